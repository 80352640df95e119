"""Notifies a webhook and a mail address of each batch that ends, in the background of the run.

The run never waits for a notification and never fails because of one. A payload holds ids and counts, and no text of
a document.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, Protocol

from error_handler import JobError
from openai_batch.job_config import NotificationConfig
from openai_batch.job_run import ShardEnd
from openai_batch.ledger import ItemState
from openai_batch.mail import Mailbox
from openai_batch.webhook import Webhook
from utils.retry_utils import RetryPolicy, retry_async

logger = logging.getLogger(__name__)

QUEUE_SIZE = 100
POLICY = RetryPolicy(attempts=4, first_wait_s=1.0)
CLOSING_S = 15.0  # how long the end of a run waits for the rest of the queue

Payload = dict[str, Any]


class Channel(Protocol):
    """A way to send a payload: ``Webhook`` or ``Mailbox``."""

    async def send(self, payload: Payload) -> None:
        """Send *payload*; JobConnectionError if a retry may help, JobValidationError if none can."""


def payload_of(end: ShardEnd) -> Payload:
    """Return the payload for one applied batch.

    Keys: batch_id, status (completed, failed, or retried if documents are sent again), total, succeeded,
    failed, timestamp (ISO 8601, UTC), error_summary (counts by kind of error, None if there is none).
    """
    succeeded = end.counts[ItemState.OK]
    wrong = {
        str(state): count
        for state, count in end.counts.items()
        if count and state not in (ItemState.OK, ItemState.SUBMITTED)
    }
    status = "completed" if not wrong else "retried" if end.retried else "failed" if not succeeded else "completed"
    return {
        "batch_id": end.shard.batch_id,
        "status": status,
        "total": end.shard.lines,
        "succeeded": succeeded,
        "failed": end.shard.lines - succeeded,
        "timestamp": datetime.now(UTC).isoformat(timespec="seconds"),
        "error_summary": ", ".join(f"{count} {state}" for state, count in wrong.items()) or None,
    }


def channels_of(config: NotificationConfig) -> list[Channel]:
    """Return the channels that *config* names; raise ConfigurationError if an address cannot be used."""
    channels: list[Channel] = []
    if config.webhook_url is not None:
        channels.append(Webhook(config.webhook_url, config.webhook_secret))
    if config.email is not None:
        channels.append(Mailbox(config.email, config.smtp_server, config.smtp_login, config.smtp_from))
    return channels


class Notifier:
    """Sends payloads in the background, each channel with its own queue. Use as ``async with``.

    The end of the block waits *closing_s* for the queues. *dropped* counts payloads that found a full queue,
    *given_up* those that no attempt could deliver.
    """

    def __init__(
        self, channels: Sequence[Channel], *, policy: RetryPolicy = POLICY, closing_s: float = CLOSING_S
    ) -> None:
        self._policy = policy
        self._closing_s = closing_s
        self._queues = [(channel, asyncio.Queue[Payload](QUEUE_SIZE)) for channel in channels]
        self._tasks: list[asyncio.Task[None]] = []
        self.dropped = self.given_up = 0

    async def __aenter__(self) -> Notifier:
        self._tasks = [asyncio.create_task(self._work(*pair), name="notifications") for pair in self._queues]
        return self

    async def __aexit__(self, *_: object) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._closing_s):
                for _channel, queue in self._queues:
                    await queue.join()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        unsent = sum(queue.qsize() for _channel, queue in self._queues)
        if unsent or self.dropped or self.given_up:
            counts = (self.given_up, self.dropped, unsent)
            logger.warning("undelivered notifications: %d given up, %d dropped, %d unsent at the end", *counts)

    def notify(self, payload: Payload) -> None:
        """Queue *payload* for every channel; drop and count it if a queue is full."""
        for _channel, queue in self._queues:
            try:
                queue.put_nowait(payload)
            except asyncio.QueueFull:
                self.dropped += 1

    async def _work(self, channel: Channel, queue: asyncio.Queue[Payload]) -> None:
        while True:
            payload = await queue.get()
            what = f"notification of batch {payload['batch_id']}"
            self.given_up += 1  # until it is delivered, so that a cancelled one counts
            try:
                await retry_async(functools.partial(channel.send, payload), self._policy, what)
                self.given_up -= 1
            except JobError as exc:
                logger.warning("%s given up: %s", what, exc)
            finally:
                queue.task_done()

"""Tells a webhook and a mail address how batches end, beside the run: it never waits for them, and never fails by them.

A payload holds ids and counts, no text of a document.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, Protocol

from error_handler import JobConnectionError, JobValidationError
from openai_batch.job_config import NotificationConfig
from openai_batch.job_run import ShardEnd
from openai_batch.ledger import ItemState
from openai_batch.mail import Mailbox
from openai_batch.webhook import Webhook
from utils.retry_utils import RetryPolicy

logger = logging.getLogger(__name__)

QUEUE_SIZE = 100
POLICY = RetryPolicy(attempts=4, first_wait_s=1.0)
CLOSING_S = 15.0  # how long the end of a run waits for what is not told yet

Payload = dict[str, Any]


class Way(Protocol):
    """How a payload goes out: ``Webhook`` or ``Mailbox``."""

    async def send(self, payload: Payload) -> None:
        """Send *payload*; JobConnectionError where another attempt may help, JobValidationError where none can."""


def payload_of(end: ShardEnd) -> Payload:
    """Return what is told of one applied batch.

    Keys: batch_id, status (completed, failed, or retried where documents are sent again), total, succeeded,
    failed, timestamp (ISO 8601, UTC), error_summary (counts by what went wrong, None where nothing did).
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


def ways_of(config: NotificationConfig) -> list[Way]:
    """Return where *config* wants payloads to go.

    Raises:
        ConfigurationError: An address cannot be used.
    """
    ways: list[Way] = []
    if config.webhook_url is not None:
        ways.append(Webhook(config.webhook_url, config.webhook_secret))
    if config.email is not None:
        ways.append(Mailbox(config.email, config.smtp_server, config.smtp_login, config.smtp_from))
    return ways


class Notifier:
    """Sends payloads in the background, each way by itself: one that hangs does not hold up the other.

    Use as ``async with``; the end waits *closing_s* for what is left. *dropped* counts the payloads that found too
    many before them, *given_up* those that no attempt could deliver; both for each way.
    """

    def __init__(self, ways: Sequence[Way], *, policy: RetryPolicy = POLICY, closing_s: float = CLOSING_S) -> None:
        self._ways = ways
        self._policy = policy
        self._closing_s = closing_s
        self._queues = [asyncio.Queue[Payload](QUEUE_SIZE) for _ in ways]
        self._tasks: list[asyncio.Task[None]] = []
        self.dropped = self.given_up = 0

    async def __aenter__(self) -> Notifier:
        self._tasks = [
            asyncio.create_task(self._work(way, queue), name="notifications")
            for way, queue in zip(self._ways, self._queues, strict=True)
        ]
        return self

    async def __aexit__(self, *_: object) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._closing_s):
                for queue in self._queues:
                    await queue.join()
        for task in self._tasks:
            task.cancel()
        for task in self._tasks:
            with contextlib.suppress(asyncio.CancelledError):
                await task
        unsent = sum(queue.qsize() for queue in self._queues)
        if unsent or self.dropped or self.given_up:
            logger.warning(
                "notifications that nobody got: %d given up, %d too many at once, %d unsent at the end",
                self.given_up,
                self.dropped,
                unsent,
            )

    def tell(self, payload: Payload) -> None:
        """Send *payload* when its turn comes; where too many wait, it is dropped and counted."""
        for queue in self._queues:
            try:
                queue.put_nowait(payload)
            except asyncio.QueueFull:
                self.dropped += 1

    async def _work(self, way: Way, queue: asyncio.Queue[Payload]) -> None:
        while True:
            payload = await queue.get()
            delivered = False
            try:
                delivered = await self._send(way, payload)
            finally:
                self.given_up += not delivered
                queue.task_done()

    async def _send(self, way: Way, payload: Payload) -> bool:
        for attempt in range(1, self._policy.attempts + 1):
            try:
                await way.send(payload)
                return True
            except JobValidationError as exc:
                logger.warning("notification of batch %s: %s", payload["batch_id"], exc)
                return False
            except JobConnectionError as exc:
                logger.warning("notification of batch %s, attempt %d: %s", payload["batch_id"], attempt, exc)
                if attempt < self._policy.attempts:
                    await asyncio.sleep(self._policy.wait_s(attempt))
        return False

"""From a planned file to exactly one batch at OpenAI: upload it, create the batch, find a batch that exists already."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, TypeVar

from error_handler import JobConnectionError, JobValidationError
from openai_batch.job_context import JobContext
from openai_batch.ledger import NOT_SENT, Shard, ShardState
from openai_batch.openai_client import MAX_WAIT_S, NotNowError, NotThereError
from openai_batch.planning import JobPlanner

logger = logging.getLogger(__name__)

T = TypeVar("T")


class ShardSender:
    """Creates the batches of one job."""

    def __init__(self, context: JobContext, planner: JobPlanner) -> None:
        self._context = context
        self._planner = planner
        self._advance = context.ledger.advance
        self._unseen_since: dict[int, float] = {}  # shard -> when the server first reported that it has no such file

    async def send(self) -> None:
        """Upload and create what is planned and fits in the enqueued-token limit.

        A shard that cannot be sent does not block the others; the first error is raised at the end.
        """
        await for_each(self._context.ledger.shards(NOT_SENT), self._send)

    async def _send(self, shard: Shard) -> None:
        if self._context.stop.is_set():
            return
        if shard.state is ShardState.CREATING:
            shard = await self.find_batch(shard)
            if shard.state is ShardState.CREATING:
                logger.info("no batch of shard %d exists; creating it", shard.number)
                await self._create(shard)
            return
        if not self._has_room(shard):
            return
        if shard.state is ShardState.PLANNED:
            shard = await self._upload(shard)
        if shard.state is ShardState.UPLOADED:
            await self._create(self._advance(shard.number, ShardState.CREATING, problem=None))

    def _has_room(self, shard: Shard) -> bool:
        if wait_left_s(shard):
            return False
        live, limit = self._context.ledger.live_tokens(), self._planner.token_limit
        return limit is None or live == 0 or live + shard.tokens <= limit

    async def _upload(self, shard: Shard) -> Shard:
        # A file that was uploaded but not recorded costs nothing, but it holds customer text: reuse it.
        file_id = await self._context.files.find_file(shard.file_name, shard.created_at)
        if file_id is None:
            path = self._context.folder / shard.file_name
            if not path.is_file() or path.stat().st_size != shard.bytes:
                logger.warning("the file of shard %d is missing or cut; its documents are pending again", shard.number)
                return self._context.ledger.give_up(shard, "never_sent")
            self._context.on_progress(f"uploading shard {shard.number}, {shard.lines} lines")
            file_id = await self._context.files.upload(path, shard.file_name)
        return self._advance(shard.number, ShardState.UPLOADED, file_id=file_id)

    async def _create(self, shard: Shard) -> None:
        """Create the batch of *shard*, which is CREATING: the ledger already records that it may exist."""
        try:
            state = await self._context.files.create(shard.file_id or "", shard.metadata)
        except (NotThereError, NotNowError) as exc:
            self._put_off(shard, exc)
            return
        except JobValidationError as exc:
            # Refused, so no batch exists. The next start asks again, after the cause has been removed.
            self._advance(shard.number, ShardState.UPLOADED, problem=str(exc))
            raise
        self._advance(shard.number, ShardState.CREATED, batch_id=state.batch_id, status=state.status)
        logger.info("batch %s created for shard %d", state.batch_id, shard.number)

    def _put_off(self, shard: Shard, refusal: NotThereError | NotNowError) -> None:
        """Create the batch later: none exists. A file that stays invisible for too long is uploaded again."""
        times = self._context.times
        not_before = time.time() + (times.wait_s(refusal) or min(1.0, times.poll_s))
        if isinstance(refusal, NotThereError):
            since = self._unseen_since.setdefault(shard.number, time.monotonic())
            if time.monotonic() - since > times.adopt_wait_s:
                del self._unseen_since[shard.number]
                logger.warning("OpenAI has lost the file of shard %d; uploading it again", shard.number)
                self._advance(shard.number, ShardState.PLANNED, file_id=None, not_before=not_before)
                return
        self._advance(shard.number, ShardState.UPLOADED, problem=str(refusal), not_before=not_before)

    async def find_batch(self, shard: Shard) -> Shard:
        """Look for the batch that *shard*, which is CREATING, may have; return the shard, CREATED if there is one.

        Looks for ``Times.adopt_wait_s``, because lists lag. That time starts now and on the monotonic clock: after a
        crash it is unknown when the create call was made, and whether it arrived late.
        """
        wait_s = self._context.times.adopt_wait_s
        deadline = time.monotonic() + wait_s
        while True:
            state = await self._context.files.find_batch(shard.metadata, shard.file_id or "")
            if state is not None:
                logger.info("batch %s of shard %d exists already and is used", state.batch_id, shard.number)
                return self._advance(shard.number, ShardState.CREATED, batch_id=state.batch_id, status=state.status)
            if time.monotonic() >= deadline:
                return shard
            self._context.on_progress(f"shard {shard.number}: checking whether its batch exists")
            await asyncio.sleep(max(0.05, wait_s / 12))


async def for_each(values: Iterable[T], step: Callable[[T], Awaitable[Any]]) -> None:
    """Await *step* for each of *values*, even after one failed; then raise the first error, permanent ones first."""
    failures: list[JobConnectionError | JobValidationError] = []
    for value in values:
        try:
            await step(value)
        except (JobConnectionError, JobValidationError) as exc:
            failures.append(exc)
    if failures:
        raise next((failure for failure in failures if isinstance(failure, JobValidationError)), failures[0])


def wait_left_s(shard: Shard) -> float:
    """Return the seconds that *shard* still has to wait; 0 if they exceed MAX_WAIT_S, because the clock was set."""
    left = shard.not_before - time.time()
    return left if 0 < left <= MAX_WAIT_S else 0.0

"""The steps of a job, resumed from any state; docs/openai-batch.md draws them.

Each step is recorded in the ledger before or after it as the table there says. After a crash at any point the next
run resumes: a batch is created once, an answer is applied once.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import random
import re
import time
from collections.abc import Awaitable, Callable
from typing import Any

from error_handler import JobConnectionError, JobProcessingError, JobValidationError
from openai_batch.answers import Answers, count_lines
from openai_batch.batch_protocol import KNOWN, BatchState
from openai_batch.job_context import JobContext
from openai_batch.ledger import CANCELLED_HERE, NOT_SENT, OPEN, ItemState, Shard, ShardState
from openai_batch.openai_client import NotThereError, reason_given
from openai_batch.planning import JobSender, for_each, wait_left_s
from utils.retry_utils import CAP_S

logger = logging.getLogger(__name__)

MAX_TOKEN_WAIT_S = 1800.0  # before a batch over the enqueued-token limit is created again
MAX_TRIES = 50
DOWNLOADS = 3  # of result files with fewer lines than the shard
MAX_SURPLUS_FILES = 5  # copies of a file whose upload was repeated because the response was lost
STOP_GRACE_S = 3.0

OnEnd = Callable[[Shard, dict[ItemState, int], int], None]

_LIMIT = re.compile(r"[Ll]imit:?\s*([\d,]{4,15})")


class JobRun:
    """One open job. Each step resumes where the ledger stands, and retries while OpenAI cannot be reached."""

    def __init__(self, context: JobContext, sender: JobSender, on_end: OnEnd) -> None:
        """*on_end* is called once for each applied shard, with its counts and the documents that are pending again."""
        self.context = context
        self._ledger, self._files, self._times = context.ledger, context.files, context.times
        self._on_end = on_end
        self._sender = sender
        self._answers = Answers(context)

    async def run(self, limit: int | None = None) -> None:
        """Work until no document is pending and no batch is open, or the run is stopped.

        Raises JobConnectionError if OpenAI could not be reached for ``Times.unreachable_limit_s``; the batches continue.
        """
        taken, result = 0, self.context.result
        while not self.context.stop.is_set():
            ended, planned = result.total_processed, 0
            if limit is None or taken < limit:
                planned = await self._sender.plan(None if limit is None else limit - taken)
                taken += planned
            if not planned and ended == result.total_processed and not self._ledger.shards(OPEN):
                left = await self.context.store.count_pending() if limit is None else 0
                if left:
                    logger.warning(
                        "%d documents stay pending: leased by a worker, or MongoDB rejected their update", left
                    )
                await self._patiently(self._poll)  # there may be files to delete
                return
            await self.poll()
            await self._pause(self._poll_wait_s())

    async def submit(self, limit: int | None = None) -> None:
        """Send the pending documents (at most *limit*)."""
        await self._sender.plan(limit)
        await self._patiently(self._sender.send)

    async def poll(self) -> None:
        """Send what is planned, check each batch once and apply what has ended.

        A batch that cannot be sent does not delay answers that were paid for.
        """
        await self._patiently(lambda: for_each((self._sender.send, self._poll), lambda step: step()))

    async def cancel(self) -> None:
        """Cancel every batch; what has run by then is billed and applied.

        The documents of batches that OpenAI does not know, or that were never sent, become pending again.
        """
        await self._patiently(self._cancel)
        await self._patiently(self._poll)

    async def _poll(self) -> None:
        await for_each(self._ledger.shards(OPEN), self._collect)
        await for_each(self._ledger.shards([ShardState.APPLIED]), self._delete_files)

    async def _collect(self, shard: Shard) -> None:
        """Take *shard* as far as it goes: check its batch, download its files, apply its answers."""
        if self.context.stop.is_set():
            return
        if shard.state is ShardState.CREATED:
            shard = await self._check(shard)
        if shard.state is ShardState.TERMINAL:
            shard = await self._download(shard)
        if shard.state is ShardState.DOWNLOADED:
            await self._apply(shard)

    async def _check(self, shard: Shard) -> Shard:
        try:
            state = await self._files.get(shard.batch_id or "")
        except NotThereError:
            return await self._check_missing(shard)
        if state.status not in KNOWN:
            logger.warning("batch %s has the unknown status %s; waiting", state.batch_id, state.status)
        done = f"{state.completed or 0} of {state.total or shard.lines} done"
        self.context.on_progress(f"shard {shard.number}: {state.status}, {done}")
        if state.is_over_token_limit:
            return self._wait_for_tokens(shard, state)
        ended_at = _ended_at(shard) if state.has_ended else None
        if ended_at is None or (state.lacks_files and self._may_be_late(shard)):
            return self._ledger.advance(shard.number, ShardState.CREATED, status=state.status, ended_at=ended_at)
        return self._ledger.advance(
            shard.number,
            ShardState.TERMINAL,
            status=state.status,
            output_file_id=state.output_file_id,
            error_file_id=state.error_file_id,
            problem=self._problem(shard, state) or shard.problem,
            bad_lines=",".join(map(str, state.bad_lines)),
            ended_at=ended_at,
        )

    def _problem(self, shard: Shard, state: BatchState) -> str | None:
        """Return the error codes of a batch that failed as a whole, and its reason; None if there are none."""
        if not state.codes and state.message is None:
            return None
        answer = json.dumps({"message": state.message}).encode()
        reason = reason_given(answer, self.context.folder / shard.file_name)
        problem = f"{', '.join(dict.fromkeys(state.codes)) or 'batch_failed'}{reason}"
        logger.warning("batch %s of shard %d: %s", state.batch_id, shard.number, problem)
        return problem

    async def _check_missing(self, shard: Shard) -> Shard:
        """Give up a batch that the server does not know, after a while and only if the server knows its file.

        A server that knows neither is another account or address: sending everything again would pay for it again.
        """
        if self._may_be_late(shard):
            logger.warning("OpenAI does not find batch %s of shard %d; checking again", shard.batch_id, shard.number)
            ended_at = _ended_at(shard)
            return self._ledger.advance(shard.number, ShardState.CREATED, status="not_found", ended_at=ended_at)
        if await self._files.uploaded_at(shard.file_id or "") is None:
            raise JobValidationError(
                f"OpenAI knows neither batch {shard.batch_id} nor its file. Check that OPENAI_API_KEY and OPENAI_BASE_URL "
                "are the ones it was created with, or give it up with cli.py openai-batch cancel."
            )
        logger.warning("batch %s of shard %d is lost; its documents are sent again", shard.batch_id, shard.number)
        return self._ledger.give_up(shard, "gone")

    def _may_be_late(self, shard: Shard) -> bool:
        return time.time() - _ended_at(shard) < self._times.files_late_s

    def _wait_for_tokens(self, shard: Shard, state: BatchState) -> Shard:
        """Create the batch again later, since nothing of it ran; split a shard that exceeds the limit by itself."""
        sender = self._sender
        found = _LIMIT.search(state.message or "")
        limit = int(found.group(1).replace(",", "")) if found else None
        is_alone = self._ledger.live_tokens() <= shard.tokens
        if limit is not None:
            sender.token_limit = min(sender.token_limit or limit, limit)
        if (limit is not None and shard.tokens > limit) or (is_alone and shard.tries >= 3) or shard.tries >= MAX_TRIES:
            if limit is None:
                sender.token_limit = max(1000, shard.tokens // 2)
            logger.warning("shard %d exceeds the enqueued-token limit by itself; splitting it", shard.number)
            return self._ledger.give_up(shard, "token_limit")
        wait_s = min(MAX_TOKEN_WAIT_S, self._times.token_wait_s * 2 ** (shard.tries - 1)) * random.uniform(0.75, 1.25)
        logger.info("shard %d waits %.0f s: too many tokens are enqueued", shard.number, wait_s)
        return self._ledger.advance(
            shard.number,
            ShardState.UPLOADED,
            tries=shard.tries + 1,
            not_before=time.time() + wait_s,
            batch_id=None,
            problem="token_limit_exceeded",
        )

    async def _download(self, shard: Shard) -> Shard:
        for _ in range(DOWNLOADS):
            lines = 0
            for file_id, name in shard.result_files.items():
                target = self.context.folder / name
                try:
                    received = await self._files.download(file_id, target)
                except NotThereError:
                    target.unlink(missing_ok=True)
                    if self._may_be_late(shard):
                        logger.warning("OpenAI does not find %s of shard %d; checking again", file_id, shard.number)
                        return shard
                    logger.warning("file %s of shard %d is lost; its lines are sent again", file_id, shard.number)
                    continue
                lines += await asyncio.to_thread(count_lines, target)
                logger.info("shard %d: %s has %d bytes", shard.number, name, received)
            if lines >= shard.lines or not shard.result_files:
                break
            # Missing lines are sent and paid for again, so make sure that the download was not cut.
            logger.info("shard %d: received %d of %d lines", shard.number, lines, shard.lines)
        return self._ledger.advance(shard.number, ShardState.DOWNLOADED)

    async def _apply(self, shard: Shard) -> None:
        paths = [self.context.folder / name for name in shard.result_files.values()]
        if not await self._answers.apply(shard, [path for path in paths if path.exists()]):
            return
        counts, retried = self._ledger.counts(shard.number), self._ledger.retried(shard.number)
        self._ledger.advance(shard.number, ShardState.APPLIED)
        if counts.pop(ItemState.SUBMITTED) or sum(counts.values()) != shard.lines:
            raise JobProcessingError(f"the counts of shard {shard.number} do not add up; please report this as a bug.")
        text = " + ".join(f"{count} {state}" for state, count in counts.items())
        logger.info("shard %d (%s): %d submitted = %s", shard.number, shard.status, shard.lines, text)
        result = self.context.result
        result.batches += 1
        result.succeeded += counts[ItemState.OK]
        result.retried += retried
        result.failed += shard.lines - counts[ItemState.OK] - retried
        self._on_end(shard, counts, retried)

    async def _delete_files(self, shard: Shard) -> None:
        """Delete the files with customer text, at OpenAI and here."""
        for file_id in (shard.file_id, *shard.result_files):
            if file_id:
                await self._files.delete_file(file_id)
        for _ in range(MAX_SURPLUS_FILES):
            surplus = await self._files.find_file(shard.file_name, shard.created_at)
            if surplus is None:
                break
            await self._files.delete_file(surplus)
        for name in (shard.file_name, *shard.result_files.values()):
            (self.context.folder / name).unlink(missing_ok=True)
        self._ledger.advance(shard.number, ShardState.CLEANED)

    async def _cancel(self) -> None:
        for shard in self._ledger.shards(OPEN):
            if shard.state is ShardState.CREATING:
                shard = await self._sender.find_batch(shard)  # noqa: PLW2901 - the same shard, one step further
            if shard.state is ShardState.CREATED:
                self._ledger.advance(shard.number, shard.state, problem=CANCELLED_HERE)
                try:
                    await self._files.cancel(shard.batch_id or "")
                except NotThereError:
                    self._ledger.give_up(shard, "gone")
            elif shard.state in NOT_SENT:
                self._ledger.give_up(shard, "never_sent")

    def _poll_wait_s(self) -> float:
        shards = self._ledger.shards(OPEN)
        waits = [left for shard in shards if (left := wait_left_s(shard))]
        return min([self._times.poll_s * random.uniform(0.9, 1.1), *waits]) if shards else 0.0

    async def _pause(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.context.stop.wait(), seconds)

    async def _patiently(self, step: Callable[[], Awaitable[Any]]) -> None:
        """Await *step*, repeated while OpenAI cannot be reached for at most ``Times.unreachable_limit_s``."""
        started, wait_s = time.monotonic(), min(1.0, self._times.poll_s)
        while not self.context.stop.is_set():
            try:
                await self._until_stopped(step)
                return
            except JobConnectionError as exc:
                if time.monotonic() - started > self._times.unreachable_limit_s:
                    raise
                asked_s = self._times.wait_s(exc)
                logger.warning("%s; trying again in %.0f s", exc, max(wait_s, asked_s))
                await self._pause(max(wait_s * random.uniform(0.75, 1.25), asked_s))
                wait_s = min(CAP_S, wait_s * 2)

    async def _until_stopped(self, step: Callable[[], Awaitable[Any]]) -> None:
        """Await *step*; STOP_GRACE_S after the run is stopped, cancel it. The ledger makes that safe anywhere."""
        work, stopped = asyncio.ensure_future(step()), asyncio.ensure_future(self.context.stop.wait())
        try:
            await asyncio.wait((work, stopped), return_when=asyncio.FIRST_COMPLETED)
            await asyncio.wait((work,), timeout=STOP_GRACE_S)
            if work.done():
                work.result()
        finally:
            for task in (work, stopped):
                task.cancel()
            await asyncio.gather(work, stopped, return_exceptions=True)


def _ended_at(shard: Shard) -> float:
    """Return when its batch was first seen ended, in unix seconds; now if that lies in the future."""
    now = time.time()
    return now if shard.ended_at is None else min(now, shard.ended_at)

"""The steps of a job, from whatever state it was left in. docs/openai-batch.md draws them.

Each step is written to the ledger before or after it as the table there says, so that a process that dies anywhere
is followed by one that goes on: a batch is made once, an answer is applied once.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import re
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from error_handler import JobConnectionError, JobProcessingError, JobValidationError
from openai_batch.answers import Answers, count_lines, ids_at
from openai_batch.batch_protocol import BatchState
from openai_batch.job_plan import JobPlanner
from openai_batch.job_store import JobStore
from openai_batch.ledger import ItemState, Ledger, Shard, ShardState
from openai_batch.openai_client import NotThereError, OpenAIFiles
from openai_batch.shard_sending import ShardSender, Times, all_of, wait_left_s
from utils.retry_utils import CAP_S

logger = logging.getLogger(__name__)

MAX_TOKEN_WAIT_S = 1800.0  # at most, before a batch that was over the enqueued-token limit is asked for again
MAX_TRIES = 50
DOWNLOADS = 3  # of results with fewer lines than the shard
UPLOADS = 5  # of one file at most, whose answers were lost
STOP_GRACE_S = 3.0

_LIMIT = re.compile(r"[Ll]imit:?\s*([\d,]{4,15})")


@dataclass(frozen=True, slots=True)
class ShardEnd:
    """What is told when a shard is applied: its counts satisfy lines = ok + failed + expired + cancelled + missing."""

    shard: Shard
    counts: dict[ItemState, int]
    retried: int


class JobRun:
    """One job at work; its caller holds the lock of *folder*."""

    def __init__(
        self, planner: JobPlanner, store: JobStore, ledger: Ledger, answers: Answers, times: Times, *, folder: Path
    ) -> None:
        self._planner = planner
        self._store = store
        self._ledger = ledger
        self._answers = answers
        self._times = times
        self._folder = folder
        self.job_id = planner.job_id
        self.on_end: Callable[[ShardEnd], None] | None = None
        self.on_progress: Callable[[str], None] = logger.debug
        self.stop = asyncio.Event()
        self._sender = ShardSender(planner, ledger, times, self, folder=folder)

    async def send(self, files: OpenAIFiles) -> int:
        """Upload and create what is planned and has room among the enqueued tokens; return how many batches were made."""
        return await self._sender.send(files)

    async def poll(self, files: OpenAIFiles) -> None:
        """Look at every batch once, and take what has ended as far as it goes.

        A shard whose batch cannot be had holds up no other; the first reason is raised at the end.
        """
        await all_of(self._ledger.open_shards(), lambda shard: self._take_in(files, shard))
        await all_of(self._ledger.shards("state = ?", (ShardState.APPLIED,)), lambda shard: self._clean(files, shard))

    async def round(self, files: OpenAIFiles) -> None:
        """``send`` and ``poll``: what cannot be sent keeps no answer away that was paid for."""
        steps: tuple[Callable[[OpenAIFiles], Awaitable[Any]], ...] = (self._sender.send, self.poll)
        await all_of(steps, lambda step: step(files))

    async def _take_in(self, files: OpenAIFiles, shard: Shard) -> None:
        if self.stop.is_set():
            return
        if shard.state is ShardState.CREATED:
            shard = await self._look(files, shard)
        if shard.state is ShardState.TERMINAL:
            shard = await self._download(files, shard)
        if shard.state is ShardState.DOWNLOADED:
            await self._apply(shard)

    async def _look(self, files: OpenAIFiles, shard: Shard) -> Shard:
        try:
            state = await files.get(shard.batch_id or "")
        except NotThereError:
            return await self._miss(files, shard)
        if state.is_unknown:
            logger.warning("batch %s says %s, which is not known here; waiting", state.batch_id, state.status)
        self.on_progress(
            f"shard {shard.number}: {state.status}, {state.completed or 0} of {state.total or shard.lines} done"
        )
        if not state.has_ended:
            return self._ledger.advance(shard.number, ShardState.CREATED, status=state.status, ended_at=None)
        if state.is_over_token_limit:
            return await self._wait_for_tokens(shard, state)
        ended_at = _ended_at(shard)
        if state.lacks_files and time.time() - ended_at < self._times.files_late_s:
            return self._ledger.advance(shard.number, ShardState.CREATED, status=state.status, ended_at=ended_at)
        return self._ledger.advance(
            shard.number,
            ShardState.TERMINAL,
            status=state.status,
            output_file_id=state.output_file_id,
            error_file_id=state.error_file_id,
            problem=", ".join(dict.fromkeys(state.codes)) or None,
            bad_lines=",".join(map(str, state.bad_lines)),
            ended_at=ended_at,
        )

    async def _miss(self, files: OpenAIFiles, shard: Shard) -> Shard:
        """The server knows no batch of *shard*. That is believed only after a while, and of a server that knows its file.

        Another key, project or address knows neither: to send all again then would be to pay for all again.
        """
        ended_at = _ended_at(shard)
        if time.time() - ended_at < self._times.files_late_s:
            logger.warning("batch %s of shard %d is not there; looking again", shard.batch_id, shard.number)
            return self._ledger.advance(shard.number, ShardState.CREATED, status="not_found", ended_at=ended_at)
        if not await files.has_file(shard.file_id or ""):
            raise JobValidationError(
                f"OpenAI knows neither batch {shard.batch_id} nor its file; check that OPENAI_API_KEY and OPENAI_BASE_URL "
                "are those it was made with, or give it up with cli.py openai-batch cancel."
            )
        logger.warning("batch %s of shard %d is gone; its documents are sent again", shard.batch_id, shard.number)
        return self._ledger.advance(shard.number, ShardState.TERMINAL, status="gone")

    async def _wait_for_tokens(self, shard: Shard, state: BatchState) -> Shard:
        """Nothing of *shard* ran. Ask again later, or, where it alone is over the limit, make smaller ones of it."""
        found = _LIMIT.search(state.message or "")
        limit = int(found.group(1).replace(",", "")) if found else None
        alone = self._ledger.live_tokens() <= shard.tokens
        if limit is not None:
            self._planner.token_limit = min(self._planner.token_limit or limit, limit)
        if (limit is not None and shard.tokens > limit) or (alone and shard.tries >= 3) or shard.tries >= MAX_TRIES:
            if limit is None:
                self._planner.token_limit = max(1000, shard.tokens // 2)
            logger.warning("shard %d is over the enqueued-token limit by itself; smaller ones are made", shard.number)
            return self._ledger.advance(
                shard.number, ShardState.TERMINAL, status="token_limit", problem=None, ended_at=time.time()
            )
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

    async def _download(self, files: OpenAIFiles, shard: Shard) -> Shard:
        wanted = [(file_id, kind) for file_id, kind in _result_files(shard) if file_id is not None]
        for _ in range(DOWNLOADS):
            lines = 0
            for file_id, kind in wanted:
                target = self._result_path(shard, kind)
                try:
                    received = await files.download(file_id, target)
                except NotThereError:
                    target.unlink(missing_ok=True)
                    if time.time() - _ended_at(shard) < self._times.files_late_s:
                        logger.warning("the %s file of shard %d is not there; looking again", kind, shard.number)
                        return shard
                    logger.warning("the %s file of shard %d is gone; what it held is sent again", kind, shard.number)
                    continue
                lines += await asyncio.to_thread(count_lines, target)
                logger.info("shard %d: %s file of %d bytes", shard.number, kind, received)
            if lines >= shard.lines or not wanted:
                break
            # What lacks here is sent and paid for again: a download that was cut must not be the cause.
            logger.info("shard %d: %d of %d lines came", shard.number, lines, shard.lines)
        return self._ledger.advance(shard.number, ShardState.DOWNLOADED)

    def _result_path(self, shard: Shard, kind: str) -> Path:
        return self._folder / f"{self.job_id}_{shard.number:05d}.{kind}.jsonl"

    async def _apply(self, shard: Shard) -> Shard:
        # A file that this batch does not have is none of it, whatever lies there.
        paths = [self._result_path(shard, kind) for file_id, kind in _result_files(shard) if file_id is not None]
        bad = await asyncio.to_thread(ids_at, self._folder / shard.file_name, shard.bad_lines)
        present = [path for path in paths if path.exists()]
        if not await self._answers.apply(shard, present, bad, self.stop, self.on_progress):
            return shard
        retried, counts = self._ledger.retried(shard.number), self._ledger.counts(shard.number)
        shard = self._ledger.advance(shard.number, ShardState.APPLIED)
        if counts[ItemState.SUBMITTED] or sum(counts.values()) != shard.lines:
            raise JobProcessingError(f"the counts of shard {shard.number} do not add up; please report this")
        logger.info(
            "shard %d (%s): %d submitted = %s",
            shard.number,
            shard.status,
            shard.lines,
            " + ".join(f"{counts[state]} {state}" for state in ItemState if state is not ItemState.SUBMITTED),
        )
        if self.on_end is not None:
            self.on_end(ShardEnd(shard, counts, retried))
        return shard

    async def _clean(self, files: OpenAIFiles, shard: Shard) -> None:
        """Remove what holds customer text, there and here."""
        for file_id in (shard.file_id, shard.output_file_id, shard.error_file_id):
            if file_id:
                await files.delete_file(file_id)
        for _ in range(UPLOADS):  # one more where the answer to an upload was lost
            surplus = await files.find_file(shard.file_name, shard.created_at)
            if surplus is None:
                break
            await files.delete_file(surplus)
        for path in (self._folder / shard.file_name, *(self._result_path(shard, kind) for kind in ("output", "error"))):
            path.unlink(missing_ok=True)
        self._ledger.advance(shard.number, ShardState.CLEANED)

    async def cancel(self, files: OpenAIFiles) -> int:
        """Ask OpenAI to end every batch that runs; return how many. What ran by then is billed and applied.

        Batches that the server does not know are given up: their documents become pending again.
        """
        count = 0
        for number in [shard.number for shard in self._ledger.open_shards()]:
            shard = self._ledger.shard(number)
            if shard.state is ShardState.CREATING and not await self._sender.found(files, shard):
                self._ledger.advance(number, ShardState.UPLOADED)
            shard = self._ledger.shard(number)
            if shard.state is ShardState.CREATED:
                try:
                    await files.cancel(shard.batch_id or "")
                    count += 1
                except NotThereError:
                    self._ledger.advance(number, ShardState.TERMINAL, status="gone", ended_at=time.time())
            elif shard.state in (ShardState.PLANNED, ShardState.UPLOADED):
                self._ledger.advance(number, ShardState.TERMINAL, status="never_sent", ended_at=time.time())
        return count

    async def run(self, files: OpenAIFiles, limit: int | None = None) -> None:
        """Work until no document is pending and no batch open, or ``stop`` is set; it goes on where it ended.

        Raises:
            JobConnectionError: OpenAI was not there for *times.unreachable_limit_s*; the batches go on.
        """
        await self._planner.recover()
        taken = 0
        while not self.stop.is_set():
            planned, ended = 0, self._planner.refused + self._planner.skipped
            if limit is None or taken < limit:
                left = None if limit is None else limit - taken
                planned = await self._planner.plan(self.stop, self.on_progress, left)
                taken += planned
            if (
                not self._ledger.open_shards()
                and not planned
                and ended == self._planner.refused + self._planner.skipped
            ):
                await self._tell_left(limit)
                await self.patiently(lambda: self.poll(files))  # there may be files to delete
                return
            await self.patiently(lambda: self.round(files))
            await self._pause(self._next_look_s())

    async def _tell_left(self, limit: int | None) -> None:
        left = await self._store.count_pending() if limit is None else 0
        if left:
            logger.warning("%d documents stay pending: others hold them, or MongoDB lets nobody change them", left)

    def _next_look_s(self) -> float:
        shards = self._ledger.open_shards()
        if not shards:
            return 0.0
        waits = [left for shard in shards if (left := wait_left_s(shard))]
        return min([self._times.poll_s * random.uniform(0.9, 1.1), *waits])

    async def _pause(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.stop.wait(), seconds)

    async def patiently(self, step: Callable[[], Awaitable[Any]]) -> None:
        """Do *step*, again and again while OpenAI is away; each time it goes on where the ledger stands.

        Once ``stop`` is set a step has STOP_GRACE_S left. It may be cut off anywhere: that is what the ledger is for.
        """
        since = time.monotonic()
        wait_s = min(1.0, self._times.poll_s)
        while not self.stop.is_set():
            try:
                await self._until_stopped(step)
                return
            except JobConnectionError as exc:
                if time.monotonic() - since > self._times.unreachable_limit_s:
                    raise
                asked_s = self._times.wait_s(exc)
                logger.warning("%s; trying again in %.0f s", exc, max(wait_s, asked_s))
                await self._pause(max(wait_s * random.uniform(0.75, 1.25), asked_s))
                wait_s = min(CAP_S, wait_s * 2)

    async def _until_stopped(self, step: Callable[[], Awaitable[Any]]) -> None:
        work, stopped = asyncio.ensure_future(step()), asyncio.ensure_future(self.stop.wait())
        try:
            await asyncio.wait((work, stopped), return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                await asyncio.wait((work,), timeout=STOP_GRACE_S)
            if work.done():
                work.result()
        finally:
            for task in (work, stopped):
                task.cancel()
            await asyncio.gather(work, stopped, return_exceptions=True)


def _result_files(shard: Shard) -> tuple[tuple[str | None, str], ...]:
    return (shard.output_file_id, "output"), (shard.error_file_id, "error")


def _ended_at(shard: Shard) -> float:
    """Return when the end of its batch was seen first, in unix seconds; now, where the clock was set back since."""
    now = time.time()
    return now if shard.ended_at is None else min(now, shard.ended_at)

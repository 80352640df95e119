"""From a planned file to a batch at OpenAI, once: upload, create, and finding what was created already."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from error_handler import JobConnectionError, JobValidationError
from openai_batch.job_plan import JobPlanner
from openai_batch.ledger import Ledger, Shard, ShardState
from openai_batch.openai_client import NotNowError, NotThereError, OpenAIFiles

logger = logging.getLogger(__name__)

T = TypeVar("T")

ADOPT_WAIT_S = 60.0  # how long a batch may stay out of the list after it was made
TOKEN_WAIT_S = 120.0  # before a batch that was over the enqueued-token limit is asked for again; doubled each time
FILES_LATE_S = 600.0  # how long an ended batch, its files, or the batch itself may stay unseen
UNREACHABLE_LIMIT_S = 3600.0
RATE_WAIT_S = 20.0  # after a 429 that does not say how long
MAX_WAIT_S = 3600.0  # the longest of all waits: Retry-After is cut to it


@dataclass(frozen=True, slots=True)
class Times:
    """Waits of a run in seconds; tests shorten them."""

    poll_s: float
    adopt_wait_s: float = ADOPT_WAIT_S
    token_wait_s: float = TOKEN_WAIT_S
    files_late_s: float = FILES_LATE_S
    unreachable_limit_s: float = UNREACHABLE_LIMIT_S
    rate_wait_s: float = RATE_WAIT_S

    def wait_s(self, problem: Exception) -> float:
        """Return how long the server wants to be left alone after *problem*; 0 where that is no matter of time."""
        if not isinstance(problem, NotNowError):
            return 0.0
        return self.rate_wait_s if problem.wait_s is None else problem.wait_s


class Surroundings(Protocol):
    """What a sender asks and tells the run that it belongs to."""

    stop: asyncio.Event
    on_progress: Callable[[str], None]


class ShardSender:
    """Makes batches of the planned shards in *folder*."""

    def __init__(self, planner: JobPlanner, ledger: Ledger, times: Times, run: Surroundings, *, folder: Path) -> None:
        self._planner = planner
        self._ledger = ledger
        self._times = times
        self._run = run
        self._folder = folder
        self._unseen_since: dict[int, float] = {}  # shard -> when the server said first that it knows no file of it

    async def send(self, files: OpenAIFiles) -> int:
        """Upload and create what is planned and has room among the enqueued tokens; return how many batches were made.

        A shard that cannot be sent holds up no other; the first reason is raised at the end.
        """
        made = 0

        async def one(shard: Shard) -> None:
            nonlocal made
            if not self._run.stop.is_set():
                made += await self._send(files, shard)

        await all_of(self._ledger.open_shards(), one)
        return made

    async def _send(self, files: OpenAIFiles, shard: Shard) -> int:
        if shard.state is ShardState.CREATING:
            return await self._adopt(files, shard)
        if shard.state not in (ShardState.PLANNED, ShardState.UPLOADED) or not self._has_room(shard):
            return 0
        if shard.state is ShardState.PLANNED:
            shard = await self._upload(files, shard)
        if shard.state is not ShardState.UPLOADED:
            return 0
        shard = self._ledger.advance(shard.number, ShardState.CREATING, create_asked_at=time.time(), problem=None)
        return await self._create(files, shard)

    def _has_room(self, shard: Shard) -> bool:
        if wait_left_s(shard):
            return False
        live = self._ledger.live_tokens()
        return self._planner.token_limit is None or live == 0 or live + shard.tokens <= self._planner.token_limit

    async def _upload(self, files: OpenAIFiles, shard: Shard) -> Shard:
        # One that was uploaded and not noted costs nothing, but it holds customer text.
        file_id = await files.find_file(shard.file_name, shard.created_at)
        if file_id is None:
            path = self._folder / shard.file_name
            if not path.is_file() or path.stat().st_size != shard.bytes:
                logger.warning("the file of shard %d is gone or cut; its documents are pending again", shard.number)
                return self._ledger.advance(
                    shard.number, ShardState.TERMINAL, status="never_sent", ended_at=time.time()
                )
            self._run.on_progress(f"uploading shard {shard.number}, {shard.lines} lines")
            file_id = await files.upload(path, shard.file_name)
        return self._ledger.advance(shard.number, ShardState.UPLOADED, file_id=file_id)

    async def _create(self, files: OpenAIFiles, shard: Shard) -> int:
        """Ask for the batch of *shard*, whose state says that it may have been asked for already."""
        try:
            state = await files.create(shard.file_id or "", shard.metadata)
        except (NotThereError, NotNowError) as exc:
            self._put_off(shard, exc)
            return 0
        except JobValidationError as exc:
            # It said no, so there is no batch. The next start asks again, when the cause is gone.
            self._ledger.advance(shard.number, ShardState.UPLOADED, problem=str(exc))
            raise
        self._ledger.advance(shard.number, ShardState.CREATED, batch_id=state.batch_id, status=state.status)
        logger.info("batch %s made for shard %d", state.batch_id, shard.number)
        return 1

    def _put_off(self, shard: Shard, refusal: NotThereError | NotNowError) -> None:
        """No batch was made. A fresh file is not seen everywhere at once; one that stays unseen is uploaded again."""
        not_before = time.time() + (self._times.wait_s(refusal) or min(1.0, self._times.poll_s))
        if isinstance(refusal, NotThereError):
            since = self._unseen_since.setdefault(shard.number, time.monotonic())
            if time.monotonic() - since > self._times.adopt_wait_s:
                del self._unseen_since[shard.number]
                logger.warning("the file of shard %d is gone at OpenAI; it is uploaded again", shard.number)
                self._ledger.advance(shard.number, ShardState.PLANNED, file_id=None, not_before=not_before)
                return
        self._ledger.advance(shard.number, ShardState.UPLOADED, problem=str(refusal), not_before=not_before)

    async def _adopt(self, files: OpenAIFiles, shard: Shard) -> int:
        """Find the batch that *shard* was asked for; where there is none for long enough, ask again."""
        if await self.found(files, shard):
            return 0
        logger.info("no batch of shard %d is there; it is asked for", shard.number)
        return await self._create(files, shard)

    async def found(self, files: OpenAIFiles, shard: Shard) -> bool:
        """Whether the batch that *shard* was asked for is there; it is noted then.

        Looks until no list can lag behind any more. That time is counted from here on and by the clock that nobody
        sets: when the call was made, and whether it arrived late, is known to nobody after a crash.
        """
        until = time.monotonic() + self._times.adopt_wait_s
        while True:
            state = await files.find_batch(shard.metadata, shard.file_id or "")
            if state is not None:
                self._ledger.advance(shard.number, ShardState.CREATED, batch_id=state.batch_id, status=state.status)
                logger.info("batch %s of shard %d was there already and is adopted", state.batch_id, shard.number)
                return True
            if time.monotonic() >= until:
                return False
            self._run.on_progress(f"shard {shard.number}: looking whether its batch was made")
            await asyncio.sleep(max(0.05, self._times.adopt_wait_s / 12))


async def all_of(values: Iterable[T], step: Callable[[T], Awaitable[Any]]) -> None:
    """Do *step* with each of *values*, also after one that failed; raise the first failure at the end."""
    failures: list[JobConnectionError | JobValidationError] = []
    for value in values:
        try:
            await step(value)
        except (JobConnectionError, JobValidationError) as exc:
            failures.append(exc)
    if failures:
        # What nobody can wait for is said before what passes.
        raise next((failure for failure in failures if isinstance(failure, JobValidationError)), failures[0])


def wait_left_s(shard: Shard) -> float:
    """Return the seconds that *shard* has to wait still; none where they are more than is ever waited: the clock was set."""
    left = shard.not_before - time.time()
    return left if 0 < left <= MAX_WAIT_S else 0.0

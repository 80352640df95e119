"""One run of the batch worker: exactly one result for each document, despite crashes (see docs/architecture.md)."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import AsyncGenerator, Callable
from dataclasses import asdict
from typing import Any

from aggregator import aggregate_conversation
from domain.conversation import Outcome, ResultOptions, build_result
from error_handler import (
    FailureThresholdError,
    LLMError,
    LLMModelError,
    LLMOutageError,
    PoisonDocumentError,
    SkippedDocumentError,
    StoreError,
    TriadError,
)
from storage.files import Event
from utils.batch_file_manager import FailureKind
from worker.dedupe import FILE_NAME, Deduplicator
from worker.intake import MAX_SWEEPS, DocumentIntake, RunParts
from worker.left_out import LeftOut, count_in_time, count_left_out
from worker.quarantine import failed_keys
from worker.settlement import BatchInWork, Settlement, WorkItem, verdict_of
from worker.staleness import REPLACED
from worker.urgent import UrgentLane

logger = logging.getLogger(__name__)

SETTLE_EVERY_S = 1.0  # the longest delay of a source status
BYTES_IN_WORK = 8_000_000  # of batch files; beyond that, no further page is read
MODEL_ERRORS_IN_A_ROW = 5  # replies of "no such model" that end the run


class BatchRun:
    """One run: distributes documents to workers, writes their results, settles them.

    With ``parts.limit``, a worker acquires a concurrency slot before it takes a document.
    """

    def __init__(
        self, parts: RunParts, make_intake: Callable[[RunParts, Settlement], DocumentIntake] = DocumentIntake
    ) -> None:
        self._parts = parts
        self._settings = parts.settings
        self._store = parts.store
        self._stop = parts.stop
        self._limit = parts.limit
        self._floor: int | None = None  # of calls, while the service goes first
        self._replace = parts.options.reprocess or parts.options.only in REPLACED
        self._job_id = parts.checkpoint.job_id
        self._result_options = ResultOptions.of(parts.settings)
        run = f"{self._job_id} {parts.plan or secrets.token_hex(8)}"
        self._dedupe = Deduplicator(parts.files.directory / FILE_NAME, run, is_on=parts.options.dedupe)
        self._settlement = Settlement(
            parts.store, parts.files, parts.checkpoint, replaces=self._replace, on_rejected=self._dedupe.rejected
        )
        self._progress = self._settlement.progress
        self.intake = make_intake(parts, self._settlement)
        self._queue: asyncio.Queue[WorkItem | None] = asyncio.Queue()  # None: one that waits in the lane
        self._lane = UrgentLane(parts, self.intake, self._settlement, self._queue)
        self._in_flight = 0
        self._model_errors = 0
        self._leases_sure_at = self._doubted_before = time.monotonic()
        self._left_out: LeftOut | None = None

    async def execute(self, sources: list[AsyncGenerator[BatchInWork]], *, to_the_end: bool) -> dict[str, Any]:
        """Process *sources* until they end, the run is stopped, or an error occurs; save what is settled in each case.

        *to_the_end* adds the sweeps and the retry rounds.
        """
        try:
            return await self._execute(sources, to_the_end=to_the_end)
        except FailureThresholdError as exc:  # other documents failed while the run ended
            raise FailureThresholdError(self._settlement.threshold_message()) from exc

    async def _execute(self, sources: list[AsyncGenerator[BatchInWork]], *, to_the_end: bool) -> dict[str, Any]:
        status = "failed"
        try:
            async with asyncio.TaskGroup() as tasks:
                jobs = {
                    "writes": self._settlement.writes.run(),
                    "settlement": self._settle_regularly(),
                    "leases": self._renew_leases(),
                    "stop": self._watch_stop(),
                    "indexes": self._prepare_source(count=to_the_end and not self._parts.options.only),
                    **{f"worker-{number}": self._work() for number in range(self._settings.most_in_flight)},
                }
                if self._parts.service_first is not None:
                    jobs["service"] = self._parts.service_first.watch(self._give_way)
                if self._parts.urgent_first and self.intake.takes_new:
                    jobs["urgent"] = self._lane.run()
                started = [tasks.create_task(job, name=name) for name, job in jobs.items()]
                for source in sources:
                    await self._admit_all(source)
                if to_the_end:
                    await self._sweep_and_retry()
                if self._stop.is_set():
                    await self._finish_calls()
                await self._settlement.writes.drained()
                await self._settlement.flush()  # before the tasks that flush are cancelled
                if to_the_end and not self._stop.is_set() and self._parts.options.only in (None, "new"):
                    await self._count_left_out()
                for task in started:
                    task.cancel()
            self._parts.checkpoint.finished = not self._stop.is_set()
            status = "interrupted" if self._stop.is_set() else "completed"
        except ExceptionGroup as group:  # not ``except*``: before Python 3.11.4 it wraps what it raises in a group
            ours, others = group.split(TriadError)
            if ours is None or others is not None:
                raise
            raise _first(ours) from group
        finally:
            self._dedupe.close(is_finished=status == "completed")
            await self._save(status)
        return self._statistics()

    async def _sweep_and_retry(self) -> None:
        for _ in range(MAX_SWEEPS):
            if self._stop.is_set() or not await self._admit_all(self.intake.sweep()):
                break
        await self._retry()
        await self._lane.end()
        await self._until(lambda: self._settlement.unsettled == 0 or self._stop.is_set())
        await self._retry()

    async def _retry(self) -> None:
        while not self._stop.is_set() and await self._admit_all(self.intake.retry_round()):
            pass

    async def _admit_all(self, source: AsyncGenerator[BatchInWork]) -> int:
        """Queue every batch of *source*, wait until all are settled, and return the number of documents.

        The next batch is read and saved while a whole batch, or twice the slots, is still in work, if both fit in memory.
        """
        await self._settlement.flush()
        backlog = max(self._settings.batch_size, 2 * self._settings.most_in_flight)
        admitted = 0
        async with contextlib.aclosing(source):
            async for batch in source:
                if self._stop.is_set():  # it is saved; the next run resumes it
                    return admitted
                self._settlement.admit(batch)
                for item in batch.items:
                    self._queue.put_nowait(item)
                admitted += len(batch.items)
                await self._until(lambda: self._has_room(backlog) or self._stop.is_set())
        await self._until(lambda: self._has_room(0) or self._stop.is_set())
        return admitted

    def _has_room(self, backlog: int) -> bool:
        """Return whether at most *backlog* documents are in work; urgent ones keep none out, or the others could starve."""
        unsettled = self._settlement.unsettled - (self._lane.unsettled if self._settlement.stats.urgent else 0)
        return unsettled <= backlog and (not backlog or self._settlement.bytes_in_work <= BYTES_IN_WORK)

    async def _until(self, is_true: Callable[[], bool]) -> None:
        while not is_true():
            self._progress.clear()
            await self._progress.wait()

    async def _work(self) -> None:
        while True:
            if self._limit is None:
                await self._work_on_next()
            else:
                async with self._limit.slot():
                    await self._work_on_next()

    async def _work_on_next(self) -> None:
        entry = await self._queue.get()
        if self._parts.go is not None:
            await self._parts.go.wait()
        await self._until(self._may_start)
        if self._stop.is_set():
            return
        item = self._lane.exchange(entry) if self._lane.waiting or entry is None else entry
        self._in_flight += 1
        try:
            await self._process(item)
        finally:
            self._in_flight -= 1
            self._progress.set()

    def _may_start(self) -> bool:
        return self._floor is None or self._in_flight < self._floor or self._stop.is_set()

    def _give_way(self, floor: int | None) -> None:
        """Take no new calls beyond *floor*; None takes as many as before."""
        self._floor = floor
        self._progress.set()

    async def _process(self, item: WorkItem) -> None:
        """Take one document from the queue to its answer; steps that the journal has recorded are not repeated."""
        past = item.past
        if past.result is not None:
            self._settlement.writes.submit((item, past.result))
        elif past.verdict is not None:
            self._settlement.end(item, past.verdict)
        elif item.is_poison:
            self._end(item, PoisonDocumentError("the worker died each time it processed this document"))
        elif self._is_doubtful(item) and item.key not in await self.intake.needed([item.document]):
            self._settlement.drop(item)
            self._ask_instead(item)
        else:
            await self._classify(item)

    async def _classify(self, item: WorkItem) -> None:
        """Reuse the answer of an identical conversation, wait for one that is in flight, or ask the model."""
        item.note("started")
        try:
            item.conversation = conversation = aggregate_conversation(item.document)
        except SkippedDocumentError as exc:
            self._end(item, exc)
            return
        copies = self._dedupe.known(item)
        if copies:
            self._keep(copies)
            return
        item.note("asked")
        if self._dedupe.follows(item):
            item.note("released")
            return
        try:
            outcome = await self._parts.classify(conversation, item.rounds)
        except (asyncio.CancelledError, LLMOutageError):
            item.note("released")
            raise
        except (SkippedDocumentError, LLMError) as exc:
            self._require_model(exc)
            self._end(item, exc)
            self._ask_instead(item)
        else:
            self._model_errors = 0
            self._keep([(item, outcome), *self._dedupe.answered(item, outcome)])

    def _keep(self, answers: list[tuple[WorkItem, Outcome]]) -> None:
        """Record each answer in the journal before it is written to MongoDB."""
        for item, outcome in answers:
            result = build_result(
                item.document,
                item.conversation,
                outcome,
                self._job_id,
                self._result_options,
            )
            item.note("answered", result=result)
            self._settlement.writes.submit((item, result))

    def _ask_instead(self, item: WorkItem) -> None:
        """Queue the next document with the text of *item*, which gets no answer."""
        for heir in self._dedupe.gave_up(item):
            self._queue.put_nowait(heir)

    def _end(self, item: WorkItem, error: SkippedDocumentError | LLMError | PoisonDocumentError) -> None:
        verdict = verdict_of(error)
        event: Event = "skipped" if verdict.is_skipped else "failed"
        item.note(event, reason=verdict.reason, problem=verdict.problem, is_final=verdict.is_final)
        self._settlement.end(item, verdict)

    def _require_model(self, error: SkippedDocumentError | LLMError) -> None:
        """End the run if the server repeatedly reports that it has no such model."""
        if isinstance(error, LLMError):
            self._model_errors = self._model_errors + 1 if isinstance(error, LLMModelError) else 0
        if self._model_errors >= MODEL_ERRORS_IN_A_ROW:
            raise LLMModelError(
                f"{error} - {self._model_errors} such replies in a row; the next run continues with the remaining documents"
            )

    async def _finish_calls(self) -> None:
        """Wait for the calls in flight, at most for the shutdown grace period."""
        logger.info(
            "stopping: waiting up to %.0f s for %d calls in flight", self._settings.shutdown_grace_s, self._in_flight
        )
        try:
            async with asyncio.timeout(self._settings.shutdown_grace_s):
                await self._until(lambda: self._in_flight == 0)
        except TimeoutError:
            logger.warning("stopping: %d calls did not finish in time; the next run repeats them", self._in_flight)

    async def _watch_stop(self) -> None:
        await self._stop.wait()
        while not self._queue.empty():
            self._queue.get_nowait()
        self._progress.set()

    async def _settle_regularly(self) -> None:
        """Flush each SETTLE_EVERY_S, and as soon as CHECKPOINT_EVERY documents are settled."""
        while True:
            self._report("running")
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(SETTLE_EVERY_S):
                    await self._settlement.due.wait()
            await self._settlement.flush()

    async def _renew_leases(self) -> None:
        while True:
            await asyncio.sleep(self._settings.lease_s / 3)
            self._note_delay()
            asked_at = time.monotonic()
            await self._store.renew_leases()
            self._leases_sure_at = asked_at

    def _note_delay(self) -> None:
        now = time.monotonic()
        if now - self._leases_sure_at > self._settings.lease_s:
            self._doubted_before = now

    def _is_doubtful(self, item: WorkItem) -> bool:
        """Return whether the lease on *item* may have expired, because this process was suspended for longer than a lease."""
        self._note_delay()
        return item.batch.claimed_at < self._doubted_before

    async def _prepare_source(self, *, count: bool) -> None:
        """Count and index while the first calls run, because both take long on millions of documents.

        An error is a warning: if MongoDB is away, the calls that need it end the run.
        """
        try:
            if count:
                found, limit = await self._store.count("known" if self._replace else "sweep"), self._parts.options.limit
                self._settlement.stats.total += found if limit is None else min(found, limit)
        except StoreError as exc:
            logger.warning("the run goes on without the number of documents: %s", exc)
        try:
            await self._store.ensure_source_indexes()
            self._lane.ready.set()
        except StoreError as exc:
            logger.warning("the run goes on without the indexes of the source: %s", exc)

    async def _count_left_out(self) -> None:
        """Count and log what this run did not select; an error here must not fail a run that is done, nor hold a stop."""
        skipped = self._settlement.stats.skipped - self._settlement.unusable
        left_out = count_left_out(self._store, queued=self._parts.files.directory, skipped_now=skipped)
        counting = asyncio.create_task(count_in_time(left_out, logger.info))
        counting.add_done_callback(lambda _: self._progress.set())
        try:
            await self._until(lambda: counting.done() or self._stop.is_set())
            if not counting.done():
                return
            self._left_out = counting.result()
        except StoreError as exc:
            logger.warning("could not count the documents that were not selected: %s", exc)
            return
        finally:
            counting.cancel()
        for problem in self._left_out.problems(self._settings.results_collection):
            logger.info("%s %s", *problem)

    def _failed_now(self, *kinds: FailureKind) -> set[bytes]:
        return failed_keys(self._parts.files.directory, *kinds)

    async def _save(self, status: str) -> None:
        """Flush a last time; an error here must not hide the one that ended the run."""
        try:
            await self._settlement.flush()
        except TriadError as exc:
            logger.warning("could not save the final checkpoint (%s); the next run rebuilds it from MongoDB", exc)
            if status != "failed":
                raise
        finally:
            self._report(status)

    def _report(self, status: str) -> None:
        limits = (None if self._limit is None else self._limit.current, self._floor)
        limit = min((one for one in limits if one is not None), default=None)
        for reporter in self._parts.reporters:
            reporter.update(self._job_id, status, self._settlement.stats, self._in_flight, limit)

    def _statistics(self) -> dict[str, Any]:
        counts = asdict(self._settlement.stats)
        return {
            "job_id": self._job_id,
            "documents_processed": counts.pop("processed"),
            **counts,
            "in_retry_queue": len(self._failed_now("retry")),
            "in_quarantine": len(self._failed_now("quarantine")),
            "not_selected": None if self._left_out is None else asdict(self._left_out),
            "interrupted": self._stop.is_set(),
            "held_back_s": 0.0 if self._parts.service_first is None else round(self._parts.service_first.held_s, 1),
            "review_below": self._settings.review_below,
        }


def _first(group: BaseExceptionGroup[TriadError]) -> TriadError:
    """Return the first leaf of *group*, which is the error that ended the run."""
    error = group.exceptions[0]
    return _first(error) if isinstance(error, BaseExceptionGroup) else error

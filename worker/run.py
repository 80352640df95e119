"""One run of the batch worker: documents in, exactly one result each out, through any crash.

Knows neither MongoDB nor the model: store and steps are handed in. docs/architecture.md follows
one document through this module.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import asdict, dataclass
from typing import Any

from config import Settings
from domain.conversation import Conversation, Outcome
from domain.result import build_result
from domain.staleness import REPLACED, StalenessChecker
from error_handler import (
    LLMError,
    LLMModelError,
    LLMOutageError,
    PoisonDocumentError,
    SkippedDocumentError,
    StoreUnavailableError,
    TriadError,
)
from model_server.concurrency import ConcurrencyLimit
from storage.contract import Document, Store
from utils.aio import GroupCommit
from utils.batch_file_manager import BatchFiles
from worker.checkpoint import Checkpoint
from worker.dedupe import FILE_NAME, Asking, Deduplicator, ReplyCache
from worker.intake import MAX_SWEEPS, DocumentIntake, RunOptions
from worker.items import BatchInWork, Failure, WorkItem, failure_of
from worker.progress import Reporter
from worker.settlement import Settlement

logger = logging.getLogger(__name__)

SETTLE_EVERY_S = 1.0  # the longest a source status is late
MODEL_ERRORS_IN_A_ROW = 5  # answers of "no such model" that end the run

Classify = Callable[[Conversation, int], Awaitable[Outcome]]


@dataclass(frozen=True, slots=True)
class Steps:
    """What is done with one document.

    *aggregate* raises SkippedDocumentError. *classify* gets the conversation and how many retry
    rounds it has had, and raises LLMError, or SkippedDocumentError where it is too long and shall be skipped. *plan* is
    the plan_fingerprint of the answers; empty where it is not known, and then no answer of an interrupted run is used
    again. *kinds* judges documents for ``RunOptions.only``.
    """

    aggregate: Callable[[Document], Conversation]
    classify: Classify
    plan: str = ""
    kinds: StalenessChecker | None = None


class BatchRun:
    """One run: feeds documents to *max_concurrent* workers, writes their results, settles them.

    With a *limit*, a worker takes a document only when it has one of its places.
    """

    reporter: Reporter | None = None
    limit: ConcurrencyLimit | None = None

    def __init__(
        self,
        settings: Settings,
        options: RunOptions,
        store: Store,
        files: BatchFiles,
        steps: Steps,
        *,
        checkpoint: Checkpoint,
    ) -> None:
        self._settings = settings
        self._store = store
        self._files = files
        self._steps = steps
        self._replace = options.reprocess or options.only in REPLACED
        self._only = options.only
        self.checkpoint = checkpoint
        self.settlement = Settlement(store, files, self.checkpoint)
        self.intake = DocumentIntake(store, files, self.checkpoint, options, settlement=self.settlement)
        self.intake.kinds = steps.kinds
        asked = ReplyCache(files.directory / FILE_NAME, f"{checkpoint.job_id} {steps.plan or secrets.token_hex(8)}")
        self._identical = Deduplicator(asked if options.dedupe else None)
        self.stop = asyncio.Event()
        self._queue: asyncio.Queue[WorkItem] = asyncio.Queue()
        self._writes: GroupCommit[tuple[WorkItem, Document]] = GroupCommit(self._write_group)
        self._progress = asyncio.Event()
        self._in_flight = 0
        self._model_errors = 0
        self._leases_sure_at = self._doubted_before = time.monotonic()

    async def execute(self, sources: list[AsyncGenerator[BatchInWork]], *, to_the_end: bool) -> dict[str, Any]:
        """Run to the end of *sources*, to a stop, or to an error; whichever it is, what is settled is saved.

        *to_the_end* adds the sweeps and the retry rounds.
        """
        status = "failed"
        try:
            async with asyncio.TaskGroup() as tasks:
                helpers = [
                    tasks.create_task(self._writes.run(), name="writes"),
                    tasks.create_task(self._settle_regularly(), name="settlement"),
                    tasks.create_task(self._renew_leases(), name="leases"),
                    tasks.create_task(self._watch_stop(), name="stop"),
                ]
                preparation = tasks.create_task(self._prepare_source(), name="indexes")
                workers = [
                    tasks.create_task(self._work(), name=f"worker-{number}")
                    for number in range(self._settings.most_concurrent)
                ]
                for source in sources:
                    await self._admit_all(source)
                if to_the_end:
                    await self._sweep_and_retry()
                if self.stop.is_set():
                    await self._let_calls_finish()
                await self._writes.drained()
                await self.settlement.flush()  # so that nobody is cancelled in the middle of one
                for task in (*helpers, *workers, preparation):
                    task.cancel()
            self.checkpoint.finished = not self.stop.is_set()
            status = "interrupted" if self.stop.is_set() else "completed"
        except ExceptionGroup as group:  # before 3.11.4, what ``except*`` raises is wrapped in a group again
            ours, others = group.split(TriadError)
            if ours is None or others is not None:
                raise
            raise _first(ours) from group
        finally:
            self._identical.close(is_finished=status == "completed")
            await self._save(status)
        return self._statistics()

    async def _sweep_and_retry(self) -> None:
        for _ in range(MAX_SWEEPS):
            if self.stop.is_set() or not await self._admit_all(self.intake.sweep()):
                break
        while not self.stop.is_set() and await self._admit_all(self.intake.retry_round()):
            pass

    async def _admit_all(self, source: AsyncGenerator[BatchInWork]) -> int:
        """Hand every batch of *source* to the workers and wait for the last; return how many documents it had.

        The next batch is read and saved while at least a batch, and twice the slots, are still in work.
        """
        await self.settlement.flush()
        backlog = max(self._settings.batch_size, 2 * self._settings.most_concurrent)
        admitted = 0
        async with contextlib.aclosing(source):
            async for batch in source:
                if self.stop.is_set():  # saved, and left to the next run
                    return admitted
                self.settlement.admit(batch)
                for item in batch.items:
                    self._queue.put_nowait(item)
                admitted += len(batch.items)
                await self._until_unsettled(backlog)
        await self._until_unsettled(0)
        return admitted

    async def _until_unsettled(self, count: int) -> None:
        while self.settlement.unsettled > count and not self.stop.is_set():
            self._progress.clear()
            await self._progress.wait()

    async def _work(self) -> None:
        while True:
            async with contextlib.nullcontext() if self.limit is None else self.limit.slot():
                item = await self._queue.get()
                if self.stop.is_set():
                    continue
                self._in_flight += 1
                try:
                    await self._process(item)
                finally:
                    self._in_flight -= 1
                    self._progress.set()

    async def _process(self, item: WorkItem) -> None:
        """Take one document from the queue to its answer; what was on disk is not done again."""
        journal, document_id, past = item.batch.file.journal, item.document_id, item.past
        known = past.result or item.known_result
        if known is not None:
            self._writes.submit((item, known))
        elif past.reason is not None and past.is_skipped:
            self.settlement.skip(item, past.reason, past.problem)
        elif past.reason is not None:
            self.settlement.fail(item, Failure(past.reason, past.problem, past.is_final))
        elif past.is_poison:
            error = PoisonDocumentError("the worker ended each time it had this document in hand")
            self.settlement.fail(item, failure_of(error))
        elif self._is_doubtful(item) and not await self.intake.is_still_ours(item):
            self.settlement.drop(item)
            self._put(self._identical.dropped(item))
        else:
            journal.started(document_id)
            try:
                conversation = self._steps.aggregate(item.document)
            except SkippedDocumentError as exc:
                self._skip(item, exc)
                return
            asking = self._identical.asking(item, conversation)
            copies = self._identical.known(asking)
            for copy in copies:
                self._keep(*copy)
            if not copies:
                journal.asked(document_id)
                if self._identical.waits(asking):
                    journal.released(document_id)
                else:
                    await self._ask(asking)

    async def _ask(self, asking: Asking) -> None:
        item = asking.item
        journal, document_id = item.batch.file.journal, item.document_id
        try:
            outcome = await self._steps.classify(asking.conversation, item.rounds)
        except (asyncio.CancelledError, LLMOutageError):
            journal.released(document_id)
            raise
        except SkippedDocumentError as exc:
            self._skip(item, exc)
            self._put(self._identical.gave_up(asking))
            return
        except LLMError as exc:
            self._require_model(exc)
            failure = failure_of(exc)
            journal.failed(document_id, failure.reason, failure.message, is_final=failure.is_final)
            self.settlement.fail(item, failure)
            self._put(self._identical.gave_up(asking))
            return
        self._model_errors = 0
        self._keep(asking, outcome)
        for copy in self._identical.answered(asking, outcome):
            self._keep(*copy)

    def _keep(self, asking: Asking, outcome: Outcome) -> None:
        item = asking.item
        result = build_result(
            item.document,
            asking.conversation,
            outcome,
            self.checkpoint.job_id,
            keep_original=self._settings.store_original_conversation,
            review_below=self._settings.review_below,
        )
        item.batch.file.journal.answered(item.document_id, result)
        self._writes.submit((item, result))

    def _put(self, items: list[WorkItem]) -> None:
        for item in items:
            self._queue.put_nowait(item)

    def _skip(self, item: WorkItem, problem: SkippedDocumentError) -> None:
        item.batch.file.journal.skipped(item.document_id, problem.reason, str(problem))
        self.settlement.skip(item, problem.reason, str(problem))

    def _require_model(self, error: LLMError) -> None:
        """End the run where the server says again and again that it has no such model."""
        self._model_errors = self._model_errors + 1 if isinstance(error, LLMModelError) else 0
        if self._model_errors >= MODEL_ERRORS_IN_A_ROW:
            raise LLMModelError(f"{error} - {self._model_errors} answers in a row; the documents wait for the next run")

    async def _write_group(self, group: list[tuple[WorkItem, Document]]) -> None:
        try:
            rejected = await self._store.write_results([result for _, result in group], replace=self._replace)
        except StoreUnavailableError as exc:
            for item, result in group:
                self.settlement.fail(item, failure_of(exc), result)
            raise  # asking on would only make more answers that cannot be stored
        finally:
            self._progress.set()
        for index, (item, result) in enumerate(group):
            if index in rejected:
                self.settlement.fail(item, failure_of(rejected[index]), result)
                self._identical.rejected(result)
            else:
                self.settlement.succeed(item, result)

    async def _let_calls_finish(self) -> None:
        """After a stop: no new documents, and the grace period for the calls in flight."""
        logger.info("stopping: %d calls in flight may take %.0f s", self._in_flight, self._settings.shutdown_grace_s)
        try:
            async with asyncio.timeout(self._settings.shutdown_grace_s):
                while self._in_flight:
                    self._progress.clear()
                    await self._progress.wait()
        except TimeoutError:
            logger.warning("stopping: %d calls did not finish in time and will be asked again", self._in_flight)

    async def _watch_stop(self) -> None:
        await self.stop.wait()
        while not self._queue.empty():
            self._queue.get_nowait()
        self._progress.set()

    async def _settle_regularly(self) -> None:
        """Flush each second, and as soon as CHECKPOINT_EVERY documents are settled."""
        while True:
            self._report("running")
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(SETTLE_EVERY_S):
                    await self.settlement.due.wait()
            await self.settlement.flush()

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
        """Whether another worker may have *item*: this one was held up for longer than a lease since it claimed it."""
        self._note_delay()
        return item.batch.claimed_at < self._doubted_before

    async def _prepare_source(self) -> None:
        """Count and index beside the first calls: neither may hold up a start on millions of documents."""
        if not self._only:
            self.settlement.stats.total += await self._store.count("all" if self._replace else "sweep")
        await self._store.ensure_source_indexes()
        foreign = await self._store.foreign_statuses()
        if foreign:
            logger.warning("documents whose status is none of ours are left alone: %s", ", ".join(foreign[:10]))

    async def _save(self, status: str) -> None:
        """Flush a last time; an error here must not hide the one that ended the run."""
        try:
            await self.settlement.flush()
        except TriadError as exc:
            logger.warning("the last state could not be saved (%s); the next run finds it out", exc)
            if status != "failed":
                raise
        finally:
            self._report(status)

    def _report(self, status: str) -> None:
        if self.reporter is not None:
            limit = None if self.limit is None else self.limit.current
            self.reporter.update(self.checkpoint.job_id, status, self.settlement.stats, self._in_flight, limit)

    def _statistics(self) -> dict[str, Any]:
        counts = asdict(self.settlement.stats)
        return {
            "job_id": self.checkpoint.job_id,
            "documents_processed": counts.pop("processed"),
            **counts,
            "in_retry_queue": self._files.count_failed("retry"),
            "in_quarantine": self._files.count_failed("quarantine"),
            "interrupted": self.stop.is_set(),
            "review_below": self._settings.review_below,
        }


def _first(group: BaseExceptionGroup[TriadError]) -> TriadError:
    """Return the error that started the fall: the first leaf of the group."""
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error if isinstance(error, TriadError) else TriadError("the run failed")

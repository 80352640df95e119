"""Documents in work and how they end: counts, source status, retry or quarantine entry, checkpoint."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any, Generic, TypeVar

import orjson

from domain.conversation import Conversation
from error_handler import (
    FailureThresholdError,
    LLMModelError,
    LLMRejectedError,
    PoisonDocumentError,
    Reason,
    SkippedDocumentError,
    StoreRejectedError,
    StoreUnavailableError,
    TriadError,
    UnreadableDocumentError,
)
from mongo_client import DocumentStore, FinalStatus
from storage.extended_json import Document, id_key, id_text
from storage.files import Event, JournalEntry, Verdict
from storage.selection import StateFields
from utils.batch_file_manager import BatchFile, BatchFiles
from utils.failed_documents import FailedDocument
from worker.checkpoint import CHECKPOINT_EVERY, Checkpoint, LowWaterMark, RunStats
from worker.quarantine import MAX_ROUNDS, failed_keys, failed_places

logger = logging.getLogger(__name__)

T = TypeVar("T")

FAILURE_SHARE, FAILURE_MINIMUM = 0.10, 50  # the run stops above this share, from this many documents on
IDS_PER_UPDATE = 1000


def verdict_of(error: TriadError) -> Verdict:
    """Return what *error* means for its document."""
    if isinstance(error, UnreadableDocumentError):
        return Verdict(error.reason, str(error), is_final=True)
    if isinstance(error, SkippedDocumentError):
        return Verdict(error.reason, str(error), is_skipped=True)
    refused = isinstance(error, LLMRejectedError | PoisonDocumentError | StoreRejectedError)
    is_final = (refused and not isinstance(error, LLMModelError)) or error.reason is Reason.CONTEXT_OVERFLOW
    return Verdict(error.reason, str(error), is_final)


@dataclass(slots=True)
class WorkItem:
    """One document in work.

    *written_id* is its id for the journal. *past* is what an interrupted run, or an earlier round, left of it. *rounds*
    counts its earlier retry rounds; *ticket* is its place in the reading order. *conversation* is set by aggregation.
    *input_hash* is empty if the document must be asked itself; *followers* have the same text and wait for its answer.
    """

    document: Document
    batch: BatchInWork
    key: bytes
    written_id: orjson.Fragment
    past: JournalEntry
    ticket: int | None = None
    rounds: int = 0
    conversation: Conversation = field(init=False)
    input_hash: str = ""
    followers: list[WorkItem] = field(default_factory=list)
    since_s: float = 0.0

    @property
    def document_id(self) -> Any:
        """The source ``_id``."""
        return self.document.get("_id")

    @property
    def is_poison(self) -> bool:
        """True if too many crashes happened while it was processed."""
        return self.past.is_poison

    def note(self, event: Event, **details: Any) -> None:
        """Record *event* in the journal of its batch; see ``BatchJournal.add``."""
        self.batch.file.journal.add(event, self.written_id, **details)


class BatchInWork:
    """A batch of *file* with one WorkItem for each of its documents.

    *is_retry* marks a round of a retry file. With *mark*, the documents are recorded as read. *claimed_at* is a
    ``time.monotonic()`` at which this worker certainly held the leases; by default now.
    """

    def __init__(
        self,
        file: BatchFile,
        *,
        is_retry: bool = False,
        mark: LowWaterMark | None = None,
        claimed_at: float | None = None,
    ) -> None:
        self.file = file
        self.is_retry = is_retry
        self.claimed_at = time.monotonic() if claimed_at is None else claimed_at
        self.counts = {"successful": 0, "failed": 0, "skipped": 0}
        self.to_retry: list[FailedDocument] = []
        self.to_quarantine: list[FailedDocument] = []
        self.items: list[WorkItem] = []
        for key, written_id, document in file.keyed:
            item = WorkItem(document, self, key, written_id, file.replay.get(key) or JournalEntry())
            failure = file.failures.get(key)
            if failure is not None:
                item.rounds = failure.retry_count + 1 if is_retry else 0
                item.past.result = item.past.result or failure.classification_result
            if mark is not None:
                item.ticket = mark.read(document.get("_id"))
            self.items.append(item)
        self.unsettled = len(self.items)

    @property
    def document_ids(self) -> list[Any]:
        """The ids of all documents of the file, in its order."""
        return [document.get("_id") for document in self.file.documents]


class GroupCommit(Generic[T]):
    """Passes submitted items to *write* in groups of at most *max_group*, one group at a time.

    *write* settles each item itself, and raises only errors that end the run.
    """

    def __init__(self, write: Callable[[list[T]], Awaitable[None]], max_group: int = 200) -> None:
        self._write = write
        self._max_group = max_group
        self._queue: asyncio.Queue[T] = asyncio.Queue()

    def submit(self, item: T) -> None:
        """Write *item* as soon as possible; return at once."""
        self._queue.put_nowait(item)

    async def run(self) -> None:
        """Write submitted items until cancelled; raise what *write* raises."""
        while True:
            group = [await self._queue.get()]
            while len(group) < self._max_group and not self._queue.empty():
                group.append(self._queue.get_nowait())
            await self._write(group)
            for _ in group:
                self._queue.task_done()

    async def drained(self) -> None:
        """Wait until every submitted item is settled, while ``run`` runs."""
        await self._queue.join()


def is_query(states: StateFields, document: Document) -> bool:
    """Return whether *document* has the state fields of a single query."""
    has_turns = "tweets" in document or "messages" in document or states.status in document
    return states.is_default and not has_turns and ("text" in document or "processed" in document)


class Settlement:
    """Writes results, and settles documents: in memory at once, in MongoDB and the files when ``flush`` is called.

    The order of ``flush`` makes a crash harmless: source statuses first, then retry and quarantine entries, then the
    batch is completed, its leases are released, and the checkpoint moves. *replaces* means that results replace stored
    ones. *on_rejected* gets each result that MongoDB rejects for good.
    """

    def __init__(
        self,
        store: DocumentStore,
        files: BatchFiles,
        checkpoint: Checkpoint,
        *,
        replaces: bool,
        on_rejected: Callable[[Document], None],
    ) -> None:
        self._store = store
        self._files = files
        self._checkpoint = checkpoint
        self._replaces = replaces
        self.replaced: set[bytes] = set()  # documents with a result of an earlier text
        self._on_rejected = on_rejected
        self.writes: GroupCommit[tuple[WorkItem, Document]] = GroupCommit(self._write)
        self.progress = asyncio.Event()  # set when documents were settled
        self._saved: Document = {}  # the content of checkpoint.json, if this run wrote it
        self._finished: list[BatchInWork] = []
        self._failed: dict[bytes, str] = {}  # reason by id_key, of documents that failed in this run
        self._failed_before: set[bytes] = set()  # those that a journal knew: an earlier run counted them
        self._statuses: dict[tuple[FinalStatus, str | None, bool], list[Any]] = {}  # (status, reason, is_query) -> ids
        self._flushing = asyncio.Lock()
        self.stats = RunStats()
        self.mark = LowWaterMark()
        self.unsettled = 0
        self.bytes_in_work = 0  # of the files of batches that are not settled
        self.unusable = 0  # skipped documents whose status cannot be written
        self._since_flush = 0
        self.due = asyncio.Event()  # set when CHECKPOINT_EVERY documents wait for a flush

    @property
    def failed_keys(self) -> set[bytes]:
        """The ``id_key`` of each document that failed in this run and has no result yet."""
        return set(self._failed)

    def admit(self, batch: BatchInWork) -> None:
        """Take responsibility for every document of *batch*."""
        self.unsettled += batch.unsettled
        self.bytes_in_work += batch.file.size if batch.unsettled else 0
        if batch.unsettled == 0:
            self._finished.append(batch)

    async def _write(self, group: list[tuple[WorkItem, Document]]) -> None:
        try:
            replaces = self._replaces or any(item.key in self.replaced for item, _ in group)
            rejected = await self._store.write_results([result for _, result in group], replace=replaces)
        except StoreUnavailableError as exc:
            for item, result in group:
                self._end_unwritten(item, exc, result)
            raise  # further answers could not be stored either
        finally:
            self.progress.set()
        for index, (item, result) in enumerate(group):
            if index in rejected:
                self._end_unwritten(item, rejected[index], result)
                self._on_rejected(result)
            else:
                self._count(item.key)
                self.stats.successful += 1
                self.stats.count_result(result)
                item.batch.counts["successful"] += 1
                self._settle(item, "processed", None)

    def _end_unwritten(self, item: WorkItem, error: TriadError, result: Document) -> None:
        """End *item*, whose answer is known; the journal says why it is not stored, for ``failed_keys``."""
        verdict = verdict_of(error)
        item.note("failed", reason=verdict.reason, problem=verdict.problem, is_final=verdict.is_final)
        self.end(item, verdict, result)

    def count_unusable(self, total: int) -> None:
        """Count as skipped that *total* documents were read so far that cannot be named in MongoDB."""
        new, self.unusable = total - self.unusable, total
        self.stats.processed += new
        self.stats.skipped += new

    def found_done(self, documents: list[Document]) -> None:
        """Queue the final status of *documents*, which already have a result."""
        for document in documents:
            key = id_key(document.get("_id"))
            if key in self._failed:  # its write was stored after all
                self._count(key)
                self.stats.successful += 1
            else:
                self.stats.already_done += 1
            self._add_status(document, "processed", None)

    def end(self, item: WorkItem, verdict: Verdict, result: Document | None = None) -> None:
        """Settle this round of *item* without a result in MongoDB; *result* is there if only its write failed.

        Afterwards, raise FailureThresholdError if too many documents have failed.
        """
        failed_earlier = self._count(item.key)
        self.stats.count_reason(verdict.reason)
        if verdict.is_skipped:
            self.stats.skipped += 1
            item.batch.counts["skipped"] += 1
            logger.info("document %s skipped: %s", id_text(item.document_id), verdict.problem)
            self._settle(item, "skipped", f"{verdict.reason}: {verdict.problem}")
            return
        self.stats.failed += 1
        self._failed[item.key] = verdict.reason
        if item.past.verdict is not None and not failed_earlier:
            self._failed_before.add(item.key)
        item.batch.counts["failed"] += 1
        self._requeue(item, verdict, result)
        self._settle(item, "failed", f"{verdict.reason}: {verdict.problem}")
        self._require_few_failures()

    def _requeue(self, item: WorkItem, verdict: Verdict, result: Document | None) -> None:
        """Add *item* to the retry queue, or to the quarantine if no other round can help."""
        final = verdict.is_final or item.rounds >= MAX_ROUNDS
        entry = FailedDocument(
            conversation_id=item.document_id,
            status="write_failed" if result is not None else "llm_failed",
            conversation_data=item.document,
            retry_count=item.rounds,
            reason=verdict.reason,
            error=verdict.problem,
            classification_result=result,
        )
        (item.batch.to_quarantine if final else item.batch.to_retry).append(entry)
        outcome = "quarantined" if final else "queued for retry"
        logger.warning("document %s %s: %s: %s", id_text(item.document_id), outcome, verdict.reason, verdict.problem)

    def _count(self, key: bytes) -> bool:
        """Count a document that ends; return whether it failed earlier in this run, which no longer counts."""
        earlier = self._failed.pop(key, None)
        if earlier is None:
            self.stats.processed += 1
        else:
            self.stats.failed -= 1
            self.stats.count_reason(earlier, -1)
        return earlier is not None

    def _require_few_failures(self) -> None:
        stats = self.stats
        # An outage of MongoDB is not the documents' fault, and ends the run by itself.
        failed_now = sum(
            reason != Reason.STORE_FAILED and key not in self._failed_before for key, reason in self._failed.items()
        )
        if stats.processed >= FAILURE_MINIMUM and failed_now > FAILURE_SHARE * stats.processed:
            raise FailureThresholdError(self.threshold_message())

    def threshold_message(self) -> str:
        """Return what FailureThresholdError says: how many documents failed, why, where they are, and what to do."""
        reasons, directory = list(self._failed.values()), self._files.directory
        flag = " with --retry-failed" if failed_keys(directory, "quarantine") else ""
        return (
            f"{self.stats.failed} of {self.stats.processed} documents failed, mostly because of "
            f"{max(set(reasons), key=reasons.count)}. {failed_places(directory)} Fix the cause, then run the same command "
            f"again{flag}."
        )

    def _settle(self, item: WorkItem, status: FinalStatus, reason: str | None) -> None:
        self._add_status(item.document, status, reason)
        self.drop(item)

    def _add_status(self, document: Document, status: FinalStatus, reason: str | None) -> None:
        group = (status, reason, is_query(self._store.states, document))
        self._statuses.setdefault(group, []).append(document.get("_id"))

    def drop(self, item: WorkItem) -> None:
        """Give up responsibility for *item*: it is settled, or another worker has it."""
        if item.ticket is not None:
            self.mark.settle(item.ticket)
        item.batch.unsettled -= 1
        self.unsettled -= 1
        self._since_flush += 1
        if self._since_flush >= CHECKPOINT_EVERY:
            self.due.set()
        if item.batch.unsettled == 0:
            self.bytes_in_work -= item.batch.file.size
            self._finished.append(item.batch)

    async def flush(self) -> None:
        """Bring MongoDB, the files and the checkpoint up to date; after an error, the next flush writes the rest."""
        async with self._flushing:
            finished = len(self._finished)
            self._since_flush = 0
            self.due.clear()
            await self._flush_statuses()
            for _ in range(finished):  # statuses of batches that finished meanwhile are not written yet
                batch = self._finished[0]
                await asyncio.to_thread(self._finish, batch)
                del self._finished[0]
                batch.items.clear()  # break the reference cycle, or they wait for the garbage collector
                await self._store.release(batch.document_ids)
            self.mark.advance(self._checkpoint)
            self._checkpoint.counts = asdict(self.stats)
            content = {name: getattr(self._checkpoint, name) for name in Checkpoint.__slots__}
            if content != self._saved:
                await asyncio.to_thread(
                    self._files.write_state, "checkpoint.json", content | {"updated_at": datetime.now(UTC)}
                )
                self._saved = content

    async def _flush_statuses(self) -> None:
        groups, self._statuses = self._statuses, {}
        try:
            for (status, reason, queries), document_ids in list(groups.items()):
                for start in range(0, len(document_ids), IDS_PER_UPDATE):
                    chunk = document_ids[start : start + IDS_PER_UPDATE]
                    await self._store.mark(chunk, status, reason, queries=queries)
                del groups[(status, reason, queries)]
        finally:
            for group, document_ids in groups.items():
                self._statuses.setdefault(group, []).extend(document_ids)

    def _finish(self, batch: BatchInWork) -> None:
        number = batch.file.number
        if batch.to_quarantine:
            self._files.save_failed("quarantine", number, batch.to_quarantine)
            self.stats.quarantined += len(batch.to_quarantine)
        if batch.is_retry:
            self._files.finish_retry(batch.file, batch.to_retry)
            return
        if batch.to_retry:
            self._files.save_failed("retry", number, batch.to_retry)
        self._files.save_completed(batch.file, batch.counts, batch.document_ids)

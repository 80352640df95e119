"""The source of a run's documents: batches that are claimed, and saved to disk before they are processed; the dry run."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any, Protocol

from aggregator import aggregate_conversation
from config import Settings
from domain.conversation import Conversation, Outcome
from error_handler import SkippedDocumentError
from mongo_client import DocumentStore
from storage.extended_json import Document, id_key, id_text
from storage.files import JournalEntry
from storage.selection import Selection
from storage.subset import ALL, Subset
from utils.batch_file_manager import BatchFile, BatchFiles
from worker.checkpoint import Checkpoint
from worker.current_text import bring_up_to_date
from worker.left_out import LINE_EVERY_S
from worker.progress import Reporter
from worker.quarantine import requeue
from worker.service_first import ServiceFirst
from worker.settlement import BatchInWork, Settlement, is_query
from worker.staleness import REPLACED, Only, StalenessChecker, grown_keys
from worker.subset import in_subset, quarantined

logger = logging.getLogger(__name__)

MAX_SWEEPS = 5
EXAMPLES = 10  # ids in the report of a dry run

Classify = Callable[[Conversation, int], Awaitable[Outcome]]


@dataclass(frozen=True, slots=True)
class RunOptions:
    """The options of one run. *limit* None takes all documents, *only* None all kinds (see worker.staleness).

    *subset* is that of the store.
    """

    batch_size: int = 100
    limit: int | None = None
    reprocess: bool = False
    retry_failed: bool = False
    only: Only | None = None
    dedupe: bool = True
    subset: Subset = ALL


class Slots(Protocol):
    """The slots for calls; a worker holds one while it works on a document."""

    @property
    def current(self) -> int:
        """The number of slots now."""

    def slot(self) -> AbstractAsyncContextManager[None]:
        """Wait for a slot, and hold it inside the block."""


@dataclass(frozen=True, slots=True)
class RunParts:
    """Settings, stores, the classify step and observers of one run.

    *stop*, when set, ends the run: no new documents, and a grace period for calls in flight. *classify* takes a
    conversation and the number of its earlier retry rounds; it raises LLMError, or SkippedDocumentError for a conversation
    that is too long and shall be skipped. *plan* is the plan_fingerprint of its answers; if it is empty, answers of an
    interrupted run are not reused. *kinds* is needed with ``options.only``. *limit* None means that
    ``settings.max_concurrent`` is a fixed number. *service_first* None does not wait for the service. While *go* is not
    set, no document is taken to the model; None takes them always. *urgent_first* looks for urgent documents (worker.urgent).
    """

    settings: Settings
    options: RunOptions
    store: DocumentStore
    files: BatchFiles
    checkpoint: Checkpoint
    stop: asyncio.Event
    classify: Classify
    plan: str = ""
    kinds: StalenessChecker | None = None
    reporters: Sequence[Reporter] = ()
    limit: Slots | None = None
    service_first: ServiceFirst | None = None
    go: asyncio.Event | None = None
    urgent_first: bool = False


class DocumentIntake:
    """Reads, claims and saves documents; yields batches whose documents are all leased to this worker.

    Documents that already have a result of their text only get their status; documents of another worker are counted and
    skipped.
    Batches that an interrupted run left in work are finished first, whatever ``options.only`` says: their answers may
    be in its journal.
    """

    def __init__(self, parts: RunParts, settlement: Settlement) -> None:
        self._parts = parts
        self._store = parts.store
        self._files = parts.files
        self._options = parts.options
        self._settlement = settlement
        self._recovered: set[bytes] = set()  # what this run takes, or has taken, by another way than its pages
        self._claiming = asyncio.Lock()  # pages and urgent documents are claimed in turn, so that none is taken twice
        self._queued: set[bytes] = set()  # in local failure files when reading began, with ``options.only``
        self._taken = 0
        self._retries_failed = self._options.retry_failed or self._options.only == "failed"

    @property
    def takes_new(self) -> bool:
        """True if the run takes documents without a result."""
        return self._options.only in (None, "new")

    async def recovered(self) -> AsyncGenerator[BatchInWork]:
        """Yield the batches that an earlier run left in ``pending/``, with their journals replayed."""
        if self._retries_failed:
            is_part, limit = self._options.subset.name is not None, self._options.limit
            keys = await quarantined(self._store, self._files, is_part=is_part, limit=limit)
            requeued = await asyncio.to_thread(requeue, self._files, keys)
            logger.info("%d quarantined documents are retried with a full set of attempts", requeued)
        async for file in _one_by_one(self._files.load_pending()):
            batch = BatchInWork(file)
            logger.info("%s: %d documents from an earlier run", file.name, len(batch.items))
            await self._keep_own(batch)
            self._taken += len(batch.items)
            yield batch

    async def fresh(self) -> AsyncGenerator[BatchInWork]:
        """Yield the selected documents in the order of ids, up to the greatest id at the start."""
        bound = await self._store.upper_bound()
        if not bound:
            return
        after = [self._parts.checkpoint.low_water_mark] if self._parts.checkpoint.has_mark else []
        only = self._options.only
        if only:
            self._queued = await asyncio.to_thread(self._files.failed_keys)
        selections: list[Selection] = ["all" if only else "known" if self._options.reprocess else "pending"]
        if only == "failed":
            selections = ["failed"]
        elif self._options.retry_failed or (self._files.lost_failures and not only):
            selections.append("failed")
        for selection in selections:
            if selection == "failed":  # queued documents have used their rounds
                self._recovered |= self._settlement.failed_keys | await asyncio.to_thread(self._files.failed_keys)
            async for batch in self._pages(selection, after if selection != "failed" else [], bound):
                yield batch

    async def sweep(self) -> AsyncGenerator[BatchInWork]:
        """Yield documents without a result that are pending or were left processing: late small ids, lost files."""
        if not self.takes_new:
            return
        # A failed document whose status could not be written still looks pending.
        self._recovered |= self._settlement.failed_keys | self._store.unmarked
        bound = await self._store.upper_bound()
        async for batch in self._pages("sweep", [], bound):
            logger.info("sweep: %d documents found", len(batch.items))
            yield batch

    async def given(self, documents: list[Document]) -> AsyncGenerator[BatchInWork]:
        """Yield *documents* as one batch, without those that have a result or belong to another worker."""
        claimed_at = time.monotonic()
        own = await self._claimed(documents)
        self._settlement.stats.total += len(own)
        if own:
            yield BatchInWork(await asyncio.to_thread(self._files.save_pending, own), claimed_at=claimed_at)

    async def retry_round(self) -> AsyncGenerator[BatchInWork]:
        """Yield each retry file once as a batch."""
        async for file in _one_by_one(self._files.load_retry()):
            batch = BatchInWork(file, is_retry=True)
            if not await self._is_selected(batch):
                continue
            await self._keep_own(batch)
            self._taken += len({item.key for item in batch.items} - self._settlement.failed_keys)
            self._settlement.stats.retried += len(batch.items)
            yield batch

    async def _pages(
        self, selection: Selection, after: Sequence[Any], bound: Sequence[Any]
    ) -> AsyncGenerator[BatchInWork]:
        limit, only, kinds = self._options.limit, self._options.only, self._parts.kinds
        while limit is None or self._taken < limit:
            page = await self._store.read_page(selection, after, bound, self._options.batch_size)
            self._settlement.count_unusable(len(self._store.unusable))
            if not page:
                return
            after = [page[-1]["_id"]]
            claimed_at = time.monotonic()
            if kinds is not None and only and selection == "all":
                found = await kinds.of(page, self._queued | self._settlement.failed_keys)
                page = [document for document, kind in found if kind == only]
            file = await self._saved(await self._claimed(page))
            if file is None:
                continue
            in_order = selection in ("pending", "known", "all")
            # Not the time of now: this process may have been suspended since it claimed them.
            yield BatchInWork(file, mark=self._settlement.mark if in_order else None, claimed_at=claimed_at)

    async def _claimed(self, page: list[Document]) -> list[Document]:
        """Lease the documents of *page* and return those that need a result."""
        async with self._claiming:
            page = [document for document in page if id_key(document["_id"]) not in self._recovered]
            needed = await self.needed(page)
        return [document for document in page if id_key(document["_id"]) in needed]

    async def _saved(self, documents: list[Document]) -> BatchFile | None:
        """Save the leased *documents* as the next batch, up to the limit of the run; None if none are left."""
        limit = self._options.limit
        room = len(documents) if limit is None else max(0, limit - self._taken)
        documents, surplus = documents[:room], documents[room:]
        self._taken += len(documents)  # before the next step of the other tasks that take documents
        if surplus:
            await self._store.release([document["_id"] for document in surplus])
        if not documents:
            return None
        if self._options.only:  # their number is only known after the last page
            self._settlement.stats.total += len(documents)
        file = await asyncio.to_thread(self._files.save_pending, documents)
        states = self._store.states
        await self._store.mark_processing([one["_id"] for one in documents if not is_query(states, one)])
        return file

    def free(self, keys: Iterable[bytes], left_alone: set[bytes]) -> list[bytes]:
        """Return those ``id_key`` of urgent documents that this run has not taken in another way, nor are in *left_alone*."""
        # A failed document whose status could not be written still looks pending.
        taken = (self._recovered, left_alone, self._settlement.failed_keys, self._store.unmarked)
        return [key for key in keys if not any(key in one for one in taken)]

    async def urgent(self, document_ids: list[Any]) -> BatchInWork | None:
        """Return those pending *document_ids* that nobody has leased, in this order, as one batch; None if there are none."""
        if self._options.limit is not None and self._taken >= self._options.limit:
            return None
        claimed_at = time.monotonic()
        async with self._claiming:
            own = await self._store.claim(document_ids, only_free=True)
            self._recovered |= own
        ids = [value for value in document_ids if id_key(value) in own]
        found = {id_key(one["_id"]): one for one in await self._store.read_documents("pending", ids)} if ids else {}
        if gone := [value for value in ids if id_key(value) not in found]:
            await self._store.release(gone)
        ended = await self._ended(list(found.values()))
        in_order = (id_key(value) for value in ids)
        file = await self._saved([found[key] for key in in_order if key in found.keys() - ended])
        return None if file is None else BatchInWork(file, claimed_at=claimed_at)

    async def _keep_own(self, batch: BatchInWork) -> None:
        """Remove documents from a recovered *batch* that other workers hold, or have finished since."""
        self._recovered.update(item.key for item in batch.items)
        for item in batch.items:
            if self._retries_failed and item.past.verdict is not None and not item.past.verdict.is_skipped:
                item.past = JournalEntry(result=item.past.result)  # it failed before the run was interrupted
        await bring_up_to_date(self._store, batch.items)
        needed = await self.needed([item.document for item in batch.items])
        batch.items = [item for item in batch.items if item.key in needed]
        batch.unsettled = len(batch.items)

    async def needed(self, documents: list[Document]) -> set[bytes]:
        """Lease *documents*; return the ``id_key`` of those that this worker holds and that need a result."""
        own = await self._store.claim([document["_id"] for document in documents]) if documents else set()
        held = [document for document in documents if id_key(document["_id"]) in own]
        self._settlement.stats.leased_elsewhere += len(documents) - len(held)
        return own - await self._ended(held)

    async def _ended(self, held: list[Document]) -> set[bytes]:
        """End the lease of each of *held* that needs no result, and return their ``id_key``."""
        # After the lease: the worker that held it before may have stored the result.
        done = await self._done(held) if held else set()
        finished = [document for document in held if id_key(document["_id"]) in done]
        if finished:
            self._settlement.found_done(finished)
            await self._store.release([document["_id"] for document in finished])
        return done

    async def _done(self, documents: list[Document]) -> set[bytes]:
        kinds, only = self._parts.kinds, self._options.only
        if kinds is not None and only in REPLACED:
            return await kinds.settled(documents, only)
        job_id = self._parts.checkpoint.job_id if self._options.reprocess else None
        done = await self._store.result_keys([document["_id"] for document in documents], job_id)
        if done and only is None and job_id is None:
            grown = await grown_keys(self._store, documents, done)
            self._settlement.replaced |= grown
            done -= grown
        return done

    async def _is_selected(self, batch: BatchInWork) -> bool:
        """Return whether this run retries *batch*: with ``options.only`` or a subset, it leaves those of other runs alone."""
        kinds, only = self._parts.kinds, self._options.only
        if self._settlement.failed_keys & {item.key for item in batch.items}:
            return True
        if self._options.subset.name and not await in_subset(self._store, [item.document_id for item in batch.items]):
            return False
        if only in (None, "failed"):
            return True
        if kinds is None or only not in REPLACED:
            return False
        documents = [item.document for item in batch.items]  # of the same run, before its interruption
        return only in {kind for _, kind in await kinds.of(documents, set())}


async def has_work(
    store: DocumentStore, files: BatchFiles, options: RunOptions, kinds: StalenessChecker | None
) -> bool:
    """Return whether a run with *options* finds a document that needs a result; reads no further than the first one.

    Documents without text count as well: the aggregator is only used for those with a result, because a document that
    crashes it must do so in a run, which has a journal to notice it. *kinds* is required with ``options.only``.
    """
    retries = options.retry_failed or options.only == "failed"
    folders = ("pending", "retry", *(("quarantine",) if retries else ()))
    if any(any((files.directory / folder).glob("batch_*")) for folder in folders):
        return True
    selections: list[Selection] = ["all"] if options.reprocess or options.only else ["sweep"]
    if retries or files.lost_failures:
        selections = ["failed"] if options.only else [*selections, "failed"]
    bound = await store.upper_bound()
    for selection in selections:
        after: list[Any] = []
        while bound and (page := await store.read_page(selection, after, bound, options.batch_size)):
            after = [page[-1]["_id"]]
            if selection == "all" and options.reprocess:
                return True
            if selection == "all" and kinds is not None:
                if any(kind == options.only for _, kind in await kinds.of(page, set())):
                    return True
            else:
                done = await store.result_keys([document["_id"] for document in page])
                if len(done) < len(page) or (options.only is None and await grown_keys(store, page, done)):
                    return True
    return False


async def _one_by_one(files: Iterator[BatchFile]) -> AsyncGenerator[BatchFile]:
    """Yield *files*, each read when it is asked for: together they may be larger than the memory."""
    while (file := await asyncio.to_thread(next, files, None)) is not None:
        yield file


async def preview(
    store: DocumentStore,
    options: RunOptions,
    kinds: StalenessChecker | None = None,
    tell: Callable[[str], None] = logger.info,
) -> dict[str, Any]:
    """Return counts of the documents that a run with *options* would process, for ``--dry-run``; read only.

    *kinds* is required with ``options.only``; to_classify then includes documents that have a result.
    *tell* gets a line each LINE_EVERY_S.

    Keys: selected, to_classify, already_done, skipped (by reason), shapes, turns, characters (of the transcripts),
    first_ids (at most EXAMPLES, as text).
    """
    bound = await store.upper_bound()
    queued = await asyncio.to_thread(kinds.queued) if kinds else set()
    selections: list[Selection] = ["all" if options.only else "known" if options.reprocess else "sweep"]
    selections += ["failed"] if options.retry_failed and not options.reprocess else []
    report = Counter(dict.fromkeys(("selected", "to_classify", "already_done", "turns", "characters"), 0))
    skipped, shapes = Counter[str](), Counter[str]()
    first_ids: list[str] = []
    after: list[Any] = []
    shown_s = time.monotonic()
    while bound and selections and (options.limit is None or report["selected"] < options.limit):
        left = options.batch_size if options.limit is None else options.limit - report["selected"]
        size = options.batch_size if options.only else min(options.batch_size, left)
        page = await store.read_page(selections[0], after, bound, size)
        if not page:
            selections, after = selections[1:], []
            continue
        after = [page[-1]["_id"]]
        if kinds is not None and options.only:
            page = [document for document, kind in await kinds.of(page, queued) if kind == options.only][:left]
        replaces = options.reprocess or options.only in REPLACED
        done = set() if replaces else await store.result_keys([document["_id"] for document in page])
        done -= await grown_keys(store, page, done) if options.only is None else set()
        report.update(selected=len(page), already_done=len(done))
        if time.monotonic() - shown_s >= LINE_EVERY_S:
            shown_s = time.monotonic()
            tell(f"dry run: {report['selected']:,} documents read")
        for document in page:
            if id_key(document["_id"]) in done:
                continue
            try:
                conversation = aggregate_conversation(document)
            except SkippedDocumentError as exc:
                skipped[exc.reason] += 1
                continue
            report.update(to_classify=1, turns=len(conversation.turns), characters=len(conversation.transcript))
            shapes[conversation.shape] += 1
            first_ids.append(id_text(document["_id"]))
            del first_ids[EXAMPLES:]
    return {**report, "skipped": dict(skipped), "shapes": dict(shapes), "first_ids": first_ids}

"""The source of a run's documents: batches that are claimed, and saved to disk before they are processed."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Any

from domain.staleness import REPLACED, Only, StalenessChecker
from storage.contract import Document, Selection, Store
from storage.extended_json import id_key
from utils.batch_file_manager import BatchFiles
from worker.checkpoint import Checkpoint
from worker.quarantine import requeue
from worker.settlement import BatchInWork, Settlement, WorkItem, is_query

logger = logging.getLogger(__name__)

MAX_SWEEPS = 5


@dataclass(frozen=True, slots=True)
class RunOptions:
    """The options of one run. *limit* None takes all documents, *only* None all kinds (see domain.staleness)."""

    batch_size: int = 100
    limit: int | None = None
    reprocess: bool = False
    retry_failed: bool = False
    only: Only | None = None
    dedupe: bool = True


class DocumentIntake:
    """Reads, claims and saves documents; yields batches whose documents are all leased to this worker.

    Documents that already have a result only get their status; documents of another worker are counted and skipped.
    Batches that an interrupted run left in work are finished first, whatever ``options.only`` says: their answers may
    be in its journal. *kinds* is needed if ``options.only`` is given.
    """

    def __init__(
        self,
        store: Store,
        files: BatchFiles,
        checkpoint: Checkpoint,
        options: RunOptions,
        *,
        settlement: Settlement,
        kinds: StalenessChecker | None,
    ) -> None:
        self._store = store
        self._files = files
        self._checkpoint = checkpoint
        self._options = options
        self._settlement = settlement
        self._kinds = kinds
        self._recovered: set[bytes] = set()
        self._queued: set[bytes] = set()  # in local failure files when reading began, with ``options.only``
        self._taken = 0

    async def recovered(self) -> AsyncGenerator[BatchInWork]:
        """Yield the batches that an earlier run left in ``pending/``, with their journals replayed."""
        if self._options.retry_failed or self._options.only == "failed":
            requeued = await asyncio.to_thread(requeue, self._files)
            logger.info("%d quarantined documents are retried with a full set of attempts", requeued)
        for file in await asyncio.to_thread(lambda: list(self._files.load_pending())):
            batch = BatchInWork(file)
            logger.info("%s: %d documents from an earlier run", file.name, len(batch.items))
            self._recovered.update(item.key for item in batch.items)
            await self._keep_own(batch)
            yield batch

    async def fresh(self) -> AsyncGenerator[BatchInWork]:
        """Yield the selected documents in the order of ids, up to the greatest id at the start."""
        bound = await self._store.upper_bound()
        if not bound:
            return
        after = [self._checkpoint.low_water_mark] if self._checkpoint.has_mark else []
        only = self._options.only
        if only:
            self._queued = await asyncio.to_thread(self._files.failed_keys)
        selections: list[Selection] = ["all"] if self._options.reprocess or only else ["pending"]
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
        if self._options.only not in (None, "new"):
            return
        # A failed document whose status could not be written still looks pending.
        self._recovered |= self._settlement.failed_keys
        bound = await self._store.upper_bound()
        async for batch in self._pages("sweep", [], bound):
            logger.info("sweep: %d documents found", len(batch.items))
            yield batch

    async def given(self, documents: list[Document]) -> AsyncGenerator[BatchInWork]:
        """Yield *documents* as one batch, without those that have a result or belong to another worker."""
        self._settlement.stats.total += len(documents)
        own = await self._claimed(documents)
        if own:
            yield BatchInWork(await asyncio.to_thread(self._files.save_pending, own))

    async def retry_round(self) -> AsyncGenerator[BatchInWork]:
        """Yield each retry file once as a batch."""
        for file in await asyncio.to_thread(lambda: list(self._files.load_retry())):
            batch = BatchInWork(file, is_retry=True)
            if not await self._is_selected(batch):
                continue
            self._recovered.update(item.key for item in batch.items)
            await self._keep_own(batch)
            self._settlement.stats.retried += len(batch.items)
            yield batch

    @property
    def is_exhausted(self) -> bool:
        """True if ``options.limit`` is reached."""
        return self._options.limit is not None and self._taken >= self._options.limit

    async def _pages(
        self, selection: Selection, after: Sequence[Any], bound: Sequence[Any]
    ) -> AsyncGenerator[BatchInWork]:
        while not self.is_exhausted:
            page = await self._store.read_page(selection, after, bound, self._options.batch_size)
            if not page:
                return
            after = [page[-1]["_id"]]
            claimed_at = time.monotonic()
            documents = await self._claimed(await self._of_the_kind(page) if selection == "all" else page)
            if self._options.limit is not None:
                surplus = documents[self._options.limit - self._taken :]
                documents = documents[: self._options.limit - self._taken]
                if surplus:
                    await self._store.release([document["_id"] for document in surplus])
            if not documents:
                continue
            self._taken += len(documents)
            if self._options.only:  # their number is only known after the last page
                self._settlement.stats.total += len(documents)
            file = await asyncio.to_thread(self._files.save_pending, documents)
            await self._store.mark_processing([document["_id"] for document in documents if not is_query(document)])
            in_order = selection in ("pending", "all")
            # Not the time of now: this process may have been suspended since it claimed them.
            yield BatchInWork(file, mark=self._settlement.mark if in_order else None, claimed_at=claimed_at)

    async def _claimed(self, page: list[Document]) -> list[Document]:
        """Lease the documents of *page* and return those that need a result."""
        keyed = [(key, document) for document in page if (key := id_key(document["_id"])) not in self._recovered]
        if not keyed:
            return []
        own = await self._store.claim([document["_id"] for _, document in keyed])
        leased = [(key, document) for key, document in keyed if key in own]
        self._settlement.stats.leased_elsewhere += len(keyed) - len(leased)
        if not leased:
            return []
        # After the lease: the worker that held it before may have stored the result.
        done = await self._done([document for _, document in leased])
        finished = [document for key, document in leased if key in done]
        if finished:
            self._settlement.found_done(finished)
            await self._store.release([document["_id"] for document in finished])
        return [document for key, document in leased if key not in done]

    async def is_still_ours(self, item: WorkItem) -> bool:
        """Return whether *item* still needs a result from this worker; if another worker finished it, it gets its status."""
        return bool(await self._own([item]))

    async def _keep_own(self, batch: BatchInWork) -> None:
        """Remove documents from a recovered *batch* that other workers hold, or have finished since."""
        batch.items = await self._own(batch.items)
        batch.unsettled = len(batch.items)

    async def _own(self, items: list[WorkItem]) -> list[WorkItem]:
        own = await self._store.claim([item.document_id for item in items])
        done = await self._done([item.document for item in items])
        self._settlement.found_done([item.document for item in items if item.key in done])
        self._settlement.stats.leased_elsewhere += sum(item.key not in own | done for item in items)
        return [item for item in items if item.key in own - done]

    async def _done(self, documents: list[Document]) -> set[bytes]:
        if self._kinds is not None and self._options.only in REPLACED:
            return await self._kinds.settled(documents, self._options.only)
        job_id = self._checkpoint.job_id if self._options.reprocess else None
        return await self._store.result_keys([document["_id"] for document in documents], job_id)

    async def _of_the_kind(self, page: list[Document]) -> list[Document]:
        """Return the documents of *page* that ``options.only`` selects."""
        if self._kinds is None or self._options.only is None:
            return page
        found = await self._kinds.of(page, self._queued | self._settlement.failed_keys)
        return [document for document, kind in found if kind == self._options.only]

    async def _is_selected(self, batch: BatchInWork) -> bool:
        """Return whether this run retries *batch*: with ``options.only``, it leaves the retry files of other runs alone."""
        only = self._options.only
        if only in (None, "failed") or self._settlement.failed_keys & {item.key for item in batch.items}:
            return True
        if self._kinds is None or only not in REPLACED:
            return False
        documents = [item.document for item in batch.items]  # of the same run, before its interruption
        return only in {kind for _, kind in await self._kinds.of(documents, set())}

"""Where the documents of a run come from, one batch at a time, each on disk before it is worked on."""

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
from worker.items import BatchInWork, WorkItem, batch_in_work, is_query
from worker.quarantine import release
from worker.settlement import Settlement

logger = logging.getLogger(__name__)

MAX_SWEEPS = 5


@dataclass(frozen=True, slots=True)
class RunOptions:
    """What one run shall do. *limit* None takes every document; so does *only* None, see domain.staleness."""

    batch_size: int = 100
    limit: int | None = None
    reprocess: bool = False
    retry_failed: bool = False
    only: Only | None = None
    dedupe: bool = True


class DocumentIntake:
    """Reads, claims and saves documents; yields batches whose every document is this worker's.

    Documents that have a result already only get their status; ones that another worker
    holds are counted and left alone. With ``options.only``, the documents that an interrupted run left in work are
    finished first all the same: their answers may be in its journal.
    """

    kinds: StalenessChecker | None = None  # set where ``options.only`` is

    def __init__(
        self, store: Store, files: BatchFiles, checkpoint: Checkpoint, options: RunOptions, *, settlement: Settlement
    ) -> None:
        self._store = store
        self._files = files
        self._checkpoint = checkpoint
        self._options = options
        self._settlement = settlement
        self._recovered: set[bytes] = set()
        self._queued: set[bytes] = set()  # what was in local files when the pages began, with ``options.only``
        self._taken = 0

    async def recovered(self) -> AsyncGenerator[BatchInWork]:
        """Yield the batches an earlier run left in ``pending/``, journal replayed."""
        if self._options.retry_failed or self._options.only == "failed":
            released = await asyncio.to_thread(release, self._files)
            logger.info("%d quarantined documents get fresh attempts", released)
        for file in await asyncio.to_thread(lambda: list(self._files.load_pending())):
            batch = batch_in_work(file)
            logger.info("%s: %d documents from an earlier run", file.name, len(batch.items))
            self._recovered.update(item.key for item in batch.items)
            await self._keep_own(batch)
            yield batch

    async def fresh(self) -> AsyncGenerator[BatchInWork]:
        """Yield the selected documents up to the greatest id there is now, in the order of ids."""
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
            if selection == "failed":  # what is queued has its rounds already
                self._recovered |= self._settlement.failed_keys | await asyncio.to_thread(self._files.failed_keys)
            async for batch in self._pages(selection, after if selection != "failed" else [], bound):
                yield batch

    async def sweep(self) -> AsyncGenerator[BatchInWork]:
        """Yield documents that are pending or were left processing, and have no result: late small ids, lost files."""
        if self._options.only not in (None, "new"):
            return
        # A document that failed and could not be given its status still looks pending; it has had its turn.
        self._recovered |= self._settlement.failed_keys
        bound = await self._store.upper_bound()
        async for batch in self._pages("sweep", [], bound):
            logger.info("sweep: %d documents found", len(batch.items))
            yield batch

    async def given(self, documents: list[Document]) -> AsyncGenerator[BatchInWork]:
        """Yield *documents* as one batch, without those that have a result or belong to another worker."""
        own = await self._claimed(documents)
        if own:
            yield batch_in_work(await asyncio.to_thread(self._files.save_pending, own))

    async def retry_round(self) -> AsyncGenerator[BatchInWork]:
        """Yield each retry file once as a batch."""
        for file in await asyncio.to_thread(lambda: list(self._files.load_retry())):
            batch = batch_in_work(file, is_retry=True)
            if not await self._is_selected(batch):
                continue
            self._recovered.update(item.key for item in batch.items)
            await self._keep_own(batch)
            self._settlement.stats.retried += len(batch.items)
            yield batch

    @property
    def is_exhausted(self) -> bool:
        """Whether the limit of documents is reached."""
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
            if self._options.only:  # how many there are is not known before the last page
                self._settlement.stats.total += len(documents)
            file = await asyncio.to_thread(self._files.save_pending, documents)
            await self._store.mark_processing([document["_id"] for document in documents if not is_query(document)])
            in_order = selection in ("pending", "all")
            batch = batch_in_work(file, mark=self._settlement.mark if in_order else None)
            batch.claimed_at = claimed_at  # this worker may have been held up since
            yield batch

    async def _claimed(self, page: list[Document]) -> list[Document]:
        """Return the documents of *page* that are nobody's yet and need a result; they are leased now."""
        page = [document for document in page if id_key(document["_id"]) not in self._recovered]
        if not page:
            return []
        own = await self._store.claim([document["_id"] for document in page])
        leased = [document for document in page if id_key(document["_id"]) in own]
        self._settlement.stats.leased_elsewhere += len(page) - len(leased)
        if not leased:
            return []
        # Asked after the lease: a worker that held it before may have stored the result meanwhile.
        done = await self._done(leased)
        finished = [document for document in leased if id_key(document["_id"]) in done]
        if finished:
            self._settlement.found_done(finished)
            await self._store.release([document["_id"] for document in finished])
        return [document for document in leased if id_key(document["_id"]) not in done]

    async def is_still_ours(self, item: WorkItem) -> bool:
        """Whether *item* still needs a result, and from this worker; one that another finished gets its status."""
        alone = BatchInWork(item.batch.file, items=[item])
        await self._keep_own(alone)
        return bool(alone.items)

    async def _keep_own(self, batch: BatchInWork) -> None:
        """Take out of a recovered *batch* what others hold or have finished since."""
        own = await self._store.claim([item.document_id for item in batch.items])
        done = await self._done([item.document for item in batch.items])
        self._settlement.found_done([item.document for item in batch.items if item.key in done])
        kept = [item for item in batch.items if item.key in own and item.key not in done]
        self._settlement.stats.leased_elsewhere += sum(
            item.key not in own and item.key not in done for item in batch.items
        )
        batch.items, batch.unsettled = kept, len(kept)

    async def _done(self, documents: list[Document]) -> set[bytes]:
        if self.kinds is not None and self._options.only in REPLACED:
            return await self.kinds.settled(documents, self._options.only)
        job_id = self._checkpoint.job_id if self._options.reprocess else None
        return await self._store.result_keys([document["_id"] for document in documents], job_id)

    async def _of_the_kind(self, page: list[Document]) -> list[Document]:
        """Return the documents of *page* that ``options.only`` selects."""
        if self.kinds is None or self._options.only is None:
            return page
        found = await self.kinds.of(page, self._queued | self._settlement.failed_keys)
        return [document for document, kind in found if kind == self._options.only]

    async def _is_selected(self, batch: BatchInWork) -> bool:
        """Whether *batch*, a retry file, is of this run: ``options.only`` leaves the queue of others alone."""
        only = self._options.only
        if only in (None, "failed") or self._settlement.failed_keys & {item.key for item in batch.items}:
            return True
        if self.kinds is None or only not in REPLACED:
            return False
        documents = [item.document for item in batch.items]  # of the same run, before it was interrupted
        return only in {kind for _, kind in await self.kinds.of(documents, set())}

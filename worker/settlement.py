"""How documents end: their counts, their source status, their place in the local files, the checkpoint."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import asdict
from typing import Any

from error_handler import FailureThresholdError, Reason
from storage.contract import FinalStatus, Store
from storage.extended_json import id_key, id_text
from utils.batch_file_manager import BatchFiles, FailedDocument
from worker.checkpoint import CHECKPOINT_EVERY, Checkpoint, LowWaterMark, RunStats
from worker.items import MAX_ROUNDS, BatchInWork, Failure, StatusUpdates, WorkItem

logger = logging.getLogger(__name__)

FAILURE_SHARE, FAILURE_MINIMUM = 0.10, 50  # the run stops above this share, from this many documents on
IDS_PER_UPDATE = 1000


class Settlement:
    """Settles documents in memory at once, and in MongoDB and the files when ``flush`` is called.

    The order of ``flush`` is what makes a crash harmless: source statuses, then retry and
    quarantine entries, then the batch is completed, its leases end, and the checkpoint moves.
    """

    def __init__(self, store: Store, files: BatchFiles, checkpoint: Checkpoint) -> None:
        self._store = store
        self._files = files
        self._checkpoint = checkpoint
        self._finished: list[BatchInWork] = []
        self._failed: dict[bytes, str] = {}  # reason by id_key, of documents that failed in this run
        self._failed_before: set[bytes] = set()  # those of them that a journal knew; an earlier threshold had them
        self._flushing = asyncio.Lock()
        self.stats = RunStats()
        self.statuses = StatusUpdates()
        self.mark = LowWaterMark()
        self.unsettled = 0
        self.since_flush = 0
        self.due = asyncio.Event()  # set when CHECKPOINT_EVERY documents wait to be flushed

    @property
    def failed_keys(self) -> set[bytes]:
        """The ``id_key`` of each document that failed in this run and has no result yet."""
        return set(self._failed)

    def admit(self, batch: BatchInWork) -> None:
        """Take responsibility for every document of *batch*."""
        self.unsettled += batch.unsettled
        if batch.unsettled == 0:
            self._finished.append(batch)

    def succeed(self, item: WorkItem, result: dict[str, Any]) -> None:
        """The *result* of *item* is stored."""
        self._count_success(item.key)
        self.stats.count_labels(result["classification"])
        self.stats.count_confidence(result["processing_metadata"])
        self.stats.copied += "copied_from" in result["processing_metadata"]
        item.batch.counts["successful"] += 1
        self._settle(item, "processed", None)

    def found_done(self, documents: list[dict[str, Any]]) -> None:
        """*documents* were found to have a result; they only get their status."""
        for document in documents:
            key = id_key(document.get("_id"))
            if key in self._failed:  # its write was stored after all
                self._count_success(key)
            else:
                self.stats.already_done += 1
            self.statuses.add_done(document)

    def skip(self, item: WorkItem, reason: str, explanation: str) -> None:
        """There is nothing in *item* to classify."""
        self.stats.processed += 1
        self.stats.skipped += 1
        self.stats.count_reason(reason)
        item.batch.counts["skipped"] += 1
        logger.info("document %s skipped: %s", id_text(item.document_id), explanation)
        self._settle(item, "skipped", f"{reason}: {explanation}")

    def fail(self, item: WorkItem, failure: Failure, result: dict[str, Any] | None = None) -> None:
        """This round of *item* failed; *result* is its finished result where only the write failed.

        Raises:
            FailureThresholdError: Too large a share of the documents fails. *item* is settled.
        """
        earlier = self._failed.get(item.key)
        if earlier is None:
            self.stats.processed += 1
            self.stats.failed += 1
            if item.past.reason is not None:
                self._failed_before.add(item.key)
        else:
            self.stats.uncount_reason(earlier)
        self._failed[item.key] = failure.reason
        self.stats.count_reason(failure.reason)
        item.batch.counts["failed"] += 1
        final = failure.is_final or item.rounds >= MAX_ROUNDS
        entry = FailedDocument(
            conversation_id=item.document_id,
            status="write_failed" if result is not None else "llm_failed",
            conversation_data=item.document,
            retry_count=item.rounds,
            reason=failure.reason,
            error=failure.message,
            classification_result=result,
        )
        (item.batch.to_quarantine if final else item.batch.to_retry).append(entry)
        where = "quarantined" if final else "queued for another round"
        logger.warning("document %s %s: %s: %s", id_text(item.document_id), where, failure.reason, failure.message)
        self._settle(item, "failed", f"{failure.reason}: {failure.message}")
        self._require_few_failures()

    def _count_success(self, key: bytes) -> None:
        earlier = self._failed.pop(key, None)
        self._failed_before.discard(key)
        if earlier is None:
            self.stats.processed += 1
        else:
            self.stats.failed -= 1
            self.stats.uncount_reason(earlier)
        self.stats.successful += 1

    def _require_few_failures(self) -> None:
        stats = self.stats
        # A database that is away is no fault of the documents, and ends the run by itself.
        failed_now = sum(
            reason != Reason.STORE_FAILED and key not in self._failed_before for key, reason in self._failed.items()
        )
        if stats.processed >= FAILURE_MINIMUM and failed_now > FAILURE_SHARE * stats.processed:
            reasons = list(self._failed.values())
            raise FailureThresholdError(
                f"{stats.failed} of {stats.processed} documents failed, mostly for {max(set(reasons), key=reasons.count)}; "
                "remove the cause and run the same command again, the failed ones are in the retry queue."
            )

    def _settle(self, item: WorkItem, status: FinalStatus, reason: str | None) -> None:
        self.statuses.add(item, status, reason)
        self.drop(item)

    def drop(self, item: WorkItem) -> None:
        """Owe nothing for *item* any more: it is settled, or another worker has it now."""
        if item.ticket is not None:
            self.mark.settle(item.ticket)
        item.batch.unsettled -= 1
        self.unsettled -= 1
        self.since_flush += 1
        if self.since_flush >= CHECKPOINT_EVERY:
            self.due.set()
        if item.batch.unsettled == 0:
            self._finished.append(item.batch)

    async def flush(self) -> None:
        """Bring MongoDB, the files and the checkpoint up to what is settled.

        Raises:
            StoreError, StateDirectoryError: What could not be written is kept for the next time,
                as it is when this is cancelled.
        """
        async with self._flushing:
            finished, self._finished = self._finished, []
            self.since_flush = 0
            self.due.clear()
            try:
                await self._flush_statuses()
                while finished:
                    await asyncio.to_thread(self._finish, finished[0])
                    batch = finished.pop(0)
                    batch.items.clear()  # each knows its batch: in a circle, they would wait for the garbage collector
                    await self._store.release(batch.document_ids)
            finally:
                self._finished = finished + self._finished
            self.mark.advance(self._checkpoint)
            self._checkpoint.counts = asdict(self.stats)
            await asyncio.to_thread(self._files.write_state, "checkpoint.json", self._checkpoint.as_dict())

    async def _flush_statuses(self) -> None:
        groups = self.statuses.take()
        try:
            for (status, reason, queries), document_ids in list(groups.items()):
                for start in range(0, len(document_ids), IDS_PER_UPDATE):
                    chunk = document_ids[start : start + IDS_PER_UPDATE]
                    await self._store.mark(chunk, status, reason, queries=queries)
                del groups[(status, reason, queries)]
        finally:
            self.statuses.put_back(groups)

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

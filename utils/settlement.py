"""How documents end: their counts, their source status, their place in the local files, the checkpoint."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import asdict
from typing import Any

from error_handler import (
    FailureThresholdError,
    LLMModelError,
    LLMRejectedError,
    PoisonDocumentError,
    Reason,
    StoreError,
    StoreRejectedError,
    TriadError,
)
from utils.batch_file_manager import BatchFiles, FailedDocument
from utils.batch_work import MAX_ROUNDS, BatchInWork, StatusUpdates, WorkItem
from utils.checkpoint import CHECKPOINT_EVERY, Checkpoint, LowWaterMark, RunStats
from utils.extended_json import id_text
from utils.store_protocol import FinalStatus, Store

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
        self._failed: dict[bytes, str] = {}
        self._flushing = asyncio.Lock()
        self.stats = RunStats()
        self.statuses = StatusUpdates()
        self.mark = LowWaterMark()
        self.unsettled = 0
        self.since_flush = 0
        self.due = asyncio.Event()  # set when CHECKPOINT_EVERY documents wait to be flushed

    def admit(self, batch: BatchInWork) -> None:
        """Take responsibility for every document of *batch*."""
        self.unsettled += batch.unsettled
        if batch.unsettled == 0:
            self._finished.append(batch)

    def succeed(self, item: WorkItem, result: dict[str, Any]) -> None:
        """The *result* of *item* is stored."""
        self.stats.count_labels(result["classification"])
        if self._failed.pop(item.key, None) is None:
            self.stats.processed += 1
        else:
            self.stats.failed -= 1
        self.stats.successful += 1
        item.batch.counts["successful"] += 1
        self._settle(item, "processed", None)

    def skip(self, item: WorkItem, reason: str, explanation: str) -> None:
        """There is nothing in *item* to classify."""
        self.stats.processed += 1
        self.stats.skipped += 1
        self.stats.count_reason(reason)
        item.batch.counts["skipped"] += 1
        logger.info("document %s skipped: %s", id_text(item.document_id), explanation)
        self._settle(item, "skipped", f"{reason}: {explanation}")

    def fail(self, item: WorkItem, error: TriadError, result: dict[str, Any] | None = None) -> None:
        """This round of *item* failed; *result* is its finished result where only the write failed.

        Raises:
            FailureThresholdError: Too large a share of the documents fails. *item* is settled.
        """
        if item.key not in self._failed:
            self.stats.processed += 1
            self.stats.failed += 1
        self._failed[item.key] = error.reason
        item.batch.counts["failed"] += 1
        final = is_final(error) or item.rounds >= MAX_ROUNDS
        entry = FailedDocument(
            conversation_id=item.document_id,
            status="write_failed" if result is not None else "llm_failed",
            conversation_data=item.document,
            retry_count=item.rounds,
            reason=error.reason,
            error=str(error),
            classification_result=result,
        )
        (item.batch.to_quarantine if final else item.batch.to_retry).append(entry)
        where = "quarantined" if final else "queued for another round"
        logger.warning("document %s %s: %s: %s", id_text(item.document_id), where, error.reason, error)
        self._settle(item, "failed", f"{error.reason}: {error}")
        if self.stats.processed >= FAILURE_MINIMUM and self.stats.failed > FAILURE_SHARE * self.stats.processed:
            raise FailureThresholdError(
                f"{self.stats.failed} of {self.stats.processed} documents failed, mostly for {self._main_reason()}; "
                "remove the cause and run the same command again, the failed ones are in the retry queue."
            )

    def _main_reason(self) -> str:
        reasons = list(self._failed.values())
        return max(set(reasons), key=reasons.count)

    def _settle(self, item: WorkItem, status: FinalStatus, reason: str | None) -> None:
        self.statuses.add(item, status, reason)
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
            StoreError, StateDirectoryError: What could not be written is kept for the next time.
        """
        async with self._flushing:
            finished, self._finished = self._finished, []
            self.since_flush = 0
            self.due.clear()
            try:
                await self._flush_statuses()
            except StoreError:
                self._finished = finished + self._finished
                raise
            while finished:
                try:
                    await asyncio.to_thread(self._finish, finished[0])
                except TriadError:
                    self._finished = finished + self._finished
                    raise
                await self._store.release(finished.pop(0).document_ids)
            self.mark.advance(self._checkpoint)
            self._checkpoint.counts = self.counts()
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

    def counts(self) -> dict[str, Any]:
        """Return the counts so far, reasons of failed documents included."""
        counts = asdict(self.stats)
        for reason in self._failed.values():
            counts["reasons"][reason] = counts["reasons"].get(reason, 0) + 1
        return counts


def is_final(error: TriadError) -> bool:
    """Whether another round cannot help the document that failed with *error*."""
    if isinstance(error, LLMModelError):
        return False
    return (
        isinstance(error, LLMRejectedError | PoisonDocumentError | StoreRejectedError)
        or error.reason is Reason.CONTEXT_OVERFLOW
    )

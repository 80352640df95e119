"""What the batch worker holds in memory: documents in work, their batches, and the status updates they owe."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from error_handler import LLMModelError, LLMRejectedError, PoisonDocumentError, Reason, StoreRejectedError, TriadError
from storage.contract import FinalStatus
from storage.extended_json import id_key
from storage.journal import JournalEntry
from utils.batch_file_manager import BatchFile, FailedDocument
from worker.checkpoint import LowWaterMark

MAX_ROUNDS = 3  # retry rounds of one document before it is quarantined


@dataclass(frozen=True, slots=True)
class Failure:
    """Why one round of a document failed; *is_final* where another round cannot help."""

    reason: Reason
    message: str
    is_final: bool


def failure_of(error: TriadError) -> Failure:
    """Return what *error* means for the document it struck."""
    refused = isinstance(error, LLMRejectedError | PoisonDocumentError | StoreRejectedError)
    is_final = (refused and not isinstance(error, LLMModelError)) or error.reason is Reason.CONTEXT_OVERFLOW
    return Failure(error.reason, str(error), is_final)


@dataclass(slots=True)
class WorkItem:
    """One document in work. *rounds* counts its earlier retry rounds; *ticket* is its place in the reading order."""

    document: dict[str, Any]
    batch: BatchInWork
    key: bytes
    past: JournalEntry
    ticket: int | None = None
    rounds: int = 0
    known_result: dict[str, Any] | None = None

    @property
    def document_id(self) -> Any:
        """The source ``_id``."""
        return self.document.get("_id")


@dataclass(slots=True)
class BatchInWork:
    """A batch whose documents are not all settled yet. *is_retry* tells a round of a retry file.

    *claimed_at* is ``time.monotonic()`` when its documents were this worker's for sure.
    """

    file: BatchFile
    is_retry: bool = False
    items: list[WorkItem] = field(default_factory=list)
    unsettled: int = 0
    counts: dict[str, int] = field(default_factory=lambda: {"successful": 0, "failed": 0, "skipped": 0})
    to_retry: list[FailedDocument] = field(default_factory=list)
    to_quarantine: list[FailedDocument] = field(default_factory=list)
    claimed_at: float = field(default_factory=time.monotonic)

    @property
    def document_ids(self) -> list[Any]:
        """The ids of all documents of the batch, in its order."""
        return [document.get("_id") for document in self.file.documents]


def batch_in_work(file: BatchFile, *, is_retry: bool = False, mark: LowWaterMark | None = None) -> BatchInWork:
    """Return *file* with one WorkItem for each of its documents; with *mark*, they are noted as read."""
    batch = BatchInWork(file, is_retry)
    for document in file.documents:
        key = id_key(document.get("_id"))
        failure = file.failures.get(key)
        item = WorkItem(document, batch, key, file.replay.entry(key))
        if failure is not None:
            item.rounds = failure.retry_count + 1 if is_retry else 0
            item.known_result = failure.classification_result
        if mark is not None:
            item.ticket = mark.read(document.get("_id"))
        batch.items.append(item)
    batch.unsettled = len(batch.items)
    return batch


def is_query(document: dict[str, Any]) -> bool:
    """Whether *document* has the shape of a single query, whose status fields differ."""
    return not document.keys() & {"tweets", "messages", "status"} and bool(document.keys() & {"text", "processed"})


class StatusUpdates:
    """Final statuses that the source documents still have to be told, grouped into as few updates as possible."""

    def __init__(self) -> None:
        self._groups: dict[tuple[FinalStatus, str | None, bool], list[Any]] = {}

    def add(self, item: WorkItem, status: FinalStatus, reason: str | None) -> None:
        """Note that the document of *item* ended as *status*."""
        self._groups.setdefault((status, reason, is_query(item.document)), []).append(item.document_id)

    def add_done(self, document: dict[str, Any]) -> None:
        """Note that *document* has a result, found and not made now."""
        self._groups.setdefault(("processed", None, is_query(document)), []).append(document.get("_id"))

    def take(self) -> dict[tuple[FinalStatus, str | None, bool], list[Any]]:
        """Return the groups ``(status, reason, is_query) -> ids`` and start anew."""
        groups, self._groups = self._groups, {}
        return groups

    def put_back(self, groups: dict[tuple[FinalStatus, str | None, bool], list[Any]]) -> None:
        """Keep *groups* that could not be written for the next time."""
        for group, document_ids in groups.items():
            self._groups.setdefault(group, []).extend(document_ids)

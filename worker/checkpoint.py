"""The progress of a run: its counts, its checkpoint, and the low-water mark of settled documents."""

from __future__ import annotations

import secrets
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from domain.conversation import stored_labels
from utils.batch_file_manager import BatchFiles

CHECKPOINT_EVERY = 50  # documents


@dataclass(slots=True)
class RunStats:
    """Counts of one run.

    *skipped* documents have nothing to classify. *already_done* documents had a result, *leased_elsewhere* ones belong
    to another worker; neither counts as processed. *with_confidence* counts results with the model's confidence,
    *needs_review* those of them with a label below REVIEW_BELOW. *copied* is the part of *successful* that reused the
    result of an identical conversation, *by_student* the part that the student answered. *urgent* documents
    went first.
    """

    total: int = 0
    processed: int = 0
    successful: int = 0
    failed: int = 0
    skipped: int = 0
    already_done: int = 0
    leased_elsewhere: int = 0
    quarantined: int = 0
    retried: int = 0
    with_confidence: int = 0
    needs_review: int = 0
    copied: int = 0
    by_student: int = 0
    urgent: int = 0
    reasons: dict[str, int] = field(default_factory=dict)
    labels: dict[str, dict[str, int]] = field(default_factory=dict)  # field -> label -> documents

    @property
    def expected(self) -> int:
        """The number of documents that the run processes; documents that arrive during the run raise it."""
        return max(self.total, self.processed)

    def count_labels(self, classification: Mapping[str, Any]) -> None:
        """Count the labels of one stored result."""
        for name, labels in stored_labels(classification).items():
            counts = self.labels.setdefault(name, {})
            for label in labels:
                counts[label] = counts.get(label, 0) + 1

    def count_result(self, result: dict[str, Any]) -> None:
        """Count the labels, the confidence and the origin of one stored result."""
        self.count_labels(result["classification"])
        metadata = result["processing_metadata"]
        self.with_confidence += "confidence" in metadata
        self.needs_review += metadata.get("needs_review") is True
        self.copied += "copied_from" in metadata
        self.by_student += "copied_from" not in metadata and metadata.get("label_source") == "student"

    def count_reason(self, reason: str, change: int = 1) -> None:
        """Count one document that failed or was skipped because of *reason*; -1 if a later round ended differently."""
        self.reasons[reason] = self.reasons.get(reason, 0) + change
        if not self.reasons[reason]:
            del self.reasons[reason]


@dataclass(slots=True)
class Checkpoint:
    """The content of ``checkpoint.json``.

    *source* names database, source and results collection; a checkpoint of another source is ignored. *finished* is
    False for a run that was interrupted.
    """

    source: str
    job_id: str
    reprocess: bool = False
    low_water_mark: Any = None
    has_mark: bool = False  # null is a valid _id, so None cannot mean "no mark"
    finished: bool = False
    counts: dict[str, Any] = field(default_factory=dict)
    only: str | None = None  # RunOptions.only
    worker_id: str | None = None  # if worker.json is lost: leases belong to this id
    subset: str | None = None  # Subset.name; the mark of a part says nothing about the others

    @classmethod
    def resume_or_new(
        cls,
        saved: dict[str, Any] | None,
        source: str,
        worker_id: str,
        *,
        reprocess: bool,
        only: str | None = None,
        subset: str | None = None,
    ) -> Checkpoint:
        """Return the interrupted run in *saved*, or a new run for *source*."""
        job_id = f"job_{datetime.now(UTC):%Y%m%d_%H%M%S}_{secrets.token_hex(3)}"
        checkpoint = cls(source, job_id, reprocess, only=only, worker_id=worker_id, subset=subset)
        saved = saved or {}
        is_same = all(
            saved.get(name) == getattr(checkpoint, name)
            for name in ("source", "reprocess", "only", "subset", "finished")
        )
        if is_same and isinstance(saved.get("job_id"), str):
            checkpoint.job_id = saved["job_id"]
            checkpoint.low_water_mark = saved.get("low_water_mark")
            checkpoint.has_mark = saved.get("has_mark") is True
        return checkpoint


class LowWaterMark:
    """The last id of the longest prefix of settled documents, in the order they were read."""

    def __init__(self) -> None:
        self._waiting: deque[tuple[int, Any]] = deque()
        self._settled: set[int] = set()
        self._next = 0

    def read(self, document_id: Any) -> int:
        """Record a document that was read; return its ticket for ``settle``."""
        ticket = self._next
        self._next += 1
        self._waiting.append((ticket, document_id))
        return ticket

    def settle(self, ticket: int) -> None:
        """Record that this run is done with the document of *ticket*."""
        self._settled.add(ticket)

    def advance(self, checkpoint: Checkpoint) -> None:
        """Move the mark of *checkpoint* to the end of the settled prefix."""
        while self._waiting and self._waiting[0][0] in self._settled:
            ticket, document_id = self._waiting.popleft()
            self._settled.discard(ticket)
            checkpoint.low_water_mark, checkpoint.has_mark = document_id, True


def worker_id(files: BatchFiles) -> str:
    """Return the id under which the worker of the directory of *files* holds leases, the same after a crash."""
    for name in ("worker.json", "checkpoint.json"):
        known = (files.read_state(name) or {}).get("worker_id")
        if isinstance(known, str):
            return known
    new = f"worker-{secrets.token_hex(8)}"
    files.write_state("worker.json", {"worker_id": new})
    return new

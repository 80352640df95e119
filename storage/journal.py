"""An append-only journal of the documents of one batch.

Each event is one line of Extended JSON in one ``write``, so a killed process leaves whole lines. The journal is not
fsynced: after a power cut the model is asked again, and nothing is lost.

Events: ``started`` before a document is processed, ``asked`` before it waits for the model, ``released`` if the run
stops meanwhile, ``answered`` with the result, ``skipped`` and ``failed`` with the reason. Replaying them shows what a
crash interrupted and whether the document is a suspect: one that was *started* but not *asked* was being processed by
this process; one that was *asked* was only waiting.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from error_handler import Reason, StateDirectoryError
from storage import extended_json

MAX_DEATHS_IN_HAND = 2  # crashes while the process worked on this document
MAX_DEATHS_WAITING = 5  # crashes while it waited for the model; mostly not its fault


@dataclass(slots=True)
class JournalEntry:
    """What the journal recorded about one document.

    *in_hand* and *waiting* count the crashes while it was processed, and while it waited for the model. *reason* goes
    with *problem* and, for failures, with *is_final*; *result* is the document to store.
    """

    in_hand: int = 0
    waiting: int = 0
    result: dict[str, Any] | None = None
    reason: Reason | None = None
    problem: str = ""
    is_final: bool = False
    is_skipped: bool = False
    settled: bool = False

    @property
    def is_poison(self) -> bool:
        """Whether the document ended the process too often to be tried again."""
        return not self.settled and (self.in_hand >= MAX_DEATHS_IN_HAND or self.waiting >= MAX_DEATHS_WAITING)


class BatchJournal:
    """The journal at *path*; opened at the first event, closed by ``close``."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._handle: int | None = None

    def started(self, document_id: Any) -> None:
        """Record that processing of the document begins."""
        self._append({"e": "started", "id": document_id})

    def asked(self, document_id: Any) -> None:
        """Record that the document now waits for the model."""
        self._append({"e": "asked", "id": document_id})

    def released(self, document_id: Any) -> None:
        """Record that the run stopped while the document waited."""
        self._append({"e": "released", "id": document_id})

    def answered(self, document_id: Any, result: dict[str, Any]) -> None:
        """Record the finished result, which is kept until MongoDB has it."""
        self._append({"e": "answered", "id": document_id, "result": result})

    def skipped(self, document_id: Any, reason: Reason, problem: str) -> None:
        """Record that there is nothing to classify."""
        self._append({"e": "skipped", "id": document_id, "reason": reason, "problem": problem})

    def failed(self, document_id: Any, reason: Reason, problem: str, *, is_final: bool) -> None:
        """Record that this round of the document failed; *is_final* if another round cannot help."""
        self._append({"e": "failed", "id": document_id, "reason": reason, "problem": problem, "is_final": is_final})

    def close(self) -> None:
        """Close the file, which stays."""
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None

    def _append(self, event: dict[str, Any]) -> None:
        line = extended_json.dumps(event) + b"\n"
        try:
            if self._handle is None:
                self._handle = _open_on_new_line(self.path)
            written = os.write(self._handle, line)
        except OSError as exc:
            raise StateDirectoryError(
                f"{self.path} cannot be written ({exc.strerror}); free space or fix the permissions, then run again."
            ) from exc
        if written != len(line):
            raise StateDirectoryError(
                f"{self.path} could only be written in part (disk full?); free space, then run again."
            )


def _open_on_new_line(path: Path) -> int:
    """Open *path* for appending; first end a line that a full disk truncated."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o600)
    size = os.fstat(handle).st_size
    if size and os.pread(handle, 1, size - 1) != b"\n":
        os.write(handle, b"\n")
    return handle


def replay_journal(path: Path) -> dict[bytes, JournalEntry]:
    """Return the entries of the journal at *path* by ``id_key``; a missing journal is empty, torn lines are ignored.

    Raises:
        StateDirectoryError: The file exists but cannot be read.
    """
    entries: dict[bytes, JournalEntry] = {}
    try:
        with open(path, "rb") as file:
            for line in file:
                try:
                    event = extended_json.loads(line)
                    _apply(entries, event)
                except (ValueError, KeyError, TypeError):
                    continue
    except FileNotFoundError:
        pass
    except OSError as exc:
        raise StateDirectoryError(
            f"{path} cannot be read ({exc.strerror}); fix the permissions, then run again."
        ) from exc
    return entries


def _apply(entries: dict[bytes, JournalEntry], event: dict[str, Any]) -> None:
    entry = entries.setdefault(extended_json.id_key(event["id"]), JournalEntry())
    match event["e"]:
        case "started":
            entry.in_hand += 1
        case "asked":
            entry.in_hand -= 1
            entry.waiting += 1
        case "released":
            entry.waiting -= 1
        case "answered":
            entry.result, entry.settled = event["result"], True
        case "skipped" | "failed":
            entry.reason, entry.problem, entry.settled = Reason(event["reason"]), str(event["problem"]), True
            entry.is_final = event.get("is_final") is True
            entry.is_skipped = event["e"] == "skipped"

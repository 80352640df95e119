"""What has happened to the documents of one batch since its file was written: an append-only log.

One line per event, Extended JSON, in one ``write`` each, so that a killed process leaves whole
lines. It is not fsynced: after a power cut its answers are asked for again, and nothing is lost.

Events: ``started`` before a document is touched, ``asked`` before it waits for the model,
``released`` when the run is stopped meanwhile, ``answered`` with the result, ``skipped`` and ``failed``
with the reason. Replaying them tells what a
crash interrupted, and whose fault it was: a document that was *started* and not yet *asked* was in
the hands of this process alone; one that was *asked* was only waiting.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from error_handler import Reason, StateDirectoryError
from storage import extended_json

MAX_DEATHS_IN_HAND = 2  # crashes while the process had this document in hand
MAX_DEATHS_WAITING = 5  # crashes while it waited for the model; mostly somebody else's fault


@dataclass(slots=True)
class JournalEntry:
    """What the journal knows of one document.

    *reason* goes with *problem* and, for failures, with *is_final*; *result* is the document to store.
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
        """Whether the document ended the process too often to be tried once more."""
        return not self.settled and (self.in_hand >= MAX_DEATHS_IN_HAND or self.waiting >= MAX_DEATHS_WAITING)


class BatchJournal:
    """Appends the events of one batch to *path*; opened at the first event, closed by ``close``."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._handle: int | None = None

    def started(self, document_id: Any) -> None:
        """Note that the document is about to be touched."""
        self._append({"e": "started", "id": document_id})

    def asked(self, document_id: Any) -> None:
        """Note that the document now waits for the model."""
        self._append({"e": "asked", "id": document_id})

    def released(self, document_id: Any) -> None:
        """Note that the run was stopped while the document waited; it will be asked again."""
        self._append({"e": "released", "id": document_id})

    def answered(self, document_id: Any, result: dict[str, Any]) -> None:
        """Keep the finished result until MongoDB has it."""
        self._append({"e": "answered", "id": document_id, "result": result})

    def skipped(self, document_id: Any, reason: Reason, problem: str) -> None:
        """Note that there is nothing to classify."""
        self._append({"e": "skipped", "id": document_id, "reason": reason, "problem": problem})

    def failed(self, document_id: Any, reason: Reason, problem: str, *, is_final: bool) -> None:
        """Note that this round of the document failed, and whether another one can help."""
        self._append({"e": "failed", "id": document_id, "reason": reason, "problem": problem, "is_final": is_final})

    def close(self) -> None:
        """Close the file; it stays."""
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
                f"{self.path} cannot be written ({exc.strerror}); free space or fix the rights, then run again."
            ) from exc
        if written != len(line):
            raise StateDirectoryError(
                f"{self.path} could only be written in part (disk full?); free space, then run again."
            )


def _open_on_new_line(path: Path) -> int:
    """Open *path* for appending; a line that a full disk cut short is ended first."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o600)
    size = os.fstat(handle).st_size
    if size and os.pread(handle, 1, size - 1) != b"\n":
        os.write(handle, b"\n")
    return handle


@dataclass(slots=True)
class Replay:
    """The entries of a journal by ``extended_json.id_key``."""

    entries: dict[bytes, JournalEntry] = field(default_factory=dict)

    def entry(self, key: bytes) -> JournalEntry:
        """Return the entry of a document; an empty one where the journal does not know it."""
        return self.entries.get(key) or JournalEntry()


def replay_journal(path: Path) -> Replay:
    """Read the journal at *path*; a missing one is empty, and torn lines are passed over.

    Raises:
        StateDirectoryError: The file is there and cannot be read.
    """
    replay = Replay()
    try:
        with open(path, "rb") as file:
            for line in file:
                try:
                    event = extended_json.loads(line)
                    _apply(replay, event)
                except (ValueError, KeyError, TypeError):
                    continue
    except FileNotFoundError:
        pass
    except OSError as exc:
        raise StateDirectoryError(f"{path} cannot be read ({exc.strerror}); fix the rights, then run again.") from exc
    return replay


def _apply(replay: Replay, event: dict[str, Any]) -> None:
    entry = replay.entries.setdefault(extended_json.id_key(event["id"]), JournalEntry())
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

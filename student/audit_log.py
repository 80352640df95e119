"""The audit of a student on disk: each conversation that the model was asked about although the student was sure."""

from __future__ import annotations

import hashlib
import itertools
import sqlite3
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Self

from storage.state_file import Schema, StateFile
from student.audit import Audit


def _add_share(db: sqlite3.Connection, _: Path) -> None:
    # A share that is not known counts as 1: such a comparison stands for no conversation that was taken.
    db.execute("ALTER TABLE comparisons ADD COLUMN share REAL NOT NULL DEFAULT 1")


SCHEMA = Schema(
    what="the audit of the student",
    tables="""CREATE TABLE comparisons (
        number INTEGER PRIMARY KEY, student TEXT, promise REAL, input_sha256 BLOB, agreed INTEGER, day TEXT,
        share REAL NOT NULL DEFAULT 1, UNIQUE (student, promise, input_sha256, day))""",
    version=2,
    if_damaged="remove the file and train the student again, because nobody knows whether its promise holds",
    if_foreign="remove it and train the student again",
    application=0x53415544,
    migrate=_add_share,
)


def utc_date() -> str:
    """Return the current date (UTC), as in 2026-11-30."""
    return datetime.now(UTC).date().isoformat()


class AuditLog:
    """The comparisons of one *student* under the promise of *audit*. Any thread may use it; use it as ``with``, or close it.

    The running test is the replay of the comparisons, so it cannot differ from them. It begins with evidence that was left
    against the student before, so a training does not undo a withdrawal. A conversation is recorded once a day: one that is asked
    again after a crash does not count twice.
    """

    def __init__(self, path: Path, student: str, audit: Audit, today: Callable[[], str] = utc_date) -> None:
        """Open *path*; a missing file is created. *audit* has no comparisons yet, *today* returns the date. Raises
        StateDirectoryError.
        """
        self._student, self._promise, self._today = student, audit.promise, today
        self._file = StateFile(path, SCHEMA)
        self.audit = audit
        query = "SELECT student, agreed, share FROM comparisons WHERE promise = ? ORDER BY number"
        with self._file.reading() as db:
            rows = db.execute(query, (audit.promise,)).fetchall()
        last, evidence = student, audit.evidence
        for last, comparisons in itertools.groupby(rows, lambda row: str(row[0])):
            one = audit if last == student else Audit(audit.promise)
            one.succeed(evidence)
            for _, agreed, share in comparisons:
                one.record(bool(agreed), share)
            evidence = one.evidence
        if last != student:
            audit.succeed(evidence)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; what was recorded is durable already."""
        self._file.close()

    def drawn(self, input_sha256: str) -> float | None:
        """Return the share with which the conversation is drawn: the model is asked although the student is sure. None if it is not.

        A hash decides, so that a run that was killed draws the same conversations again. It changes each day (UTC), so that
        a text that comes again and again is drawn at last.
        """
        drawn = hashlib.sha256(f"audit {self._student} {self._today()} {input_sha256}".encode()).digest()
        share = self.audit.share
        return share if int.from_bytes(drawn[:8]) < share * 2**64 else None

    def record(self, input_sha256: str, share: float, *, agreed: bool) -> bool:
        """Record durably whether the labels of the student were the model's, with the *share* of ``drawn``; nothing if this
        conversation is recorded today. Return whether this comparison has broken the promise, which one does at most.

        Raises StateDirectoryError if it cannot be written.
        """
        row = (self._student, self._promise, bytes.fromhex(input_sha256), agreed, self._today(), share)
        insert = "INSERT OR IGNORE INTO comparisons (student, promise, input_sha256, agreed, day, share) VALUES (?, ?, ?, ?, ?, ?)"
        with self._file.transaction() as db:
            was_broken = self.audit.is_broken
            is_new = db.execute(insert, row).rowcount
            if is_new:
                self.audit.record(agreed, share)
            return self.audit.is_broken and not was_broken

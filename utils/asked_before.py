"""Which conversations the model has answered in this run: on disk, so that a large collection costs no memory.

Derived data: without the file the model is asked once more, and nothing is wrong. It outlives a crash, for the run
that goes on, and is removed when a run comes to its end. It holds hashes, ids, labels and the one-line
categorization, no conversation.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sqlite3
from pathlib import Path
from typing import Any

import orjson

from utils import extended_json
from utils.classification import Classification, Outcome

logger = logging.getLogger(__name__)

FILE_NAME = "asked_before.sqlite"
_SIBLINGS = ("", "-wal", "-shm", "-journal")  # of SQLite, beside the file
_CACHE_KB = 1024


class AskedBefore:
    """The answers of one run by ``input_sha256``, in *path*; opened at the first use.

    *run* names the run and its plan: answers of another run are thrown away, because its labels may be others and its
    results may since be replaced. A file that cannot be used is given up with one warning; then nothing is found.
    """

    def __init__(self, path: Path, run: str) -> None:
        self._path = path
        self._run = run
        self._database: sqlite3.Connection | None = None
        self._is_usable = True

    def find(self, input_hash: str) -> tuple[Any, Outcome] | None:
        """Return the source id of the conversation that was asked, and its outcome; None where there is none."""
        query = "SELECT source, outcome FROM asked WHERE input_sha256 = ?"
        row = self._execute(query, (bytes.fromhex(input_hash),))
        return None if row is None else (extended_json.loads(row[0])[0], _outcome(row[1], input_hash))

    def add(self, source_id: Any, outcome: Outcome) -> None:
        """Keep the *outcome* of the conversation of *source_id*; the first of identical ones stays."""
        values = (bytes.fromhex(outcome.input_sha256), extended_json.dumps([source_id]), _row(outcome))
        self._execute("INSERT OR IGNORE INTO asked VALUES (?, ?, ?)", values)

    def forget(self, input_hash: str) -> None:
        """Take out an answer that will not be stored as a result."""
        self._execute("DELETE FROM asked WHERE input_sha256 = ?", (bytes.fromhex(input_hash),))

    def close(self) -> None:
        """Close the file and leave it to the run that goes on."""
        if self._database is not None:
            with contextlib.suppress(sqlite3.Error):
                self._database.close()
            self._database = None

    def remove(self) -> None:
        """Remove the file, also one that this run never opened."""
        self.close()
        for sibling in _SIBLINGS:
            with contextlib.suppress(OSError):
                os.unlink(f"{self._path}{sibling}")

    def _execute(self, statement: str, values: tuple[Any, ...]) -> Any:
        """Return the first row of *statement*; None where there is none, or the file cannot be used."""
        if not self._is_usable:
            return None
        try:
            if self._database is None:
                self._database = self._open()
            return self._database.execute(statement, values).fetchone()
        except (sqlite3.Error, OSError) as exc:
            logger.warning("%s cannot be used (%s): identical conversations may be asked again", self._path, exc)
            self._is_usable = False
            self.remove()
            return None

    def _open(self) -> sqlite3.Connection:
        try:
            return self._connected()
        except sqlite3.DatabaseError:  # of another run, or not whole: a power cut may do that to it
            self.remove()
            return self._connected()

    def _connected(self) -> sqlite3.Connection:
        # SQLite gives its own files the rights of this one.
        os.close(os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600))
        database = sqlite3.connect(self._path, isolation_level=None, timeout=0)
        try:
            # Without fsync: a killed process leaves a whole file all the same, and a power cut may take it.
            for pragma in ("locking_mode=EXCLUSIVE", "journal_mode=WAL", "synchronous=OFF", f"cache_size=-{_CACHE_KB}"):
                database.execute(f"PRAGMA {pragma}")
            database.execute("CREATE TABLE IF NOT EXISTS run (name TEXT)")
            database.execute(
                "CREATE TABLE IF NOT EXISTS asked (input_sha256 BLOB PRIMARY KEY, source BLOB, outcome BLOB) WITHOUT ROWID"
            )
            known = [name for (name,) in database.execute("SELECT name FROM run")]
            if known != [self._run]:
                if known:
                    raise sqlite3.DatabaseError("of another run")
                database.execute("INSERT INTO run VALUES (?)", (self._run,))
        except sqlite3.Error:
            database.close()
            raise
        return database


def _row(outcome: Outcome) -> bytes:
    made = (outcome.model_used, outcome.model_digest, outcome.fingerprint)
    seen = (outcome.input_complete, outcome.turns_used, outcome.confidence)
    return orjson.dumps([outcome.classification.as_dict(), *made, *seen])


def _outcome(row: bytes, input_hash: str) -> Outcome:
    labels, model, digest, fingerprint, input_complete, turns_used, confidence = orjson.loads(row)
    return Outcome(
        Classification(**labels),
        model,
        digest,
        attempts=0,
        duration_ms=0,
        prompt_tokens=None,
        reply_tokens=None,
        input_sha256=input_hash,
        fingerprint=fingerprint,
        input_complete=input_complete,
        turns_used=turns_used,
        confidence=confidence,
    )

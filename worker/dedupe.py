"""Deduplication: the model classifies one of several identical conversations, and the others reuse its answer."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import sqlite3
import time
from dataclasses import replace
from operator import attrgetter
from pathlib import Path
from typing import Any

import orjson

from domain.conversation import Classification, Outcome, is_student
from storage import extended_json
from storage.extended_json import Document
from worker.settlement import WorkItem

logger = logging.getLogger(__name__)

FILE_NAME = "asked_before.sqlite"
_SIBLINGS = ("", "-wal", "-shm", "-journal")  # SQLite files beside the cache file
# No fsync: the file survives a killed process, and losing it in a power cut costs only calls.
_SET_UP = """
PRAGMA locking_mode=EXCLUSIVE; PRAGMA journal_mode=WAL; PRAGMA synchronous=OFF; PRAGMA cache_size=-1024;
CREATE TABLE IF NOT EXISTS run (name TEXT);
CREATE TABLE IF NOT EXISTS asked (input_sha256 BLOB PRIMARY KEY, source BLOB, outcome BLOB);
"""
# The fields of an Outcome in a row, after its labels.
_KEPT = ("model_used", "model_digest", "fingerprint", "input_complete", "turns_used", "confidence", "plan")
_kept_values = attrgetter(*_KEPT)

Copy = tuple[WorkItem, Outcome]


class Deduplicator:
    """Decides which documents the model is asked about; if not *is_on*, all of them.

    Memory is bounded by the documents in work: followers are among them, and earlier answers of this run are in the SQLite
    file *path*. *run* names the run and its plan. Answers of another run are discarded, because its labels may differ and
    its results may have been replaced. A file that cannot be used is removed with one warning; then identical
    conversations are asked again. Documents of a retry round are always asked, with another seed.
    """

    def __init__(self, path: Path, run: str, *, is_on: bool) -> None:
        self._path = path
        self._run = run
        self._is_on = is_on
        self._is_usable = is_on
        self._database: sqlite3.Connection | None = None
        self._leaders: dict[str, WorkItem] = {}  # in flight, by input hash

    def known(self, item: WorkItem) -> list[Copy]:
        """Return copies of an earlier answer for *item* and its followers; empty if it must be asked."""
        item.since_s = time.monotonic()
        if not self._is_on or item.rounds > 0:
            return []
        item.input_hash = item.conversation.transcript_sha256
        row = self._execute("SELECT source, outcome FROM asked WHERE input_sha256 = ?", bytes.fromhex(item.input_hash))
        source_id = extended_json.loads(row[0])[0] if row else item.document_id
        if not row or source_id == item.document_id:
            return []
        outcome = _outcome(row[1], item.input_hash)
        followers, item.followers = item.followers, []
        return [(one, _copy(outcome, source_id, one)) for one in (item, *followers)]

    def follows(self, item: WorkItem) -> bool:
        """Return whether an identical conversation is in flight; then *item* waits for its ``answered`` or ``gave_up``."""
        if not item.input_hash:
            return False
        leader = self._leaders.setdefault(item.input_hash, item)
        if leader is item:
            return False
        leader.followers += [item, *item.followers]
        item.followers = []
        return True

    def answered(self, item: WorkItem, outcome: Outcome) -> list[Copy]:
        """Keep the *outcome* of *item*, unless a student answered; return its followers, each with a copy."""
        if item.input_hash:
            del self._leaders[item.input_hash]
        if item.input_hash and not is_student(outcome.model_used):  # it may withdraw before the next copy
            values = extended_json.dumps([item.written_id]), _row(outcome)
            self._begin()
            self._execute("INSERT OR IGNORE INTO asked VALUES (?, ?, ?)", bytes.fromhex(item.input_hash), *values)
        followers, item.followers = item.followers, []
        return [(one, _copy(outcome, item.document_id, one)) for one in followers]

    def gave_up(self, item: WorkItem) -> list[WorkItem]:
        """Record that *item* gets no answer; return the document to ask instead: its first follower, if any."""
        if self._leaders.get(item.input_hash) is item:
            del self._leaders[item.input_hash]
        if not item.followers:
            return []
        heir, *others = item.followers
        heir.followers, item.followers = others, []
        return [heir]

    def rejected(self, result: Document) -> None:
        """Forget *result*, which cannot be stored: no copy may refer to its document."""
        made = result["processing_metadata"]
        if "copied_from" not in made and "input_sha256" in made:
            self._execute("DELETE FROM asked WHERE input_sha256 = ?", bytes.fromhex(made["input_sha256"]))

    def close(self, *, is_finished: bool) -> None:
        """Close the file; remove it if the run is finished, keep it for a run that resumes."""
        self._commit()
        if self._database is not None:
            with contextlib.suppress(sqlite3.Error):
                self._database.close()
            self._database = None
        if self._is_on and is_finished:
            self._remove()

    def _begin(self) -> None:
        """Begin the transaction of the answers that come in this turn of the loop: if the process is killed, they are lost."""
        if self._database is not None and not self._database.in_transaction:
            self._execute("BEGIN")
            asyncio.get_running_loop().call_soon(self._commit)

    def _commit(self) -> None:
        if self._database is not None and self._database.in_transaction:
            self._execute("COMMIT")

    def _remove(self) -> None:
        for sibling in _SIBLINGS:
            with contextlib.suppress(OSError):
                os.unlink(f"{self._path}{sibling}")

    def _execute(self, statement: str, *values: bytes) -> Any:
        """Return the first row of *statement*; None if there is none, or the file cannot be used."""
        if not self._is_usable:
            return None
        try:
            if self._database is None:
                self._database = self._open()
            return self._database.execute(statement, values).fetchone()
        except (sqlite3.Error, OSError) as exc:
            logger.warning("%s cannot be used (%s): identical conversations may be asked again", self._path, exc)
            self._is_usable = False
            self.close(is_finished=True)
            return None

    def _open(self) -> sqlite3.Connection:
        try:
            return self._connected()
        except sqlite3.DatabaseError:  # of another run, or damaged by a power cut
            self._remove()
            return self._connected()

    def _connected(self) -> sqlite3.Connection:
        # SQLite gives its other files the mode of this one.
        os.close(os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600))
        database = sqlite3.connect(self._path, isolation_level=None, timeout=0)
        try:
            database.executescript(_SET_UP)
            names = [name for (name,) in database.execute("SELECT name FROM run")]
            if not names:
                database.execute("INSERT INTO run VALUES (?)", (self._run,))
            elif names != [self._run]:
                raise sqlite3.DatabaseError("of another run")
        except sqlite3.Error:
            database.close()
            raise
        return database


def _copy(outcome: Outcome, source_id: Any, item: WorkItem) -> Outcome:
    """Return *outcome*, which is that of *source_id*, for *item*."""
    duration_ms = round((time.monotonic() - item.since_s) * 1000)
    return replace(
        outcome, attempts=0, duration_ms=duration_ms, prompt_tokens=None, reply_tokens=None, copied_from=(source_id,)
    )


def _row(outcome: Outcome) -> bytes:
    return orjson.dumps([outcome.classification.as_dict(), *_kept_values(outcome)])


def _outcome(row: bytes, input_hash: str) -> Outcome:
    labels, *values = orjson.loads(row)
    kept = dict(zip(_KEPT, values, strict=False))  # rows of the version before have no plan
    return Outcome(Classification(**labels), input_sha256=input_hash, **kept)

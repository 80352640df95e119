"""Deduplication: the model classifies one of several identical conversations, and the others reuse its answer."""

from __future__ import annotations

import contextlib
import logging
import os
import sqlite3
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import orjson

from domain.conversation import Classification, Outcome
from storage import extended_json
from storage.contract import Document
from worker.settlement import WorkItem

logger = logging.getLogger(__name__)

FILE_NAME = "asked_before.sqlite"
_SIBLINGS = ("", "-wal", "-shm", "-journal")  # SQLite files beside the cache file
# No fsync: the file survives a killed process, and losing it in a power cut costs only calls.
_SET_UP = """
PRAGMA locking_mode=EXCLUSIVE; PRAGMA journal_mode=WAL; PRAGMA synchronous=OFF; PRAGMA cache_size=-1024;
CREATE TABLE IF NOT EXISTS run (name TEXT);
CREATE TABLE IF NOT EXISTS asked (input_sha256 BLOB PRIMARY KEY, source BLOB, outcome BLOB) WITHOUT ROWID;
"""
# The fields of an Outcome in a row, after its labels.
_KEPT = ("model_used", "model_digest", "fingerprint", "input_complete", "turns_used", "confidence")

Copy = tuple[WorkItem, Outcome]


class Deduplicator:
    """Decides which documents the model is asked about; with *cache* None, all of them.

    Memory is bounded by the documents in work: followers are among them, earlier answers are in *cache*. Documents of
    a retry round are always asked, with another seed.
    """

    def __init__(self, cache: ReplyCache | None) -> None:
        self._cache = cache
        self._leaders: dict[str, WorkItem] = {}  # in flight, by input hash

    def known(self, item: WorkItem) -> list[Copy]:
        """Return copies of an earlier answer for *item* and its followers; empty if it must be asked."""
        item.since_s = time.monotonic()
        if self._cache is None or item.rounds > 0:
            return []
        item.input_hash = item.conversation.transcript_sha256
        found = self._cache.find(item.input_hash)
        if found is None or found[0] == item.document_id:
            return []
        followers, item.followers = item.followers, []
        return [(one, _copy(found[1], found[0], one)) for one in (item, *followers)]

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
        """Keep the *outcome* of *item*; return its followers, each with a copy."""
        if self._cache is not None and item.input_hash:
            del self._leaders[item.input_hash]
            self._cache.add(item.document_id, outcome)
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
        if self._cache is not None and "copied_from" not in made and "input_sha256" in made:
            self._cache.forget(made["input_sha256"])

    def close(self, *, is_finished: bool) -> None:
        """Close the cache; remove its file if the run is finished, keep it for a run that resumes."""
        if self._cache is not None:
            self._cache.close()
            if is_finished:
                self._cache.remove()


def _copy(outcome: Outcome, source_id: Any, item: WorkItem) -> Outcome:
    """Return *outcome*, which is that of *source_id*, for *item*."""
    duration_ms = round((time.monotonic() - item.since_s) * 1000)
    return replace(
        outcome, attempts=0, duration_ms=duration_ms, prompt_tokens=None, reply_tokens=None, copied_from=(source_id,)
    )


class ReplyCache:
    """The answers of one run by ``input_sha256``, in the SQLite file *path*; opened at first use.

    *run* names the run and its plan. Answers of another run are discarded, because its labels may differ and its
    results may have been replaced. A file that cannot be used is removed with one warning; then nothing is found.
    """

    def __init__(self, path: Path, run: str) -> None:
        self._path = path
        self._run = run
        self._database: sqlite3.Connection | None = None
        self._is_usable = True

    def find(self, input_hash: str) -> tuple[Any, Outcome] | None:
        """Return the source id and the outcome of the identical conversation; None if there is none."""
        query = "SELECT source, outcome FROM asked WHERE input_sha256 = ?"
        row = self._execute(query, (bytes.fromhex(input_hash),))
        return None if row is None else (extended_json.loads(row[0])[0], _outcome(row[1], input_hash))

    def add(self, source_id: Any, outcome: Outcome) -> None:
        """Keep the *outcome* of the conversation of *source_id*; the first of identical ones stays."""
        values = (bytes.fromhex(outcome.input_sha256), extended_json.dumps([source_id]), _row(outcome))
        self._execute("INSERT OR IGNORE INTO asked VALUES (?, ?, ?)", values)

    def forget(self, input_hash: str) -> None:
        """Remove an answer that will not be stored as a result."""
        self._execute("DELETE FROM asked WHERE input_sha256 = ?", (bytes.fromhex(input_hash),))

    def close(self) -> None:
        """Close the file and keep it."""
        if self._database is not None:
            with contextlib.suppress(sqlite3.Error):
                self._database.close()
            self._database = None

    def remove(self) -> None:
        """Remove the file, even if this run never opened it."""
        self.close()
        for sibling in _SIBLINGS:
            with contextlib.suppress(OSError):
                os.unlink(f"{self._path}{sibling}")

    def _execute(self, statement: str, values: tuple[Any, ...]) -> Any:
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
            self.remove()
            return None

    def _open(self) -> sqlite3.Connection:
        try:
            return self._connected()
        except sqlite3.DatabaseError:  # of another run, or damaged by a power cut
            self.remove()
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


def _row(outcome: Outcome) -> bytes:
    return orjson.dumps([outcome.classification.as_dict(), *(getattr(outcome, name) for name in _KEPT)])


def _outcome(row: bytes, input_hash: str) -> Outcome:
    labels, *values = orjson.loads(row)
    return Outcome(Classification(**labels), input_sha256=input_hash, **dict(zip(_KEPT, values, strict=True)))

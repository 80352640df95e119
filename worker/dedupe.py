"""Asks one of several identical conversations, and lets the others have its answer."""

from __future__ import annotations

import contextlib
import logging
import os
import sqlite3
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import orjson

from domain.conversation import Classification, Conversation, Outcome, input_sha256
from storage import extended_json
from worker.items import WorkItem


@dataclass(slots=True)
class Asking:
    """A document whose answer is wanted, and those with the same text that wait for it.

    *input_hash* is empty where it is asked for itself, whatever others were told.
    """

    item: WorkItem
    conversation: Conversation
    input_hash: str
    followers: list[Asking] = field(default_factory=list)
    since_s: float = field(default_factory=time.monotonic)


Copy = tuple[Asking, Outcome]


class Deduplicator:
    """Decides who is asked; *asked* None: everybody.

    Memory is bounded by the documents in work: those who wait are among them, the rest is in *asked*. Retry rounds are
    asked themselves, with another seed.
    """

    def __init__(self, asked: ReplyCache | None) -> None:
        self._asked = asked
        self._leaders: dict[str, Asking] = {}  # in flight, by input_sha256
        self._carried: dict[bytes, list[Asking]] = {}  # by id_key of the one who is to ask next: who waits for it

    def asking(self, item: WorkItem, conversation: Conversation) -> Asking:
        """Return *item* as somebody who wants an answer, with those who wait for it already."""
        is_shared = self._asked is not None and item.rounds == 0
        input_hash = input_sha256(conversation) if is_shared else ""
        return Asking(item, conversation, input_hash, self._carried.pop(item.key, []))

    def known(self, asking: Asking) -> list[Copy]:
        """Return copies of an answer that is known, for *asking* and for who waits for it; none where it is not known."""
        found = self._asked.find(asking.input_hash) if self._asked is not None and asking.input_hash else None
        if found is None or found[0] == asking.item.document_id:
            return []
        return [(one, _copy(found[1], found[0], one)) for one in (asking, *asking.followers)]

    def waits(self, asking: Asking) -> bool:
        """Whether another one with the same text is in flight: then ``answered`` or ``gave_up`` of that one decides."""
        if not asking.input_hash:
            return False
        leader = self._leaders.setdefault(asking.input_hash, asking)
        if leader is asking:
            return False
        leader.followers += [asking, *asking.followers]
        asking.followers = []
        return True

    def answered(self, asking: Asking, outcome: Outcome) -> list[Copy]:
        """Keep the *outcome* of *asking*; return who waited for it, each with its own copy."""
        if self._asked is not None and asking.input_hash:
            del self._leaders[asking.input_hash]
            self._asked.add(asking.item.document_id, outcome)
        return [(one, _copy(outcome, asking.item.document_id, one)) for one in asking.followers]

    def gave_up(self, asking: Asking) -> list[WorkItem]:
        """Note that *asking* got no answer; return who has to be asked now: the first of those who waited, or nobody."""
        if asking.input_hash:
            del self._leaders[asking.input_hash]
        return self._hand_on(asking.followers)

    def dropped(self, item: WorkItem) -> list[WorkItem]:
        """Note that *item* is not asked after all; return as ``gave_up`` does."""
        return self._hand_on(self._carried.pop(item.key, []))

    def rejected(self, result: dict[str, Any]) -> None:
        """Note that *result* cannot be stored: no further copy shall name its document."""
        made = result["processing_metadata"]
        if self._asked is not None and "copied_from" not in made and "input_sha256" in made:
            self._asked.forget(made["input_sha256"])

    def close(self, *, is_finished: bool) -> None:
        """Give back the file; it goes with a run that *is_finished*, and waits for the one that goes on."""
        if self._asked is not None:
            if is_finished:
                self._asked.remove()
            else:
                self._asked.close()

    def _hand_on(self, waiting: list[Asking]) -> list[WorkItem]:
        if not waiting:
            return []
        heir, *others = waiting
        if others:
            self._carried[heir.item.key] = others
        return [heir.item]


def _copy(outcome: Outcome, source_id: Any, asking: Asking) -> Outcome:
    """Return *outcome* as that of a document that was not asked itself."""
    duration_ms = round((time.monotonic() - asking.since_s) * 1000)
    return replace(
        outcome, attempts=0, duration_ms=duration_ms, prompt_tokens=None, reply_tokens=None, copied_from=(source_id,)
    )


logger = logging.getLogger(__name__)

FILE_NAME = "asked_before.sqlite"
_SIBLINGS = ("", "-wal", "-shm", "-journal")  # of SQLite, beside the file
_CACHE_KB = 1024


class ReplyCache:
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

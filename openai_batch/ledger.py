"""What was sent, durable before each step: the reason why nothing is billed twice and nothing is lost.

One SQLite file for one job, in WAL mode with ``synchronous=FULL``: a committed step survives a power cut
(sqlite.org/pragma.html#pragma_synchronous). It holds ids, hashes, counts and error codes; no text of a document.
"""

from __future__ import annotations

import os
import secrets
import sqlite3
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from error_handler import JobValidationError, StateDirectoryError

_TABLES = """
CREATE TABLE IF NOT EXISTS job (
    job_id TEXT NOT NULL,
    source TEXT NOT NULL
) STRICT;
CREATE TABLE IF NOT EXISTS shards (
    number INTEGER PRIMARY KEY,
    job_id TEXT NOT NULL,
    state TEXT NOT NULL,
    sha256 TEXT NOT NULL,
    lines INTEGER NOT NULL,
    bytes INTEGER NOT NULL,
    tokens INTEGER NOT NULL,
    model TEXT NOT NULL,
    file_id TEXT,
    batch_id TEXT,
    status TEXT,
    output_file_id TEXT,
    error_file_id TEXT,
    problem TEXT,
    bad_lines TEXT NOT NULL DEFAULT '',
    tries INTEGER NOT NULL DEFAULT 1,
    not_before REAL NOT NULL DEFAULT 0,
    created_at REAL NOT NULL,
    create_asked_at REAL,
    ended_at REAL
) STRICT;
CREATE TABLE IF NOT EXISTS items (
    custom_id TEXT PRIMARY KEY,
    shard INTEGER NOT NULL,
    document_id TEXT NOT NULL,
    attempt INTEGER NOT NULL,
    state TEXT NOT NULL,
    code TEXT,
    retryable INTEGER NOT NULL DEFAULT 0
) STRICT;
CREATE INDEX IF NOT EXISTS items_by_shard ON items (shard, state);
CREATE INDEX IF NOT EXISTS items_by_document ON items (document_id);
"""


# Codes of items whose shard was never run: no attempt of the document.
NOT_RUN_CODES = ("token_limit_exceeded", "never_sent")


class ShardState(StrEnum):
    """How far a shard has come; docs/openai-batch.md says what a start does with each."""

    PLANNED = "planned"
    UPLOADED = "uploaded"
    CREATING = "creating"
    CREATED = "created"
    TERMINAL = "terminal"
    DOWNLOADED = "downloaded"
    APPLIED = "applied"
    CLEANED = "cleaned"


LIVE = (ShardState.CREATING, ShardState.CREATED)  # its tokens may be enqueued
OPEN = tuple(state for state in ShardState if state not in (ShardState.APPLIED, ShardState.CLEANED))


class ItemState(StrEnum):
    """How one line of a shard ended; SUBMITTED until then."""

    SUBMITTED = "submitted"
    OK = "ok"
    FAILED = "failed"
    EXPIRED = "expired"
    CANCELLED = "cancelled"
    MISSING = "missing"


@dataclass(frozen=True, slots=True)
class Shard:
    """One JSONL file and its batch.

    Times are unix seconds; *not_before* holds back a shard that has to wait. *tries* counts the batches that were
    asked for: more than one only after one that was refused whole, of which nothing ran. *bad_lines* are the lines
    of the file, joined by commas, for which the API refused it.
    """

    number: int
    job_id: str
    state: ShardState
    sha256: str
    lines: int
    bytes: int
    tokens: int
    model: str
    file_id: str | None = None
    batch_id: str | None = None
    status: str | None = None
    output_file_id: str | None = None
    error_file_id: str | None = None
    problem: str | None = None
    bad_lines: str = ""
    tries: int = 1
    not_before: float = 0.0
    created_at: float = 0.0
    create_asked_at: float | None = None
    ended_at: float | None = None

    @property
    def metadata(self) -> dict[str, str]:
        """What marks its batch at OpenAI as ours; a batch with the same is never made a second time."""
        return {"job": self.job_id, "shard": str(self.number), "try": str(self.tries), "sha256": self.sha256[:32]}

    @property
    def file_name(self) -> str:
        """The name of its file, here and at OpenAI."""
        return f"{self.job_id}_{self.number:05d}_{self.sha256[:16]}.jsonl"


@dataclass(frozen=True, slots=True)
class Item:
    """One line of a shard. *document_id* is canonical Extended JSON; *attempt* counts from 1.

    *retryable* says of an ended one that its document was made pending again.
    """

    custom_id: str
    document_id: str
    attempt: int
    state: ItemState = ItemState.SUBMITTED
    code: str | None = None
    retryable: bool = False


class Ledger:
    """The ledger of one job; one process at a time (its caller holds the lock). Use as ``with``."""

    def __init__(self, path: Path) -> None:
        """Open or make the file *path*, mode 0600.

        Raises:
            StateDirectoryError: It cannot be opened, or is no ledger.
        """
        self._path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600))
            self._db = sqlite3.connect(path, isolation_level=None)
            self._db.row_factory = sqlite3.Row
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=FULL")
            self._db.executescript(_TABLES)
        except (OSError, sqlite3.Error) as exc:
            raise self._unusable(exc) from exc

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; what was written is durable already."""
        self._db.close()

    @contextmanager
    def _step(self) -> Iterator[sqlite3.Connection]:
        """Make everything inside one durable step, or nothing of it."""
        try:
            self._db.execute("BEGIN IMMEDIATE")
            with self._db:  # ends the transaction, one way or the other
                yield self._db
        except sqlite3.Error as exc:
            raise self._unusable(exc) from exc

    def _unusable(self, exc: Exception) -> StateDirectoryError:
        if isinstance(exc, ValueError | LookupError) or type(exc) is sqlite3.DatabaseError:
            return StateDirectoryError(
                f"the ledger {self._path} is damaged ({type(exc).__name__}); put back a copy of it, and never delete it "
                "while batches run: it alone knows what was paid for."
            )
        return StateDirectoryError(
            f"the ledger {self._path} cannot be used ({type(exc).__name__}); free space or fix the rights, and never "
            "delete it while batches run: it alone knows what was paid for."
        )

    def job_id(self, source: str) -> str:
        """Return the id of this job, made on the first call; *source* names what it works on.

        Raises:
            JobValidationError: The ledger belongs to another source.
        """
        rows = self._rows("SELECT job_id, source FROM job")
        if not rows:
            with self._step() as db:
                db.execute("INSERT INTO job VALUES (?, ?)", (f"job{secrets.token_hex(6)}", source))
            rows = self._rows("SELECT job_id, source FROM job")
        if rows[0]["source"] != source:
            raise JobValidationError(
                f"the ledger {self._path} belongs to {rows[0]['source']}, not to {source}; give this job its own --state-dir."
            )
        return str(rows[0]["job_id"])

    def plan(self, shard: Shard, items: Iterable[Item]) -> None:
        """Write a complete *shard* and its *items*, state PLANNED; its file is durable by now."""
        row = (shard.number, shard.job_id, ShardState.PLANNED, shard.sha256, shard.lines, shard.bytes, shard.tokens)
        with self._step() as db:
            db.execute(
                "INSERT INTO shards (number, job_id, state, sha256, lines, bytes, tokens, model, created_at) "
                "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (*row, shard.model, time.time()),
            )
            db.executemany(
                "INSERT INTO items (custom_id, shard, document_id, attempt, state) VALUES (?, ?, ?, ?, ?)",
                ((item.custom_id, shard.number, item.document_id, item.attempt, ItemState.SUBMITTED) for item in items),
            )

    def advance(self, number: int, state: ShardState, **fields: Any) -> Shard:
        """Write that shard *number* is now in *state*, with columns of Shard in *fields*; return it."""
        names = ["state", *fields]
        with self._step() as db:
            db.execute(
                f"UPDATE shards SET {', '.join(f'{name} = ?' for name in names)} WHERE number = ?",  # noqa: S608 - names are ours
                (state, *fields.values(), number),
            )
        return self.shard(number)

    def shard(self, number: int) -> Shard:
        """Return shard *number*."""
        return self.shards("number = ?", (number,))[0]

    def shards(self, where: str = "1", values: Sequence[Any] = ()) -> list[Shard]:
        """Return the shards for which *where* (SQL over the columns of Shard) holds, in their order."""
        rows = self._rows(f"SELECT * FROM shards WHERE {where} ORDER BY number", values)  # noqa: S608 - no caller hands in text
        try:
            return [Shard(**{**dict(row), "state": ShardState(row["state"])}) for row in rows]
        except ValueError as exc:
            raise self._unusable(exc) from exc

    def open_shards(self) -> list[Shard]:
        """Return the shards that are not applied yet."""
        return self.shards(f"state IN ({', '.join('?' * len(OPEN))})", OPEN)

    def next_number(self) -> int:
        """Return the number of the next shard, from 1; numbers are never used twice."""
        return int(self._rows("SELECT COALESCE(MAX(number), 0) + 1 FROM shards")[0][0])

    def live_tokens(self) -> int:
        """Return the estimated prompt tokens that are enqueued at OpenAI now."""
        query = f"SELECT COALESCE(SUM(tokens), 0) FROM shards WHERE state IN ({', '.join('?' * len(LIVE))})"  # noqa: S608 - no text
        return int(self._rows(query, LIVE)[0][0])

    def items(self, number: int, state: ItemState | None = None) -> Iterator[Item]:
        """Yield the items of shard *number* (in *state*), some hundred at a time in memory."""
        last = ""
        while True:
            rows = self._rows(
                "SELECT * FROM items WHERE shard = ? AND (? IS NULL OR state = ?) AND custom_id > ? "
                "ORDER BY custom_id LIMIT 500",
                (number, state, state, last),
            )
            for row in rows:
                yield Item(
                    row["custom_id"],
                    row["document_id"],
                    row["attempt"],
                    ItemState(row["state"]),
                    row["code"],
                    bool(row["retryable"]),
                )
            if len(rows) < 500:
                return
            last = rows[-1]["custom_id"]

    def find(self, custom_ids: Sequence[str], number: int | None = None) -> dict[str, Item]:
        """Return those of *custom_ids* (at most 500) that are known, of shard *number* alone where it is given."""
        marks = ", ".join("?" * len(custom_ids))
        rows = self._rows(
            f"SELECT * FROM items WHERE (? IS NULL OR shard = ?) AND custom_id IN ({marks})",  # noqa: S608 - marks only
            (number, number, *custom_ids),
        )
        return {
            row["custom_id"]: Item(
                row["custom_id"], row["document_id"], row["attempt"], ItemState(row["state"]), row["code"]
            )
            for row in rows
        }

    def settle(self, items: Iterable[Item]) -> None:
        """Write how *items* ended; one that ended before keeps its first end."""
        with self._step() as db:
            db.executemany(
                "UPDATE items SET state = ?, code = ?, retryable = ? WHERE custom_id = ? AND state = 'submitted'",
                ((item.state, item.code, item.retryable, item.custom_id) for item in items),
            )

    def counts(self, number: int | None = None) -> dict[ItemState, int]:
        """Return how many items of shard *number* (None: of all) are in each state; states without any are 0."""
        rows = self._rows(
            "SELECT state, COUNT(*) FROM items WHERE ? IS NULL OR shard = ? GROUP BY state", (number, number)
        )
        found = {ItemState(state): count for state, count in rows}
        return {state: found.get(state, 0) for state in ItemState}

    def sendings(self, document_ids: Sequence[str]) -> dict[str, tuple[int, int]]:
        """Return how often each of *document_ids* (at most 500) was put in a shard, and how often that counts.

        A shard that was never run does not count as an attempt. Documents that were never sent are absent.
        """
        marks = ", ".join("?" * len(document_ids))
        counted = "SELECT document_id, COUNT(*), SUM(code IS NULL OR code NOT IN (?, ?)) FROM items"
        query = f"{counted} WHERE document_id IN ({marks}) GROUP BY document_id"
        rows = self._rows(query, (*NOT_RUN_CODES, *document_ids))
        return {row[0]: (row[1], row[2]) for row in rows}

    def retried(self, number: int) -> int:
        """Return how many items of shard *number* ended so that their documents are pending again."""
        return int(self._rows("SELECT COUNT(*) FROM items WHERE shard = ? AND retryable", (number,))[0][0])

    def _rows(self, query: str, values: Sequence[Any] = ()) -> list[Any]:
        try:
            return self._db.execute(query, values).fetchall()
        except sqlite3.Error as exc:
            raise self._unusable(exc) from exc

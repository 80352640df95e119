"""The ledger of one job: a durable record of requests and answers, written before each step.

It holds ids, hashes, counts and error codes, and no text of a document.
"""

from __future__ import annotations

import json
import secrets
import sqlite3
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from error_handler import JobValidationError
from storage.state_file import Schema, StateFile

_TABLES = """
CREATE TABLE job (job_id TEXT NOT NULL, source TEXT NOT NULL) STRICT;
CREATE TABLE shards (
    number INTEGER PRIMARY KEY, job_id TEXT NOT NULL, state TEXT NOT NULL, sha256 TEXT NOT NULL,
    lines INTEGER NOT NULL, bytes INTEGER NOT NULL, tokens INTEGER NOT NULL, model TEXT NOT NULL,
    file_id TEXT, batch_id TEXT, status TEXT, output_file_id TEXT, error_file_id TEXT, problem TEXT,
    bad_lines TEXT NOT NULL DEFAULT '', tries INTEGER NOT NULL DEFAULT 1, not_before REAL NOT NULL DEFAULT 0,
    created_at REAL NOT NULL, create_asked_at REAL, ended_at REAL
) STRICT;
CREATE TABLE items (
    custom_id TEXT PRIMARY KEY, shard INTEGER NOT NULL, document_id TEXT NOT NULL, attempt INTEGER NOT NULL,
    state TEXT NOT NULL, code TEXT, retryable INTEGER NOT NULL DEFAULT 0
) STRICT;
CREATE INDEX items_by_shard ON items (shard, state);
CREATE INDEX items_by_document ON items (document_id);
"""
_SCHEMA = Schema(
    what="the ledger",
    tables=_TABLES,
    version=1,
    oldest=0,
    if_damaged="restore it from a copy. Do not delete it while batches run: it is the only record of what was paid for.",
    if_foreign="give this job its own --state-dir.",
)

# Statuses of batches that never ran, and the codes of their items; such a sending is no attempt of the document.
NOT_RUN = {"token_limit": "token_limit_exceeded", "never_sent": "never_sent"}
CANCELLED_HERE = (
    "cancelled_here"  # the problem of a batch that ``cancel`` ended, and the code of its items that never ran
)
MASKED = "m"  # the end of the custom id of a request that was masked
PAGE = 500  # rows read at once


class ShardState(StrEnum):
    """The step that a shard has reached; docs/openai-batch.md describes how a run resumes from each."""

    PLANNED = "planned"
    UPLOADED = "uploaded"
    CREATING = "creating"
    CREATED = "created"
    TERMINAL = "terminal"
    DOWNLOADED = "downloaded"
    APPLIED = "applied"
    CLEANED = "cleaned"


NOT_SENT = (ShardState.PLANNED, ShardState.UPLOADED, ShardState.CREATING)
LIVE = (ShardState.CREATING, ShardState.CREATED)  # their tokens may be enqueued at OpenAI
ENDED = (ShardState.APPLIED, ShardState.CLEANED)
OPEN = tuple(state for state in ShardState if state not in ENDED)


class ItemState(StrEnum):
    """The outcome of one line of a shard; SUBMITTED until it has ended."""

    SUBMITTED = "submitted"
    OK = "ok"
    FAILED = "failed"
    EXPIRED = "expired"
    CANCELLED = "cancelled"
    MISSING = "missing"


@dataclass(frozen=True, slots=True)
class Shard:
    """One JSONL file and its batch.

    Times are unix seconds; a shard is not sent before *not_before*. *tries* counts the create calls: more than one
    only if OpenAI refused the whole batch and ran nothing of it. *bad_lines* are the line numbers, joined by commas,
    that OpenAI named when it refused the file.
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
    create_asked_at: float | None = None  # of earlier versions
    ended_at: float | None = None

    @property
    def metadata(self) -> dict[str, str]:
        """The metadata of its batch at OpenAI; no second batch is created with the same metadata."""
        return {"job": self.job_id, "shard": str(self.number), "try": str(self.tries), "sha256": self.sha256[:32]}

    @property
    def file_name(self) -> str:
        """The name of its file, here and at OpenAI."""
        return f"{self.job_id}_{self.number:05d}_{self.sha256[:16]}.jsonl"

    @property
    def result_files(self) -> dict[str, str]:
        """The local names of its result files, by their ids at OpenAI."""
        files = {self.output_file_id: "output", self.error_file_id: "error"}
        return {file_id: f"{self.job_id}_{self.number:05d}.{kind}.jsonl" for file_id, kind in files.items() if file_id}


@dataclass(frozen=True, slots=True)
class Item:
    """One line of *shard*. *document_id* is canonical Extended JSON; *attempt* counts from 1.

    *retryable*: the item has ended and its document is pending again.
    """

    custom_id: str
    document_id: str
    attempt: int
    state: ItemState = ItemState.SUBMITTED
    code: str | None = None
    retryable: bool = False
    shard: int = 0

    @property
    def is_masked(self) -> bool:
        """True if its request has placeholders for personal data, and so has its answer."""
        return self.custom_id.endswith(MASKED)


class Ledger(StateFile):
    """The ledger of one job, for one process at a time: the caller holds the lock."""

    def __init__(self, path: Path) -> None:
        """See ``StateFile``."""
        super().__init__(path, _SCHEMA)

    def _rows(self, query: str, *values: Any) -> list[Any]:
        """Return the rows of *query*; a change outside a transaction is durable by itself."""
        with self.reading() as db:
            return db.execute(query, values).fetchall()

    def job_id(self, source: str) -> str:
        """Return the id of this job, created on the first call.

        *source* names the documents it works on; raises JobValidationError if the ledger belongs to another one.
        """
        new = f"job{secrets.token_hex(6)}"
        self._rows("INSERT INTO job SELECT ?, ? WHERE NOT EXISTS (SELECT * FROM job)", new, source)
        job_id, owner = self._rows("SELECT job_id, source FROM job")[0]
        if owner != source:
            raise JobValidationError(
                f"the ledger {self.path} belongs to {owner}, not to {source}; give this job its own --state-dir."
            )
        return str(job_id)

    def plan(self, shard: Shard, items: Iterable[Item]) -> None:
        """Add *shard*, whose file is complete and durable, and its *items* in one transaction."""
        row = asdict(shard)
        with self.transaction() as db:
            db.execute(
                f"INSERT INTO shards ({', '.join(row)}) VALUES ({', '.join('?' * len(row))})",  # noqa: S608 - our own names
                tuple(row.values()),
            )
            db.executemany(
                "INSERT INTO items (custom_id, shard, document_id, attempt, state) VALUES (?, ?, ?, ?, ?)",
                ((item.custom_id, shard.number, item.document_id, item.attempt, item.state) for item in items),
            )

    def advance(self, number: int, state: ShardState, **fields: Any) -> Shard:
        """Set the *state* of shard *number* and the columns in *fields*; return the shard."""
        names = ", ".join(f"{name} = ?" for name in ("state", *fields))
        query = f"UPDATE shards SET {names} WHERE number = ? RETURNING *"  # noqa: S608 - our own names
        return _shard(self._rows(query, state, *fields.values(), number)[0])

    def give_up(self, shard: Shard, status: str) -> Shard:
        """End *shard*, which has no result files, with *status*; its documents are settled by the next poll."""
        return self.advance(shard.number, ShardState.TERMINAL, status=status, ended_at=time.time())

    def shards(self, states: Iterable[ShardState] = tuple(ShardState)) -> list[Shard]:
        """Return the shards that are in one of *states*, by number."""
        query = "SELECT * FROM shards WHERE state IN (SELECT value FROM json_each(?)) ORDER BY number"
        return [_shard(row) for row in self._rows(query, json.dumps(list(states)))]

    def next_number(self) -> int:
        """Return the number of the next shard, from 1; numbers are never reused."""
        return int(self._rows("SELECT COALESCE(MAX(number), 0) + 1 FROM shards")[0][0])

    def live_tokens(self) -> int:
        """Return the estimated prompt tokens enqueued at OpenAI now."""
        return sum(shard.tokens for shard in self.shards(LIVE))

    def items(self, number: int, state: ItemState) -> Iterator[Item]:
        """Yield the items of shard *number* in *state*, PAGE rows in memory at a time."""
        last = ""
        query = "SELECT * FROM items WHERE shard = ? AND state = ? AND custom_id > ? ORDER BY custom_id LIMIT ?"
        while rows := self._rows(query, number, state, last, PAGE):
            yield from map(_item, rows)
            last = rows[-1]["custom_id"]

    def find(self, custom_ids: Sequence[str]) -> dict[str, Item]:
        """Return the item of each of *custom_ids* that is known."""
        query = "SELECT * FROM items WHERE custom_id IN (SELECT value FROM json_each(?))"
        rows = self._rows(query, json.dumps(custom_ids))
        return {row["custom_id"]: _item(row) for row in rows}

    def settle(self, items: Iterable[Item]) -> None:
        """Record how *items* ended; an item that has ended already is left alone."""
        with self.transaction() as db:
            db.executemany(
                "UPDATE items SET state = ?, code = ?, retryable = ? WHERE custom_id = ? AND state = 'submitted'",
                ((item.state, item.code, item.retryable, item.custom_id) for item in items),
            )

    def counts(self, number: int) -> dict[ItemState, int]:
        """Return how many items of shard *number* are in each state."""
        found = dict(self._rows("SELECT state, COUNT(*) FROM items WHERE shard = ? GROUP BY state", number))
        return {state: found.get(state, 0) for state in ItemState}

    def sendings(self, document_ids: Sequence[str]) -> dict[str, tuple[int, int]]:
        """Return, for each of *document_ids* that was sent, its sendings and its attempts since it last ended.

        A sending whose batch never ran, or was cancelled by the operator, is no attempt.
        """
        query = """
            WITH sent AS (
                SELECT document_id, code, rowid AS place,
                    MAX(iif(state <> 'submitted' AND NOT retryable, rowid, 0)) OVER (PARTITION BY document_id) AS ended_at
                FROM items WHERE document_id IN (SELECT value FROM json_each(?))
            )
            SELECT document_id, COUNT(*), SUM(place > ended_at AND (code IS NULL OR code NOT IN (?, ?, ?)))
            FROM sent GROUP BY document_id"""
        rows = self._rows(query, json.dumps(document_ids), *NOT_RUN.values(), CANCELLED_HERE)
        return {row[0]: (row[1], row[2]) for row in rows}

    def retried(self, number: int) -> int:
        """Return how many documents of shard *number* became pending again."""
        return int(self._rows("SELECT COUNT(*) FROM items WHERE shard = ? AND retryable", number)[0][0])


def _shard(row: sqlite3.Row) -> Shard:
    return Shard(**{**dict(row), "state": ShardState(row["state"])})


def _item(row: sqlite3.Row) -> Item:
    return Item(**{**dict(row), "state": ItemState(row["state"])})

"""Every vector that was ever paid for, by the hash of its text: the reason why nothing is embedded twice.

One SQLite file in WAL mode with ``synchronous=FULL``: a vector that was added survives a power cut
(sqlite.org/pragma.html#pragma_synchronous). It holds hashes, vectors and counts; no text. Vectors of several models stand
beside each other, so that going back to a model costs nothing.
"""

from __future__ import annotations

import os
import sqlite3
import threading
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from embedding_index.items import ModelIdentity
from embedding_index.vector_checks import Vector, mixed_dimensions
from error_handler import StateDirectoryError

_FORMAT = 1
_APPLICATION = 0x54524456  # marks the file as ours: "TRDV"
_MARKS = 500
_ROWS = 500  # of one statement, which has four values in each; SQLite takes 32,766
_PAGE_BYTES = 16_384  # of SQLite's 4,096 a vector of 1536 numbers fills one and a half
_BUSY_TIMEOUT_S = 30.0
_TABLES = """
CREATE TABLE models (
    id INTEGER PRIMARY KEY,
    provider TEXT NOT NULL,
    model TEXT NOT NULL,
    dimensions INTEGER NOT NULL,
    is_default INTEGER NOT NULL,
    UNIQUE (provider, model, dimensions)
) STRICT;
CREATE TABLE vectors (
    model INTEGER NOT NULL REFERENCES models (id),
    hash BLOB NOT NULL,
    vector BLOB NOT NULL,
    checksum INTEGER NOT NULL,
    UNIQUE (model, hash)
) STRICT;
CREATE TABLE parts (
    whole BLOB NOT NULL,
    part BLOB NOT NULL,
    PRIMARY KEY (whole, part)
) STRICT, WITHOUT ROWID;
CREATE TABLE usage (
    provider TEXT NOT NULL,
    model TEXT NOT NULL,
    calls INTEGER NOT NULL,
    tokens INTEGER NOT NULL,
    PRIMARY KEY (provider, model)
) STRICT;
"""


@dataclass(frozen=True, slots=True)
class Totals:
    """What one model has cost since the ledger was made; *calls* are those that were answered.

    *tokens* are as billed, of calls of all dimensions; *vectors* are those that are kept, pieces of long texts included.
    """

    vectors: int
    calls: int
    tokens: int


class VectorLedger:
    """The ledger at one path; any threads of one process (whose caller holds the lock of the folder). Use as ``with``.

    An identity whose dimensions are not known yet means the vectors of the model's default length. Those of a length that
    was asked for are others: with EMBEDDING_DIMENSIONS unset again, none of them must be taken for one of the default.
    """

    def __init__(self, path: Path) -> None:
        """Open or make the file *path*, mode 0600, in a folder of mode 0700 where that is new.

        Raises:
            StateDirectoryError: It cannot be opened, is damaged, no ledger, or of a later version.
        """
        self._path = path
        self._lock = threading.Lock()
        try:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600))
            self._db = sqlite3.connect(
                path, isolation_level=None, check_same_thread=False, timeout=_BUSY_TIMEOUT_S, cached_statements=8
            )  # a statement keeps the vectors of its last use
        except (OSError, sqlite3.Error) as exc:
            raise self._unusable(exc) from exc
        try:
            self._prepare()
        except sqlite3.Error as exc:
            self._db.close()
            raise self._unusable(exc) from exc
        except StateDirectoryError:
            self._db.close()
            raise

    def __enter__(self) -> VectorLedger:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; what was added is durable already."""
        with self._lock:
            self._db.close()

    def known(self, identity: ModelIdentity, hashes: Iterable[str]) -> set[str]:
        """Return those of *hashes* that have a vector of *identity*."""
        query = "SELECT hash FROM vectors WHERE model = ? AND hash IN ({marks})"
        return {row[0].hex() for row in self._found(identity, query, hashes)}

    def vectors(self, identity: ModelIdentity, hashes: Iterable[str]) -> dict[str, Vector]:
        """Return the vectors of those of *hashes* that have one, length 1, float32.

        Raises:
            StateDirectoryError: One was changed on disk.
        """
        query = "SELECT hash, vector, checksum FROM vectors WHERE model = ? AND hash IN ({marks})"
        found: dict[str, Vector] = {}
        for key, stored, checksum in self._found(identity, query, hashes):
            if zlib.crc32(stored) != checksum:
                raise self._damaged("checksum")
            found[key.hex()] = np.frombuffer(stored, dtype="<f4")
        return found

    def add(
        self,
        identity: ModelIdentity,
        vectors: Mapping[str, Vector],
        tokens: int | None = None,
        *,
        calls: int = 1,
    ) -> None:
        """Keep *vectors* by content hash, and that *calls* calls were billed *tokens*; durable, all or nothing, on return.

        A hash that has a vector keeps it.

        Raises:
            MixedIndexError: Their dimension is not the one of *identity* or of its vectors here; nothing was added.
            StateDirectoryError: The file cannot be written; nothing was added.
        """
        with self._step() as db:
            if vectors:
                lengths = {len(vector) for vector in vectors.values()}
                length = lengths.pop()
                wanted = next(iter(lengths), None) or self._dimensions(identity) or length
                if wanted != length:
                    raise mixed_dimensions(wanted, length)
                number = self._model(identity, length)
                left = iter(vectors.items())
                while page := list(islice(left, _ROWS)):
                    _insert(db, number, page)
            if calls or tokens:
                db.execute(
                    "INSERT INTO usage VALUES (?, ?, ?, ?) ON CONFLICT DO UPDATE "
                    "SET calls = calls + excluded.calls, tokens = tokens + excluded.tokens",
                    (identity.provider, identity.model, calls, tokens or 0),
                )

    def note_parts(self, parts: Mapping[str, Iterable[str]]) -> None:
        """Keep which pieces (content hashes) belong to which long text, so that ``keep_only`` spares them."""
        rows = ((bytes.fromhex(whole), bytes.fromhex(part)) for whole, pieces in parts.items() for part in pieces)
        with self._step() as db:
            db.executemany("INSERT OR IGNORE INTO parts VALUES (?, ?)", rows)

    def dimensions(self, identity: ModelIdentity) -> int | None:
        """Return how long the vectors of *identity* are here; None where there are none and it does not say."""
        with self._reading():
            return self._dimensions(identity)

    def totals(self, identity: ModelIdentity) -> Totals:
        """Return what was kept and billed of *identity*."""
        with self._reading() as db:
            number = self._number(identity)
            vectors = db.execute("SELECT COUNT(*) FROM vectors WHERE model = ?", (number,)).fetchone()[0]
            spent = db.execute(
                "SELECT calls, tokens FROM usage WHERE provider = ? AND model = ?", (identity.provider, identity.model)
            ).fetchone()
        return Totals(vectors, *(spent or (0, 0)))

    def identities(self) -> list[ModelIdentity]:
        """Return the models that have vectors here, with their dimensions."""
        with self._reading() as db:
            rows = db.execute("SELECT provider, model, dimensions FROM models ORDER BY id").fetchall()
        return [ModelIdentity(*row) for row in rows]

    def keep_only(self, hashes: Iterable[str]) -> int:
        """Remove the vectors of all texts but those of *hashes* and their pieces, of every model; return how many."""
        with self._step() as db:
            db.execute("CREATE TEMP TABLE kept (hash BLOB PRIMARY KEY) WITHOUT ROWID")
            db.executemany("INSERT OR IGNORE INTO kept VALUES (?)", ((bytes.fromhex(key),) for key in hashes))
            # A piece that was found too long has pieces itself.
            db.execute(
                "WITH RECURSIVE needed (hash) AS (SELECT hash FROM kept UNION "
                "SELECT part FROM parts JOIN needed ON whole = needed.hash) INSERT OR IGNORE INTO kept SELECT hash FROM needed"
            )
            removed = db.execute("DELETE FROM vectors WHERE hash NOT IN (SELECT hash FROM kept)").rowcount
            db.execute("DELETE FROM parts WHERE whole NOT IN (SELECT hash FROM kept)")
            db.execute("DROP TABLE kept")
        return removed

    def _prepare(self) -> None:
        """Make the tables in a new file; leave a file that is not ours as it is."""
        application = self._db.execute("PRAGMA application_id").fetchone()[0]
        version = self._db.execute("PRAGMA user_version").fetchone()[0]
        is_new = not self._db.execute("SELECT COUNT(*) FROM sqlite_schema").fetchone()[0]
        if not is_new and application != _APPLICATION:
            raise StateDirectoryError(
                f"{self._path} is a database of something else; set INDEX_DIR to a folder of the index's own."
            )
        if version > _FORMAT:
            raise StateDirectoryError(
                f"{self._path} was written by a later version of this program (format {version}, this one knows "
                f"{_FORMAT}); use that version, or set INDEX_DIR to another folder, where everything is embedded again."
            )
        self._db.execute(f"PRAGMA page_size={_PAGE_BYTES}")  # does nothing to a file that has pages
        self._db.execute("PRAGMA journal_mode=WAL")
        self._db.execute("PRAGMA synchronous=FULL")
        self._db.execute("PRAGMA secure_delete=ON")  # what is removed is overwritten, not only forgotten where it was
        if is_new:
            with self._step() as db:
                for statement in _TABLES.split(";\n"):
                    db.execute(statement)
                db.execute(f"PRAGMA application_id={_APPLICATION}")
                db.execute(f"PRAGMA user_version={_FORMAT}")

    def _found(self, identity: ModelIdentity, query: str, hashes: Iterable[str]) -> Iterator[tuple[bytes, bytes, int]]:
        """Yield the rows of *query*, some hundred hashes at a time; the lock is free in between."""
        left = iter(hashes)
        while page := [bytes.fromhex(key) for key in islice(left, _MARKS)]:
            with self._reading() as db:
                number = self._number(identity)
                rows = db.execute(query.format(marks=", ".join("?" * len(page))), (number, *page)).fetchall()
            yield from rows

    def _number(self, identity: ModelIdentity) -> int | None:
        """Return the row of *identity* in ``models``, None where it has none."""
        rows = self._db.execute(
            "SELECT id, dimensions, is_default FROM models WHERE provider = ? AND model = ? ORDER BY is_default DESC",
            (identity.provider, identity.model),
        ).fetchall()
        if identity.dimensions is not None:
            return next((row[0] for row in rows if row[1] == identity.dimensions), None)
        return rows[0][0] if rows and rows[0][2] else None

    def _dimensions(self, identity: ModelIdentity) -> int | None:
        if identity.dimensions is not None:
            return identity.dimensions
        row = self._db.execute("SELECT dimensions FROM models WHERE id = ?", (self._number(identity),)).fetchone()
        return row[0] if row else None

    def _model(self, identity: ModelIdentity, length: int) -> int:
        """Return the row of *identity*, made where it has none."""
        number = self._number(identity)
        if number is None:
            (number,) = self._db.execute(
                "INSERT INTO models (provider, model, dimensions, is_default) VALUES (?, ?, ?, ?) "
                "ON CONFLICT DO UPDATE SET is_default = excluded.is_default RETURNING id",
                (identity.provider, identity.model, length, identity.dimensions is None),
            ).fetchone()
        return number

    @contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        try:
            with self._lock:
                yield self._db
        except sqlite3.Error as exc:
            raise self._unusable(exc) from exc

    @contextmanager
    def _step(self) -> Iterator[sqlite3.Connection]:
        """Make everything inside one durable step, or nothing of it."""
        with self._reading() as db:
            db.execute("BEGIN IMMEDIATE")
            with db:  # ends the transaction, one way or the other
                yield db

    def _unusable(self, exc: Exception) -> StateDirectoryError:
        if type(exc) is sqlite3.DatabaseError:
            return self._damaged(str(exc))
        return StateDirectoryError(
            f"the stored vectors in {self._path} cannot be used ({exc}); free space or fix the rights, then run again."
        )

    def _damaged(self, how: str) -> StateDirectoryError:
        return StateDirectoryError(
            f"the stored vectors in {self._path} are damaged ({how}); put back a copy of the file, or delete it with its -wal "
            "and -shm and run `python cli.py index --batch`, which takes them from ChromaDB's files where those are whole, "
            "and embeds (and pays for) the others again."
        )


def _insert(db: sqlite3.Connection, number: int, page: Sequence[tuple[str, Vector]]) -> None:
    """Add the vectors of *page* (content hash, vector), all in one statement: other threads run until it is done."""
    values: list[object] = []
    for key, vector in page:
        stored = np.ascontiguousarray(vector, dtype="<f4").data
        values += (number, bytes.fromhex(key), stored, zlib.crc32(stored))
    query = "INSERT INTO vectors (model, hash, vector, checksum) VALUES {rows} ON CONFLICT DO NOTHING"
    db.execute(query.format(rows=", ".join(["(?, ?, ?, ?)"] * len(page))), values)

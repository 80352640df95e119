"""Stores every paid vector by the hash of its text, so that nothing is embedded twice.

The file holds hashes, vectors and counts. It keeps the vectors of several models, so going back to a model costs nothing.
It also has the table of what a search finds: see ``search_entries``. Each run that changed it writes a copy beside it.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import sqlite3
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from embedding_index.providers.contract import ModelIdentity, Vector, mixed_dimensions
from error_handler import StateDirectoryError
from storage.files import sync_folder
from storage.state_file import Schema, StateFile

logger = logging.getLogger(__name__)

LEDGER_FILE, COPY_FILE = "vectors.sqlite3", "vectors.copy.sqlite3"
HASHES_PER_QUERY = 500  # an insert has four values for each; SQLite allows 32,766

_SEARCH_TABLES = """
CREATE TABLE entries (
    kind TEXT NOT NULL,
    name TEXT NOT NULL,
    hash BLOB NOT NULL,
    metadata TEXT NOT NULL, -- JSON
    text TEXT NOT NULL, -- JSON, which has all strings of Python; null for conversations
    PRIMARY KEY (kind, name)
) STRICT, WITHOUT ROWID;
CREATE TABLE search (
    token TEXT NOT NULL, -- tells this file from another one at the same path
    model INTEGER REFERENCES models (id), -- whose vectors are compared
    version INTEGER NOT NULL, -- counts changes of names and hashes in entries
    changes INTEGER NOT NULL, -- counts all transactions
    graph TEXT -- the checksum of the published graph, see search_graph
) STRICT;
INSERT INTO search VALUES (hex(randomblob(8)), NULL, 0, 0, NULL)"""
_TABLES = f"""
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
{_SEARCH_TABLES}"""


@dataclass(frozen=True, slots=True)
class Totals:
    """The cost of one model since the ledger was created.

    *calls* were answered; *tokens* are as billed, for all dimensions; *vectors* include pieces of long texts.
    """

    vectors: int
    calls: int
    tokens: int


class VectorLedger(StateFile):
    """The ledger at one path; the process that writes holds the lock of the folder.

    An identity without dimensions means the vectors of the model's default length. Those made with EMBEDDING_DIMENSIONS
    are never used as default ones, even if their length is the same.
    """

    def __init__(self, path: Path, *, create: bool = True) -> None:
        """See ``StateFile``."""
        super().__init__(path, _SCHEMA, create=create)

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
        rows = self._found(identity, query, hashes)
        return {key.hex(): self.checked(stored, checksum) for key, stored, checksum in rows}

    def checked(self, stored: bytes, checksum: int) -> Vector:
        """Return the vector *stored*; raise StateDirectoryError if it was changed on disk."""
        if zlib.crc32(stored) != checksum:
            raise self.damaged("checksum")
        return np.frombuffer(stored, dtype="<f4")

    def add(
        self, identity: ModelIdentity, vectors: Mapping[str, Vector], tokens: int | None = None, *, calls: int = 1
    ) -> None:
        """Store *vectors* by content hash, and that *calls* calls were billed *tokens*; durably, all or nothing.

        A hash that has a vector keeps it.

        Raises:
            MixedIndexError: Their length is not the one of *identity* or of its vectors here; nothing was added.
            StateDirectoryError: The file cannot be written; nothing was added.
        """
        with self.change() as db:
            if vectors:
                lengths = {len(vector) for vector in vectors.values()}
                length = lengths.pop()
                wanted = next(iter(lengths), None) or self.dimensions(identity) or length
                if wanted != length:
                    raise mixed_dimensions(wanted, length)
                number = self._model(identity, length)
                left = iter(vectors.items())
                while page := list(islice(left, HASHES_PER_QUERY)):
                    _insert(db, number, page)
            if calls or tokens:
                db.execute(
                    "INSERT INTO usage VALUES (?, ?, ?, ?) ON CONFLICT DO UPDATE "
                    "SET calls = calls + excluded.calls, tokens = tokens + excluded.tokens",
                    (identity.provider, identity.model, calls, tokens or 0),
                )

    def note_parts(self, parts: Mapping[str, Iterable[str]]) -> None:
        """Store which pieces (content hashes) belong to which long text, so that ``keep_only`` spares them."""
        rows = ((bytes.fromhex(whole), bytes.fromhex(part)) for whole, pieces in parts.items() for part in pieces)
        with self.change() as db:
            db.executemany("INSERT OR IGNORE INTO parts VALUES (?, ?)", rows)

    def dimensions(self, identity: ModelIdentity) -> int | None:
        """Return the length of the vectors of *identity*; None if it has no length yet."""
        if identity.dimensions is not None:
            return identity.dimensions
        with self.reading() as db:
            row = db.execute("SELECT dimensions FROM models WHERE id = ?", (self.number(identity),)).fetchone()
        return row[0] if row else None

    def totals(self, identity: ModelIdentity) -> Totals:
        """Return what was stored and billed for *identity*."""
        with self.reading() as db:
            number = self.number(identity)
            vectors = db.execute("SELECT COUNT(*) FROM vectors WHERE model = ?", (number,)).fetchone()[0]
            spent = db.execute(
                "SELECT calls, tokens FROM usage WHERE provider = ? AND model = ?", (identity.provider, identity.model)
            ).fetchone()
        return Totals(vectors, *(spent or (0, 0)))

    def keep_only(self, hashes: Iterable[str]) -> int:
        """Delete all vectors, of every model, and all search entries except those of *hashes* and their pieces.

        Returns the number of deleted vectors.
        """
        with self.change() as db:
            db.execute("CREATE TEMP TABLE kept (hash BLOB PRIMARY KEY) WITHOUT ROWID")
            db.executemany("INSERT OR IGNORE INTO kept VALUES (?)", ((bytes.fromhex(key),) for key in hashes))
            entries = db.execute("DELETE FROM entries WHERE hash NOT IN (SELECT hash FROM kept)").rowcount
            db.execute("UPDATE search SET version = version + (? > 0)", (entries,))
            # A piece that the provider found too long has pieces itself.
            db.execute(
                "WITH RECURSIVE needed (hash) AS (SELECT hash FROM kept UNION "
                "SELECT part FROM parts JOIN needed ON whole = needed.hash) INSERT OR IGNORE INTO kept SELECT hash FROM needed"
            )
            removed = db.execute("DELETE FROM vectors WHERE hash NOT IN (SELECT hash FROM kept)").rowcount
            db.execute("DELETE FROM parts WHERE whole NOT IN (SELECT hash FROM kept)")
            db.execute("DROP TABLE kept")
        return removed

    def number(self, identity: ModelIdentity) -> int | None:
        """Return the row of *identity* in ``models``, None if it has no vectors."""
        with self.reading() as db:
            rows = db.execute(
                "SELECT id, dimensions, is_default FROM models WHERE provider = ? AND model = ? ORDER BY is_default DESC",
                (identity.provider, identity.model),
            ).fetchall()
        if identity.dimensions is not None:
            return next((row[0] for row in rows if row[1] == identity.dimensions), None)
        return rows[0][0] if rows and rows[0][2] else None

    @contextmanager
    def change(self) -> Iterator[sqlite3.Connection]:
        """Do a transaction and count it in ``search.changes``, which shows whether a copy of the file is stale."""
        with self.transaction() as db:
            yield db
            db.execute("UPDATE search SET changes = changes + 1")

    def _found(self, identity: ModelIdentity, query: str, hashes: Iterable[str]) -> Iterator[tuple[bytes, bytes, int]]:
        """Yield the rows of *query*, some hundred hashes at a time; the lock is free in between."""
        left = iter(hashes)
        while page := [bytes.fromhex(key) for key in islice(left, HASHES_PER_QUERY)]:
            with self.reading() as db:
                number = self.number(identity)
                rows = db.execute(query.format(marks=", ".join("?" * len(page))), (number, *page)).fetchall()
            yield from rows

    def _model(self, identity: ModelIdentity, length: int) -> int:
        """Return the row of *identity*; make it if there is none."""
        number = self.number(identity)
        if number is None:
            (number,) = self._db.execute(
                "INSERT INTO models (provider, model, dimensions, is_default) VALUES (?, ?, ?, ?) "
                "ON CONFLICT DO UPDATE SET is_default = excluded.is_default RETURNING id",
                (identity.provider, identity.model, length, identity.dimensions is None),
            ).fetchone()
        return number


def _insert(db: sqlite3.Connection, number: int, page: Sequence[tuple[str, Vector]]) -> None:
    """Add the vectors of *page* (content hash, vector) in one statement, during which other threads run."""
    values: list[object] = []
    for key, vector in page:
        stored = np.ascontiguousarray(vector, dtype="<f4").data
        values += (number, bytes.fromhex(key), stored, zlib.crc32(stored))
    query = "INSERT INTO vectors (model, hash, vector, checksum) VALUES {rows} ON CONFLICT DO NOTHING"
    db.execute(query.format(rows=", ".join(["(?, ?, ?, ?)"] * len(page))), values)


def restore_ledger(path: Path) -> None:
    """Restore the ledger *path* from its copy if it is missing or empty; the copy stays.

    Raises:
        StateDirectoryError: There is no room, or the folder does not allow it.
    """
    copy = path.with_name(COPY_FILE)
    if not copy.exists() or (path.exists() and path.stat().st_size):
        return
    try:
        for old in path.parent.glob(f"{path.name}*"):  # journals of the lost file
            old.unlink()
        part = copy.with_suffix(".part")
        shutil.copyfile(copy, part)
        _move_durably(part, path)
    except OSError as exc:
        raise _unusable(path, exc) from exc
    logger.warning("%s was missing; it is restored from %s", path.name, COPY_FILE)


def write_copy(ledger: VectorLedger) -> None:
    """Write the copy of *ledger* unless there is one of the same state; neither contains deleted vectors.

    Raises:
        StateDirectoryError: There is no room, or the folder does not allow it; the old copy stays.
    """
    copy = ledger.path.with_name(COPY_FILE)
    ledger.empty_journal()
    with ledger.reading() as db:
        state = tuple(db.execute("SELECT token, changes FROM search").fetchone())
        is_empty = not db.execute("SELECT EXISTS (SELECT 1 FROM vectors)").fetchone()[0]
        if state == _state_of(copy) or (is_empty and not copy.exists()):
            return
        part = copy.with_suffix(".part")
        try:
            part.unlink(missing_ok=True)
            os.close(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
            db.execute("VACUUM INTO ?", (str(part),))
            _move_durably(part, copy)
        except OSError as exc:
            raise _unusable(copy, exc) from exc


def _state_of(copy: Path) -> tuple[str, int] | None:
    try:
        with closing(sqlite3.connect(f"{copy.absolute().as_uri()}?mode=ro&immutable=1", uri=True)) as db:
            state: tuple[str, int] = db.execute("SELECT token, changes FROM search").fetchone()
            return state
    except sqlite3.Error:  # missing or damaged; the caller writes a new copy
        return None


def _move_durably(part: Path, path: Path) -> None:
    with part.open("rb") as file:
        os.fsync(file.fileno())
    os.chmod(part, 0o600)
    os.replace(part, path)
    sync_folder(path.parent)


def _unusable(path: Path, exc: OSError) -> StateDirectoryError:
    return StateDirectoryError(
        f"{path} cannot be written ({exc.strerror}); free space or fix the permissions, then run again."
    )


def _from_format_1(db: sqlite3.Connection, folder: Path) -> None:
    """Add the table of search entries to a ledger of format 1, whose entries were in ChromaDB's files only.

    The items that ``index.sqlite3`` marks as indexed become entries, if the file ``generation`` names their model.
    """
    for statement in _SEARCH_TABLES.split(";\n"):
        db.execute(statement)
    try:
        made_by = json.loads((folder / "generation").read_text(encoding="utf-8"))["identity"]
        model = db.execute(
            "SELECT id FROM models WHERE provider = ? AND model = ? AND dimensions = ?",
            (made_by["provider"], made_by["model"], made_by["dimensions"]),
        ).fetchone()
        with closing(sqlite3.connect(f"{(folder / 'index.sqlite3').absolute().as_uri()}?mode=rw", uri=True)) as states:
            rows = states.execute(
                "SELECT i.kind, i.name, i.hash, i.metadata, coalesce(json_quote(d.text), 'null') FROM items i "
                "LEFT JOIN documentation d ON d.kind = i.kind AND d.name = i.name WHERE i.state = 'indexed'"
            ).fetchall()
    except (OSError, ValueError, TypeError, KeyError, sqlite3.Error):
        return  # the next run that indexes adds what is missing without a call
    if model is None:
        return
    db.executemany(
        "INSERT INTO entries SELECT ?1, ?2, ?3, ?4, ?5 WHERE EXISTS (SELECT 1 FROM vectors WHERE model = ?6 AND hash = ?3)",
        ((*row, *model) for row in rows),
    )
    db.execute("UPDATE search SET model = ?", model)


_SCHEMA = Schema(
    what="the store of vectors",
    tables=_TABLES,
    version=2,
    application=0x54524456,  # "TRDV"
    migrate=_from_format_1,
    if_damaged="delete it with its -wal and -shm and run `python cli.py index --batch`: the copy beside it takes its place, "
    "and only what came after the copy is embedded (and paid for) again.",
    if_foreign="set INDEX_DIR to another folder.",
)

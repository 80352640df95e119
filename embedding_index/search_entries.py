"""The search entries: content hash, metadata and text of each item that can be found.

They are in the file of the vectors, so that a reader in any process sees both in one state.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from database_docs.items import Item, Kind, MetadataValue
from embedding_index.providers.contract import ModelIdentity, Vector
from embedding_index.vector_ledger import VectorLedger
from error_handler import MixedIndexError

Page = tuple[list[str], NDArray[np.float32]]
"""Names and their vectors, one row each."""


@dataclass(frozen=True, slots=True)
class Hit:
    """One found item. *similarity* is the cosine, -1 to 1; *text* is None for conversations, whose text is not stored."""

    kind: Kind
    name: str
    similarity: float
    metadata: Mapping[str, MetadataValue]
    text: str | None = None


_VECTORS = """
SELECT e.name, v.vector, v.checksum FROM entries e
JOIN vectors v ON v.hash = e.hash AND v.model = (SELECT model FROM search) WHERE e.kind = ? AND {which}"""
_PUT = """
INSERT INTO entries SELECT ?1, ?2, ?3, ?4, ?5 WHERE EXISTS (SELECT 1 FROM vectors WHERE model = ?6 AND hash = ?3)
ON CONFLICT (kind, name) DO UPDATE SET hash = excluded.hash, metadata = excluded.metadata, text = excluded.text"""


class SearchEntries:
    """The entries in the file of *ledger*."""

    def __init__(self, ledger: VectorLedger) -> None:
        self.ledger = ledger

    def identity(self) -> ModelIdentity | None:
        """Return the model whose vectors are compared, with its dimensions; None before the first entry."""
        with self.ledger.reading() as db:
            row = db.execute(
                "SELECT m.provider, m.model, m.dimensions FROM models m JOIN search s ON s.model = m.id"
            ).fetchone()
        return ModelIdentity(*row) if row else None

    def version(self) -> tuple[str, int]:
        """Return a value that changes when names or hashes change, or when the file is replaced by another one."""
        with self.ledger.reading() as db:
            token, version = db.execute("SELECT token, version FROM search").fetchone()
        return token, version

    def graph(self) -> str | None:
        """Return the checksum of the published graph, None if there is none; see ``search_graph``."""
        with self.ledger.reading() as db:
            (checksum,) = db.execute("SELECT graph FROM search").fetchone()
        return checksum  # type: ignore[no-any-return]

    def set_graph(self, checksum: str | None) -> None:
        """Publish the graph with *checksum*, durably; None: no graph."""
        if checksum != self.graph():
            with self.ledger.change() as db:
                db.execute("UPDATE search SET graph = ?", (checksum,))

    def hashes(self) -> dict[str, str]:
        """Return the content hash of each entry by its id."""
        with self.ledger.reading() as db:
            rows = db.execute("SELECT kind, name, hash FROM entries").fetchall()
        return {f"{kind}:{name}": key.hex() for kind, name, key in rows}

    def counts(self) -> dict[Kind, int]:
        """Return the number of entries of each kind that has some."""
        with self.ledger.reading() as db:
            rows = db.execute("SELECT kind, count(*) FROM entries GROUP BY kind").fetchall()
        return {Kind(kind): number for kind, number in rows}

    def put(self, identity: ModelIdentity, items: Iterable[Item]) -> None:
        """Add *items*, or replace those of the same name; durably. Items without a stored vector are left out.

        Raises:
            MixedIndexError: The entries are compared by vectors of another model than *identity*; nothing was added.
        """
        with self.ledger.change() as db:
            self._put(db, identity, items)

    def replace(self, identity: ModelIdentity, items: Iterable[Item]) -> None:
        """Replace all entries by *items*, which are compared by vectors of *identity* from now on; all or nothing."""
        with self.ledger.change() as db:
            db.execute("DELETE FROM entries")
            db.execute("UPDATE search SET model = NULL, version = version + 1, graph = NULL")
            self._put(db, identity, items)

    def update_metadata(self, items: Iterable[Item]) -> None:
        """Replace the metadata of *items*; unknown names are left out."""
        with self.ledger.change() as db:
            db.executemany(
                "UPDATE entries SET metadata = ? WHERE kind = ? AND name = ?",
                ((json.dumps(dict(item.metadata)), item.kind, item.name) for item in items),
            )

    def delete(self, kind: Kind, names: Iterable[str]) -> None:
        """Delete entries; unknown names are ignored."""
        with self.ledger.change() as db:
            db.executemany("DELETE FROM entries WHERE kind = ? AND name = ?", ((kind, name) for name in names))
            db.execute("UPDATE search SET version = version + 1")

    def pages(self, kind: Kind, size: int = 1000) -> Iterator[Page]:
        """Yield the names and vectors of *kind* by name, *size* at a time.

        Raises:
            StateDirectoryError: A vector was changed on disk.
        """
        query = _VECTORS.format(which="e.name > ? ORDER BY e.name LIMIT ?")
        last = ""
        while True:
            with self.ledger.reading() as db:
                rows = db.execute(query, (kind, last, size)).fetchall()
            if not rows:
                return
            last = rows[-1][0]
            yield [row[0] for row in rows], np.stack([self.ledger.checked(row[1], row[2]) for row in rows])

    def vectors(self, kind: Kind, names: Collection[str]) -> dict[str, Vector]:
        """Return the vectors of those of *names* that are entries."""
        query = _VECTORS.format(which="e.name IN (SELECT value FROM json_each(?))")
        with self.ledger.reading() as db:
            rows = db.execute(query, (kind, json.dumps(list(names)))).fetchall()
        return {name: self.ledger.checked(stored, checksum) for name, stored, checksum in rows}

    def hits(self, found: Sequence[tuple[float, Kind, str]]) -> list[Hit]:
        """Return the entries *found* (similarity, kind, name) in their order, with metadata and text."""
        query = "SELECT metadata, text FROM entries WHERE kind = ? AND name = ?"
        hits = []
        with self.ledger.reading() as db:
            for similarity, kind, name in found:
                metadata, text = map(json.loads, db.execute(query, (kind, name)).fetchone())
                hits.append(Hit(kind, name, similarity, metadata, text))
        return hits

    def checksum(self, kinds: Collection[Kind]) -> str:
        """Return the SHA-256 of the model and of the names and content hashes of *kinds*."""
        digest = hashlib.sha256(str(self.identity()).encode())
        with self.ledger.reading() as db:
            rows = db.execute("SELECT kind, name, hash FROM entries ORDER BY kind, name")
            for kind, name, key in rows:
                if kind in kinds:
                    digest.update(f"{kind}:{name}\0".encode("utf-8", "surrogatepass") + key)
        return digest.hexdigest()

    def _put(self, db: sqlite3.Connection, identity: ModelIdentity, items: Iterable[Item]) -> None:
        number = self.ledger.number(identity)
        recorded = db.execute("SELECT model FROM search").fetchone()[0]
        if recorded is not None and recorded != number:
            raise MixedIndexError(mixed_message(self.identity(), identity))
        db.executemany(_PUT, (_row(item, number) for item in items))
        db.execute("UPDATE search SET model = ?, version = version + 1", (number,))


def mixed_message(recorded: ModelIdentity | None, other: object) -> str:
    """Return the sentence of a MixedIndexError."""
    return (
        f"the index holds vectors of {recorded}, which cannot be compared with {other}; set EMBEDDING_PROVIDER and "
        "EMBEDDING_MODEL (and EMBEDDING_DIMENSIONS) back, or rebuild the index: `python cli.py index --rebuild`."
    )


def _row(item: Item, model: int | None) -> tuple[object, ...]:
    # Customer text is never written to disk.
    text = None if item.kind is Kind.CONVERSATION else item.text
    metadata = json.dumps(dict(item.metadata))
    return item.kind, item.name, bytes.fromhex(item.content_hash), metadata, json.dumps(text), model

"""The state of each item (pending, indexed, failed), and the documentation of tables and relationships.

Losing the file costs no money, because the vectors are in another file. The next run fills it from the sources.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from config.index_settings import load_index_settings
from database_docs.documentation import Documentation, RelationshipFacts, TableFacts, document_database
from database_docs.items import IndexItem, Item, Kind, Offered, State, StoredItem
from storage.state_file import Schema, StateFile

FILE_NAME = "index.sqlite3"
CHUNK = 5_000  # rows that are read at once

# Sorted, so that equal values are equal texts.
_JSON = json.JSONEncoder(sort_keys=True, separators=(",", ":"))

# Texts have a separate table, so that a pass over 100,000 unchanged items reads little.
_TABLES = """
CREATE TABLE items (
    kind TEXT NOT NULL,
    name TEXT NOT NULL,
    state TEXT NOT NULL,
    hash BLOB NOT NULL,
    metadata TEXT NOT NULL,
    -- 1: indexed, with older metadata.
    is_outdated INTEGER NOT NULL DEFAULT 0,
    problem TEXT,
    PRIMARY KEY (kind, name)
) STRICT, WITHOUT ROWID;
CREATE INDEX items_to_do ON items (kind, state) WHERE state <> 'indexed';
CREATE TABLE documentation (
    kind TEXT NOT NULL,
    name TEXT NOT NULL,
    text TEXT NOT NULL,
    details TEXT NOT NULL,
    PRIMARY KEY (kind, name)
) STRICT"""

_KNOWN = "SELECT state, hash, metadata, is_outdated FROM items WHERE kind = ? AND name = ?"
_UPSERT = """
INSERT INTO items (kind, name, state, hash, metadata) VALUES (:kind, :name, 'pending', :hash, :metadata)
ON CONFLICT (kind, name) DO UPDATE SET
    state = 'pending', metadata = :metadata, is_outdated = 0,
    problem = iif(hash = :hash, problem, NULL), hash = :hash"""
_NEW_METADATA = "UPDATE items SET metadata = :metadata, is_outdated = 1 WHERE kind = :kind AND name = :name"
_NEW_TEXT = """
INSERT INTO documentation VALUES (?, ?, ?, ?)
ON CONFLICT (kind, name) DO UPDATE SET text = excluded.text, details = excluded.details
WHERE text <> excluded.text OR details <> excluded.details"""


_SCHEMA = Schema(
    what="the state of the items",
    tables=_TABLES,
    version=1,
    if_damaged="remove it with its -wal and -shm, and index again: stored vectors are not paid for twice.",
    if_foreign="set INDEX_DIR to another folder.",
)


class DocumentationStore(StateFile):
    """The state of every item. One process may write (its caller holds the lock of the folder); others may read."""

    def __init__(self, path: Path | None = None) -> None:
        """Open or make the file *path*; None: ``index.sqlite3`` in INDEX_DIR. See ``StateFile``."""
        super().__init__(path if path is not None else load_index_settings().index_dir / FILE_NAME, _SCHEMA)
        self._met: dict[Kind, set[str]] = {}  # by the pass of a kind; an interrupted pass starts again

    def begin_pass(self, kind: Kind) -> None:
        """Begin a complete pass over the source of *kind*: offered names are noted from now on."""
        self._met[kind] = set()

    def offer(self, items: Iterable[IndexItem], keep_text: bool = True) -> Offered:
        """Store *items* as their source has them now, and return the work they leave.

        Items are pending if they are new, have another text, failed before, or were never finished. Without *keep_text*,
        only the hashes of their texts are stored.
        """
        return self._offer([Documentation(item, {}) for item in items], keep_text)

    def _offer(self, documented: Sequence[Documentation], keep_text: bool) -> Offered:
        offered, new, newer = Offered(), [], []
        with self.transaction() as db:
            for item in (documentation.item for documentation in documented):
                row = {
                    "kind": item.kind,
                    "name": item.name,
                    "hash": bytes.fromhex(item.content_hash),
                    "metadata": _JSON.encode(dict(item.metadata)),
                }
                known = db.execute(_KNOWN, (item.kind, item.name)).fetchone()
                state, stored_hash, metadata, is_outdated = known or (None, None, None, 0)
                if item.kind in self._met:
                    self._met[item.kind].add(item.name)
                if state != State.INDEXED or stored_hash != row["hash"]:
                    offered.pending.append(item)
                    if (state, stored_hash, metadata) != (State.PENDING, row["hash"], row["metadata"]):
                        new.append(row)
                elif metadata != row["metadata"] or is_outdated:
                    offered.changed.append(item)
                    newer.append(row)
            db.executemany(_UPSERT, new)
            db.executemany(_NEW_METADATA, newer)
            if keep_text:
                db.executemany(
                    _NEW_TEXT, ((d.item.kind, d.item.name, d.item.text, _JSON.encode(d.details)) for d in documented)
                )
        return offered

    def end_pass(self, kind: Kind) -> list[str]:
        """End the pass and return the names of *kind* that were not offered, because the source no longer has them.

        They stay here until ``remove``, so that a crash before they leave the index does not lose them.

        Raises:
            ValueError: No pass has begun, so every name would be returned.
        """
        if kind not in self._met:
            raise ValueError(f"no pass of {kind} has begun")
        met = self._met.pop(kind)
        rows = self._rows("SELECT name FROM items WHERE kind = ? ORDER BY name", (kind,))
        return [row["name"] for row in rows if row["name"] not in met]

    def sync_database(self, tables: Sequence[TableFacts], relationships: Sequence[RelationshipFacts]) -> Offered:
        """Document everything that a database has now, and return the work it leaves.

        Call ``remove`` for removed names after they have left the index, and ``mark_ended`` for the other items.
        """
        documented_tables, documented_relationships = document_database(tables, relationships)
        done = Offered()
        for kind, documented in ((Kind.TABLE, documented_tables), (Kind.RELATIONSHIP, documented_relationships)):
            self.begin_pass(kind)
            offered = self._offer(documented, keep_text=True)
            done.pending.extend(offered.pending)
            done.changed.extend(offered.changed)
            done.removed[kind] = self.end_pass(kind)
        return done

    def mark_ended(self, ended: Iterable[tuple[Item, str | None]]) -> None:
        """Mark each item as indexed with its text and metadata (None), or as failed (its problem).

        An item whose text has changed meanwhile stays pending. A problem is one sentence that does not quote the item.
        """
        done = list(ended)
        with self.transaction() as db:
            db.executemany(
                "UPDATE items SET state = 'indexed', is_outdated = 0, problem = NULL "
                "WHERE kind = ? AND name = ? AND hash = ?",
                ((item.kind, item.name, bytes.fromhex(item.content_hash)) for item, problem in done if problem is None),
            )
            db.executemany(
                "UPDATE items SET state = 'failed', problem = ? WHERE kind = ? AND name = ?",
                ((problem, item.kind, item.name) for item, problem in done if problem is not None),
            )

    def mark_pending(self, ids: Iterable[str]) -> None:
        """Mark the items *ids* as pending: the index no longer has them."""
        with self.transaction() as db:
            db.executemany(
                "UPDATE items SET state = 'pending', is_outdated = 0 WHERE kind = ? AND name = ?",
                (id_.partition(":")[::2] for id_ in ids),
            )

    def remove(self, kind: Kind, names: Iterable[str]) -> None:
        """Delete the items *names*, which have left the index."""
        rows = [(kind, name) for name in names]
        with self.transaction() as db:
            db.executemany("DELETE FROM items WHERE kind = ? AND name = ?", rows)
            db.executemany("DELETE FROM documentation WHERE kind = ? AND name = ?", rows)

    def counts(self) -> dict[Kind, dict[State, int]]:
        """Return the number of items by kind and state, zeros included."""
        counted = {kind: dict.fromkeys(State, 0) for kind in Kind}
        for row in self._rows("SELECT kind, state, count(*) AS number FROM items GROUP BY kind, state"):
            counted[Kind(row["kind"])][State(row["state"])] = row["number"]
        return counted

    def items(self, kind: Kind, state: State | None = None) -> Iterator[StoredItem]:
        """Yield the items of *kind* by name, all or those in *state*. They are read in pages; later pages show changes."""
        query = (
            "SELECT i.*, d.text FROM items i LEFT JOIN documentation d ON d.kind = i.kind AND d.name = i.name "
            "WHERE i.kind = ?1 AND i.name >= ?2 AND i.name IS NOT ?3 AND (?4 IS NULL OR i.state = ?4) "
            "ORDER BY i.name LIMIT ?5"
        )
        first, last = "", None
        while rows := self._rows(query, (kind, first, last, state, CHUNK)):
            yield from map(_stored_item, rows)
            first = last = rows[-1]["name"]

    def hashes(self, state: State | None = None) -> dict[str, str]:
        """Return the content hash of each item by its id, of all or of those in *state*."""
        rows = self._rows("SELECT kind, name, hash FROM items WHERE ?1 IS NULL OR state = ?1", (state,))
        return {f"{row['kind']}:{row['name']}": row["hash"].hex() for row in rows}

    def get_pending_tables(self) -> list[str]:
        """Return the names of the pending tables, sorted."""
        return [item.name for item in self.items(Kind.TABLE, State.PENDING)]

    def get_pending_relationships(self) -> list[dict[str, str]]:
        """Return the pending relationships, sorted: ``id``, ``constrained_table``, ``referred_table``."""
        query = (
            "SELECT i.name, d.details FROM items i JOIN documentation d ON d.kind = i.kind AND d.name = i.name "
            "WHERE i.kind = 'relationship' AND i.state = 'pending' ORDER BY i.name"
        )
        found = []
        for row in self._rows(query):
            details = json.loads(row["details"])
            tables = {key: details[key] for key in ("constrained_table", "referred_table")}
            found.append({"id": row["name"], **tables})
        return found

    def get_table_info(self, name: str) -> dict[str, Any] | None:
        """Return ``table_name``, ``schema_data`` (as TableFacts), ``business_purpose``, ``documentation``, ``metadata``,
        ``content_hash`` and ``status`` of one table; None if no such table is documented.
        """
        return self._info(Kind.TABLE, name, "table_name")

    def get_relationship_info(self, relationship_id: str) -> dict[str, Any] | None:
        """Return ``id``, ``relationship_type``, the other fields of RelationshipFacts, ``documentation``, ``metadata``,
        ``content_hash`` and ``status`` of one relationship; None if no such relationship is documented.
        """
        return self._info(Kind.RELATIONSHIP, relationship_id, "id")

    def _rows(self, query: str, values: Sequence[Any] = ()) -> list[sqlite3.Row]:
        with self.reading() as db:
            return db.execute(query, values).fetchall()

    def _info(self, kind: Kind, name: str, name_key: str) -> dict[str, Any] | None:
        query = (
            "SELECT i.*, d.text, d.details FROM items i JOIN documentation d ON d.kind = i.kind AND d.name = i.name "
            "WHERE i.kind = ? AND i.name = ?"
        )
        rows = self._rows(query, (kind, name))
        if not rows:
            return None
        row = rows[0]
        return {
            name_key: name,
            **json.loads(row["details"]),
            "documentation": row["text"],
            "metadata": json.loads(row["metadata"]),
            "content_hash": row["hash"].hex(),
            "status": row["state"],
            "problem": row["problem"],
        }


def _stored_item(row: sqlite3.Row) -> StoredItem:
    metadata = json.loads(row["metadata"])
    return StoredItem(
        Kind(row["kind"]), row["name"], State(row["state"]), row["hash"].hex(), metadata, row["text"], row["problem"]
    )

"""Documentation of tables and relationships becomes findable, one by one or many at once."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from embedding_index.items import IndexItem, Kind
from embedding_index.vector_store import Ended, OnEnded, SQLVectorStore

OnDocumented = Callable[[Sequence[tuple[str, str | None]]], None]


class SQLIndexerAgent:
    """Indexes into *vector_store*, which stays the caller's.

    A table is ``{"name", "documentation", "business_purpose"?, "schema"?, "metadata"?}``; a relationship is
    ``{"id", "documentation", "type"?, "tables"?, "metadata"?}``. What is found later is the documentation; where it is
    empty, it is made of the rest.
    """

    def __init__(self, vector_store: SQLVectorStore) -> None:
        self.vector_store = vector_store

    def index_table(self, table: Mapping[str, Any]) -> bool:
        """Index one table; see ``batch_index_tables``."""
        return self.batch_index_tables([table])[str(table["name"])]

    def index_relationship(self, relationship: Mapping[str, Any]) -> bool:
        """Index one relationship; see ``batch_index_relationships``."""
        return self.batch_index_relationships([relationship])[str(relationship["id"])]

    def batch_index_tables(
        self, tables: Sequence[Mapping[str, Any]], on_ended: OnDocumented | None = None
    ) -> dict[str, bool]:
        """Index *tables* in the fewest calls and return whether each succeeded, by name.

        A bad one fails alone. *on_ended* gets each name, some at a time, with None or the reason, when that is durable. A table that
        no call was made for, because the store was told to stop, is not in the result.

        Raises:
            IndexingError: The provider or ChromaDB ended the work; what is done is stored.
        """
        return self._index([table_item(table) for table in tables], on_ended)

    def batch_index_relationships(
        self, relationships: Sequence[Mapping[str, Any]], on_ended: OnDocumented | None = None
    ) -> dict[str, bool]:
        """Index *relationships* by id; see ``batch_index_tables``."""
        return self._index([relationship_item(relationship) for relationship in relationships], on_ended)

    def index_items(self, items: Sequence[IndexItem], on_ended: OnEnded) -> None:
        """Index *items* of any kind; see ``SQLVectorStore.index``."""
        self.vector_store.index(items, on_ended)

    def _index(self, items: Sequence[IndexItem], on_ended: OnDocumented | None) -> dict[str, bool]:
        results: dict[str, bool] = {}

        def note(ended: Ended) -> None:
            results.update((item.name, problem is None) for item, problem in ended)
            if on_ended is not None:
                on_ended([(item.name, problem) for item, problem in ended])

        self.vector_store.index(items, note)
        return results


def table_item(table: Mapping[str, Any]) -> IndexItem:
    """Return *table* as the item it is in the index."""
    name = str(table["name"])
    return IndexItem(Kind.TABLE, name, _text(f"Table {name}", table, "schema"), table.get("metadata") or {})


def relationship_item(relationship: Mapping[str, Any]) -> IndexItem:
    """Return *relationship* as the item it is in the index."""
    name = str(relationship["id"])
    metadata = relationship.get("metadata") or {}
    return IndexItem(Kind.RELATIONSHIP, name, _text(f"Relationship {name}", relationship, "type"), metadata)


def _text(title: str, given: Mapping[str, Any], detail: str) -> str:
    documentation = str(given.get("documentation") or "")
    if documentation:
        return documentation
    more = given.get(detail)
    parts = [title, str(given.get("business_purpose") or ""), json.dumps(more, default=str) if more else ""]
    return ". ".join(part for part in parts if part)

"""Facts about the structure of a database: names, types, keys, comments. They do not depend on its rows."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

TableKind = Literal["table", "view", "materialized view"]
RelationshipType = Literal["one-to-one", "many-to-one"]

_PLAIN_NAME = re.compile(r"[^\W\d]\w*")


def quoted(name: str) -> str:
    """Return *name*, quoted unless it is one word, so that names joined by dots and commas stay unique."""
    return name if _PLAIN_NAME.fullmatch(name) else '"' + name.replace('"', '""') + '"'


def full_name(schema: str | None, table: str) -> str:
    """Return the name of *table* in the index: ``billing.refunds``, or ``refunds`` without a schema."""
    return quoted(table) if schema is None else f"{quoted(schema)}.{quoted(table)}"


def column_list(columns: Sequence[str]) -> str:
    """Return *columns* as written in ids and texts."""
    return ", ".join(map(quoted, columns))


@dataclass(frozen=True, slots=True)
class ColumnFacts:
    """One column.

    *type* is empty if it has none, or one that SQLAlchemy does not know. *choices* are the labels of an enumeration; *default* is SQL;
    *is_automatic*: the database fills it.
    """

    name: str
    type: str
    is_nullable: bool
    default: str | None = None
    comment: str | None = None
    is_automatic: bool = False
    choices: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class TableFacts:
    """One table or view.

    *schema* is None if the database has only one. *unique_keys* are the columns of unique constraints and of unique
    indexes over whole tables, without the primary key. *indexes* are those of the other indexes, with expressions as SQL.
    *problem* is the reason if only the name could be read, else None.
    """

    schema: str | None
    name: str
    kind: TableKind = "table"
    columns: tuple[ColumnFacts, ...] = ()
    primary_key: tuple[str, ...] = ()
    unique_keys: tuple[tuple[str, ...], ...] = ()
    indexes: tuple[tuple[str, ...], ...] = ()
    checks: tuple[str, ...] = ()
    comment: str | None = None
    is_partitioned: bool = False
    problem: str | None = None

    @property
    def full_name(self) -> str:
        """See ``full_name``."""
        return full_name(self.schema, self.name)

    def is_unique(self, columns: Collection[str]) -> bool:
        """Return whether no two rows can have the same values in *columns*, apart from NULL."""
        keys = [key for key in (self.primary_key, *self.unique_keys) if key]
        return any(set(key) <= set(columns) for key in keys)


@dataclass(frozen=True, slots=True)
class RelationshipFacts:
    """One foreign key, from the constrained table to the referred one; both by their full names.

    *id* is unique: ``public.refunds(order_id) -> public.orders(id)``; of several equal foreign keys, those after the first
    have their constraint's name appended. *referred_columns* are empty if the referred table is missing. *on_delete* is
    SQL (``CASCADE``), None if referenced rows cannot be deleted.
    """

    id: str
    constrained_table: str
    constrained_columns: tuple[str, ...]
    referred_table: str
    referred_columns: tuple[str, ...]
    relationship_type: RelationshipType
    is_required: bool
    on_delete: str | None = None
    comment: str | None = None

    @property
    def is_self_reference(self) -> bool:
        """True if rows refer to rows of the same table."""
        return self.constrained_table == self.referred_table


@dataclass(frozen=True, slots=True)
class DatabaseFacts:
    """Everything that was read, ordered by name."""

    tables: tuple[TableFacts, ...]
    relationships: tuple[RelationshipFacts, ...]

"""What is known of a database: names, types, keys, comments; nothing of its rows, nothing that changes by itself."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

TableKind = Literal["table", "view", "materialized view"]
RelationshipType = Literal["one-to-one", "many-to-one"]

_PLAIN_NAME = re.compile(r"[^\W\d]\w*")


def quoted(name: str) -> str:
    """Return *name*, in double quotes unless it is one word, so that names joined by dots and commas stay unique."""
    return name if _PLAIN_NAME.fullmatch(name) else '"' + name.replace('"', '""') + '"'


def full_name(schema: str | None, table: str) -> str:
    """Return how *table* is called everywhere in the index: ``billing.refunds``, or ``refunds`` without a schema."""
    return quoted(table) if schema is None else f"{quoted(schema)}.{quoted(table)}"


def column_list(columns: Sequence[str]) -> str:
    """Return *columns* as they stand in ids and texts."""
    return ", ".join(map(quoted, columns))


@dataclass(frozen=True, slots=True)
class ColumnFacts:
    """One column.

    *type* is empty where the database has none for it. *choices* are the labels of an enumeration; *default* is SQL;
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

    *schema* is None where the database has one only. *unique_keys* hold the columns of unique constraints and of unique
    indexes over whole tables, without the primary key; *indexes* those of the others, expressions as SQL. *problem* says
    why nothing more than the name could be read; None as a rule.
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
        """Whether no two rows can have the same values, none of them NULL, in *columns*."""
        keys = [key for key in (self.primary_key, *self.unique_keys) if key]
        return any(set(key) <= set(columns) for key in keys)


@dataclass(frozen=True, slots=True)
class RelationshipFacts:
    """One foreign key, from the constrained table to the referred one; both by their full names.

    *id* is unique: ``public.refunds(order_id) -> public.orders(id)``; where several foreign keys are equal in that,
    those after the first have their constraint's name behind it. *referred_columns* are empty where the referred table
    is missing. *on_delete* is SQL (``CASCADE``), None where rows that are referred to cannot be deleted.
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
        """Whether rows refer to other rows of their own table."""
        return self.constrained_table == self.referred_table


@dataclass(frozen=True, slots=True)
class DatabaseFacts:
    """Everything that was read, ordered by name. *hidden_schemas* are those that the user may not use: not read."""

    tables: tuple[TableFacts, ...]
    relationships: tuple[RelationshipFacts, ...]
    hidden_schemas: tuple[str, ...] = ()

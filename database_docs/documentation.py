"""Facts about the structure of a database, and texts about them for people and for embeddings. No I/O.

The facts do not depend on its rows. Equal facts give equal texts.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from database_docs.items import IndexItem, Kind, MetadataValue

TableKind = Literal["table", "view", "materialized view"]
RelationshipType = Literal["one-to-one", "many-to-one"]

_PLAIN_NAME = re.compile(r"[^\W\d]\w*")
# Ends of words inside a name: order_items, orderItems, HTTPLog, line2.
_WORD_END = re.compile(
    r"[\W_]+|(?<=[^\W\d_A-Z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])|(?<=[^\W\d_])(?=\d)|(?<=\d)(?=[^\W\d_])"
)
_SPACES = re.compile(r"\s+")


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


@dataclass(frozen=True, slots=True)
class Documentation:
    """One item and its *details*: JSON values under the keys that the documentation store returns."""

    item: IndexItem
    details: Mapping[str, Any]


def document_database(
    tables: Sequence[TableFacts], relationships: Sequence[RelationshipFacts]
) -> tuple[list[Documentation], list[Documentation]]:
    """Return the documentation of *tables* and of *relationships*, in their order."""
    by_name = {table.full_name: table for table in tables}
    outgoing: defaultdict[str, list[RelationshipFacts]] = defaultdict(list)
    incoming: defaultdict[str, list[RelationshipFacts]] = defaultdict(list)
    for relationship in relationships:
        outgoing[relationship.constrained_table].append(relationship)
        incoming[relationship.referred_table].append(relationship)
    documented = [_document_table(t, outgoing[t.full_name], incoming[t.full_name]) for t in tables]
    return documented, [_document_relationship(relationship, by_name) for relationship in relationships]


def words(name: str) -> str:
    """Return *name* as words in lower case: ``OrderItems`` and ``order_items`` become "order items"."""
    return _WORD_END.sub(" ", name).strip().lower() or name


def linked_tables(table: TableFacts, outgoing: Sequence[RelationshipFacts]) -> tuple[str, str] | None:
    """Return the two tables that *table* links many-to-many (its primary key is two foreign keys), or None."""
    parts = [key for key in outgoing if set(key.constrained_columns) <= set(table.primary_key)]
    if len(parts) != 2 or not table.primary_key:
        return None
    first, second = (set(key.constrained_columns) for key in parts)
    if first & second or first | second != set(table.primary_key):
        return None
    return parts[0].referred_table, parts[1].referred_table


def business_purpose(table: TableFacts, outgoing: Sequence[RelationshipFacts]) -> str:
    """Return the purpose of *table*: its comment, or a sentence derived from its names."""
    if table.comment:
        return _one_line(table.comment)
    subject = words(table.name)
    derived = "(derived: it has no comment)"
    linked = linked_tables(table, outgoing)
    if linked:
        return f"Links {_table_words(linked[0])} with {_table_words(linked[1])}, many-to-many {derived}."
    if table.kind != "table":
        return f"Shows {subject} {derived}."
    referred = list(dict.fromkeys(_table_words(key.referred_table) for key in outgoing if not key.is_self_reference))
    if referred:
        return f"Keeps {subject}, which refer to {_enumeration(referred)} {derived}."
    return f"Keeps {subject} {derived}."


def _document_table(
    table: TableFacts, outgoing: Sequence[RelationshipFacts], incoming: Sequence[RelationshipFacts]
) -> Documentation:
    purpose = business_purpose(table, outgoing)
    metadata: dict[str, MetadataValue] = {"table_type": table.kind, "purpose": purpose}
    if table.schema is not None:
        metadata["schema"] = table.schema
    text = "\n".join(_table_lines(table, purpose, outgoing, incoming))
    details = {"schema_data": asdict(table), "business_purpose": purpose}
    return Documentation(IndexItem(Kind.TABLE, table.full_name, text, metadata), details)


def _table_lines(
    table: TableFacts, purpose: str, outgoing: Sequence[RelationshipFacts], incoming: Sequence[RelationshipFacts]
) -> Iterator[str]:
    subject = words(table.name)
    called = "" if subject == table.name else f": {subject}"
    partitioned = ", kept in partitions" if table.is_partitioned else ""
    yield f"{table.kind.capitalize()} {table.full_name}{called}{partitioned}."
    if table.comment:  # a derived purpose adds nothing, and makes all tables alike
        yield f"Purpose: {purpose}"
    if table.problem:
        yield f"Nothing more is known of it: {table.problem}."
        return
    if linked := linked_tables(table, outgoing):
        yield f"Junction table: each row links one row of {linked[0]} with one of {linked[1]} (many-to-many)."
    yield "Columns:"
    targets = _targets(outgoing)
    yield from (f"- {_column_line(column, targets.get(column.name))}" for column in table.columns)
    yield from _key_lines(table, outgoing, incoming)


def _key_lines(
    table: TableFacts, outgoing: Sequence[RelationshipFacts], incoming: Sequence[RelationshipFacts]
) -> Iterator[str]:
    if len(table.primary_key) > 1:
        yield f"Primary key: {column_list(table.primary_key)} together."
    for key in table.unique_keys:
        if len(key) > 1:
            yield f"Unique: {column_list(key)} together."
    for foreign in outgoing:
        if len(foreign.constrained_columns) > 1:
            yield f"Refers by {column_list(foreign.constrained_columns)} together to {_referred(foreign)}."
    if incoming:
        names = dict.fromkeys(f"{key.constrained_table} ({column_list(key.constrained_columns)})" for key in incoming)
        yield f"Referred to by: {', '.join(names)}."
    if table.checks:
        yield f"Checks: {'; '.join(map(_one_line, table.checks))}."
    if table.indexes:
        yield f"Indexed by: {'; '.join(', '.join(index) for index in table.indexes)}."


def _targets(outgoing: Sequence[RelationshipFacts]) -> dict[str, str]:
    """Return the targets of the single columns that are foreign keys."""
    targets: defaultdict[str, list[str]] = defaultdict(list)
    for key in outgoing:
        if len(key.constrained_columns) == 1:
            targets[key.constrained_columns[0]].append(_referred(key))
    return {column: " and ".join(dict.fromkeys(found)) for column, found in targets.items()}


def _referred(key: RelationshipFacts) -> str:
    columns = f"({column_list(key.referred_columns)})" if key.referred_columns else ""
    return f"{key.referred_table}{columns}"


def _column_line(column: ColumnFacts, target: str | None) -> str:
    """Return the line of a column, without type and default, which make the search worse."""
    line = quoted(column.name)
    if column.choices:
        line += f": one of {', '.join(column.choices)}"
    if target:
        line += f", refers to {target}"
    if column.comment:
        return f"{line}{'; ' if column.choices else ': '}{_one_line(column.comment)}"
    return f"{line}."


def _document_relationship(key: RelationshipFacts, tables: Mapping[str, TableFacts]) -> Documentation:
    metadata: dict[str, MetadataValue] = {
        "constrained_table": key.constrained_table,
        "referred_table": key.referred_table,
        "relationship_type": key.relationship_type,
    }
    text = "\n".join(_relationship_lines(key, tables))
    return Documentation(IndexItem(Kind.RELATIONSHIP, key.id, text, metadata), asdict(key))


def _relationship_lines(key: RelationshipFacts, tables: Mapping[str, TableFacts]) -> Iterator[str]:
    yield f"Relationship {key.id}: {key.relationship_type}."
    if key.comment:
        yield f"Purpose: {_one_line(key.comment)}"
    other = "itself" if key.is_self_reference else _table_words(key.referred_table)
    columns = f"{column_list(key.constrained_columns)} = {column_list(key.referred_columns) or 'the primary key'}"
    yield f"Join {_table_words(key.constrained_table)} with {other} by {columns}."
    for name in dict.fromkeys((key.constrained_table, key.referred_table)):
        table = tables.get(name)
        if table is None:
            yield f"{name} was not read: it is missing, or hidden from the user of the database."
        elif table.comment:
            yield f"{name}: {_one_line(table.comment)}"


def _table_words(name: str) -> str:
    """Return the words of the table in a full name."""
    return words(re.split(r'\.(?=(?:[^"]*"[^"]*")*[^"]*$)', name)[-1].strip('"'))


def _enumeration(names: Sequence[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def _one_line(value: str) -> str:
    return _SPACES.sub(" ", value).strip()

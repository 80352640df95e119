"""Reads the catalogue of a database through SQLAlchemy's inspector, never a row."""

from __future__ import annotations

import re
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from pydantic import SecretStr
from sqlalchemy import Connection, Inspector, inspect, text
from sqlalchemy.engine.interfaces import Dialect
from sqlalchemy.engine.reflection import ObjectKind
from sqlalchemy.exc import CompileError, DBAPIError, NoSuchTableError, SAWarning
from sqlalchemy.types import ARRAY, Enum, NullType, TypeEngine

from database_docs.database_connection import connected
from database_docs.database_facts import (
    ColumnFacts,
    DatabaseFacts,
    RelationshipFacts,
    TableFacts,
    TableKind,
    column_list,
    full_name,
)

_SYSTEM_SCHEMAS = {"information_schema", "sys", "performance_schema", "mysql", "pg_catalog"}
_ONE_SCHEMA_DIALECTS = ("sqlite", "mysql", "mariadb")  # only the database in the URL is read

# Partitions are documented by their partitioned table.
_PARTITIONS = """
SELECT n.nspname, c.relname, c.relispartition FROM pg_catalog.pg_class c
JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace WHERE c.relispartition OR c.relkind = 'p'"""
# A foreign key to a partitioned table has a copy for each of its partitions.
_COPIED_KEYS = """
SELECT n.nspname, c.relname, k.conname FROM pg_catalog.pg_constraint k
JOIN pg_catalog.pg_class c ON c.oid = k.conrelid JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
WHERE k.contype = 'f' AND k.conparentid <> 0"""
_HIDDEN_SCHEMAS = """
SELECT nspname FROM pg_catalog.pg_namespace WHERE NOT has_schema_privilege(oid, 'USAGE') AND nspname !~ '^pg_'"""
# SQLAlchemy finds these only if the foreign key is declared apart from its column.
_SQLITE_ACTIONS = """
SELECT m.name, k.id, k."from", k.on_delete FROM sqlite_master m JOIN pragma_foreign_key_list(m.name) k
WHERE m.type = 'table' AND m.sql NOT LIKE 'CREATE VIRTUAL%' ORDER BY m.name, k.id, k.seq"""

Row = Mapping[str, Any]
Key = tuple[str | None, str]


def read_database(url: SecretStr) -> DatabaseFacts:
    """Return the tables, views and foreign keys of the database at *url*, in all schemas except the system's.

    Views and virtual tables that the database itself cannot open are included with their ``problem``.

    Raises:
        ConfigurationError: *url* is malformed, or its driver is not installed.
        DatabaseUnavailableError: The database cannot be reached or read. No message shows the password.
    """
    with connected(url) as connection, warnings.catch_warnings():
        # SQLAlchemy warns about types and indexes that it does not know. They are left out.
        warnings.simplefilter("ignore", SAWarning)
        return _read(connection)


@dataclass(frozen=True, slots=True)
class _Catalogue:
    """Facts that SQLAlchemy's inspector does not have."""

    partitions: set[Key] = field(default_factory=set)
    partitioned: set[Key] = field(default_factory=set)
    copied_keys: set[tuple[str, str, str]] = field(default_factory=set)
    hidden_schemas: set[str] = field(default_factory=set)
    unreadable: set[str] = field(default_factory=set)
    shadow_tables: set[str] = field(default_factory=set)


def _catalogue(connection: Connection, inspector: Inspector) -> _Catalogue:
    if connection.dialect.name == "postgresql":
        partitions = connection.execute(text(_PARTITIONS)).all()
        return _Catalogue(
            partitions={(schema, table) for schema, table, is_partition in partitions if is_partition},
            partitioned={(schema, table) for schema, table, is_partition in partitions if not is_partition},
            copied_keys={(schema, table, name) for schema, table, name in connection.execute(text(_COPIED_KEYS))},
            hidden_schemas=set(connection.execute(text(_HIDDEN_SCHEMAS)).scalars()),
        )
    if connection.dialect.name == "sqlite":
        kinds = connection.execute(text("SELECT name, type FROM pragma_table_list WHERE schema = 'main'"))
        shadows = {name for name, kind in kinds if kind == "shadow"}
        names = {*inspector.get_table_names(), *inspector.get_view_names()} - shadows
        return _Catalogue(unreadable=set(_unreadable(inspector, names)), shadow_tables=shadows)
    return _Catalogue()


def _unreadable(inspector: Inspector, names: Iterable[str]) -> Iterator[str]:
    """Yield the views and virtual tables that cannot be opened. The inspector caches what it has read."""
    for name in names:
        try:
            inspector.get_columns(name)
        except (DBAPIError, NoSuchTableError) as exc:
            if re.search(r"locked|not a database|malformed|disk", str(exc)):
                raise
            yield name


def _read(connection: Connection) -> DatabaseFacts:
    if connection.dialect.name == "postgresql":
        # Foreign keys, types and defaults then name their schemas, independent of the user's path.
        connection.execute(text("SET LOCAL search_path = ''"))
    inspector = inspect(connection)
    catalogue = _catalogue(connection, inspector)
    schemas: list[str | None] = [None]
    if connection.dialect.name not in _ONE_SCHEMA_DIALECTS:
        hidden = _SYSTEM_SCHEMAS | catalogue.hidden_schemas
        schemas = [name for name in sorted(inspector.get_schema_names()) if name.lower() not in hidden]
    tables = [table for schema in schemas for table in _tables(connection, inspector, schema, catalogue)]
    by_name = {table.full_name: table for table in tables}
    keys = [key for schema in schemas for key in _foreign_keys(inspector, schema, catalogue)]
    if connection.dialect.name == "sqlite":
        keys = list(_with_actions(connection, keys))
    relationships = sorted(_relationships(keys, by_name), key=lambda relationship: relationship.id)
    tables.sort(key=lambda table: table.full_name)
    return DatabaseFacts(tuple(tables), tuple(relationships))


def _tables(
    connection: Connection, inspector: Inspector, schema: str | None, catalogue: _Catalogue
) -> Iterator[TableFacts]:
    """Yield the tables and views of *schema*, with one query for each kind of facts if the dialect supports that."""
    kinds: dict[str, TableKind] = dict.fromkeys(inspector.get_table_names(schema), "table")
    kinds |= dict.fromkeys(inspector.get_view_names(schema), "view")
    if connection.dialect.name == "postgresql":
        kinds |= dict.fromkeys(inspector.get_materialized_view_names(schema), "materialized view")
    kinds = {name: kind for name, kind in kinds.items() if name not in catalogue.shadow_tables}
    readable = [name for name in kinds if name not in catalogue.unreadable]
    of = partial(_facts_by_table, inspector, schema, readable)
    columns, keys, uniques, indexes = map(of, ("columns", "pk_constraint", "unique_constraints", "indexes"))
    checks, comments = of("check_constraints"), of("table_comment")
    for name, kind in kinds.items():
        place = (schema, name)
        if place in catalogue.partitions:
            continue
        if name in catalogue.unreadable:
            yield TableFacts(schema, name, kind, problem="the database cannot open it")
            continue
        found = indexes.get(place, [])
        yield TableFacts(
            schema,
            name,
            kind,
            columns=tuple(_column(row, connection.dialect) for row in columns[place]),
            primary_key=tuple(keys.get(place, {}).get("constrained_columns", ())),
            unique_keys=tuple(sorted(_unique_keys(uniques.get(place, []), found))),
            indexes=tuple(sorted(_other_indexes(found))),
            checks=tuple(sorted(str(row["sqltext"]) for row in checks.get(place, []))),
            comment=(comments.get(place) or {}).get("text") or None,
            is_partitioned=place in catalogue.partitioned,
        )


def _facts_by_table(inspector: Inspector, schema: str | None, names: list[str], what: str) -> dict[Key, Any]:
    """Return one kind of facts of the tables *names*; empty if the dialect has none of that kind."""
    if not names:
        return {}
    # Only for SQLite are some tables of a schema left out; a condition over thousands of names is slow.
    chosen = names if inspector.dialect.name == "sqlite" else None
    try:
        read = getattr(inspector, f"get_multi_{what}")
        return dict(read(schema=schema, filter_names=chosen, kind=ObjectKind.ANY))
    except NotImplementedError:
        return {}


def _column(row: Row, dialect: Dialect) -> ColumnFacts:
    default, kind = row.get("default"), row["type"]
    is_automatic = bool(row.get("identity") or row.get("computed") or "nextval(" in str(default))
    element = kind.item_type if isinstance(kind, ARRAY) else kind
    return ColumnFacts(
        row["name"],
        _type_text(kind, dialect),
        is_nullable=bool(row["nullable"]),
        default=None if is_automatic or default is None else str(default),
        comment=row.get("comment") or None,
        is_automatic=is_automatic,
        choices=tuple(element.enums) if isinstance(element, Enum) else (),
    )


def _type_text(kind: TypeEngine[Any], dialect: Dialect) -> str:
    if isinstance(kind, NullType):
        return ""
    try:
        return kind.compile(dialect=dialect)
    except CompileError:
        return type(kind).__name__


def _is_key(index: Row) -> bool:
    """Return whether *index* is unique over whole rows: without a condition and without expressions."""
    options = index.get("dialect_options") or {}
    is_partial = any(option.endswith("_where") and value is not None for option, value in options.items())
    return bool(index["unique"]) and not is_partial and not index.get("expressions")


def _unique_keys(constraints: Iterable[Row], indexes: Iterable[Row]) -> set[tuple[str, ...]]:
    return {tuple(row["column_names"]) for row in (*constraints, *filter(_is_key, indexes))}


def _other_indexes(indexes: Iterable[Row]) -> set[tuple[str, ...]]:
    others = (row for row in indexes if not _is_key(row))
    return {tuple(str(part) for part in row.get("expressions") or row["column_names"]) for row in others}


def _foreign_keys(inspector: Inspector, schema: str | None, catalogue: _Catalogue) -> Iterator[tuple[Key, Row]]:
    names = inspector.get_table_names(schema)
    readable = [name for name in names if name not in catalogue.unreadable | catalogue.shadow_tables]
    for place, rows in _facts_by_table(inspector, schema, readable, "foreign_keys").items():
        if place in catalogue.partitions:
            continue
        for row in rows:
            if (*place, row["name"]) not in catalogue.copied_keys:
                yield place, row


def _with_actions(connection: Connection, keys: Iterable[tuple[Key, Row]]) -> Iterator[tuple[Key, Row]]:
    columns: defaultdict[tuple[str, int, str], list[str]] = defaultdict(list)
    for table, number, column, action in connection.execute(text(_SQLITE_ACTIONS)):
        columns[table, number, action].append(column)
    actions = {(table, tuple(names)): action for (table, _, action), names in columns.items()}
    for place, row in keys:
        yield place, {**row, "options": {"ondelete": actions.get((place[1], tuple(row["constrained_columns"])))}}


def _relationships(keys: Iterable[tuple[Key, Row]], tables: Mapping[str, TableFacts]) -> Iterator[RelationshipFacts]:
    seen: Counter[str] = Counter()
    spelled = {name.lower(): name for name in tables}
    for place, row in sorted(keys, key=lambda key: (*map(str, key[0]), str(key[1]["name"]), str(key[1]))):
        table, columns = tables.get(full_name(*place)), tuple(row["constrained_columns"])
        if table is None:  # created after the tables were read, without a snapshot
            continue
        referred, referred_columns = full_name(row["referred_schema"], row["referred_table"]), row["referred_columns"]
        if place[0] is None:  # SQLite ignores upper and lower case
            referred = spelled.get(referred.lower(), referred)
        if not referred_columns and referred in tables:
            referred_columns = tables[referred].primary_key
        target = f"{referred}({column_list(referred_columns)})" if referred_columns else referred
        name = f"{table.full_name}({column_list(columns)}) -> {target}"
        seen[name] += 1
        if seen[name] > 1:
            name = f"{name} [{row['name'] or seen[name]}]"
        nullable = {column.name for column in table.columns if column.is_nullable} - set(table.primary_key)
        action = (row.get("options") or {}).get("ondelete")
        yield RelationshipFacts(
            id=name,
            constrained_table=table.full_name,
            constrained_columns=columns,
            referred_table=referred,
            referred_columns=tuple(referred_columns),
            relationship_type="one-to-one" if table.is_unique(columns) else "many-to-one",
            is_required=not nullable & set(columns),
            on_delete=None if action in (None, "NO ACTION", "RESTRICT") else str(action),
            comment=row.get("comment") or None,
        )

"""Reads the catalogue of the database of DATABASE_URL through SQLAlchemy, read-only, and never a row."""

from __future__ import annotations

import re
import sqlite3
import traceback
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

from pydantic import SecretStr
from sqlalchemy import URL, Connection, Engine, Inspector, create_engine, inspect, make_url, text
from sqlalchemy.engine.interfaces import Dialect
from sqlalchemy.engine.reflection import ObjectKind
from sqlalchemy.exc import (
    ArgumentError,
    CompileError,
    DBAPIError,
    NoSuchModuleError,
    NoSuchTableError,
    SAWarning,
    SQLAlchemyError,
)
from sqlalchemy.pool import NullPool
from sqlalchemy.types import ARRAY, Enum, NullType, TypeEngine

from database_docs.documentation import (
    ColumnFacts,
    DatabaseFacts,
    RelationshipFacts,
    TableFacts,
    TableKind,
    column_list,
    full_name,
)
from error_handler import ConfigurationError, DatabaseUnavailableError

CONNECT_TIMEOUT_S = 10
STATEMENT_TIMEOUT_S = 60

_SYSTEM_SCHEMAS = {"information_schema", "sys", "performance_schema", "mysql", "pg_catalog"}
_ONE_SCHEMA_DIALECTS = ("sqlite", "mysql", "mariadb")  # only the database in the URL is read

# Error texts of drivers, with the remedy; the first match counts.
_REMEDIES = (
    (r'role ".*" does not exist|authentication|password|pg_hba|denied for user', "correct its user and password"),
    (r'database ".*" does not exist|Unknown database', "correct the name of the database in it"),
    (r"resolve|getaddrinfo|Name or service|nodename", "correct its host"),
    (r"statement timeout|database is locked", "run again when the database is less busy"),
    (r"permission denied|unable to open", "give its user the right to read the database's structure"),
    (r"not a database|malformed", "name the file of a database in it"),
)
_USUAL_REMEDY = "check that the database runs, and correct host and port"
_UNKNOWN_OPTION = "DATABASE_URL has an option that its driver does not know; remove what follows the question mark."

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
        if place not in catalogue.partitions:
            yield from ((place, row) for row in rows if (*place, row["name"]) not in catalogue.copied_keys)


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


@contextmanager
def connected(url: SecretStr) -> Iterator[Connection]:
    """Yield a connection to *url* inside a read-only transaction; raises like ``read_database``."""
    target = _parsed(url)
    engine = _engine(target)
    try:
        with engine.connect() as connection:
            if target.get_backend_name() == "postgresql":
                connection.execute(text("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY"))
                connection.execute(text(f"SET LOCAL statement_timeout = '{STATEMENT_TIMEOUT_S}s'"))
            elif target.get_backend_name() == "sqlite":
                connection.exec_driver_sql("BEGIN")  # all queries see one state of the file
            yield connection
    except SQLAlchemyError as exc:
        raise _translated(exc, target) from _quotable(exc, target)
    finally:
        engine.dispose()


def _parsed(url: SecretStr) -> URL:
    try:
        target = make_url(url.get_secret_value())
    except (ArgumentError, ValueError):
        target = None
    # Raised outside the handler, because the original error may quote a part of a password with an unescaped : or @.
    if target is None or "@" in (target.host or ""):
        raise ConfigurationError(
            "DATABASE_URL cannot be read as an address; write it as postgresql://user:password@host:5432/database or "
            "sqlite:///path/to/file.db, with the characters @ : / % of a password percent-encoded (@ is %40)."
        )
    if target.drivername in ("postgres", "postgresql"):
        target = target.set(drivername="postgresql+psycopg")
    return target


def _engine(target: URL) -> Engine:
    options: dict[str, Any] = {"poolclass": NullPool}
    if target.drivername.split("+")[0] == "sqlite":
        path = _sqlite_file(target)
        # Quoted, so that no file name can add an option to the address.
        options["creator"] = lambda: sqlite3.connect(f"file:{quote(str(path))}?mode=ro", uri=True, isolation_level=None)
        target = URL.create("sqlite")
    elif target.drivername == "postgresql+psycopg" and "connect_timeout" not in target.query:
        options["connect_args"] = {"connect_timeout": CONNECT_TIMEOUT_S}
    try:
        engine = create_engine(target, **options)
    except NoSuchModuleError:
        raise ConfigurationError(
            f"DATABASE_URL names an unknown kind of database or driver, {target.drivername}; "
            "write postgresql:// or sqlite:///, or install its package."
        ) from None
    except ImportError as exc:
        package = exc.name or target.drivername
        raise ConfigurationError(
            f"the driver of DATABASE_URL is not installed ({package}); pip install -r requirements-index.txt installs the "
            "one for PostgreSQL, other databases need their own."
        ) from exc
    except (ArgumentError, TypeError) as exc:
        raise ConfigurationError(_UNKNOWN_OPTION) from _quotable(exc, target)
    if engine.dialect.is_async:
        raise ConfigurationError(
            f"DATABASE_URL names an asynchronous driver, {target.drivername}; remove the part from + to ://."
        )
    return engine


def _sqlite_file(target: URL) -> Path:
    name = target.database or ""
    if name.startswith("file:"):
        name = name.removeprefix("file:").partition("?")[0]
    if name in ("", ":memory:"):
        raise ConfigurationError("DATABASE_URL names no SQLite file; write sqlite:///path/to/file.db.")
    path = Path(name).absolute()
    if not path.is_file():
        raise DatabaseUnavailableError(f"there is no SQLite file {path}; correct DATABASE_URL.")
    return path


def _translated(exc: SQLAlchemyError, target: URL) -> ConfigurationError | DatabaseUnavailableError:
    original = getattr(exc, "orig", None) or exc
    reason = next(iter(str(original).strip().splitlines()), "").rstrip(".")
    if any(secret in reason for secret in _secrets(target)):
        reason = ""
    if "connection option" in str(original):
        return ConfigurationError(_UNKNOWN_OPTION)
    place = target.database
    if target.get_backend_name() != "sqlite":
        port = f":{target.port}" if target.port else ""
        place = f"{place or ''} at {target.host or 'the local socket'}{port}".strip()
    remedy = next((remedy for pattern, remedy in _REMEDIES if re.search(pattern, reason)), _USUAL_REMEDY)
    reason = reason or type(original).__name__
    return DatabaseUnavailableError(f"the database {place} of DATABASE_URL cannot be read ({reason}); {remedy}.")


def _secrets(target: URL) -> list[str]:
    password = str(target.password or "")
    options = [value for values in target.query.values() for value in ([values] if isinstance(values, str) else values)]
    return [secret for secret in (password, quote(password, safe=""), *options) if secret]


def _quotable(exc: Exception, target: URL) -> Exception | None:
    """Return *exc* as the cause for tracebacks; None if a part of it quotes a secret of the address."""
    shown = "".join(traceback.format_exception(exc))
    return None if any(secret in shown for secret in _secrets(target)) else exc

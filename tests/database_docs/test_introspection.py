"""Databases as they are read: SQLite files and a real PostgreSQL server, with all that a schema can hold."""

from __future__ import annotations

import logging
import sqlite3
import time
import traceback
import uuid
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

import pytest
from pydantic import SecretStr

from database_docs.documentation import DatabaseFacts, RelationshipFacts, TableFacts, document_database
from database_docs.introspection import connected, read_database
from error_handler import ConfigurationError, DatabaseUnavailableError, TriadError

if TYPE_CHECKING:
    from tests.fakes.postgres_server import Postgres

SECRET = "Tr0ub4dor"

POSTGRESQL_SCHEMA = (
    "CREATE SCHEMA billing",
    "CREATE SCHEMA private",
    "CREATE TYPE billing.refund_state AS ENUM ('asked', 'approved', 'paid')",
    "CREATE DOMAIN billing.amount AS numeric(12,2) CHECK (VALUE >= 0)",
    """CREATE TABLE customers (
        id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, email varchar(200) NOT NULL UNIQUE,
        place point, tags text[] NOT NULL DEFAULT '{}', manager_id bigint REFERENCES customers (id))""",
    "COMMENT ON TABLE customers IS 'People who bought\nsomething'",
    "COMMENT ON COLUMN customers.place IS 'where they live'",
    """CREATE TABLE "Order Items" (
        "Order" bigint, "Größe" int, customer_id bigint NOT NULL REFERENCES customers (id) ON DELETE CASCADE,
        n serial, twice int GENERATED ALWAYS AS ("Größe" * 2) STORED, PRIMARY KEY ("Order", "Größe"),
        CONSTRAINT positive CHECK ("Größe" > 0))""",
    """CREATE TABLE billing.refunds (
        id int PRIMARY KEY, customer_id bigint UNIQUE REFERENCES public.customers (id),
        state billing.refund_state NOT NULL DEFAULT 'asked', history billing.refund_state[], paid billing.amount,
        item_order bigint, item_size int, CONSTRAINT item FOREIGN KEY (item_order, item_size)
        REFERENCES public."Order Items" ("Order", "Größe") ON DELETE SET NULL)""",
    "CREATE UNIQUE INDEX one_open ON billing.refunds (item_order) WHERE state = 'asked'",
    "CREATE INDEX by_half ON billing.refunds ((item_size / 2), item_order)",
    "CREATE TABLE events (id bigint, at date, PRIMARY KEY (id, at)) PARTITION BY RANGE (at)",
    "CREATE TABLE events_2024 PARTITION OF events FOR VALUES FROM ('2024-01-01') TO ('2025-01-01')",
    "CREATE TABLE events_2025 PARTITION OF events FOR VALUES FROM ('2025-01-01') TO ('2026-01-01')",
    """CREATE TABLE event_notes (
        event_id bigint NOT NULL, event_at date NOT NULL, FOREIGN KEY (event_id, event_at) REFERENCES events)""",
    "ALTER TABLE event_notes ADD CONSTRAINT again FOREIGN KEY (event_id, event_at) REFERENCES events ON DELETE CASCADE",
    "CREATE VIEW open_refunds AS SELECT id, state FROM billing.refunds WHERE state <> 'paid'",
    "CREATE MATERIALIZED VIEW billing.totals AS SELECT customer_id, sum(paid) AS paid FROM billing.refunds GROUP BY 1",
    "CREATE TABLE private.salaries (id int PRIMARY KEY, customer_id bigint REFERENCES public.customers (id))",
    "CREATE TABLE public.links_to_private (id int PRIMARY KEY, salary_id int REFERENCES private.salaries (id))",
)


@pytest.fixture(scope="module")
def database(postgres: Postgres) -> str:
    """A database with everything, and a role that may not use one of its schemas."""
    name = f"Shop {uuid.uuid4().hex[:8]}"
    postgres.run(f'CREATE DATABASE "{name}"')
    postgres.run(*POSTGRESQL_SCHEMA, database=name)
    # Roles belong to the server, and tests of this module may be run in two parts.
    postgres.run(
        f"DO $$ BEGIN CREATE ROLE reader LOGIN PASSWORD '{SECRET}'; EXCEPTION WHEN duplicate_object THEN NULL; END $$",
        "GRANT USAGE ON SCHEMA billing TO reader",
        database=name,
    )
    return name


@pytest.fixture(scope="module")
def facts(postgres: Postgres, database: str) -> DatabaseFacts:
    return read_database(SecretStr(postgres.uri(database)))


def table(facts: DatabaseFacts, name: str) -> TableFacts:
    return {table.full_name: table for table in facts.tables}[name]


def relationship(facts: DatabaseFacts, relationship_id: str) -> RelationshipFacts:
    return {relationship.id: relationship for relationship in facts.relationships}[relationship_id]


def sqlite_file(path: Path, script: str) -> SecretStr:
    with closing(sqlite3.connect(path)) as db:
        db.executescript(script)
    return SecretStr(f"sqlite:///{quote(str(path))}")


def test_every_table_of_every_schema_is_read(facts: DatabaseFacts) -> None:
    """Partitions are documented by their partitioned table; system schemas are not there."""
    assert [(table.full_name, table.kind) for table in facts.tables] == [
        ("billing.refunds", "table"),
        ("billing.totals", "materialized view"),
        ("private.salaries", "table"),
        ('public."Order Items"', "table"),
        ("public.customers", "table"),
        ("public.event_notes", "table"),
        ("public.events", "table"),
        ("public.links_to_private", "table"),
        ("public.open_refunds", "view"),
    ]
    assert table(facts, "public.events").is_partitioned


def test_columns_keep_types_comments_and_what_the_database_fills(facts: DatabaseFacts) -> None:
    """Identity, serial and computed columns have no default text; types that SQLAlchemy does not know are empty."""
    columns = {column.name: column for column in table(facts, "public.customers").columns}
    assert columns["id"].is_automatic
    assert (columns["place"].type, columns["place"].comment) == ("", "where they live")
    assert (columns["tags"].type, columns["tags"].is_nullable, columns["tags"].default) == (
        "TEXT[]",
        False,
        "'{}'::text[]",
    )
    items = {column.name: column for column in table(facts, 'public."Order Items"').columns}
    assert items["n"].is_automatic
    assert items["n"].default is None
    assert items["twice"].is_automatic
    refunds = {column.name: column for column in table(facts, "billing.refunds").columns}
    assert refunds["state"].choices == refunds["history"].choices == ("asked", "approved", "paid")
    assert refunds["history"].type.endswith("refund_state[]")
    assert refunds["paid"].type.endswith("amount")
    assert table(facts, "public.customers").comment == "People who bought\nsomething"


def test_keys_indexes_and_checks(facts: DatabaseFacts) -> None:
    """A partial unique index makes no key."""
    refunds = table(facts, "billing.refunds")
    assert refunds.primary_key == ("id",)
    assert refunds.unique_keys == (("customer_id",),)
    assert {len(index) for index in refunds.indexes} == {1, 2}
    assert not refunds.is_unique(["item_order"])
    items = table(facts, 'public."Order Items"')
    assert items.primary_key == ("Order", "Größe")
    assert items.checks == ('"Größe" > 0',)


def test_every_foreign_key_is_one_relationship(facts: DatabaseFacts) -> None:
    """Foreign keys across schemas, over several columns, to the same table, twice over the same columns; without PostgreSQL's copies."""
    notes = "public.event_notes(event_id, event_at) -> public.events(id, at)"
    assert [relationship.id for relationship in facts.relationships] == [
        "billing.refunds(customer_id) -> public.customers(id)",
        'billing.refunds(item_order, item_size) -> public."Order Items"(Order, Größe)',
        "private.salaries(customer_id) -> public.customers(id)",
        'public."Order Items"(customer_id) -> public.customers(id)',
        "public.customers(manager_id) -> public.customers(id)",
        notes,
        f"{notes} [event_notes_event_id_event_at_fkey]",
        "public.links_to_private(salary_id) -> private.salaries(id)",
    ]
    assert relationship(facts, "billing.refunds(customer_id) -> public.customers(id)").relationship_type == "one-to-one"
    to_item = relationship(facts, facts.relationships[1].id)
    assert (to_item.relationship_type, to_item.is_required, to_item.on_delete) == ("many-to-one", False, "SET NULL")
    assert relationship(facts, "public.customers(manager_id) -> public.customers(id)").is_self_reference
    assert relationship(facts, notes).on_delete == "CASCADE"


def test_the_search_path_of_the_user_changes_nothing(postgres: Postgres, database: str, facts: DatabaseFacts) -> None:
    """A user whose search path holds other schemas gets the same names, so nothing is embedded again."""
    postgres.run(f"CREATE ROLE wanderer LOGIN SUPERUSER PASSWORD '{SECRET}'")
    postgres.run("ALTER ROLE wanderer SET search_path = billing, private, public")
    assert read_database(SecretStr(postgres.uri(database, user="wanderer", password=SECRET))) == facts


def test_reading_again_gives_equal_texts(postgres: Postgres, database: str, facts: DatabaseFacts) -> None:
    """Rows, statistics and new partitions change no hash."""
    postgres.run(
        "INSERT INTO customers (email) VALUES ('a@example.org'), ('b@example.org')",
        "CREATE TABLE events_2026 PARTITION OF events FOR VALUES FROM ('2026-01-01') TO ('2027-01-01')",
        "VACUUM ANALYZE",
        database=database,
    )
    again = read_database(SecretStr(postgres.uri(database).replace("postgresql://", "postgres://")))
    assert again == facts
    assert document_database(again.tables, again.relationships) == document_database(facts.tables, facts.relationships)


def test_schemas_that_the_user_may_not_use_are_left_out(postgres: Postgres, database: str) -> None:
    """The catalogue would show them; what the database's owner hides is not sent to an embedding provider."""
    facts = read_database(SecretStr(postgres.uri(database, user="reader", password=SECRET)))
    assert not [table for table in facts.tables if table.schema == "private"]
    key = relationship(facts, "public.links_to_private(salary_id) -> private.salaries(id)")
    text = document_database(facts.tables, [key])[1][0].item.text
    assert "private.salaries was not read" in text


def test_nothing_can_be_written(postgres: Postgres, database: str, tmp_path: Path) -> None:
    """Neither PostgreSQL's superuser nor a SQLite connection can write."""
    url = sqlite_file(tmp_path / "a.db", "CREATE TABLE a (id)")
    for target in (SecretStr(postgres.uri(database)), url):
        with pytest.raises(DatabaseUnavailableError, match=r"read-?only"), connected(target) as connection:
            connection.exec_driver_sql("CREATE TABLE written (id int)")


def test_many_tables_take_few_queries(postgres: Postgres, caplog: pytest.LogCaptureFixture) -> None:
    """The number of queries depends on the schemas, not on the tables."""
    postgres.run("CREATE DATABASE many")
    postgres.run("CREATE TABLE anchor (id int PRIMARY KEY)", database="many")
    one = "CREATE TABLE t%s (id int PRIMARY KEY, a text UNIQUE, b int REFERENCES anchor (id))"
    loop = f"FOR i IN 1..100 LOOP EXECUTE format('{one}', i); END LOOP;"
    postgres.run(f"DO $$ BEGIN {loop} END $$", database="many")
    with caplog.at_level(logging.INFO, logger="sqlalchemy.engine.Engine"):
        facts = read_database(SecretStr(postgres.uri("many")))
    assert (len(facts.tables), len(facts.relationships)) == (101, 100)
    statements = [record for record in caplog.records if "SELECT" in record.getMessage()]
    assert 5 < len(statements) < 60


@pytest.mark.parametrize(
    ("url", "error", "expected"),
    [
        ("postgresql://reader:{secret}x@127.0.0.1:{port}/postgres", DatabaseUnavailableError, "user and password"),
        ("postgresql://owner:{password}@127.0.0.1:{port}/nowhere", DatabaseUnavailableError, "name of the database"),
        ("postgresql://u:{secret}@127.0.0.1:1/d", DatabaseUnavailableError, "d at 127.0.0.1:1 .*runs"),
        ("postgresql://u:{secret}@no-such-host.invalid/d", DatabaseUnavailableError, "correct its host"),
        ("postgresql://u:{secret}@127.0.0.1:{port}/d?nonsense={secret}", ConfigurationError, "option"),
        ("postgresql://u:{secret}@127.0.0.1:{port}/d?sslmode={secret}", DatabaseUnavailableError, "DATABASE_URL"),
        ("postgresql://u:a@b:{secret}@127.0.0.1:{port}/d", ConfigurationError, "percent-encoded"),
        ("postgresql://u:a@{secret}@127.0.0.1:{port}/d", ConfigurationError, "percent-encoded"),
        ("postgresql://u:{secret}@127.0.0.1:x/d", ConfigurationError, "percent-encoded"),
        ("u:{secret}@127.0.0.1/d", ConfigurationError, "percent-encoded"),
        ("nosuch://u:{secret}@127.0.0.1/d", ConfigurationError, "nosuch"),
        ("mysql://u:{secret}@127.0.0.1/d", ConfigurationError, "MySQLdb"),
        ("postgresql+asyncpg://u:{secret}@127.0.0.1/d", ConfigurationError, "driver"),
        ("sqlite+aiosqlite://", ConfigurationError, "no SQLite file"),
        ("sqlite:///", ConfigurationError, "no SQLite file"),
        ("sqlite:////no/such/file.db", DatabaseUnavailableError, "no SQLite file /no/such/file.db"),
    ],
)
def test_errors_name_the_remedy_and_never_the_password(
    postgres: Postgres, url: str, error: type[TriadError], expected: str
) -> None:
    """It is neither in the message nor in the traceback that --verbose shows."""
    address = url.format(secret=SECRET, port=postgres.port, password=postgres.password)
    with pytest.raises(error, match=expected) as caught:
        read_database(SecretStr(address))
    shown = "".join(traceback.format_exception(caught.value))
    assert SECRET not in shown
    assert postgres.password not in shown
    assert str(caught.value).endswith(".")
    assert "\n" not in str(caught.value)


def test_a_server_that_never_answers_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """After the time-out for connecting, set in the address here so that the test is short."""
    import socket

    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        port = silent.getsockname()[1]
        monkeypatch.setattr("database_docs.introspection.CONNECT_TIMEOUT_S", 2)
        started = time.monotonic()
        with pytest.raises(DatabaseUnavailableError, match="time"):
            read_database(SecretStr(f"postgresql://u:{SECRET}@127.0.0.1:{port}/d"))
    assert time.monotonic() - started < 60


def test_a_slow_catalogue_is_given_up(postgres: Postgres, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every statement has the time-out of the connection."""
    monkeypatch.setattr("database_docs.introspection.STATEMENT_TIMEOUT_S", 1)
    with pytest.raises(DatabaseUnavailableError, match="less busy"), connected(SecretStr(postgres.uri())) as connection:
        connection.exec_driver_sql("SELECT pg_sleep(50)")


@pytest.fixture
def odd(tmp_path: Path) -> DatabaseFacts:
    """A SQLite file with everything that SQLAlchemy does not expect."""
    return read_database(
        sqlite_file(
            tmp_path / "50% odd?#file.db",
            """
            CREATE TABLE a (id INTEGER PRIMARY KEY, shape GEOMETRY, odd "weird type", untyped,
                            label TEXT GENERATED ALWAYS AS (id || 'x') STORED);
            CREATE TABLE "b.c" (x INT UNIQUE REFERENCES A ON DELETE CASCADE, y INT REFERENCES missing, z INT REFERENCES a (id),
                                FOREIGN KEY (z) REFERENCES a (id));
            CREATE INDEX by_expression ON "b.c" (abs(x));
            CREATE VIEW fine AS SELECT id, shape FROM a;
            CREATE VIEW broken AS SELECT * FROM gone;
            CREATE VIRTUAL TABLE notes USING fts5(body);
            """,
        )
    )


def test_unreadable_sqlite_view_fails_nothing_else(odd: DatabaseFacts) -> None:
    """A broken view is included with its problem; shadow tables are left out."""
    assert [table.full_name for table in odd.tables] == ['"b.c"', "a", "broken", "fine", "notes"]
    assert table(odd, "broken").problem == "the database cannot open it"
    assert not table(odd, "fine").problem


def test_sqlite_column_has_the_type_of_its_affinity(odd: DatabaseFacts) -> None:
    """A column without a type has none."""
    assert [(column.name, column.type) for column in table(odd, "a").columns] == [
        ("id", "INTEGER"),
        ("shape", "NUMERIC"),
        ("odd", "NUMERIC"),
        ("untyped", ""),
        ("label", "TEXT"),
    ]


def test_sqlite_foreign_keys(odd: DatabaseFacts) -> None:
    """Without named columns, in other upper case, to a table that is missing, and twice the same (read once)."""
    assert [(key.id, key.relationship_type, key.on_delete) for key in odd.relationships] == [
        ('"b.c"(x) -> a(id)', "one-to-one", "CASCADE"),
        ('"b.c"(y) -> missing', "many-to-one", None),
        ('"b.c"(z) -> a(id)', "many-to-one", None),
    ]


def test_a_missing_sqlite_file_is_not_made(tmp_path: Path) -> None:
    """A misspelled address creates no file."""
    with pytest.raises(DatabaseUnavailableError):
        read_database(SecretStr(f"sqlite:///{tmp_path}/none.db"))
    assert list(tmp_path.iterdir()) == []


def test_file_that_is_no_database_is_refused(tmp_path: Path) -> None:
    """The error message names the file."""
    path = tmp_path / "notes.txt"
    path.write_text("no database " * 1000)
    with pytest.raises(DatabaseUnavailableError, match=r"notes\.txt"):
        read_database(SecretStr(f"sqlite:///{path}"))


@pytest.mark.thorough
def test_a_locked_sqlite_file(tmp_path: Path) -> None:
    """The reader waits for the lock, then reports it."""
    url = sqlite_file(tmp_path / "a.db", "CREATE TABLE a (id)")
    with closing(sqlite3.connect(tmp_path / "a.db", isolation_level=None)) as writer:
        writer.execute("BEGIN EXCLUSIVE")
        with pytest.raises(DatabaseUnavailableError, match="less busy"):
            read_database(url)

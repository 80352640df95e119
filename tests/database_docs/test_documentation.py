"""Facts as texts: what people read, and what is embedded."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from database_docs.documentation import ColumnFacts, RelationshipFacts, TableFacts, document_database, full_name, words

ID = ColumnFacts("id", "BIGINT", is_nullable=False, is_automatic=True)
ORDER_ID = ColumnFacts("order_id", "BIGINT", is_nullable=False, comment="What was\nbought")
REASON = ColumnFacts("reason", "TEXT", is_nullable=True, default="'other'", choices=("broken", "other"))
REFUNDS = TableFacts(
    "billing",
    "refunds",
    columns=(ID, ORDER_ID, REASON),
    primary_key=("id",),
    unique_keys=(("order_id", "reason"),),
    indexes=(("order_id",),),
    checks=("reason <> ''",),
    comment="Money given back",
)
ORDERS = TableFacts("public", "CustomerOrders", columns=(ID,), primary_key=("id",))
REFUND_OF_ORDER = RelationshipFacts(
    "billing.refunds(order_id) -> public.CustomerOrders(id)",
    "billing.refunds",
    ("order_id",),
    "public.CustomerOrders",
    ("id",),
    "many-to-one",
    is_required=True,
    on_delete="CASCADE",
)


def texts(tables: list[TableFacts], relationships: list[RelationshipFacts]) -> dict[str, str]:
    documented = document_database(tables, relationships)
    return {documentation.item.name: documentation.item.text for part in documented for documentation in part}


def test_a_table_with_everything() -> None:
    """The test compares the whole text, because all of it is embedded."""
    assert texts([REFUNDS, ORDERS], [REFUND_OF_ORDER])["billing.refunds"] == (
        "Table billing.refunds.\n"
        "Purpose: Money given back\n"
        "Columns:\n"
        "- id.\n"
        "- order_id, refers to public.CustomerOrders(id): What was bought\n"
        "- reason: one of broken, other.\n"
        "Unique: order_id, reason together.\n"
        "Checks: reason <> ''.\n"
        "Indexed by: order_id."
    )


def test_table_text_names_the_referring_tables() -> None:
    """Without a comment the purpose is derived, is marked as derived, and is not embedded."""
    orders = document_database([REFUNDS, ORDERS], [REFUND_OF_ORDER])[0][1]
    assert orders.item.text.startswith("Table public.CustomerOrders: customer orders.\nColumns:\n")
    assert "Referred to by: billing.refunds (order_id)." in orders.item.text
    assert orders.details["business_purpose"] == "Keeps customer orders (derived: it has no comment)."


def test_a_relationship() -> None:
    """The text has the join and the comments of both tables."""
    assert texts([REFUNDS, ORDERS], [REFUND_OF_ORDER])[REFUND_OF_ORDER.id] == (
        "Relationship billing.refunds(order_id) -> public.CustomerOrders(id): many-to-one.\n"
        "Join refunds with customer orders by order_id = id.\n"
        "billing.refunds: Money given back"
    )


def test_junction_table_names_the_linked_tables() -> None:
    """Two foreign keys are together the primary key; if they are only a part of it, it is no junction table."""
    columns = tuple(ColumnFacts(name, "INT", is_nullable=False) for name in ("tag_id", "order_id", "at"))
    junction = TableFacts(None, "tags_of_orders", columns=columns, primary_key=("tag_id", "order_id"))
    keys = [
        RelationshipFacts(name, "tags_of_orders", (column,), table, ("id",), "many-to-one", is_required=True)
        for name, column, table in (("a", "tag_id", "tags"), ("b", "order_id", "orders"))
    ]
    sentence = "each row links one row of tags with one of orders (many-to-many)"
    assert sentence in texts([junction], keys)["tags_of_orders"]
    purpose = document_database([junction], keys)[0][0].details["business_purpose"]
    assert purpose == "Links tags with orders, many-to-many (derived: it has no comment)."
    wider = replace(junction, primary_key=("tag_id", "order_id", "at"))
    assert "many-to-many" not in texts([wider], keys)["tags_of_orders"]
    assert "many-to-many" not in texts([junction], keys[:1])["tags_of_orders"]


def test_stored_documentation_is_json() -> None:
    """The store returns the facts with the documentation."""
    tables, relationships = document_database([REFUNDS], [REFUND_OF_ORDER])
    details = json.loads(json.dumps(tables[0].details))
    assert details["schema_data"]["columns"][2]["default"] == "'other'"
    assert json.loads(json.dumps(relationships[0].details))["on_delete"] == "CASCADE"
    assert details["business_purpose"] == "Money given back"
    assert details["schema_data"]["columns"][1]["name"] == "order_id"
    assert json.loads(json.dumps(relationships[0].details))["relationship_type"] == "many-to-one"
    assert tables[0].item.metadata == {"table_type": "table", "purpose": "Money given back", "schema": "billing"}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("order_items", "order items"),
        ("OrderItems", "order items"),
        ("HTTPLogLine2", "http log line 2"),
        ("Order Items", "order items"),
        ("straßenName", "straßen name"),
        ("___", "___"),
        ("注文", "注文"),
    ],
)
def test_names_become_words(name: str, expected: str) -> None:
    assert words(name) == expected


NAMES = st.text('a."', min_size=1, max_size=4)


@given(st.lists(st.tuples(st.none() | NAMES, NAMES), max_size=20, unique=True))
def test_full_names_are_unique(places: list[tuple[str | None, str]]) -> None:
    """Names may have dots, quotes and spaces."""
    assert len({full_name(schema, table) for schema, table in places}) == len(places)

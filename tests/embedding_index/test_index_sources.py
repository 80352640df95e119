"""``cli.py index`` with its other sources: PostgreSQL, and the conversations of MongoDB; every part is the real one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest
from pymongo import MongoClient
from pymongo.database import Database

from tests.embedding_index.index_commands import KEY, RELATIONSHIPS, TABLES, IndexSite, add_conversation

if TYPE_CHECKING:
    from tests.fakes.postgres_server import Postgres

ITEMS = TABLES + RELATIONSHIPS
TEXTS = {
    "late": "My parcel should have arrived on Monday and nobody can tell me where it is.",
    "twice": "You took the money from my credit card two times for one order.",
    "login": "I forgot my password and the link to set a new one never comes.",
}
CONVERSATIONS = ("--source", "conversations")
SCHEMA = (
    "CREATE SCHEMA money",
    "CREATE TABLE orders (id bigint PRIMARY KEY)",
    "CREATE TABLE money.card_charges (id bigint PRIMARY KEY, order_id bigint NOT NULL REFERENCES orders(id))",
    "CREATE TABLE money.payouts_to_customers (id bigint PRIMARY KEY, charge_id bigint REFERENCES money.card_charges(id))",
    "COMMENT ON TABLE money.payouts_to_customers IS 'Refunds: money given back to customers'",
    "COMMENT ON COLUMN money.payouts_to_customers.charge_id IS 'the charge that is refunded'",
)


@pytest.fixture
def mongo(site: IndexSite, mongodb_uri: str, db_name: str) -> Iterator[Database[dict[str, Any]]]:
    """Return the database of the site, with three classified conversations."""
    site.environment |= {"MONGODB_URI": mongodb_uri, "MONGODB_DB": db_name}
    with MongoClient[dict[str, Any]](mongodb_uri) as client:
        for name, text in TEXTS.items():
            add_conversation(client[db_name], name, text)
        yield client[db_name]


@pytest.mark.slow
@pytest.mark.usefixtures("loaded_model")
def test_postgresql_from_its_catalogue_to_a_hit(site: IndexSite, postgres: Postgres) -> None:
    """Schemas, comments and keys are documented, a search finds refunds first, and no output shows the password."""
    postgres.run("CREATE DATABASE index_command")
    postgres.run(*SCHEMA, database="index_command")
    log = site.folder / "index.log"
    local = {"EMBEDDING_PROVIDER": "local", "LOG_FILE": str(log), "DATABASE_URL": postgres.uri("index_command")}
    ended = site.run("--batch", "--json", "--verbose", **local)
    assert ended.code == 0, ended.err
    tables = {"public.orders", "money.card_charges", "money.payouts_to_customers"}
    assert ended.json["tables"] == dict.fromkeys(tables, True)
    assert ended.json["relationships"] == {
        "money.card_charges(order_id) -> public.orders(id)": True,
        "money.payouts_to_customers(charge_id) -> money.card_charges(id)": True,
    }
    hit = site.run("--search", "where are refunds stored", "--json", **local).json[0]
    assert (hit["kind"], hit["name"]) == ("table", "money.payouts_to_customers")
    assert hit["purpose"] == "Refunds: money given back to customers"
    assert "the charge that is refunded" in hit["text"]
    again = site.run("--batch", "--json", **local)
    assert (again.json["indexed"], again.json["tokens"]) == (0, 0)

    wrong = postgres.uri("index_command", password="a-wrong-secret")
    refused = site.run("--batch", "--verbose", **(local | {"DATABASE_URL": wrong}))
    assert refused.code == 3
    assert "correct its user and password" in refused.err
    for secret in (postgres.password, "a-wrong-secret"):
        assert secret not in ended.said + refused.said + log.read_text()
        assert secret.encode() not in site.files()


@pytest.mark.slow
def test_conversations_beside_the_database(site: IndexSite, mongo: Database[dict[str, Any]]) -> None:
    """They are estimated, indexed, found, relabelled and removed; no log, output or file has their texts."""
    log = site.folder / "index.log"
    site.environment["LOG_FILE"] = str(log)
    estimate = site.run("--estimate-costs", *CONVERSATIONS, "--json")
    assert (estimate.code, site.calls) == (0, 0), estimate.err
    assert (estimate.json["pending_conversations"], estimate.json["estimated_batches"]) == (3, 1)
    assert estimate.json["total_estimated_cost"] == pytest.approx(estimate.json["estimated_tokens"] * 0.02 / 1e6)
    over = site.run("--batch", *CONVERSATIONS, "--max-cost", "0.0000001")
    assert (over.code, site.calls) == (2, 0)
    assert site.run("--batch").code == 0
    some = site.run("--batch", *CONVERSATIONS, "--limit", "1", "--json", "--verbose")
    assert (some.code, some.json["indexed"], some.json["calls"]) == (0, 1, 1), some.err
    ended = site.run("--batch", *CONVERSATIONS, "--json", "--max-cost", "1")
    assert (ended.code, ended.json["indexed"], ended.json["read"], ended.json["calls"]) == (0, 2, 3, 1), ended.err
    hit = site.run("--search", TEXTS["late"], *CONVERSATIONS, "--json").json[0]
    assert (hit["source_id"], hit["text"], hit["categorization"]) == ('"late"', None, "About late.")
    assert "Other, Other, Negative, About late." in site.run("--search", TEXTS["late"], *CONVERSATIONS).out

    mongo["sentimental_analysis"].update_one(
        {"source_conversation_id": "late"}, {"$set": {"classification.intent": "Complaint"}}
    )
    mongo["conversation_set"].delete_one({"_id": "twice"})
    calls = site.calls
    after = site.run("--batch", *CONVERSATIONS, "--json")
    assert (after.code, after.json["changed"], after.json["removed"], site.calls) == (0, 1, 1, calls), after.err
    assert site.run("--batch", "--json").json["calls"] == 0, "the vectors of tables were forgotten with the others"
    assert site.run("--rebuild", "--json").json["calls"] == 0
    hits = site.run("--search", TEXTS["late"], *CONVERSATIONS, "--json").json
    assert {hit["source_id"]: hit["intent"] for hit in hits} == {'"late"': "Complaint", '"login"': "Other"}
    said = some.said + ended.said + log.read_text() + site.files().decode(errors="replace")
    for text in TEXTS.values():
        assert text not in said


def test_texts_of_customers_stay_in_the_house(site: IndexSite, mongo: Database[dict[str, Any]]) -> None:
    """That includes the text of a search. The documentation of a database needs no permission."""
    assert mongo["conversation_set"].estimated_document_count() == 3
    outside = {"OPENAI_BASE_URL": "http://192.0.2.1:9/v1"}  # a documentation address: nobody is there
    for action in (["--batch"], ["--estimate-costs"], ["--search", "x"]):
        refused = site.run(*action, *CONVERSATIONS, **outside)
        assert refused.code == 2, refused.said
        assert "--allow-external" in refused.err
    assert site.run("--estimate-costs", *CONVERSATIONS, "--allow-external", **outside).code == 0
    assert site.run("--estimate-costs", *CONVERSATIONS, **outside, ALLOW_EXTERNAL_LLM="true").code == 0
    assert site.run("--estimate-costs", **outside).code == 0
    assert KEY.encode() not in site.files()


@pytest.mark.thorough
def test_a_rebuild_with_another_model_says_what_the_other_source_needs(
    site: IndexSite, mongo: Database[dict[str, Any]]
) -> None:
    """Texts of conversations are not stored, so these leave the index until they are indexed again; the estimate has their price."""
    assert mongo["conversation_set"].estimated_document_count() == 3
    assert site.run("--batch").code == 0
    assert site.run("--batch", *CONVERSATIONS).code == 0
    other = {"EMBEDDING_MODEL": "text-embedding-3-large"}
    price = site.run("--estimate-costs", *CONVERSATIONS, "--json", **other)
    assert (price.code, price.json["pending_conversations"]) == (0, 3), price.err
    assert price.json["total_estimated_cost"] > 0
    calls = site.calls
    assert site.run("--rebuild", *CONVERSATIONS, "--max-cost", "0", **other).code == 2
    assert (site.calls, site.states()) == (calls, {"indexed": ITEMS + 3})
    rebuilt = site.run("--rebuild", **other)
    assert rebuilt.code == 0, rebuilt.err
    assert f"{ITEMS} indexed, 0 failed" in rebuilt.out
    remedy = "3 conversations are not in the index, or with an older text: cli.py index --batch --source conversations"
    assert remedy in rebuilt.out
    assert site.states() == {"indexed": ITEMS, "pending": 3}
    assert site.run("--search", "parcel", *CONVERSATIONS, "--json", **other).json == []
    done = site.run("--batch", *CONVERSATIONS, **other)
    assert done.code == 0, done.err
    assert "not in the index" not in done.out
    assert site.states() == {"indexed": ITEMS + 3}
    calls = site.calls
    back = site.run("--rebuild", *CONVERSATIONS)
    assert (back.code, site.calls) == (0, calls), "the first model's vectors are still stored"
    assert len(site.run("--search", "parcel", *CONVERSATIONS, "--json").json) == 3


def test_vectors_that_were_paid_for_outlive_the_states(site: IndexSite, mongo: Database[dict[str, Any]]) -> None:
    """If index.sqlite3 is lost and conversations are indexed first, the vectors of tables are kept."""
    assert mongo["conversation_set"].estimated_document_count() == 3
    assert site.run("--batch").code == 0
    assert site.run("--batch", *CONVERSATIONS).code == 0
    calls = site.calls
    for path in site.index.glob("index.sqlite3*"):
        path.unlink()
    for command in (["--batch", *CONVERSATIONS], ["--batch"], ["--batch", *CONVERSATIONS]):
        assert site.run(*command).code == 0
    assert site.calls == calls
    mongo["conversation_set"].delete_one({"_id": "twice"})
    before = site.vectors()
    assert site.run("--batch", *CONVERSATIONS).code == 0
    assert site.vectors() == before - 1, "what no item has any more is deleted"


@pytest.mark.thorough
def test_mongodb_is_asked_for_conversations_only(site: IndexSite) -> None:
    """Without MongoDB a database is indexed; for conversations the exit code is 3."""
    nowhere = {"MONGODB_URI": "mongodb://127.0.0.1:9/?serverSelectionTimeoutMS=300", "MONGODB_TIMEOUT_MS": "300"}
    assert site.run("--batch", **nowhere).code == 0
    away = site.run("--batch", *CONVERSATIONS, **nowhere)
    assert away.code == 3, away.err
    assert "MongoDB" in away.err

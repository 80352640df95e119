"""The document store on a real mongod, through PyMongo's own asyncio API and through Motor."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Any

import bson
import pytest
from bson.datetime_ms import DatetimeMS
from bson.raw_bson import RawBSONDocument
from mongomock_motor import AsyncMongoMockClient
from pymongo import IndexModel
from pymongo.database import Database
from pymongo.errors import DuplicateKeyError

from aggregator import aggregate_conversation
from config import load_settings
from error_handler import ConfigurationError, IndexBlockedError, StoreRejectedError
from mongo_client import DocumentStore, range_filter
from storage.extended_json import id_key
from storage.mongo_indexes import serves_as_unique
from storage.selection import STATUSES, Selection, State, StateFields
from tests.cases import mostly_thorough
from tests.embedding_index.stores import DRIVERS, open_store
from worker.left_out import count_left_out

# Ids of many types, in the order in which MongoDB sorts them.
IDS: list[Any] = [
    bson.MinKey(),
    None,
    -5,
    1,
    bson.Int64(2),
    2.5,
    bson.Decimal128("3.5"),
    bson.Int64(2**53),
    "",
    "1",
    "doc0",
    {"a": 1},
    {"a": 1, "b": 2},
    b"\x01",
    bson.Binary.from_uuid(uuid.UUID(int=5)),
    bson.ObjectId("000000000000000000000001"),
    bson.ObjectId("65f0a1b2c3d4e5f6a7b8c9d0"),
    False,
    True,
    datetime(1969, 1, 1, tzinfo=UTC),
    datetime(2024, 5, 1, tzinfo=UTC),
    bson.Timestamp(1, 2),
    bson.MaxKey(),
]


@pytest.fixture(params=DRIVERS)
async def store(request: pytest.FixtureRequest, mongodb_uri: str, db_name: str) -> AsyncIterator[DocumentStore]:
    async with open_store(mongodb_uri, db_name, request.param) as opened:
        yield opened


def keys(values: list[Any]) -> list[bytes]:
    return [id_key(value) for value in values]


async def all_ids(store: DocumentStore, selection: Selection, limit: int, bound: list[Any]) -> list[Any]:
    """Every id that paging finds, in its order."""
    found: list[Any] = []
    after: list[Any] = []
    while page := await store.read_page(selection, after, bound, limit):
        assert len(page) <= limit
        found += [document["_id"] for document in page]
        after = [page[-1]["_id"]]
    return found


# Reading


@pytest.mark.parametrize("limit", [4, *(pytest.param(limit, marks=pytest.mark.thorough) for limit in (1, 1000))])
async def test_pages_across_id_types(store: DocumentStore, database: Database[dict[str, Any]], limit: int) -> None:
    """Each document comes once, in MongoDB's order, whatever type of id is at the edge of a page."""
    database["conversation_set"].insert_many([{"_id": value, "text": "x"} for value in reversed(IDS)])
    found = await all_ids(store, "pending", limit, await store.upper_bound())
    assert keys(found) == keys(IDS)


async def test_a_page_begins_and_ends_at_any_type(store: DocumentStore, database: Database[dict[str, Any]]) -> None:
    """After an id and up to an id of any type: no type bracketing."""
    database["conversation_set"].insert_many([{"_id": value} for value in IDS])
    for place, value in enumerate(IDS):
        after = [document["_id"] for document in await store.read_page("all", [value], [], 100)]
        upto = [document["_id"] for document in await store.read_page("all", [], [value], 100)]
        assert keys(after) == keys(IDS[place + 1 :]), value
        assert keys(upto) == keys(IDS[: place + 1]), value


async def test_upper_bound(store: DocumentStore, database: Database[dict[str, Any]]) -> None:
    """Empty for an empty collection; null is a bound like any other."""
    assert await store.upper_bound() == []
    database["conversation_set"].insert_one({"_id": None})
    assert await store.upper_bound() == [None]
    database["conversation_set"].insert_many([{"_id": "z"}, {"_id": 5}])
    assert await store.upper_bound() == ["z"]


async def test_documents_beyond_the_bound_are_left_for_the_next_run(
    store: DocumentStore, database: Database[dict[str, Any]]
) -> None:
    """A run works on what was there at its start."""
    database["conversation_set"].insert_many([{"_id": number} for number in range(5)])
    bound = await store.upper_bound()
    database["conversation_set"].insert_many([{"_id": 9}, {"_id": "later"}, {"_id": 2.5}])
    assert await all_ids(store, "pending", 2, bound) == [0, 1, 2, 2.5, 3, 4]


STATE_OF: list[tuple[dict[str, Any], State]] = [
    ({"status": "pending"}, "pending"),
    ({"tweets": []}, "pending"),
    ({"status": None}, "pending"),
    ({"status": "processing"}, "processing"),
    ({"status": "processed"}, "processed"),
    ({"status": "skipped"}, "skipped"),
    ({"status": "failed"}, "failed"),
    ({"status": "archived"}, "foreign"),
    ({"status": "Pending"}, "foreign"),
    ({"status": ""}, "foreign"),
    ({"status": 5}, "foreign"),
    ({"status": {"name": "open"}}, "foreign"),
    ({"status": "pending", "processed": True, "status_reason": "x"}, "pending"),
    ({"status": "closed", "processed": True}, "foreign"),
    ({"text": "x", "processed": False}, "pending"),
    ({"text": "x"}, "pending"),
    ({"text": "x", "processed": None}, "pending"),
    ({"text": "x", "processed": "true"}, "pending"),
    ({"text": "x", "processed": True}, "processed"),
    ({"messages": [], "processed": True}, "processed"),
    ({"text": "x", "processed": True, "status_reason": "skipped_no_text: x"}, "skipped"),
    ({"text": "x", "processed": False, "status_reason": "empty: x"}, "failed"),
]
SELECTED: dict[Selection, set[State]] = {
    "pending": {"pending"},
    "sweep": {"pending", "processing"},
    "failed": {"failed"},
    "processed": {"processed"},
    "skipped": {"skipped"},
    "known": {"pending", "processing", "processed", "failed", "skipped"},
    "foreign": {"foreign"},
    "all": {"pending", "processing", "processed", "failed", "skipped", "foreign"},
}


async def assert_selections(store: DocumentStore) -> None:
    await store.insert_documents([{"_id": number, **document} for number, (document, _) in enumerate(STATE_OF)])
    for selection, states in SELECTED.items():
        expected = [number for number, (_, state) in enumerate(STATE_OF) if state in states]
        assert await all_ids(store, selection, 4, await store.upper_bound()) == expected, selection
        assert await store.count(selection) == len(expected)
    for document, state in STATE_OF:
        assert StateFields().state_of(document) == state, document


async def test_selections(store: DocumentStore) -> None:
    """Documents that are done, or not ours, are never selected. The queries, the aggregation and Python agree on each state."""
    await assert_selections(store)
    rows = await store.aggregate(
        "read states", [{"$sort": {"_id": 1}}, {"$project": {"state": StateFields().state_expression}}]
    )
    found = [row["state"] if row["state"] in STATUSES else "foreign" for row in rows]
    assert found == [state for _, state in STATE_OF]


async def test_status_that_is_a_list(store: DocumentStore) -> None:
    """Queries match a list that holds the value, so the plan does as well."""
    await store.insert_documents([{"_id": 1, "status": ["vip", "pending"]}, {"_id": 2, "status": ["vip"]}])
    assert await all_ids(store, "pending", 4, await store.upper_bound()) == [1]
    assert [StateFields().state_of({"status": status}) for status in (["vip", "pending"], ["vip"])] == [
        "pending",
        "foreign",
    ]
    assert (await count_left_out(store, queued=0)).statuses == {"['vip']": 1}


async def test_selections_in_memory(db_name: str) -> None:
    """The same queries on mongomock, which the demonstration runs on."""
    client = AsyncMongoMockClient()
    store = DocumentStore(load_settings(None, db_name=db_name), client=client)
    await store.check()
    await store.ensure_result_indexes()
    await assert_selections(store)
    await store.close()


def test_open_sides_of_a_range_are_no_condition() -> None:
    """Null is an id, so the absence of a limit is said otherwise."""
    assert range_filter([], []) == {}
    assert range_filter([None], []) == {"$expr": {"$and": [{"$gt": ["$_id", {"$literal": None}]}]}}
    assert StateFields().queries["all"] == {}


async def test_an_id_that_looks_like_an_expression(store: DocumentStore, database: Database[dict[str, Any]]) -> None:
    """It is compared as a value and never computed."""
    ids = ["$status", {"$gt": 1}]
    database.command("insert", "conversation_set", documents=[{"_id": "$status"}, {"_id": {"a": "$b"}}])
    assert await all_ids(store, "pending", 1, await store.upper_bound()) == ["$status", {"a": "$b"}]
    assert await store.read_page("pending", ids[:1], [{"a": "$b"}], 5) == [{"_id": {"a": "$b"}}]


async def test_dates_are_aware(store: DocumentStore, database: Database[dict[str, Any]]) -> None:
    """So that they compare with the times that texts tell."""
    at = datetime(2024, 5, 1, 10, 30, tzinfo=UTC)
    database["conversation_set"].insert_one({"_id": 1, "messages": [{"timestamp": at}]})
    (document,) = await store.read_page("pending", [], [], 1)
    assert document["messages"][0]["timestamp"] == at


async def test_odd_documents_are_read(mongodb_uri: str, db_name: str, database: Database[dict[str, Any]]) -> None:
    """A date beyond the year 9999 or a text that is not UTF-8 must not end the run for all the others."""
    broken = bson.encode({"_id": 2, "text": "caf_"}).replace(b"caf_", b"caf\xff")
    database["conversation_set"].insert_one({"_id": 1, "text": "hello", "created_at": DatetimeMS(2**60)})
    database["conversation_set"].insert_one(RawBSONDocument(broken))
    async with open_store(mongodb_uri, db_name) as store:
        first, second = await store.read_page("pending", [], await store.upper_bound(), 10)
    assert aggregate_conversation(first).transcript == "Customer: hello"
    assert aggregate_conversation(second).transcript == "Customer: caf\ufffd"


# Results


def result(source: Any, **fields: Any) -> dict[str, Any]:
    return {"_id": bson.ObjectId(), "source_conversation_id": source, "classification": {"intent": "Other"}, **fields}


def stored(database: Database[dict[str, Any]]) -> dict[bytes, dict[str, Any]]:
    found = list(database["sentimental_analysis"].find())
    by_source = {id_key(document["source_conversation_id"]): document for document in found}
    assert len(by_source) == len(found), "a document has two results"
    return by_source


async def test_results_are_found_by_the_exact_id(store: DocumentStore) -> None:
    """1 and "1" are two documents; a job id narrows the search."""
    await store.ensure_result_indexes()
    meta = {"processing_metadata": {"batch_job_id": "job_1"}}
    assert await store.write_results([result(value, **meta) for value in IDS]) == {}
    assert await store.result_keys(IDS) == set(keys(IDS))
    assert await store.result_keys(["1", "2", {"b": 2, "a": 1}]) == {id_key("1")}
    assert await store.result_keys(IDS, "job_1") == set(keys(IDS))
    assert await store.result_keys(IDS, "job_2") == set()


async def test_a_second_result_is_not_stored(store: DocumentStore, database: Database[dict[str, Any]]) -> None:
    """The first one stays, the others of the group are written; writing again is harmless."""
    await store.ensure_result_indexes()
    assert await store.write_results([result("a", n=1)]) == {}
    group = [result("a", n=2), result("b", n=2)]
    for _ in range(2):
        assert await store.write_results(group) == {}
    assert {key: document["n"] for key, document in stored(database).items()} == {id_key("a"): 1, id_key("b"): 2}


async def test_replace(store: DocumentStore, database: Database[dict[str, Any]]) -> None:
    """The whole result is replaced under its old id; new ones are added."""
    await store.ensure_result_indexes()
    await store.write_results([result(None, n=1, old=True)])
    old_id = stored(database)[id_key(None)]["_id"]
    for _ in range(2):
        assert await store.write_results([result(None, n=2), result({"$a": 1}, n=2)], replace=True) == {}
    found = stored(database)
    assert {key: document["n"] for key, document in found.items()} == {id_key(None): 2, id_key({"$a": 1}): 2}
    assert found[id_key(None)]["_id"] == old_id
    assert "old" not in found[id_key(None)]


async def test_replaced_result_keeps_the_labels_of_an_earlier_text(
    store: DocumentStore, database: Database[dict[str, Any]]
) -> None:
    """A repeated write, and another label of the same text, add nothing to the history."""

    def labelled(label: str, text: str) -> dict[str, Any]:
        return result(7, classification={"intent": label}, processing_metadata={"input_sha256": text})

    for label, text in (("A", "one"), ("B", "two"), ("B", "two"), ("C", "two"), ("D", "three")):
        assert await store.write_results([labelled(label, text)], replace=True) == {}
    (stored,) = database["sentimental_analysis"].find()
    assert stored["classification"] == {"intent": "D"}
    assert [(one["classification"]["intent"], one["input_sha256"]) for one in stored["history"]] == [
        ("A", "one"),
        ("C", "two"),
    ]


@pytest.mark.parametrize("replace", [False, pytest.param(True, marks=pytest.mark.thorough)], ids=["insert", "replace"])
@pytest.mark.parametrize(
    "bad",
    mostly_thorough(
        [
            pytest.param({"text": "x" * 17_000_000}, id="17-MB"),
            pytest.param({"a\x00b": 1}, id="nul-in-key"),
            pytest.param({"text": "caf\ud83d"}, id="lone-surrogate"),
            pytest.param({"number": 2**80}, id="number-beyond-64-bit"),
            pytest.param({"value": object()}, id="foreign-type"),
        ],
        2,
    ),
)
async def test_one_bad_result_does_not_spoil_its_group(
    store: DocumentStore, database: Database[dict[str, Any]], bad: dict[str, Any], replace: bool
) -> None:
    """It alone is named; the message quotes nothing of it."""
    await store.ensure_result_indexes()
    rejected = await store.write_results([result(0), result(1, **bad), result(2)], replace=replace)
    assert list(rejected) == [1]
    assert isinstance(rejected[1], StoreRejectedError)
    assert "caf" not in str(rejected[1])
    assert set(stored(database)) == {id_key(0), id_key(2)}


async def test_what_a_rule_of_the_server_refuses(store: DocumentStore, database: Database[dict[str, Any]]) -> None:
    """A validator, or a unique index that is not ours: nothing is stored, so it is not taken for done."""
    database.create_collection("sentimental_analysis", validator={"n": {"$lt": 10}})
    await store.ensure_result_indexes()
    database["sentimental_analysis"].create_index("number", unique=True)
    group = [result("a", n=1, number=1), result("b", n=99, number=2), result("c", n=2, number=1)]
    assert set(await store.write_results(group)) == {1, 2}
    assert set(stored(database)) == {id_key("a")}


async def test_results_are_read_in_pages(store: DocumentStore) -> None:
    """In the order of their own ids."""
    results = [result(number) for number in range(5)]
    await store.write_results(results)
    first = await store.read_results([], 3)
    rest = await store.read_results([first[-1]["_id"]], 3)
    assert [found["source_conversation_id"] for found in (*first, *rest)] == [0, 1, 2, 3, 4]


# Indexes


async def test_indexes(store: DocumentStore, database: Database[dict[str, Any]]) -> None:
    """The documented ones; making them again is harmless."""
    for _ in range(2):
        await store.ensure_result_indexes()
        await store.ensure_source_indexes()

    def fields(collection: str) -> set[str]:
        return {name for index in database[collection].index_information().values() for name, _ in index["key"]}

    of_urgent = {"processed", "priority"}
    assert fields("conversation_set") == {"_id", "status", "conversation_number", "last_processed_at"} | of_urgent
    assert fields("sentimental_analysis") == {
        "_id",
        "source_conversation_id",
        "conversation_number",
        "processing_metadata.batch_job_id",
        "processing_metadata.processed_at",
        "conversation.last_message_at",
        "created_at",
        "classification.intent",
        "classification.topic",
        "classification.sentiment",
    }
    indexes = database["sentimental_analysis"].index_information()
    assert [name for name, index in indexes.items() if index.get("unique")] == ["source_conversation_id_1"]
    assert database["conversation_set_leases"].index_information()["expires_at_1"]["expireAfterSeconds"] == 0


async def test_stored_duplicates_block_the_unique_index(
    store: DocumentStore, database: Database[dict[str, Any]]
) -> None:
    """The message holds a query that finds them, and that query works."""
    database["sentimental_analysis"].insert_many([result("a"), result("a"), result("b")])
    with pytest.raises(IndexBlockedError) as caught:
        await store.ensure_result_indexes()
    assert "db.sentimental_analysis.aggregate([{$group: {_id: '$source_conversation_id'" in str(caught.value)
    query = [{"$group": {"_id": "$source_conversation_id", "n": {"$sum": 1}}}, {"$match": {"n": {"$gt": 1}}}]
    assert list(database["sentimental_analysis"].aggregate(query)) == [{"_id": "a", "n": 2}]


@pytest.mark.parametrize(
    ("keys_of_index", "options"),
    mostly_thorough(
        [
            pytest.param([("source_conversation_id", 1)], {"unique": True, "name": "one_result"}, id="other-name"),
            pytest.param([("source_conversation_id", -1)], {"unique": True}, id="descending"),
            pytest.param([("source_conversation_id", 1)], {}, id="not-unique"),
            pytest.param([("source_conversation_id", 1)], {"name": "of_the_application"}, id="not-unique-other-name"),
            pytest.param([("source_conversation_id", 1)], {"sparse": True}, id="sparse"),
            pytest.param([("n", 1)], {"name": "source_conversation_id_1"}, id="name-taken"),
        ],
        2,
    ),
)
async def test_any_index_of_the_results_is_accepted_and_a_unique_one_is_there_at_the_end(
    store: DocumentStore,
    database: Database[dict[str, Any]],
    keys_of_index: list[tuple[str, int]],
    options: dict[str, Any],
) -> None:
    """The index of an application stays, and prevents nothing."""
    results = database["sentimental_analysis"]
    results.create_index(keys_of_index, **options)
    for _ in range(2):
        await store.ensure_result_indexes()
    indexes = results.index_information()
    assert options.get("name", "source_conversation_id_1") in indexes or "source_conversation_id_-1" in indexes
    assert serves_as_unique(indexes)
    assert "classification.intent_1" in indexes, "the others are created all the same"
    results.insert_one(result("a"))
    with pytest.raises(DuplicateKeyError):
        results.insert_one(result("a"))


@pytest.mark.parametrize(
    ("field", "options"),
    mostly_thorough(
        [
            pytest.param("conversation_number", {"unique": True}, id="A1-unique"),
            pytest.param("status", {"name": "idx_status"}, id="A1-name"),
            pytest.param("last_processed_at", {"expireAfterSeconds": 10**8}, id="ttl"),
            pytest.param("status", {"collation": {"locale": "de"}}, id="collation"),
            pytest.param("status", {"partialFilterExpression": {"status": "pending"}}, id="partial"),
        ],
        2,
    ),
)
async def test_any_index_of_the_source_is_accepted(
    store: DocumentStore,
    database: Database[dict[str, Any]],
    caplog: pytest.LogCaptureFixture,
    field: str,
    options: dict[str, Any],
) -> None:
    """Those of the other fields are created, and nothing is worth a warning."""
    database["conversation_set"].create_index(field, **options)
    await store.ensure_source_indexes()
    fields = {index["key"][0][0] for index in database["conversation_set"].index_information().values()}
    assert fields == {"_id", "status", "conversation_number", "last_processed_at"}
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


async def test_index_that_the_server_refuses_is_a_warning(
    store: DocumentStore, database: Database[dict[str, Any]], caplog: pytest.LogCaptureFixture
) -> None:
    """MongoDB allows 64 indexes of a collection."""
    source = database["conversation_set"]
    source.create_indexes([IndexModel([(f"field{number}", 1)]) for number in range(62)])
    await store.ensure_source_indexes()
    assert len(source.index_information()) == 64
    assert "the index conversation_number_1 of conversation_set was not created" in caplog.text


async def test_identity_of_a_view_is_refused(store: DocumentStore, database: Database[dict[str, Any]]) -> None:
    """A status cannot be stored in a view; the run ends with a message before it asks the model."""
    database.create_collection("conversation_set", viewOn="conversations", pipeline=[])
    with pytest.raises(ConfigurationError, match=r"is a view.*MONGODB_SOURCE_COLLECTION"):
        await store.identity()
    with pytest.raises(ConfigurationError, match="A view stands where"):
        await store.try_writes()

"""A document that MongoDB refuses to change, or cannot name, keeps its status with a warning; the others go on."""

from __future__ import annotations

from typing import Any

import bson
import pytest
from bson.raw_bson import RawBSONDocument

from config import load_settings
from mongo_client import DocumentStore
from tests.cases import mostly_thorough
from tests.worker.site import BROKEN, Site, conversation, filled, store_raw


def statuses(site: Site) -> dict[Any, Any]:
    return {document["_id"]: document.get("status") for document in site.source.find({}, {"status": 1})}


def test_one_document_breaks_the_validator(site: Site) -> None:
    """A3: it keeps its status, is named once, and has a result; the next run asks the model for nothing."""
    documents = filled(site, 5)
    site.source.update_one({"_id": 2}, {"$set": {"channel": 7}})
    site.database.command("collMod", "conversation_set", validator={"channel": {"$in": [None, "web"]}})
    ended = site.run()
    assert ended.code == 0, ended.err
    assert ended.err.count("document 2 keeps its status: the validator of the collection does not allow it") == 1
    assert statuses(site) == dict.fromkeys(range(5), "processed") | {2: "pending"}
    assert site.results.count_documents({}) == len(documents)
    assert "1 already had a result" in site.run().out


def test_validator_of_statuses_is_one_sentence(site: Site) -> None:
    """Nothing can be marked; all results are stored all the same."""
    filled(site, 5)
    site.database.command("collMod", "conversation_set", validator={"status": {"$in": ["pending", "closed"]}})
    ended = site.run(BATCH_SIZE="2")
    assert ended.code == 0, ended.err
    assert ended.err.count("the validator of conversation_set does not allow the statuses") == 1
    assert "keeps its status" not in ended.err.replace("document 4 keeps its status", "")
    assert site.results.count_documents({}) == 5


@pytest.mark.parametrize("attempts", mostly_thorough(["three", None, [1], bson.Int64(2**63 - 1)], 3), ids=repr)
def test_counter_that_cannot_count(site: Site, attempts: Any) -> None:
    """The query is done, its counter as it was; its neighbours are counted once."""
    query = {"text": "Where is my parcel?", "processed": False}
    site.source.insert_many([{"_id": n, **query, "processing_attempts": attempts if n == 1 else 0} for n in range(3)])
    ended = site.run()
    assert ended.code == 0, ended.err
    assert [document["processed"] for document in site.source.find()] == [True] * 3
    assert [document["processing_attempts"] for document in site.source.find().sort("_id")] == [1, attempts, 1]


def test_skipped_document_that_cannot_be_marked_is_skipped_once(site: Site) -> None:
    """The sweeps do not find it again and again."""
    site.source.insert_many([conversation(0), conversation(1, messages=[], channel=7)])
    site.database.command("collMod", "conversation_set", validator={"channel": {"$in": [None, "web"]}})
    ended = site.run()
    assert ended.code == 0, ended.err
    assert "2 documents processed" in ended.out
    assert "1 skipped" in ended.out


@pytest.mark.parametrize(
    ("place", "batch_size"), mostly_thorough([("first", "1"), ("last", "1"), ("first", "20"), ("last", "20")], 3)
)
def test_id_that_is_not_utf8(site: Site, place: str, batch_size: str) -> None:
    """B24: skipped with a warning, also where whole pages have such ids; one that really has U+FFFD is not."""
    start = b"\x01" if place == "first" else b"z"
    for number in range(3):
        raw = bson.encode({**conversation(0), "_id": "QQQ"})
        site.source.insert_one(RawBSONDocument(raw.replace(b"QQQ", start + bytes([0xFF, 0x61 + number]))))
    good = ["a", "m\ufffd", "z\U0001f4e6"]
    site.source.insert_many([{**conversation(number), "_id": name} for number, name in enumerate(good)])
    ended = site.run(BATCH_SIZE=batch_size)
    assert ended.code == 0, ended.err
    assert ended.err.count("its _id is not UTF-8") == 3
    assert {result["source_conversation_id"] for result in site.results.find()} == set(good)
    assert "3 skipped" in ended.out


@pytest.mark.parametrize("batch_size", mostly_thorough(["1", "20"], 2))
def test_document_that_is_not_valid_bson(site: Site, batch_size: str) -> None:
    """It is quarantined with its reason, the others get results, and after its correction it is retried."""
    broken = conversation(2)
    broken["messages"][0]["file"] = BROKEN
    store_raw(site.source, broken)
    site.source.insert_many([conversation(number) for number in (0, 1, 3, 4)])
    ended = site.run(BATCH_SIZE=batch_size)
    assert ended.code == 1, ended.err
    assert "document 2 quarantined: unreadable: MongoDB holds it as invalid BSON" in ended.err
    assert {result["source_conversation_id"] for result in site.results.find()} == {0, 1, 3, 4}
    assert statuses(site) == dict.fromkeys(range(5), "processed") | {2: "failed"}
    assert (entry := site.entries("quarantine")[0])["reason"] == "unreadable"
    assert "messages" not in entry["conversation_data"]
    assert site.run("--retry-failed").code == 1
    site.source.update_one({"_id": 2}, {"$unset": {"messages.0.file": ""}})
    assert site.run("--retry-failed").code == 0
    assert site.results.count_documents({}) == 5


@pytest.mark.parametrize("place", mostly_thorough(["text", "status", "attachment"], 3))
def test_broken_field_of_a_query(site: Site, place: str) -> None:
    """Fields that are not read do not matter, and a binary status belongs to another program; reports go on."""
    store_raw(site.source, {"_id": 1, "text": "Where is my parcel?", "processed": False, place: BROKEN})
    filled(site, 1)
    shown = site.run("--dry-run")
    assert shown.code == 0, shown.err
    assert site.run("plan").code == 0
    ended = site.run()
    is_read = place == "text"
    assert ended.code == int(is_read), ended.err
    assert ended.err.count("document 1 quarantined: unreadable") == int(is_read)
    assert site.results.count_documents({}) == 1 + (place == "attachment")


@pytest.mark.parametrize("batch_size", mostly_thorough(["1", "20"], 2))
def test_id_that_is_not_valid_bson(site: Site, batch_size: str) -> None:
    """No query can name it, so it is skipped with a warning at any place of the page."""
    for number in range(2):
        store_raw(site.source, {**conversation(number), "_id": bson.Binary(b"%d23" % number)})
    shown = site.run("doctor", "--no-probe").out
    assert "a document is not valid BSON, so the driver cannot read it (read the source)" in shown
    assert "The time limit is" not in shown
    filled(site, 3)
    ended = site.run(BATCH_SIZE=batch_size)
    assert ended.code == 0, ended.err
    assert ended.err.count("so no query can name it") == 2
    assert "2 skipped" in ended.out
    assert site.results.count_documents({}) == 3


async def test_one_unreadable_document_hides_none_of_those_asked_for(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are read one by one then, and a page may end early. Who asks for documents takes one that is missing for deleted."""
    monkeypatch.setattr("storage.mongo_pages.PAGE_BYTES", 1)
    store_raw(site.source, {"_id": 0, "text": BROKEN})
    filled(site, 3, first=1)
    store = DocumentStore(load_settings(None, mongodb_uri=site.uri, db_name=site.database.name))
    try:
        assert [one["_id"] for one in await store.read_documents("all", [0, 1, 2, 3])] == [0, 1, 2, 3]
        assert [one["_id"] for one in await store.read_page("all", [], [], 4)] == [0]
    finally:
        await store.close()

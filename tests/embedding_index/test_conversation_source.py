"""Conversations of a real mongod on their way into the index: which, with what text and labels, and out of it again.

The index is a small one of dictionaries; ``test_conversations_end_to_end.py`` has the real one.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import bson
import pytest
from pymongo import MongoClient
from pymongo.database import Database

from config import Settings, load_settings
from database_docs.items import Ended, IndexItem, Kind, OnEnded, content_hash
from embedding_index import conversation_source
from embedding_index.conversation_source import (
    Options,
    conversation_item,
    estimate_conversations,
    index_conversations,
    require_allowed,
)
from error_handler import ConfigurationError, ProviderUnavailableError
from storage.extended_json import canonical
from tests.embedding_index.stores import DRIVERS, open_store

LABELS = {"intent": "Order Status", "topic": "Shipping/Delivery", "sentiment": "Negative", "categorization": "Late."}
AT = datetime(2026, 11, 21, 10, 0, 0, 123000, tzinfo=UTC)
ODD_IDS: list[Any] = [
    7,
    bson.Int64(2**40),
    7.5,
    "7",
    '"7"',
    bson.ObjectId("65f1c0ffee65f1c0ffee65f1"),
    {"b": 1, "a": [2]},
    None,
    True,
    AT,
    b"\x00\x01",
    bson.Decimal128("7.10"),
]


def conversation(document_id: Any, text: str = "Where is my parcel?", **more: Any) -> dict[str, Any]:
    messages = [
        {"sender": "agent", "text": "Hello, how can I help?"},
        {"sender": "customer", "text": text},
        {"sender": "agent", "text": "I am sorry."},
        {"sender": "customer", "text": "It is late."},
    ]
    return {"_id": document_id, "messages": messages, **more}


def result(document_id: Any, **labels: Any) -> dict[str, Any]:
    made = {"processed_at": AT, "model_used": "llama3.2"}
    return {
        "source_conversation_id": document_id,
        "classification": {**LABELS, **labels},
        "processing_metadata": made,
    }


@dataclass
class States:
    """The behaviour of DocumentationStore, in dictionaries."""

    items: dict[str, tuple[str, dict[str, Any], str]] = field(default_factory=dict)  # hash, metadata, state
    outdated: set[str] = field(default_factory=set)
    met: set[str] = field(default_factory=set)
    offers: int = 0

    def begin_pass(self, kind: Kind) -> None:
        assert kind is Kind.CONVERSATION
        self.met = set()

    def offer(self, items: Sequence[IndexItem], keep_text: bool = True) -> States.Offered:
        assert not keep_text
        self.offers += 1
        offered = States.Offered([], [])
        for item in items:
            self.met.add(item.name)
            text_hash, metadata, state = self.items.get(item.name, ("", {}, "new"))
            if (text_hash, state) != (item.content_hash, "indexed"):
                self.items[item.name] = item.content_hash, dict(item.metadata), "pending"
                offered.pending.append(item)
            elif metadata != item.metadata or item.name in self.outdated:
                self.items[item.name] = item.content_hash, dict(item.metadata), "indexed"
                self.outdated.add(item.name)
                offered.changed.append(item)
        return offered

    def end_pass(self, kind: Kind) -> list[str]:
        return sorted(self.items.keys() - self.met)

    def mark_ended(self, ended: Ended) -> None:
        for item, problem in ended:
            text_hash, metadata, _ = self.items[item.name]
            if problem is not None:
                self.items[item.name] = text_hash, metadata, "failed"
            elif text_hash == item.content_hash:
                self.items[item.name] = text_hash, metadata, "indexed"
                self.outdated.discard(item.name)

    def remove(self, kind: Kind, names: Collection[str]) -> None:
        for name in names:
            del self.items[name]

    def of(self, state: str) -> set[str]:
        return {name for name, facts in self.items.items() if facts[2] == state}

    @dataclass
    class Offered:
        pending: list[IndexItem]
        changed: list[IndexItem]


@dataclass
class Vectors:
    """The behaviour of SQLVectorStore, in dictionaries."""

    is_external: bool = False
    found: dict[str, dict[str, Any]] = field(default_factory=dict)
    embedded: dict[str, str] = field(default_factory=dict)  # content hash -> text
    calls: list[int] = field(default_factory=list)
    bad: str = "never in a text"
    stop_after: int = 10**9
    stop: threading.Event = field(default_factory=threading.Event)
    away: bool = False

    @property
    def provider(self) -> Vectors:
        return self

    def count_tokens(self, text: str) -> int:
        return len(text.split())

    def known(self, hashes: Collection[str]) -> set[str]:
        return set(hashes) & self.embedded.keys()

    def index(self, items: Sequence[IndexItem], on_ended: OnEnded) -> None:
        assert threading.current_thread() is not threading.main_thread()
        self.calls.append(len(items))
        for item in items:
            if self.stop.is_set():
                return
            if self.away:
                raise ProviderUnavailableError("away")
            if self.bad in item.text:
                on_ended([(item, "the provider refuses it")])
                continue
            self.embedded[item.content_hash] = item.text
            self.found[item.name] = dict(item.metadata)
            on_ended([(item, None)])
            if len(self.found) >= self.stop_after:
                self.stop.set()

    def update_metadata(self, items: Sequence[IndexItem]) -> None:
        for item in items:
            self.found[item.name] = dict(item.metadata)

    def delete(self, kind: Kind, names: Collection[str]) -> None:
        assert kind is Kind.CONVERSATION
        for name in names:
            self.found.pop(name, None)


@dataclass
class Site:
    uri: str
    db_name: str
    database: Database[dict[str, Any]]
    driver: str = "pymongo"
    taxonomy_file: Path | None = None
    states: States = field(default_factory=States)
    vectors: Vectors = field(default_factory=Vectors)
    results: list[tuple[str, str | None]] = field(default_factory=list)

    @property
    def settings(self) -> Settings:
        place = {"mongodb_uri": self.uri, "db_name": self.db_name, "taxonomy_file": self.taxonomy_file}
        return load_settings(None, mongodb_backoff_s=0, **place)

    def fill(self, *document_ids: Any, text: str = "Where is my parcel?") -> None:
        self.database["conversation_set"].insert_many([conversation(value, text) for value in document_ids])
        self.database["sentimental_analysis"].insert_many([result(value) for value in document_ids])

    async def run(self, **options: Any) -> dict[str, int]:
        async with open_store(self.uri, self.db_name, self.driver) as store:
            counts = await index_conversations(
                store,
                self.states,
                self.vectors,
                Options(self.settings, **options),
                lambda ended: self.results.extend((item.name, problem) for item, problem in ended),
            )
        return {
            name: value for name, value in asdict(counts).items() if value and name not in ("expected", "is_complete")
        }

    async def estimate(self, **options: Any) -> conversation_source.ConversationCounts:
        async with open_store(self.uri, self.db_name, self.driver) as store:
            return await estimate_conversations(store, self.states, self.vectors, Options(self.settings, **options))


@pytest.fixture
def site(mongodb_uri: str, db_name: str) -> Iterator[Site]:
    with MongoClient[dict[str, Any]](mongodb_uri, tz_aware=True) as client:
        yield Site(mongodb_uri, db_name, client[db_name])


def test_an_item_is_what_the_customer_said_with_the_labels() -> None:
    """Agents' turns are left out; the metadata have only known fields and no text of a turn."""
    item = conversation_item(conversation(7, conversation_number=17), result(7))
    assert (item.kind, item.name) == (Kind.CONVERSATION, '{"$numberInt": "7"}')
    assert item.text == "Where is my parcel?\nIt is late."
    assert item.metadata == {
        "source_id": '{"$numberInt": "7"}',
        "conversation_number": "17",
        **LABELS,
        "classified_at": "2026-11-21T10:00:00.123000+00:00",
        "classified_by": "llama3.2",
    }
    bare = conversation_item({"_id": "doc0", "text": "Hello"}, {"classification": LABELS, "processing_metadata": None})
    assert (bare.name, bare.text, bare.metadata) == ('"doc0"', "Hello", {"source_id": '"doc0"', **LABELS})


def test_an_item_has_the_labels_of_every_field() -> None:
    """Lists stay lists; what is no label, or would replace a fact of the conversation, is left out."""
    odd = {"channels": ["Phone", "Chat"], "score": 0.5, "flags": [1], "source_id": "forged", "classified_by": "forged"}
    item = conversation_item(conversation(7), result(7, urgency="High", **odd))
    assert item.metadata == {
        "source_id": '{"$numberInt": "7"}',
        **LABELS,
        "urgency": "High",
        "channels": ["Phone", "Chat"],
        "classified_at": "2026-11-21T10:00:00.123000+00:00",
        "classified_by": "llama3.2",
    }


async def test_results_from_before_a_field_existed_stay_in_the_index(site: Site, tmp_path: Path) -> None:
    """A taxonomy without the triad takes every result with a label."""
    own = tmp_path / "own.yaml"
    own.write_text("categorization: false\nfields: {urgency: [High, Low]}")
    site.fill(1)
    await site.run()
    results = site.database["sentimental_analysis"]
    site.taxonomy_file = own
    assert await site.run() == {"read": 1}
    results.update_one({}, {"$set": {"classification": {"urgency": "High"}}})
    assert await site.run() == {"read": 1, "changed": 1}
    assert site.vectors.found['{"$numberInt": "1"}']["urgency"] == "High"
    results.update_one({}, {"$set": {"classification": {}}})
    assert await site.run() == {"read": 1, "unclassified": 1, "removed": 1}


@pytest.mark.parametrize("driver", DRIVERS)
async def test_ids_of_all_types_are_told_apart(site: Site, driver: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages are smaller than the number of ids of one type."""
    monkeypatch.setattr(conversation_source, "PAGE_DOCUMENTS", 5)
    site.driver = driver
    site.fill(*ODD_IDS)
    counts = await site.run()
    assert counts == {"read": len(ODD_IDS), "pending": len(ODD_IDS), "indexed": len(ODD_IDS)}
    assert site.vectors.found.keys() == {canonical(value) for value in ODD_IDS} == site.states.of("indexed")
    assert all(metadata["source_id"] == name for name, metadata in site.vectors.found.items())
    assert sorted(name for name, _ in site.results) == sorted(site.vectors.found)


async def test_only_classified_conversations_with_text_are_taken(site: Site) -> None:
    """The others are counted; an incomplete classification does not count as one."""
    site.fill(1, 2, 3, 4)
    site.database["conversation_set"].insert_many(
        [conversation(5), {"_id": 6, "messages": [{"sender": "agent", "text": "Hello"}]}, conversation(7)]
    )
    incomplete = {**result(7), "classification": {"intent": "Order Status"}}
    site.database["sentimental_analysis"].insert_many([result(6), incomplete])
    assert await site.run() == {"read": 7, "unclassified": 2, "without_text": 1, "pending": 4, "indexed": 4}


async def test_unchanged_conversations_are_not_embedded_again(site: Site) -> None:
    """A changed text is embedded; changed labels are only replaced."""
    site.fill(1, 2, 3)
    await site.run()
    assert await site.run() == {"read": 3}
    assert site.vectors.calls == [3]
    source, results = site.database["conversation_set"], site.database["sentimental_analysis"]
    source.update_one({"_id": 1}, {"$set": {"messages.1.text": "I want my money back."}})
    source.update_one({"_id": 3}, {"$set": {"messages.0.text": "Another greeting of the agent", "status": "processed"}})
    results.update_one({"source_conversation_id": 2}, {"$set": {"classification.intent": "Complaint"}})
    assert await site.run() == {"read": 3, "pending": 1, "indexed": 1, "changed": 1}
    assert site.vectors.calls == [3, 1]
    assert site.vectors.found['{"$numberInt": "2"}']["intent"] == "Complaint"
    assert site.vectors.embedded[content_hash("I want my money back.\nIt is late.")]
    assert await site.run() == {"read": 3}


async def test_labels_that_were_not_replaced_are_offered_again(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """The state is written after the index, so the next run repairs a failure in between."""
    site.fill(1)
    await site.run()
    site.database["sentimental_analysis"].update_one({}, {"$set": {"classification.topic": "Other"}})

    def fail(items: Sequence[IndexItem]) -> None:
        raise ProviderUnavailableError("not now")

    monkeypatch.setattr(site.vectors, "update_metadata", fail, raising=False)
    with pytest.raises(ProviderUnavailableError):
        await site.run()
    monkeypatch.undo()
    assert await site.run() == {"read": 1, "changed": 1}
    assert site.vectors.found['{"$numberInt": "1"}']["topic"] == "Other"


async def test_deleted_conversations_leave_the_index(site: Site) -> None:
    """Deleted, unclassified or emptied conversations cannot be found after a complete pass."""
    site.fill(1, 2, 3, 4)
    await site.run()
    site.database["conversation_set"].delete_one({"_id": 1})
    site.database["sentimental_analysis"].delete_one({"source_conversation_id": 2})
    site.database["conversation_set"].update_one({"_id": 3}, {"$set": {"messages": []}})
    assert await site.run() == {"read": 3, "unclassified": 1, "without_text": 1, "removed": 3}
    assert list(site.vectors.found) == list(site.states.items) == ['{"$numberInt": "4"}']


async def test_a_part_of_a_pass_removes_nothing(site: Site) -> None:
    """Conversations that a limited or stopped pass did not reach may still exist."""
    site.fill(*range(10))
    await site.run()
    site.database["conversation_set"].delete_one({"_id": 0})
    site.database["conversation_set"].update_many({}, {"$set": {"messages.1.text": "Now about something else"}})
    assert await site.run(limit=2) == {"read": 9, "pending": 2, "indexed": 2}
    site.vectors.stop.set()
    assert await site.run() == {}
    site.vectors.stop.clear()
    assert len(site.vectors.found) == 10
    assert await site.run() == {"read": 9, "pending": 7, "indexed": 7, "removed": 1}


async def test_a_removal_that_was_cut_off_is_repeated(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """Items leave the index first and the states afterwards."""
    site.fill(1, 2)
    await site.run()
    site.database["conversation_set"].delete_one({"_id": 1})

    def fail(kind: Kind, names: Collection[str]) -> None:
        raise ProviderUnavailableError("not now")

    monkeypatch.setattr(site.vectors, "delete", fail, raising=False)
    with pytest.raises(ProviderUnavailableError):
        await site.run()
    monkeypatch.undo()
    assert len(site.vectors.found) == 2
    assert await site.run() == {"read": 1, "removed": 1}
    assert list(site.vectors.found) == ['{"$numberInt": "2"}']


@pytest.mark.parametrize("missing", ["conversation_set", "sentimental_analysis"])
async def test_a_wrong_name_empties_no_index(site: Site, missing: str) -> None:
    """A missing collection removes nothing; an empty one removes everything."""
    site.fill(1, 2)
    await site.run()
    site.database[missing].rename("elsewhere")
    with pytest.raises(ConfigurationError, match=missing):
        await site.run()
    assert len(site.vectors.found) == 2
    site.database.create_collection(missing)
    await site.run()
    assert site.vectors.found == {}


async def test_windows_are_handed_over_whole(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """Full windows are embedded while reading, the rest at the end; the number of characters can fill a window, too."""
    monkeypatch.setattr(conversation_source, "PAGE_DOCUMENTS", 30)
    monkeypatch.setattr(conversation_source, "WINDOW", 50)
    site.fill(*range(100))
    read: list[int] = []
    await site.run(on_read=lambda number, expected: read.append(number))
    assert site.vectors.calls == [50, 50]
    assert read == [30, 60, 90, 100]
    site.vectors.calls.clear()
    site.states.items.clear()
    monkeypatch.setattr(conversation_source, "WINDOW_CHARACTERS", 900)
    await site.run()
    assert site.vectors.calls == [30, 30, 30, 10]
    assert site.states.of("indexed") == site.vectors.found.keys()


async def test_a_bad_conversation_fails_alone_and_is_tried_again(site: Site) -> None:
    """The result names it with its problem."""
    site.fill(1, 2)
    site.fill(3, text="xyzzy")
    site.vectors.bad = "xyzzy"
    assert await site.run() == {"read": 3, "pending": 3, "indexed": 2, "failed": 1}
    assert ('{"$numberInt": "3"}', "the provider refuses it") in site.results
    site.vectors.bad = "never in a text"
    assert await site.run() == {"read": 3, "pending": 1, "indexed": 1}


async def test_stopped_pass_keeps_its_results_and_resumes(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """That also holds if the provider ends the pass."""
    monkeypatch.setattr(conversation_source, "WINDOW", 2)
    site.fill(*range(8))
    for number in range(8):
        site.database["conversation_set"].update_one({"_id": number}, {"$set": {"messages.1.text": f"Number {number}"}})
    site.vectors.stop_after = 3
    assert await site.run() == {"read": 8, "pending": 8, "indexed": 3}
    assert len(site.states.of("indexed")) == 3
    site.vectors.stop.clear()
    site.vectors.away = True
    with pytest.raises(ProviderUnavailableError):
        await site.run()
    site.vectors.away, site.vectors.stop_after = False, 10**9
    assert await site.run() == {"read": 8, "pending": 5, "indexed": 5}
    assert len(site.vectors.embedded) == 8


async def test_no_text_leaves_the_network_without_permission(site: Site) -> None:
    """No conversation is read."""
    site.fill(1)
    site.vectors.is_external = True
    with pytest.raises(ConfigurationError, match="--allow-external or ALLOW_EXTERNAL_LLM=true"):
        await site.run()
    assert (site.vectors.calls, site.states.offers) == ([], 0)
    assert await site.run(allow_external=True) == {"read": 1, "pending": 1, "indexed": 1}
    require_allowed(site.vectors, allowed=True)


async def test_estimate_sends_nothing_and_equals_the_run(site: Site) -> None:
    """Equal texts and texts with a vector cost nothing; a limit applies."""
    site.fill(1, 2)
    site.fill(3, text="Please cancel my order today")
    site.vectors.is_external = True
    estimate = await site.estimate()
    assert (estimate.pending, estimate.unpaid, estimate.tokens) == (3, 2, 4 + 5 + 2 * 3)
    assert site.vectors.calls == []
    assert (await site.estimate(limit=2)).pending == 2
    await site.run(allow_external=True)
    assert len(site.vectors.embedded) == estimate.unpaid
    site.states.items.clear()
    again = await site.estimate()
    assert (again.pending, again.unpaid, again.tokens) == (3, 0, 0)


async def test_the_loop_is_free_while_texts_are_embedded(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loop handles signals and progress meanwhile."""
    site.fill(1)
    loop, given = asyncio.get_running_loop(), site.vectors.index
    begun, ticked = asyncio.Event(), threading.Event()

    def wait_for_the_loop(items: Sequence[IndexItem], on_ended: OnEnded) -> None:
        loop.call_soon_threadsafe(begun.set)
        assert ticked.wait(20)
        given(items, on_ended)

    monkeypatch.setattr(site.vectors, "index", wait_for_the_loop, raising=False)
    run = asyncio.create_task(site.run())
    await begun.wait()
    ticked.set()
    assert (await run)["indexed"] == 1

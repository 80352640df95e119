"""The vector store, what mends it and what fills it: real ChromaDB and SQLite, a provider whose vectors are made up."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec

import numpy as np
import pytest

if find_spec("chromadb") is None:
    pytest.skip("requirements-index.txt is not installed", allow_module_level=True)

from config.index_settings import IndexSettings
from database_docs.documentation_store import DocumentationStore
from database_docs.items import Ended, IndexItem, Kind, State
from embedding_index import vector_store
from embedding_index.batch_indexing import BatchIndexingManager, Mending, SQLIndexerAgent
from embedding_index.providers.contract import Answer, ModelIdentity, RequestLimits
from embedding_index.search_entries import Hit
from embedding_index.vector_store import SQLVectorStore
from error_handler import ConfigurationError, MixedIndexError, ProviderRejectedError, StateDirectoryError

LENGTH = 8


class Words:
    """Makes a vector of the letters of a text, equal for equal texts; refuses what holds *bad*. 40 words are the limit."""

    is_external = False
    max_concurrent = 1

    def __init__(self, length: int = LENGTH, *, asked: int | None = None, inputs: int = 2048) -> None:
        self.identity = ModelIdentity("openai", "text-embedding-3-small", asked)
        self.limits = RequestLimits(inputs, 40, None)
        self.bad = "never in a text"
        self.calls: list[list[str]] = []
        self.stop: threading.Event | None = None
        self._length = length if asked is None else asked

    def count_tokens(self, text: str) -> int:
        return max(1, len(text.split()), len(text) // 100)

    def embed(self, texts: Sequence[str], on_answer: object = None) -> Answer:
        self.calls.append(list(texts))
        if self.stop is not None:
            self.stop.set()
        if any(self.bad in text or not text.strip() for text in texts) or len(texts) > self.limits.inputs:
            raise ProviderRejectedError("it does not like that")
        return Answer([self._vector(text) for text in texts], sum(map(self.count_tokens, texts)))

    def _vector(self, text: str) -> list[float]:
        seed = int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:8])
        return list(np.random.default_rng(seed).standard_normal(self._length))

    def close(self) -> None:
        """Nothing is open."""


Open = Callable[..., SQLVectorStore]


@pytest.fixture
def states(settings: IndexSettings) -> Iterator[DocumentationStore]:
    with DocumentationStore(settings.index_dir / "index.sqlite3") as store:
        yield store


def tables(*numbers: int) -> list[IndexItem]:
    return [IndexItem(Kind.TABLE, f"t{number}", f"Table number {number}.", {"number": number}) for number in numbers]


def ignore(_: Ended) -> None:
    """Nobody asks how items ended."""


def index_all(store: SQLVectorStore, states: DocumentationStore, items: Sequence[IndexItem]) -> None:
    states.offer(items)
    manager = BatchIndexingManager(SQLIndexerAgent(store))
    manager.batch_process_pending_tables(states)


def rebuild(store: SQLVectorStore, states: DocumentationStore) -> None:
    """Make the entries from the stored vectors; items without one are pending."""
    Mending(store, states, rebuild=True).mend()


def names(hits: Sequence[Hit]) -> list[str]:
    return [hit.name for hit in hits]


def test_items_of_equal_text_or_equal_name_stand_beside_each_other(settings: IndexSettings) -> None:
    """Equal texts need one vector; special characters in a name are harmless."""
    odd = ["a:b", "two\nlines", "x" * 5000, "naïve \U0001f600", "table:t1"]
    items = [IndexItem(Kind.TABLE, name, "the same", {}) for name in odd]
    items += [
        IndexItem(Kind.RELATIONSHIP, "a:b", "another", {"of": "a"}),
        IndexItem(Kind.CONVERSATION, "a:b", "the same"),
    ]
    ended: list[tuple[IndexItem, str | None]] = []
    provider = Words()
    with SQLVectorStore(settings, provider=provider) as store:
        store.index(items, ended.extend)
        assert sorted(text for call in provider.calls for text in call) == ["another", "the same"]
        assert {(item.id, problem) for item, problem in ended} == {(item.id, None) for item in items}
        assert set(names(store.search("the same", [Kind.TABLE], limit=9))) == set(odd)
        (conversation,) = store.search("the same", [Kind.CONVERSATION])
        assert (conversation.name, conversation.text) == ("a:b", None)
        store.delete(Kind.TABLE, ["a:b"])
        assert store.ids() == {item.id for item in items} - {"table:a:b"}


def test_texts_that_no_encoding_takes(settings: IndexSettings) -> None:
    """A half of a surrogate pair is in the text of one and in the metadata of another."""
    items = [IndexItem(Kind.TABLE, "a", "half \ud83d"), IndexItem(Kind.TABLE, "b", "whole", {"note": "\ud83d"})]
    with SQLVectorStore(settings, provider=Words()) as store:
        store.index(items, ignore)
        (hit,) = store.search("half \ud83d", limit=1)
        assert (hit.name, hit.text) == ("a", "half \ud83d")


def test_rebuild_replaces_vectors_of_another_length(settings: IndexSettings, states: DocumentationStore) -> None:
    """The stored vectors of the other length are not taken for those of the default."""
    with SQLVectorStore(settings, provider=Words(asked=4)) as store:
        index_all(store, states, tables(1, 2))
    provider = Words()
    with SQLVectorStore(settings, provider=provider) as store, pytest.raises(MixedIndexError, match="--rebuild"):
        store.search("Table number 1.")
    with SQLVectorStore(settings, provider=provider, rebuild=True) as store:
        rebuild(store, states)
        assert store.count() == 0
        index_all(store, states, tables(1, 2))
        assert store.identity.dimensions == LENGTH
        assert names(store.search("Table number 1.", limit=1)) == ["t1"]
    provider.calls.clear()
    with SQLVectorStore(settings, provider=Words(asked=4), rebuild=True) as store:
        rebuild(store, states)
        assert (store.count(), store.identity.dimensions) == (2, 4), "both lengths were kept"
    assert provider.calls == []


def test_failed_state_update_is_raised_once_and_costs_no_second_call(settings: IndexSettings) -> None:
    """The error of the first attempt is raised; there is no second attempt."""
    told: list[int] = []

    def full(ended: Ended) -> None:
        told.append(len(ended))
        raise StateDirectoryError("no room")

    provider = Words()
    with SQLVectorStore(settings, provider=provider) as store:
        with pytest.raises(StateDirectoryError, match="no room"):
            store.index(tables(1, 2), full)
        assert told == [2]
        store.index(tables(1, 2), ignore)
        assert len(provider.calls) == 1
        assert store.counts.reused == 2


def test_items_are_marked_in_lots_before_the_run_ends(settings: IndexSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each WRITE_AT items are written and marked together."""
    lots: list[int] = []
    with SQLVectorStore(settings, provider=Words()) as store:
        store.batch_size = 1
        monkeypatch.setattr(vector_store, "WRITE_AT", 2)
        store.index(tables(*range(5)), lambda ended: lots.append(len(ended)))
        assert lots == [2, 2, 1]


def test_calls_in_flight_are_stored_after_a_stop(settings: IndexSettings, states: DocumentationStore) -> None:
    """The other items have no result and stay pending."""
    provider = Words()
    with SQLVectorStore(settings, provider=provider) as store:
        provider.stop, store.batch_size = store.stop, 1
        states.offer(tables(1, 2, 3))
        results = BatchIndexingManager(SQLIndexerAgent(store)).batch_process_pending_tables(states)
        assert list(results.values()) == [True]
        assert len(provider.calls) == 1
        assert states.counts()[Kind.TABLE] == {State.INDEXED: 1, State.PENDING: 2, State.FAILED: 0}


def test_batch_indexes_pending_items_and_a_bad_item_fails_alone(
    settings: IndexSettings, states: DocumentationStore
) -> None:
    """Store and result name it; the next run retries only this item."""
    provider = Words()
    provider.bad = "number 2"
    noted: list[tuple[IndexItem, str | None]] = []
    with SQLVectorStore(settings, provider=provider) as store:
        manager = BatchIndexingManager(SQLIndexerAgent(store), noted.extend)
        states.offer(tables(1, 2, 3))
        assert manager.batch_process_pending_tables(states) == {"t1": True, "t2": False, "t3": True}
        assert sorted(item.name for item, _ in noted) == ["t1", "t2", "t3"]
        (failed,) = states.items(Kind.TABLE, State.FAILED)
        assert failed.name == "t2"
        assert "does not like" in str(failed.problem)
        provider.bad = "never in a text"
        provider.calls.clear()
        states.offer(tables(1, 2, 3))
        assert manager.batch_process_pending_tables(states) == {"t2": True}
        assert provider.calls == [["Table number 2."]]
        assert manager.batch_process_pending_tables(states) == {}


def test_statistics_price_only_texts_without_a_vector(settings: IndexSettings, states: DocumentationStore) -> None:
    """Equal texts count once, stored ones not at all."""
    with SQLVectorStore(settings, provider=Words()) as store:
        manager = BatchIndexingManager(SQLIndexerAgent(store))
        manager.batch_size = 2
        texts = [item.text for item in tables(1, 2, 3)]
        assert manager.unpaid([*texts, *texts]) == texts
        states.offer(tables(1, 2, 3))
        stats = manager.get_processing_stats(states)
        assert (stats["pending_tables"], stats["total_pending"], stats["estimated_batches"]) == (3, 3, 2)
        made = manager.estimate_embedding_costs(texts)
        assert made["estimated_tokens"] == 9
        assert stats["total_estimated_cost"] == pytest.approx(made["estimated_cost_usd"]) == pytest.approx(9 * 2e-8)
        store.index(tables(1), ignore)
        assert manager.unpaid(texts) == texts[1:]
        left = manager.get_processing_stats(states)
        assert left["total_estimated_cost"] == pytest.approx(6 * 2e-8)
        for name, value in (("batch_size", 0), ("batch_size", 2049), ("max_retries", -1), ("max_retries", 21)):
            with pytest.raises(ValueError, match=name):
                setattr(manager, name, value)


def test_a_question_of_any_length_is_asked_within_the_limits(settings: IndexSettings) -> None:
    """A long question is sent in pieces; pieces of white space are not sent."""
    provider = Words(inputs=3)
    with SQLVectorStore(settings, provider=provider) as store:
        store.index(tables(1), ignore)
        provider.calls.clear()
        store.search("word " * 390 + " " * 9000 + "end", limit=1)
        assert len(provider.calls) >= 4
        assert all(len(call) <= 3 for call in provider.calls)
        assert sum(text.count("word") for call in provider.calls for text in call) == 390
        with pytest.raises(ConfigurationError, match="empty"):
            store.search(" \n")


def test_vectors_of_deleted_texts_are_deleted(settings: IndexSettings) -> None:
    with SQLVectorStore(settings, provider=Words()) as store:
        first, second = tables(1, 2)
        store.index([first, second], ignore)
        store.ledger.keep_only({first.content_hash})
        assert store.known({first.content_hash, second.content_hash}) == {first.content_hash}

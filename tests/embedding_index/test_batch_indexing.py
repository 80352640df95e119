"""The programmatic API: BatchIndexingManager, SQLIndexerAgent, SQLVectorStore, DocumentationStore, as it is promised."""

from __future__ import annotations

import contextlib
import inspect
import logging
import math
import pickle
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import SecretStr

import embedding_index
from config.index_settings import IndexSettings, load_index_settings
from config.settings import known_environment_names
from database_docs.introspection import read_database
from database_docs.items import IndexItem, Kind
from embedding_index import BatchIndexingManager, DocumentationStore, SQLIndexerAgent, SQLVectorStore
from embedding_index.batch_indexing import Mending
from embedding_index.providers.contract import Answer, ModelIdentity, RequestLimits
from error_handler import DirectoryLockedError, MixedIndexError, ProviderRejectedError, StateDirectoryError
from tests.embedding_index.index_commands import RELATIONSHIPS, SHOP, TABLES

STATS = {
    *("pending_tables", "pending_relationships", "total_pending", "estimated_table_cost"),
    *("estimated_relationship_cost", "total_estimated_cost", "batch_size", "estimated_batches"),
}
COSTS = {"total_texts", "estimated_tokens", "estimated_cost_usd", "cost_per_text"}


class LetterProvider:
    """Counts letters; refuses what contains *poison*; remembers the sizes of its calls."""

    is_external = False
    max_concurrent = 1
    limits = RequestLimits(2048, 8192, 300_000)

    def __init__(self, model: str = "text-embedding-3-small", poison: str | None = None) -> None:
        self.identity = ModelIdentity("openai", model)
        self.poison = poison
        self.sizes: list[int] = []

    def count_tokens(self, text: str) -> int:
        return max(1, len(text) // 4)

    def embed(self, texts: Any, on_answer: Any = None) -> Answer:
        self.sizes.append(len(texts))
        if self.poison and any(self.poison in text for text in texts):
            raise ProviderRejectedError("HTTP 400")
        vectors = [[1.0 + text.lower().count(letter) for letter in "abcdefghijklmnopqrstuvwxyz"] for text in texts]
        return Answer([np.asarray(vector, np.float32) for vector in vectors], sum(map(self.count_tokens, texts)))

    def close(self) -> None:
        pass


@pytest.fixture
def provider() -> LetterProvider:
    return LetterProvider()


@pytest.fixture
def states(tmp_path: Path) -> Iterator[DocumentationStore]:
    """Return a store that knows a small shop."""
    with contextlib.closing(sqlite3.connect(tmp_path / "shop.db")) as database, database:
        for statement in SHOP:
            database.execute(statement)
    facts = read_database(SecretStr(f"sqlite:///{tmp_path / 'shop.db'}"))
    with DocumentationStore(tmp_path / "index/index.sqlite3") as store:
        store.sync_database(facts.tables, facts.relationships)
        yield store


def settings(tmp_path: Path, **changes: Any) -> IndexSettings:
    return load_index_settings(None, index_dir=tmp_path / "index", **changes)


@pytest.fixture
def vectors(tmp_path: Path, provider: LetterProvider) -> Iterator[SQLVectorStore]:
    with SQLVectorStore(settings(tmp_path), provider=provider) as store:
        yield store


def test_names_and_arguments_are_those_that_are_promised() -> None:
    """Code that was written against them keeps working."""

    def arguments(function: Any) -> list[str]:
        return list(inspect.signature(function).parameters)

    assert set(embedding_index.__all__) == {
        *("BatchIndexingManager", "DocumentationStore", "SQLIndexerAgent", "SQLVectorStore")
    }
    assert arguments(BatchIndexingManager) == ["indexer_agent", "on_ended"]
    assert arguments(SQLIndexerAgent) == ["vector_store"]
    for name in ("batch_process_pending_tables", "batch_process_pending_relationships", "get_processing_stats"):
        assert arguments(getattr(BatchIndexingManager, name)) == ["self", "doc_store"]
    assert arguments(BatchIndexingManager.estimate_embedding_costs) == ["self", "texts"]
    with pytest.raises(AttributeError, match="embedding_index has no Nothing"):
        embedding_index.Nothing  # noqa: B018 - the look-up is the test


def test_everything_is_indexed_and_its_state_follows(states: DocumentationStore, vectors: SQLVectorStore) -> None:
    """Results are by name; indexed items are no longer pending, and a search finds them."""
    manager = BatchIndexingManager(SQLIndexerAgent(vectors))
    stats = manager.get_processing_stats(states)
    assert set(stats) == STATS
    assert (stats["pending_tables"], stats["pending_relationships"], stats["total_pending"]) == (4, 3, 7)
    assert (stats["batch_size"], stats["estimated_batches"]) == (100, 2)
    assert stats["total_estimated_cost"] == stats["estimated_table_cost"] + stats["estimated_relationship_cost"] > 0
    tables = manager.batch_process_pending_tables(states)
    assert tables == dict.fromkeys(("customers", "orders", "refunds", "shipments"), True)
    relationships = manager.batch_process_pending_relationships(states)
    assert (len(relationships), set(relationships.values())) == (RELATIONSHIPS, {True})
    assert (states.get_pending_tables(), states.get_pending_relationships()) == ([], [])
    assert vectors.count() == TABLES + RELATIONSHIPS
    after = manager.get_processing_stats(states)
    assert after == dict.fromkeys(STATS, 0) | {"batch_size": 100}
    assert (manager.batch_process_pending_tables(states), manager.batch_process_pending_relationships(states)) == (
        {},
        {},
    )
    info = states.get_table_info("refunds")
    assert info is not None
    assert (info["table_name"], info["status"]) == ("refunds", "indexed")
    (best,) = vectors.search(info["documentation"], [Kind.TABLE], limit=1)
    assert (best.name, best.text) == ("refunds", info["documentation"])
    assert best.similarity == pytest.approx(1.0)


def test_the_batch_size_may_be_set(
    states: DocumentationStore, vectors: SQLVectorStore, provider: LetterProvider
) -> None:
    """It must be within the limits of a call; the estimate uses it."""
    manager = BatchIndexingManager(SQLIndexerAgent(vectors))
    manager.batch_size = 3
    assert manager.get_processing_stats(states)["estimated_batches"] == 3
    manager.batch_process_pending_tables(states)
    manager.batch_process_pending_relationships(states)
    assert sorted(provider.sizes) == [2, 2, 3]
    for wrong in (0, 2049):
        with pytest.raises(ValueError, match="1 to 2048"):
            manager.batch_size = wrong
    manager.max_retries = 0
    assert vectors.max_retries == 0


def test_costs_of_texts(vectors: SQLVectorStore, provider: LetterProvider) -> None:
    """Tokens are counted by the provider, prices are those of the model: None if unknown, 0 for a local provider."""
    manager = BatchIndexingManager(SQLIndexerAgent(vectors))
    costs = manager.estimate_embedding_costs(["a" * 400, "b" * 40])
    assert set(costs) == COSTS
    assert (costs["total_texts"], costs["estimated_tokens"]) == (2, 110)
    assert costs["estimated_cost_usd"] == pytest.approx(110 * 0.02 / 1e6)
    assert costs["cost_per_text"] == pytest.approx(55 * 0.02 / 1e6)
    assert manager.estimate_embedding_costs([]) == dict.fromkeys(COSTS, 0)
    provider.identity = ModelIdentity("openai", "our-own-model")
    assert manager.estimate_embedding_costs(["a"])["estimated_cost_usd"] is None
    assert manager.estimate_embedding_costs(["a"])["cost_per_text"] is None
    provider.identity = ModelIdentity("ollama", "nomic-embed-text")
    assert manager.estimate_embedding_costs(["a"])["estimated_cost_usd"] == 0.0
    assert provider.sizes == []


def test_the_calls_of_long_texts_are_counted_in_pieces(vectors: SQLVectorStore) -> None:
    """Eighty texts of 8,192 tokens are three calls of 300,000."""
    manager = BatchIndexingManager(SQLIndexerAgent(vectors))
    assert manager.calls(["x" * 4 * 8192] * 80) == math.ceil(80 / (300_000 // 8192))
    assert manager.calls(["x" * 4 * 8192 * 80]) == math.ceil(80 / (300_000 // 8192))
    assert manager.calls([]) == 0


def test_a_bad_item_fails_alone(states: DocumentationStore, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Store and log have the reason and no text of the item; it is pending when it is offered again."""
    all_ended: list[tuple[IndexItem, str | None]] = []
    with SQLVectorStore(settings(tmp_path), provider=LetterProvider(poison="Table orders")) as vectors:
        manager = BatchIndexingManager(SQLIndexerAgent(vectors), all_ended.extend)
        with caplog.at_level(logging.WARNING):
            results = manager.batch_process_pending_tables(states)
    assert results == {"customers": True, "orders": False, "refunds": True, "shipments": True}
    info = states.get_table_info("orders")
    assert info is not None
    assert (info["status"], info["problem"]) == ("failed", "the provider refuses it: HTTP 400")
    assert {(item.kind, item.name, problem is None) for item, problem in all_ended} == {
        (Kind.TABLE, name, is_indexed) for name, is_indexed in results.items()
    }
    assert "table orders is not indexed" in caplog.text
    assert "customer_id" not in caplog.text


def test_one_item_at_a_time(vectors: SQLVectorStore, provider: LetterProvider) -> None:
    """The text is the documentation, or is made of the other fields if there is none."""
    agent = SQLIndexerAgent(vectors)
    assert agent.index_table({"name": "zebras", "documentation": "zzzz zebras"})
    assert agent.index_relationship({"id": "z -> q", "business_purpose": "quick", "type": "one-to-one"})
    assert agent.batch_index_tables([{"name": "quails", "schema": {"columns": ["q"]}}]) == {"quails": True}
    assert agent.batch_index_relationships([]) == {}
    assert provider.sizes == [1, 1, 1]
    assert vectors.search("zzzz", limit=1)[0].name == "zebras"
    assert {hit.name for hit in vectors.search("anything", limit=10)} == {"zebras", "z -> q", "quails"}
    vectors.stop.set()
    assert not agent.index_table({"name": "newts", "documentation": "never sent"})
    vectors.delete(Kind.TABLE, ["zebras", "never there"])
    assert vectors.ids() == {"relationship:z -> q", "table:quails"}


def test_a_text_that_many_items_share_is_embedded_once(vectors: SQLVectorStore, provider: LetterProvider) -> None:
    """A search finds each of these items."""
    items = [IndexItem(Kind.TABLE, f"t{number}", f"text {number % 2}") for number in range(10)]
    ended: list[str] = []
    vectors.index(items, lambda some: ended.extend(item.name for item, problem in some if problem is None))
    assert sorted(ended) == sorted(item.name for item in items)
    assert provider.sizes == [2]
    assert vectors.count() == 10


def test_write_failure_is_reported_once_and_nothing_is_marked_indexed(
    vectors: SQLVectorStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first error is raised, and no item is reported as indexed."""
    tried = []

    def full(*_: object) -> None:
        tried.append(1)
        raise StateDirectoryError("the disk is full")

    monkeypatch.setattr(vectors.entries, "put", full)
    monkeypatch.setattr("embedding_index.vector_store.WRITE_AT", 1)
    ended: list[object] = []
    with pytest.raises(StateDirectoryError, match="the disk is full"):
        vectors.index([IndexItem(Kind.TABLE, "t", "text")], ended.append)
    assert (tried, ended) == ([1], [])


@pytest.mark.usefixtures("loaded_model")
def test_stores_without_arguments_read_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They use its provider, folder, batch size and retries."""
    for name in known_environment_names():
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    for name, value in {
        "EMBEDDING_PROVIDER": "local",
        "INDEX_DIR": "mine",
        "EMBEDDING_BATCH_SIZE": "7",
        "EMBEDDING_MAX_RETRIES": "1",
    }.items():
        monkeypatch.setenv(name, value)
    with SQLVectorStore() as vectors, DocumentationStore() as states:
        manager = BatchIndexingManager(SQLIndexerAgent(vectors))
        assert (manager.batch_size, manager.max_retries) == (7, 1)
        assert manager.get_processing_stats(states)["total_pending"] == 0
        assert states.path == Path("mine/index.sqlite3")
        assert SQLIndexerAgent(vectors).index_table({"name": "refunds", "documentation": "money given back"})
        with pytest.raises(DirectoryLockedError):
            SQLVectorStore()
    with pytest.raises(MixedIndexError, match="--rebuild"):
        SQLVectorStore(load_index_settings(None), provider=LetterProvider())
    with SQLVectorStore() as again:  # neither of the two kept the lock
        assert again.search("refunded money", limit=1)[0].name == "refunds"


def test_results_can_be_pickled_and_handed_on(states: DocumentationStore, vectors: SQLVectorStore) -> None:
    """Results are plain values."""
    manager = BatchIndexingManager(SQLIndexerAgent(vectors))
    shapes = (
        manager.get_processing_stats(states),
        manager.batch_process_pending_tables(states),
        manager.batch_process_pending_relationships(states),
        manager.estimate_embedding_costs(["a"]),
        states.get_table_info("refunds"),
        vectors.search("refunds"),
    )
    assert pickle.loads(pickle.dumps(shapes)) == shapes


def test_mending_looks_before_it_changes(
    states: DocumentationStore, vectors: SQLVectorStore, provider: LetterProvider, tmp_path: Path
) -> None:
    """With another model all vectors are missing; the states change only in ``mend``."""
    manager = BatchIndexingManager(SQLIndexerAgent(vectors))
    manager.batch_process_pending_tables(states)
    assert not Mending(vectors, states, rebuild=False).lost
    vectors.close()
    with SQLVectorStore(settings(tmp_path), provider=LetterProvider("text-embedding-3-large"), rebuild=True) as other:
        mending = Mending(other, states, rebuild=True)
        assert mending.lost == {f"table:{name}" for name in ("customers", "orders", "refunds", "shipments")}
        assert len(mending.pending_texts(Kind.TABLE, ["orders"])) == TABLES - 1
        assert states.get_pending_tables() == []
    with SQLVectorStore(settings(tmp_path), provider=provider) as kept:
        assert (kept.count(), kept.is_other_model) == (TABLES, False)
    with SQLVectorStore(settings(tmp_path), provider=LetterProvider("text-embedding-3-large"), rebuild=True) as other:
        Mending(other, states, rebuild=True).mend()
        assert (other.count(), len(states.get_pending_tables())) == (0, TABLES)

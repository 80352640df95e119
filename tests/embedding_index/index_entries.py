"""A ledger with search entries whose vectors anybody can make again from a number."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from database_docs.items import IndexItem, Kind
from embedding_index.providers.contract import ModelIdentity, Vector
from embedding_index.search_entries import Hit, SearchEntries
from embedding_index.search_graph import open_graph, publish_graph
from embedding_index.vector_ledger import LEDGER_FILE, VectorLedger
from embedding_index.vector_search import VectorSearch

DIMENSIONS = 32
MODEL = ModelIdentity("ollama", "nomic-embed-text", DIMENSIONS)
OTHER_MODEL = ModelIdentity("openai", "text-embedding-3-small", DIMENSIONS)


def vector_of(number: int) -> Vector:
    """The vector of item *number*, of length 1."""
    vector = np.random.default_rng(number).standard_normal(DIMENSIONS, dtype=np.float32)
    unit: Vector = vector / np.linalg.norm(vector)
    return unit


def item(number: int, kind: Kind = Kind.TABLE, **metadata: str | int) -> IndexItem:
    return IndexItem(kind, str(number), f"text of {number}", {"number": number, **metadata})


def add(ledger: VectorLedger, numbers: Iterable[int], identity: ModelIdentity = MODEL) -> None:
    """Store the vectors of *numbers* and let a search find them."""
    items = [item(number) for number in numbers]
    ledger.add(identity, {each.content_hash: vector_of(int(each.name)) for each in items})
    SearchEntries(ledger).put(identity, items)


def make_index(folder: Path, numbers: Iterable[int]) -> None:
    """Add *numbers* to the index of *folder*."""
    with VectorLedger(folder / LEDGER_FILE) as ledger:
        add(ledger, numbers)


class Searcher:
    """Searches the index of a folder, whose file it opens for each search, as a reader does."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._search = VectorSearch(folder)

    def hits(self, vector: Vector, kinds: Iterable[Kind] | None = None, limit: int = 5) -> list[Hit]:
        with VectorLedger(self._folder / LEDGER_FILE, create=False) as ledger:
            return self._search.search(ledger, vector, kinds, limit)

    def first(self, number: int) -> str:
        """The name of the hit that is most like *number*."""
        return self.hits(vector_of(number), limit=1)[0].name

    def close(self) -> None:
        self._search.close()


def publish(folder: Path) -> None:
    """Build the graph of the entries."""
    with VectorLedger(folder / LEDGER_FILE) as ledger:
        publish_graph(SearchEntries(ledger), folder)


def has_graph(folder: Path) -> bool:
    """Return whether there is a graph that fits the entries."""
    with VectorLedger(folder / LEDGER_FILE) as ledger:
        graph = open_graph(SearchEntries(ledger), folder)
        if graph is not None:
            graph.close()
        return graph is not None

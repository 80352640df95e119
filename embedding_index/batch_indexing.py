"""Indexes the pending items of a documentation store in the fewest calls, estimates their cost, and keeps both in agreement."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from database_docs.documentation_store import DocumentationStore
from database_docs.items import Ended, IndexItem, Kind, OnEnded, State, content_hash
from domain.prices import embedding_price
from embedding_index.inputs import pack
from embedding_index.vector_store import SQLVectorStore

logger = logging.getLogger(__name__)

FREE = ("ollama", "local")  # providers on your own machines

Info = Mapping[str, Any]


class SQLIndexerAgent:
    """Indexes tables and relationships into *vector_store*, which the caller closes.

    A table is ``{"name", "documentation", "business_purpose"?, "schema"?, "metadata"?}``; a relationship is
    ``{"id", "documentation", "type"?, "tables"?, "metadata"?}``. Their text is the documentation, or is made of
    the other fields if that is empty.
    """

    def __init__(self, vector_store: SQLVectorStore) -> None:
        self.vector_store = vector_store

    def index_table(self, table: Info) -> bool:
        """Index one table and return whether it succeeded; see ``batch_index_tables``."""
        return self.batch_index_tables([table]).get(str(table["name"]), False)

    def index_relationship(self, relationship: Info) -> bool:
        """Index one relationship and return whether it succeeded; see ``batch_index_relationships``."""
        return self.batch_index_relationships([relationship]).get(str(relationship["id"]), False)

    def batch_index_tables(self, tables: Sequence[Info]) -> dict[str, bool]:
        """Index *tables* in the fewest calls and return whether each succeeded, by name.

        A bad one fails alone. After a stop, tables for which no call was made are not in the result.

        Raises:
            IndexingError: The provider or the disk ended the work; what is done is stored.
        """
        return self._index(_item(Kind.TABLE, str(table["name"]), table, "schema") for table in tables)

    def batch_index_relationships(self, relationships: Sequence[Info]) -> dict[str, bool]:
        """Index *relationships* by id; see ``batch_index_tables``."""
        return self._index(_item(Kind.RELATIONSHIP, str(each["id"]), each, "type") for each in relationships)

    def _index(self, items: Iterable[IndexItem]) -> dict[str, bool]:
        results: dict[str, bool] = {}
        self.vector_store.index(
            list(items), lambda ended: results.update((item.name, problem is None) for item, problem in ended)
        )
        return results


class BatchIndexingManager:
    """Indexes what is pending through *indexer_agent*. ``batch_size`` and ``max_retries`` may be set."""

    def __init__(self, indexer_agent: SQLIndexerAgent, on_ended: OnEnded | None = None) -> None:
        """*on_ended* is called with items, each with None or the problem, when their state is durable."""
        self.indexer = indexer_agent
        self._on_ended = on_ended

    @property
    def batch_size(self) -> int:
        """The most inputs of one call, 1 to 2048."""
        return self.indexer.vector_store.batch_size

    @batch_size.setter
    def batch_size(self, size: int) -> None:
        if not 1 <= size <= 2048:
            raise ValueError("batch_size must be 1 to 2048")
        self.indexer.vector_store.batch_size = size

    @property
    def max_retries(self) -> int:
        """The number of retries of a failed call, 0 to 20."""
        return self.indexer.vector_store.max_retries

    @max_retries.setter
    def max_retries(self, number: int) -> None:
        if not 0 <= number <= 20:
            raise ValueError("max_retries must be 0 to 20")
        self.indexer.vector_store.max_retries = number

    def batch_process_pending_tables(self, doc_store: DocumentationStore) -> dict[str, bool]:
        """Index every pending table and return whether it succeeded, by name; its state in *doc_store* follows.

        Raises:
            IndexingError: The provider or the disk ended the work; the same call resumes it later.
        """
        return self._process(doc_store, Kind.TABLE)

    def batch_process_pending_relationships(self, doc_store: DocumentationStore) -> dict[str, bool]:
        """Index every pending relationship, by id; see ``batch_process_pending_tables``."""
        return self._process(doc_store, Kind.RELATIONSHIP)

    def get_processing_stats(self, doc_store: DocumentationStore) -> dict[str, Any]:
        """Return what is pending and what it costs; sends nothing.

        Keys: pending_tables, pending_relationships, total_pending (numbers of items); estimated_table_cost,
        estimated_relationship_cost, total_estimated_cost (US dollars, None if the price of the model is unknown);
        batch_size; estimated_batches (calls). Texts whose vector is stored cost nothing and need no call.
        """
        pending = [
            [item.text or "" for item in doc_store.items(kind, State.PENDING)]
            for kind in (Kind.TABLE, Kind.RELATIONSHIP)
        ]
        return self.stats_of(*pending)

    def stats_of(self, tables: Sequence[str], relationships: Sequence[str]) -> dict[str, Any]:
        """Return ``get_processing_stats`` for pending items with these texts."""
        unpaid = [self.unpaid(texts) for texts in (tables, relationships)]
        costs = [self.estimate_embedding_costs(texts)["estimated_cost_usd"] for texts in unpaid]
        total = len(tables) + len(relationships)
        return {
            "pending_tables": len(tables),
            "pending_relationships": len(relationships),
            "total_pending": total,
            "estimated_table_cost": costs[0],
            "estimated_relationship_cost": costs[1],
            "total_estimated_cost": None if None in costs else math.fsum(costs),
            "batch_size": self.batch_size,
            "estimated_batches": sum(map(self.calls, unpaid)),
        }

    def estimate_embedding_costs(self, texts: Sequence[str]) -> dict[str, Any]:
        """Return what embedding *texts* costs; sends nothing.

        Keys: total_texts, estimated_tokens, estimated_cost_usd, cost_per_text (US dollars, None if the price of the
        model is unknown, 0.0 for a local provider).
        """
        provider = self.indexer.vector_store.provider
        tokens = sum(provider.count_tokens(text) for text in texts if text)
        usd = self.price(tokens)
        return {
            "total_texts": len(texts),
            "estimated_tokens": tokens,
            "estimated_cost_usd": usd,
            "cost_per_text": usd / len(texts) if usd and texts else usd,
        }

    def price(self, tokens: int) -> float | None:
        """Return the price of *tokens* in US dollars; None if it is unknown."""
        identity = self.indexer.vector_store.provider.identity
        return 0.0 if not tokens or identity.provider in FREE else embedding_price(identity.model, tokens)

    def calls(self, texts: Sequence[str]) -> int:
        """Return how many calls *texts* need if none fails. Long ones are sent in pieces."""
        provider = self.indexer.vector_store.provider
        longest = provider.limits.input_tokens
        sizes: list[int] = []
        for tokens in map(provider.count_tokens, texts):
            sizes += [longest] * (tokens // longest) + [tokens % longest] * (tokens % longest > 0)
        return len(pack(sizes, provider.limits, self.batch_size))

    def unpaid(self, texts: Sequence[str]) -> list[str]:
        """Return the distinct *texts* that have no stored vector yet."""
        hashes = {content_hash(text): text for text in texts}
        known = self.indexer.vector_store.known(hashes)
        return [text for found, text in hashes.items() if found not in known]

    def _process(self, doc_store: DocumentationStore, kind: Kind) -> dict[str, bool]:
        results: dict[str, bool] = {}

        def note(ended: Ended) -> None:
            doc_store.mark_ended(ended)
            for item, problem in ended:
                if problem is not None:
                    logger.warning("%s %s is not indexed: %s", kind, item.name, problem)
                results[item.name] = problem is None
            if self._on_ended is not None:
                self._on_ended(ended)

        pending = doc_store.items(kind, State.PENDING)
        items = [IndexItem(kind, item.name, item.text or "", item.metadata) for item in pending]
        if items:
            self.indexer.vector_store.index(items, note)
        return results


def _item(kind: Kind, name: str, given: Info, detail: str) -> IndexItem:
    text = str(given.get("documentation") or "")
    if not text:
        more = given.get(detail)
        purpose = str(given.get("business_purpose") or "")
        parts = [f"{kind.capitalize()} {name}", purpose, json.dumps(more, default=str) if more else ""]
        text = ". ".join(part for part in parts if part)
    return IndexItem(kind, name, text, given.get("metadata") or {})


class Mending:
    """Finds the repairs after which every item that *states* marks as indexed can be found. Finding changes nothing.

    Attributes:
        lost: Ids of the indexed items without a stored vector of the model in use. They must be embedded again.
    """

    def __init__(self, vectors: SQLVectorStore, states: DocumentationStore, *, rebuild: bool) -> None:
        """With *rebuild*, all entries are replaced, not only those that are missing."""
        self._vectors, self._states, self._rebuild = vectors, states, rebuild
        indexed = states.hashes(State.INDEXED)
        found = {} if rebuild else vectors.entries.hashes()
        self._missing = {id_ for id_, content_hash in indexed.items() if found.get(id_) != content_hash}
        known = vectors.known({indexed[id_] for id_ in self._missing})
        self.lost = {id_ for id_ in self._missing if indexed[id_] not in known}

    def pending_texts(self, kind: Kind, removed: Collection[str]) -> list[str]:
        """Return the texts of *kind* that will be pending after ``mend``, without the names *removed* from their source."""
        return [
            item.text or ""
            for item in self._states.items(kind)
            if (item.state is State.PENDING or item.id in self.lost) and item.name not in removed
        ]

    def mend(self) -> None:
        """Make the entries from the stored vectors, and mark lost items as pending. A second time does nothing."""
        if not self._missing and not self._rebuild:
            return
        self._states.mark_pending(self.lost)
        items = (item for kind in Kind for item in self._states.items(kind, State.INDEXED))
        entries, identity = self._vectors.entries, self._vectors.identity
        if self._rebuild:
            logger.warning("the search entries are rebuilt from the stored vectors")
            entries.replace(identity, items)
        else:
            logger.warning("%d items could not be found; they are added from the stored vectors", len(self._missing))
            entries.put(identity, (item for item in items if item.id in self._missing))
        self._missing, self._rebuild, self.lost = set(), False, set()


def update_metadata(vectors: SQLVectorStore, states: DocumentationStore, changed: Sequence[IndexItem]) -> None:
    """Replace the metadata of *changed*. They are marked last, so a crash in between repeats the replacement."""
    if changed:
        vectors.update_metadata(changed)
        states.mark_ended([(item, None) for item in changed])


def remove(vectors: SQLVectorStore, states: DocumentationStore, kind: Kind, names: Collection[str]) -> None:
    """Delete items that their source no longer has, from the index first: after a crash in between, the next run repeats it."""
    if names:
        vectors.delete(kind, names)
        states.remove(kind, names)


def sweep(vectors: SQLVectorStore, states: DocumentationStore, kinds: Collection[Kind]) -> bool:
    """Delete the entries of *kinds* that *states* does not know, as after its loss. Call it when all sources were read.

    Returns whether *states* knows all that can be found now.
    """
    strangers = vectors.ids() - states.hashes().keys()
    for kind in kinds:
        vectors.delete(kind, [id_.removeprefix(f"{kind}:") for id_ in strangers if id_.startswith(f"{kind}:")])
    return all(id_.partition(":")[0] in kinds for id_ in strangers)

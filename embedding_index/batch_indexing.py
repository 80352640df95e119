"""What is pending in a documentation store, what it costs, and its way into the index in the fewest calls."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from domain.prices import embedding_price
from embedding_index.documentation_store import DocumentationStore
from embedding_index.indexer_agent import SQLIndexerAgent
from embedding_index.items import Kind, content_hash
from embedding_index.packing import pack

logger = logging.getLogger(__name__)

FREE = ("ollama", "local")  # providers on machines of one's own
UNREADABLE = "the documentation store has nothing under this name"

OnItems = Callable[[Kind, Sequence[tuple[str, str | None]]], None]


class PendingItems(Protocol):
    """What is pending; see ``DocumentationStore``."""

    def get_pending_tables(self) -> list[str]: ...
    def get_pending_relationships(self) -> list[dict[str, str]]: ...
    def get_table_info(self, name: str) -> dict[str, Any] | None: ...
    def get_relationship_info(self, relationship_id: str) -> dict[str, Any] | None: ...


class BatchIndexingManager:
    """Indexes through *indexer_agent*.

    *batch_size* is the most inputs of one call, *max_retries* how often a failed one is repeated; both may be set.
    *on_items* (None at first) is called with the kind and (name, None or the problem) of items when that is durable.
    """

    def __init__(self, indexer_agent: SQLIndexerAgent) -> None:
        self.indexer = indexer_agent
        self.on_items: OnItems | None = None

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
        """How often a failed call is repeated, 0 to 20."""
        return self.indexer.vector_store.max_retries

    @max_retries.setter
    def max_retries(self, number: int) -> None:
        if not 0 <= number <= 20:
            raise ValueError("max_retries must be 0 to 20")
        self.indexer.vector_store.max_retries = number

    def batch_process_pending_tables(self, doc_store: DocumentationStore) -> dict[str, bool]:
        """Index every pending table and return whether it succeeded, by name; its state in *doc_store* follows.

        Raises:
            IndexingError: The provider or ChromaDB ended the work; the same call later goes on where it ended.
        """
        tables = []
        results: dict[str, bool] = {}
        note = self._note(doc_store, Kind.TABLE, results)
        for name in doc_store.get_pending_tables():
            info = doc_store.get_table_info(name)
            if info is None:
                note([(name, UNREADABLE)])
                continue
            tables.append({**_common(info), "name": name, "schema": info.get("schema_data", {})})
        note.texts = {table["name"]: table["documentation"] for table in tables}
        if tables:
            self.indexer.batch_index_tables(tables, note)
        return results

    def batch_process_pending_relationships(self, doc_store: DocumentationStore) -> dict[str, bool]:
        """Index every pending relationship, by id; see ``batch_process_pending_tables``."""
        relationships = []
        results: dict[str, bool] = {}
        note = self._note(doc_store, Kind.RELATIONSHIP, results)
        for pending in doc_store.get_pending_relationships():
            name = str(pending["id"])
            info = doc_store.get_relationship_info(name)
            if info is None:
                note([(name, UNREADABLE)])
                continue
            ends = [pending.get("constrained_table"), pending.get("referred_table")]
            kind = info.get("relationship_type", "")
            relationships.append({**_common(info), "id": name, "type": kind, "tables": ends})
        note.texts = {relationship["id"]: relationship["documentation"] for relationship in relationships}
        if relationships:
            self.indexer.batch_index_relationships(relationships, note)
        return results

    def get_processing_stats(self, doc_store: PendingItems) -> dict[str, Any]:
        """Return what is pending and what it costs; sends nothing.

        Keys: pending_tables, pending_relationships, total_pending (numbers of items); estimated_table_cost,
        estimated_relationship_cost, total_estimated_cost (US dollars, None where the price of the model is not known);
        batch_size; estimated_batches (calls). Texts whose vector is stored cost nothing and need no call.
        """
        tables, relationships = self.pending_texts(doc_store)
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

        Keys: total_texts, estimated_tokens, estimated_cost_usd, cost_per_text (US dollars, None where the price of the
        model is not known, 0.0 for a provider on a machine of one's own).
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
        """Return the price of *tokens* in US dollars; None where it is not known."""
        identity = self.indexer.vector_store.provider.identity
        return 0.0 if not tokens or identity.provider in FREE else embedding_price(identity.model, tokens)

    def calls(self, texts: Sequence[str]) -> int:
        """Return how many calls *texts* need, where none fails; long ones go in pieces."""
        provider = self.indexer.vector_store.provider
        longest = provider.limits.input_tokens
        sizes: list[int] = []
        for tokens in map(provider.count_tokens, texts):
            sizes += [longest] * (tokens // longest) + [tokens % longest] * (tokens % longest > 0)
        return len(pack(sizes, provider.limits, self.batch_size))

    def pending_texts(self, doc_store: PendingItems) -> tuple[list[str], list[str]]:
        """Return the texts of all pending tables and relationships."""
        tables = [(name, doc_store.get_table_info(name)) for name in doc_store.get_pending_tables()]
        pending = [str(relationship["id"]) for relationship in doc_store.get_pending_relationships()]
        relationships = [(name, doc_store.get_relationship_info(name)) for name in pending]
        return _texts(tables), _texts(relationships)

    def unpaid(self, texts: Sequence[str]) -> list[str]:
        """Return the distinct *texts* that have no stored vector yet."""
        hashes = {content_hash(text): text for text in texts}
        known = self.indexer.vector_store.known(hashes)
        return [text for found, text in hashes.items() if found not in known]

    def _note(self, doc_store: DocumentationStore, kind: Kind, results: dict[str, bool]) -> _Note:
        return _Note(doc_store, kind, results, self.on_items)


class _Note:
    """Notes the outcome of one item after another in the store and in *results*."""

    def __init__(
        self, doc_store: DocumentationStore, kind: Kind, results: dict[str, bool], on_items: OnItems | None
    ) -> None:
        self._doc_store, self._kind, self._results, self._on_items = doc_store, kind, results, on_items
        self.texts: dict[str, str] = {}

    def __call__(self, ended: Sequence[tuple[str, str | None]]) -> None:
        indexed = [(name, content_hash(self.texts[name])) for name, problem in ended if problem is None]
        self._doc_store.mark_indexed_many(self._kind, indexed)
        for name, problem in ended:
            if problem is not None:
                logger.warning("%s %s is not indexed: %s", self._kind, name, problem)
                self._doc_store.mark_failed(self._kind, name, problem)
            self._results[name] = problem is None
        if self._on_items is not None:
            self._on_items(self._kind, ended)


def _common(info: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "business_purpose": info.get("business_purpose", ""),
        "documentation": str(info.get("documentation") or ""),
        "metadata": info.get("metadata") or {},
    }


def _texts(named: Sequence[tuple[str, Mapping[str, Any] | None]]) -> list[str]:
    return [_common(info)["documentation"] or name for name, info in named if info is not None]

"""Past conversations and their classifications as items of the index.

Only conversations with a stored result are indexed. Their text is that of the customer's turns: people search for a problem,
and the turns of agents (greetings, apologies, requests for a number) are similar in all conversations.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncGenerator, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from aggregator import aggregate_conversation
from config import Settings, load_taxonomy
from config.taxonomy import TRIAD
from database_docs.documentation_store import DocumentationStore
from database_docs.items import CONVERSATION_FACTS, Ended, IndexItem, Kind, MetadataValue, OnEnded
from domain.conversation import stored_labels
from embedding_index.batch_indexing import remove, update_metadata
from embedding_index.providers.contract import Provider
from embedding_index.vector_store import SQLVectorStore
from error_handler import ConfigurationError, SkippedDocumentError
from mongo_client import DocumentStore
from storage.extended_json import canonical, id_key
from storage.mongo_errors import translated

PAGE_DOCUMENTS = 200
WINDOW = 2000  # texts that are embedded together
WINDOW_CHARACTERS = 20_000_000  # of the texts of one window, which are held in memory


@dataclass(frozen=True, slots=True)
class Options:
    """Options of a pass. *settings* name the collections; *limit* is the most conversations to embed, None for all.

    *allow_external*: texts may be sent to a provider outside your network. *on_read* is called after each page, in the
    running loop, with the documents that were read and those expected.
    """

    settings: Settings
    limit: int | None = None
    allow_external: bool = False
    on_read: Callable[[int, int], None] | None = None


@dataclass(slots=True)
class ConversationCounts:
    """The counts of one pass. *expected* estimates the documents to read; *is_complete* means that all were read.

    Of an estimate: a run would send *unpaid* texts with *tokens*, for *pending* conversations.
    """

    expected: int = 0
    read: int = 0
    unclassified: int = 0
    without_text: int = 0
    pending: int = 0
    indexed: int = 0
    failed: int = 0
    changed: int = 0
    removed: int = 0
    unpaid: int = 0
    tokens: int = 0
    is_complete: bool = False


def require_allowed(provider: Provider, *, allowed: bool) -> None:
    """Raise ConfigurationError if customer text would leave your network without permission."""
    if provider.is_external and not allowed:
        raise ConfigurationError(
            "customer text would be sent to an embedding provider outside your network; allow it with "
            "--allow-external or ALLOW_EXTERNAL_LLM=true, or set EMBEDDING_PROVIDER to ollama or local."
        )


def conversation_item(document: Mapping[str, Any], result: Mapping[str, Any]) -> IndexItem:
    """Return the item of *document* with the labels of *result*.

    The metadata have no customer text except the one-line summary by the model, which is also in the results.

    Raises:
        SkippedDocumentError: The customer said nothing.
    """
    conversation = aggregate_conversation(document)
    source_id = canonical(document["_id"])
    metadata: dict[str, MetadataValue] = {"source_id": source_id}
    if conversation.conversation_number is not None:
        metadata["conversation_number"] = conversation.conversation_number
    labels = {field: value for field, value in result["classification"].items() if _is_label(value)}
    metadata |= {field: value for field, value in labels.items() if field not in CONVERSATION_FACTS}
    provenance = result.get("processing_metadata")
    provenance = provenance if isinstance(provenance, Mapping) else {}
    if isinstance(at := provenance.get("processed_at"), datetime):
        metadata["classified_at"] = (at if at.tzinfo else at.replace(tzinfo=UTC)).isoformat()
    if isinstance(model := provenance.get("model_used"), str):
        metadata["classified_by"] = model
    return IndexItem(Kind.CONVERSATION, source_id, "\n".join(conversation.customer_texts), metadata)


def _is_label(value: Any) -> bool:
    """Return whether *value* is a label, or the labels of a multi-valued field."""
    return isinstance(value, str) or (isinstance(value, list) and all(isinstance(one, str) for one in value))


async def conversation_pages(
    store: DocumentStore, options: Options, counts: ConversationCounts, stop: threading.Event
) -> AsyncGenerator[list[IndexItem], None]:
    """Yield the items of all classified conversations, page by page until *stop*, and count them in *counts*.

    Conversations that arrive meanwhile may be missed; the next pass reads them.

    Raises:
        ConfigurationError: One of the collections does not exist, or the taxonomy cannot be read.
        StoreError: MongoDB cannot be read.
    """
    await _require_collections(store, options.settings)
    taxonomy = load_taxonomy(options.settings.taxonomy_file)
    # Not the other fields: results from before such a field was added stay in the index. Not the categorization: the short
    # reply styles have none.
    needed = [key for key in TRIAD.values() if key in taxonomy.keys]
    counts.expected = await store.count("all")
    bound = await store.upper_bound()
    after: list[Any] = []
    while bound and not stop.is_set():
        page = await store.read_page("all", after, bound, PAGE_DOCUMENTS)
        if not page:
            break
        labelled = await store.result_labels([document["_id"] for document in page])
        yield _items(page, labelled, counts, needed)
        if options.on_read is not None:
            options.on_read(counts.read, counts.expected)
        after = [page[-1]["_id"]]
    counts.is_complete = not stop.is_set()


def _items(
    page: Sequence[Mapping[str, Any]],
    labelled: Mapping[bytes, Mapping[str, Any]],
    counts: ConversationCounts,
    needed: Sequence[str],
) -> list[IndexItem]:
    items = []
    for document in page:
        counts.read += 1
        result = labelled.get(id_key(document["_id"]), {})
        labels = result.get("classification")
        if not isinstance(labels, Mapping) or not stored_labels(labels):
            counts.unclassified += 1
            continue
        if not all(isinstance(labels.get(key), str) for key in needed):
            counts.unclassified += 1
            continue
        try:
            items.append(conversation_item(document, result))
        except SkippedDocumentError:
            counts.without_text += 1
    return items


async def _require_collections(store: DocumentStore, settings: Settings) -> None:
    """Refuse a missing collection: a wrong name must not look like deleted conversations."""
    with translated("look for the conversations"):
        # Without authorizedCollections, this would need a right that a run does not.
        found = await store.database.list_collection_names(authorizedCollections=True)
    for name, variable in (
        (settings.source_collection, "MONGODB_SOURCE_COLLECTION"),
        (settings.results_collection, "MONGODB_RESULTS_COLLECTION"),
    ):
        if name not in found:
            raise ConfigurationError(
                f"the database {settings.db_name} has no collection {name}; check MONGODB_DB and {variable}, "
                "and classify conversations with cli.py first."
            )


async def index_conversations(
    store: DocumentStore,
    doc_store: DocumentationStore,
    vectors: SQLVectorStore,
    options: Options,
    on_ended: OnEnded | None = None,
) -> ConversationCounts:
    """Index the conversations of *store*, and delete from the index those that MongoDB no longer has.

    Unchanged texts are not embedded again; changed labels are replaced. Items are deleted only after a pass that was
    neither limited nor stopped (``vectors.stop``). *on_ended* gets the items, each with None or the problem, in the thread
    that indexes.

    Raises:
        ConfigurationError: The texts may not leave your network, or a collection does not exist.
        StoreError: MongoDB cannot be read. What is indexed stays indexed; the same command resumes.
        IndexingError: The provider or the index fails; the same command resumes.
    """
    require_allowed(vectors.provider, allowed=options.allow_external)
    run = _Pass(doc_store, vectors, options, on_ended)
    await asyncio.to_thread(doc_store.begin_pass, Kind.CONVERSATION)
    async with contextlib.aclosing(conversation_pages(store, options, run.counts, vectors.stop)) as pages:
        async for items in pages:
            await asyncio.to_thread(run.take, items)
            if run.counts.pending == options.limit:
                break
    await asyncio.to_thread(run.finish)
    return run.counts


async def estimate_conversations(
    store: DocumentStore,
    doc_store: DocumentationStore,
    vectors: SQLVectorStore,
    options: Options,
    lost: Collection[str] = (),
) -> ConversationCounts:
    """Read all conversations and count what ``index_conversations`` would send; send nothing.

    Items with the ids *lost* are counted as pending; see ``Mending``.

    Raises:
        ConfigurationError, StoreError: See ``index_conversations``.
    """
    counts, unpaid = ConversationCounts(), set[str]()
    async with contextlib.aclosing(conversation_pages(store, options, counts, vectors.stop)) as pages:
        async for items in pages:
            offered = await asyncio.to_thread(doc_store.offer, items, keep_text=False)
            wanted = {item.id for item in offered.pending}.union(lost)
            pending = _within_limit([item for item in items if item.id in wanted], options, counts)
            texts = {item.content_hash: item.text for item in pending if item.content_hash not in unpaid}
            counts.tokens += await asyncio.to_thread(_unpaid_tokens, vectors, texts)
            unpaid |= texts.keys()
            counts.unpaid = len(unpaid)
            if counts.pending == options.limit:
                break
    return counts


def _within_limit(pending: list[IndexItem], options: Options, counts: ConversationCounts) -> list[IndexItem]:
    """Return those of *pending* that the limit allows, and count them."""
    allowed = pending if options.limit is None else pending[: options.limit - counts.pending]
    counts.pending += len(allowed)
    return allowed


def _unpaid_tokens(vectors: SQLVectorStore, texts: dict[str, str]) -> int:
    """Remove the texts that have a vector from *texts*; return the tokens of the others."""
    for known in vectors.known(texts.keys()):
        texts.pop(known, None)
    return sum(vectors.provider.count_tokens(text) for text in texts.values())


@dataclass
class _Pass:
    """One pass over all conversations; *window* holds the items that wait to be embedded."""

    doc_store: DocumentationStore
    vectors: SQLVectorStore
    options: Options
    on_ended: OnEnded | None
    counts: ConversationCounts = field(default_factory=ConversationCounts)
    window: list[IndexItem] = field(default_factory=list)

    def take(self, items: list[IndexItem]) -> None:
        """Offer one page to the state store, and embed the window if it is full."""
        offered = self.doc_store.offer(items, keep_text=False)
        update_metadata(self.vectors, self.doc_store, offered.changed)
        self.counts.changed += len(offered.changed)
        self.window += _within_limit(offered.pending, self.options, self.counts)
        is_heavy = sum(len(item.text) for item in self.window) >= WINDOW_CHARACTERS
        self._embed(at_least=1 if is_heavy else WINDOW)

    def finish(self) -> None:
        """Embed what waits; after a complete pass, delete what is gone."""
        self._embed(at_least=1)
        if self.counts.is_complete:
            names = self.doc_store.end_pass(Kind.CONVERSATION)
            remove(self.vectors, self.doc_store, Kind.CONVERSATION, names)
            self.counts.removed = len(names)

    def _embed(self, *, at_least: int) -> None:
        while len(self.window) >= at_least and not self.vectors.stop.is_set():
            part, self.window = self.window[:WINDOW], self.window[WINDOW:]
            self.vectors.index(part, self._record)

    def _record(self, ended: Ended) -> None:
        """Mark how items ended. A crash before this costs nothing, because the vectors are stored."""
        self.doc_store.mark_ended(ended)
        failed = sum(problem is not None for _, problem in ended)
        self.counts.failed += failed
        self.counts.indexed += len(ended) - failed
        if self.on_ended is not None:
            self.on_ended(ended)

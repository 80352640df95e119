"""After a crash, damage or another model: what can be found and what is marked as indexed agree again. Costs nothing."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator

from embedding_index.documentation_store import DocumentationStore
from embedding_index.item_states import State, StoredItem
from embedding_index.items import Kind
from embedding_index.vector_store import SQLVectorStore

logger = logging.getLogger(__name__)

PAGE = 1000


def mend(vectors: SQLVectorStore, states: DocumentationStore, on_progress: Callable[[int], None] | None = None) -> None:
    """Make ChromaDB's files anew from the stored vectors where they are not usable or lack what is marked as indexed.

    Items whose vector is not stored, under the model in use, are pending again. *on_progress* is told how many are done.

    Raises:
        VectorStoreError: ChromaDB cannot write its files.
    """
    reason = vectors.needs_remake or _missing(vectors, states)
    if reason is None:
        return
    logger.warning("the index is made anew from the stored vectors: %s", reason)
    _forget_unpaid(vectors, states)
    vectors.remake(((item, item.content_hash) for item in _indexed(states)), on_progress)


def _indexed(states: DocumentationStore) -> Iterator[StoredItem]:
    for kind in Kind:
        yield from states.items(kind, State.INDEXED)


def _missing(vectors: SQLVectorStore, states: DocumentationStore) -> str | None:
    expected = sum(counts[State.INDEXED] for counts in states.counts().values())
    if vectors.count() == expected:
        return None
    found = vectors.ids()
    missing = sum(item.id not in found for item in _indexed(states))
    return f"it lacks {missing} of {expected} items" if missing else None


def _forget_unpaid(vectors: SQLVectorStore, states: DocumentationStore) -> None:
    for kind in Kind:
        items = states.items(kind, State.INDEXED)
        unpaid: list[str] = []
        while page := list(itertools.islice(items, PAGE)):
            known = vectors.known({item.content_hash for item in page})
            unpaid += (item.name for item in page if item.content_hash not in known)
        states.mark_pending(kind, unpaid)

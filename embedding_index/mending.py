"""After a crash, damage or another model: what can be found and what is marked as indexed agree again. Costs nothing."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

from embedding_index.documentation_store import DocumentationStore
from embedding_index.item_states import Offered, State, StoredItem
from embedding_index.items import IndexItem, Kind
from embedding_index.vector_store import SQLVectorStore
from error_handler import RunInterruptedError

logger = logging.getLogger(__name__)

PAGE = 1000


class Mending:
    """What is to be mended in *vectors*, so that all that *states* calls indexed can be found. Looking changes nothing.

    Attributes:
        reason: Why ChromaDB's files must be made anew; None where they need not.
        lost: Names by kind of the indexed items that have no stored vector of the model in use: to be embedded again.
    """

    def __init__(self, vectors: SQLVectorStore, states: DocumentationStore) -> None:
        self._vectors, self._states = vectors, states
        self.reason = vectors.needs_remake or self._missing()
        self.lost: dict[Kind, list[str]] = {kind: [] for kind in Kind}
        if self.reason is not None:
            for kind in Kind:
                self.lost[kind] = list(self._unpaid(kind))

    @property
    def is_free(self) -> bool:
        """Whether no item has to be embedded again."""
        return not any(self.lost.values())

    def mend(self, on_progress: Callable[[int], None] | None = None) -> None:
        """Make ChromaDB's files anew from the stored vectors, where there is a reason. Items that are lost are pending then.

        *on_progress* is told how many are done.

        Raises:
            VectorStoreError: ChromaDB cannot write its files.
            RunInterruptedError: The store was told to stop; the files are as they were.
        """
        if self.reason is None:
            return
        logger.warning("the index is made anew from the stored vectors: %s", self.reason)
        for kind, names in self.lost.items():
            self._states.mark_pending(kind, names)
        self._vectors.remake(((item, item.content_hash) for item in self._until_stopped()), on_progress)
        self.reason, self.lost = None, {kind: [] for kind in Kind}

    def _until_stopped(self) -> Iterator[StoredItem]:
        for item in _indexed(self._states):
            if self._vectors.stop.is_set():
                raise RunInterruptedError("Stopped; the same command goes on where this one ended.")
            yield item

    def _missing(self) -> str | None:
        expected = sum(counts[State.INDEXED] for counts in self._states.counts().values())
        if self._vectors.count() == expected:
            return None
        found = self._vectors.ids()
        missing = sum(item.id not in found for item in _indexed(self._states))
        return f"it lacks {missing} of {expected} items" if missing else None

    def _unpaid(self, kind: Kind) -> Iterator[str]:
        items = self._states.items(kind, State.INDEXED)
        while page := list(itertools.islice(items, PAGE)):
            known = self._vectors.known({item.content_hash for item in page})
            yield from (item.name for item in page if item.content_hash not in known)


class StatesAfterMending:
    """What *states* will say is pending once the names *lost* are: its price can be asked for before ``Mending.mend``."""

    def __init__(self, states: DocumentationStore, lost: Mapping[Kind, Collection[str]]) -> None:
        self._states, self._lost = states, lost

    def get_pending_tables(self) -> list[str]:
        """See ``DocumentationStore``."""
        return _merged(self._states.get_pending_tables(), self._lost[Kind.TABLE])

    def get_pending_relationships(self) -> list[dict[str, str]]:
        """See ``DocumentationStore``; those that are lost have their id only."""
        pending = self._states.get_pending_relationships()
        known = {relationship["id"] for relationship in pending}
        return pending + [{"id": name} for name in self._lost[Kind.RELATIONSHIP] if name not in known]

    def get_table_info(self, name: str) -> dict[str, Any] | None:
        """See ``DocumentationStore``."""
        return self._states.get_table_info(name)

    def get_relationship_info(self, relationship_id: str) -> dict[str, Any] | None:
        """See ``DocumentationStore``."""
        return self._states.get_relationship_info(relationship_id)

    def offer(self, items: Sequence[IndexItem], keep_text: bool = True) -> Offered:
        """See ``DocumentationStore``."""
        offered = self._states.offer(items, keep_text)
        pending = {item.id for item in offered.pending}
        lost = {kind: set(names) for kind, names in self._lost.items()}
        return Offered([item for item in items if item.id in pending or item.name in lost[item.kind]], offered.changed)


def sweep(vectors: SQLVectorStore, states: DocumentationStore, kinds: Collection[Kind]) -> bool:
    """After all sources of *kinds* were read: take out of the index what *states* does not know, as after its loss.

    Returns whether all that can be found now is known there.
    """
    if vectors.count() == sum(counts[State.INDEXED] for counts in states.counts().values()):
        return True
    known = {item.id for kind in Kind for item in states.items(kind)}
    strangers = vectors.ids() - known
    for kind in kinds:
        prefix = f"{kind}:"
        vectors.delete(kind, [found.removeprefix(prefix) for found in strangers if found.startswith(prefix)])
    return not vectors.ids() - known


def _indexed(states: DocumentationStore) -> Iterator[StoredItem]:
    for kind in Kind:
        yield from states.items(kind, State.INDEXED)


def _merged(first: Iterable[str], second: Iterable[str]) -> list[str]:
    return sorted({*first, *second})

"""Keeps what can be found and what is marked as indexed in agreement: after a change, a crash, a loss, for another model.

Nothing here makes a call, so nothing here costs money.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from database_docs.documentation_store import DocumentationStore
from database_docs.items import IndexItem, Kind, Offered, State, StoredItem
from embedding_index.vector_store import SQLVectorStore

logger = logging.getLogger(__name__)


class Mending:
    """Finds the repairs after which every item that *states* marks as indexed can be found. Finding changes nothing.

    Attributes:
        lost: Names by kind of the indexed items without a stored vector of the model in use: to be embedded again.
    """

    def __init__(self, vectors: SQLVectorStore, states: DocumentationStore, *, rebuild: bool) -> None:
        """With *rebuild*, all entries are replaced, not only those that are missing."""
        self._vectors, self._states, self._rebuild = vectors, states, rebuild
        indexed = states.hashes(State.INDEXED)
        found = {} if rebuild else vectors.entries.hashes()
        self._missing = {id_ for id_, content_hash in indexed.items() if found.get(id_) != content_hash}
        known = vectors.known({indexed[id_] for id_ in self._missing})
        self.lost: dict[Kind, list[str]] = {kind: [] for kind in Kind}
        for id_ in sorted(id_ for id_ in self._missing if indexed[id_] not in known):
            kind, _, name = id_.partition(":")
            self.lost[Kind(kind)].append(name)

    @property
    def is_free(self) -> bool:
        """True if no item must be embedded again."""
        return not any(self.lost.values())

    def pending(self, removed: Mapping[Kind, Collection[str]]) -> StatesAfterMending:
        """Return what will be pending after ``mend``, except the names *removed* from their source."""
        lost = {kind: set(names).difference(removed.get(kind, ())) for kind, names in self.lost.items()}
        return StatesAfterMending(self._states, lost)

    def mend(self) -> None:
        """Make the entries from the stored vectors; lost items are pending then. A second time does nothing."""
        if not self._missing and not self._rebuild:
            return
        for kind, names in self.lost.items():
            self._states.mark_pending(kind, names)
        if self._rebuild:
            logger.warning("the search entries are rebuilt from the stored vectors")
            self._vectors.rebuild(_indexed(self._states))
        else:
            logger.warning("%d items could not be found; they are added from the stored vectors", len(self._missing))
            self._vectors.add_stored(item for item in _indexed(self._states) if item.id in self._missing)
        self._missing, self._rebuild, self.lost = set(), False, {kind: [] for kind in Kind}


class StatesAfterMending:
    """A view of *states* in which the *lost* names are pending too, so that their price is known before ``Mending.mend``."""

    def __init__(self, states: DocumentationStore, lost: Mapping[Kind, Collection[str]]) -> None:
        self._states, self._lost = states, lost

    def get_pending_tables(self) -> list[str]:
        """See ``DocumentationStore``."""
        return sorted({*self._states.get_pending_tables(), *self._lost[Kind.TABLE]})

    def get_pending_relationships(self) -> list[dict[str, str]]:
        """See ``DocumentationStore``; lost ones have their id only."""
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


def _indexed(states: DocumentationStore) -> Iterator[StoredItem]:
    for kind in Kind:
        yield from states.items(kind, State.INDEXED)

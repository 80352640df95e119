"""Keeps the search entries and the states of the items in agreement: after a change, a crash, a loss, for another model.

Nothing here makes a call, so nothing here costs money.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence

from database_docs.documentation_store import DocumentationStore
from database_docs.items import IndexItem, Kind, State
from embedding_index.vector_store import SQLVectorStore

logger = logging.getLogger(__name__)


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

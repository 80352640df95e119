"""Where the file of the stored vectors was lost: they are taken from ChromaDB's files, which have them as well."""

from __future__ import annotations

import itertools
import logging

from embedding_index.documentation_store import DocumentationStore
from embedding_index.item_states import State
from embedding_index.items import Kind
from embedding_index.vector_store import SQLVectorStore

logger = logging.getLogger(__name__)

PAGE = 1000


def recover_vectors(vectors: SQLVectorStore, states: DocumentationStore) -> None:
    """Store again what is indexed and has no stored vector; nothing where ChromaDB's files cannot be trusted.

    Pieces of long texts are not there any more; they are needed only when such a text changes.

    Raises:
        VectorStoreError: ChromaDB cannot read its files.
        StateDirectoryError: The stored vectors cannot be written.
    """
    if vectors.needs_remake is not None:
        return
    recovered = 0
    for kind in Kind:
        items = states.items(kind, State.INDEXED)
        while page := list(itertools.islice(items, PAGE)):
            known = vectors.known({item.content_hash for item in page})
            if lost := {item.id: item.content_hash for item in page if item.content_hash not in known}:
                vectors.refill(lost)
                recovered += len(lost)
    if recovered:
        logger.warning("%d stored vectors were missing; they are taken from ChromaDB's files", recovered)

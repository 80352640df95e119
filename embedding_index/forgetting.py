"""What is gone from MongoDB, or says something else since, leaves the files of the index as well."""

from __future__ import annotations

from embedding_index.documentation_store import DocumentationStore
from embedding_index.item_states import State
from embedding_index.items import Kind
from embedding_index.vector_store import SQLVectorStore


def forget_others(vectors: SQLVectorStore, states: DocumentationStore) -> None:
    """Delete the vectors of all texts that no item of *states* has, from all files; call it when all items are there.

    ChromaDB marks what is deleted or replaced, and its files keep it: they are made anew where there is such. A crash
    before the end is found by the next call.

    Raises:
        VectorStoreError: ChromaDB cannot write its files.
        StateDirectoryError: The stored vectors cannot be written.
    """
    vectors.forget_others(states.content_hashes())
    _delete_failed(vectors, states)
    if vectors.has_remains:
        vectors.remake((item, item.content_hash) for kind in Kind for item in states.items(kind, State.INDEXED))


def _delete_failed(vectors: SQLVectorStore, states: DocumentationStore) -> None:
    """An item whose new text could not be embedded is still found by its old one."""
    for kind, counts in states.counts().items():
        if counts[State.FAILED]:
            found = vectors.ids()
            vectors.delete(kind, [item.name for item in states.items(kind, State.FAILED) if item.id in found])

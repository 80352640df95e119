"""The embedding index: finds tables, relationships and past conversations by meaning.

``commands.index`` imports ``actions``, ``service.similar`` imports ``vector_search``, scripts import the names in
``__all__``. It may import every lower layer. Names are loaded when they are used: they need requirements-index.txt.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from database_docs.documentation_store import DocumentationStore
    from embedding_index.batch_indexing import BatchIndexingManager, SQLIndexerAgent
    from embedding_index.vector_store import SQLVectorStore

_HOMES = {
    "BatchIndexingManager": "embedding_index.batch_indexing",
    "DocumentationStore": "database_docs.documentation_store",
    "SQLIndexerAgent": "embedding_index.batch_indexing",
    "SQLVectorStore": "embedding_index.vector_store",
}

__all__ = ["BatchIndexingManager", "DocumentationStore", "SQLIndexerAgent", "SQLVectorStore"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"embedding_index has no {name}")

"""Searches the index while another process may write it."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from config.index_settings import IndexSettings
from database_docs.items import Kind
from embedding_index.providers.opening import open_provider
from embedding_index.search_entries import Hit, SearchEntries, mixed_message
from embedding_index.vector_ledger import VectorLedger
from embedding_index.vector_search import VectorSearch, query_vector
from error_handler import MixedIndexError, StateDirectoryError, VectorStoreError

LEDGER_FILE = "vectors.sqlite3"


class IndexReader:
    """Searches the index as it is at the time of each search. Use as ``with``, or close it.

    Raises:
        ConfigurationError: The provider cannot be opened: a package or a key is missing.
    """

    def __init__(self, settings: IndexSettings) -> None:
        self.provider = open_provider(settings)
        self._path = settings.index_dir / LEDGER_FILE
        self._search = VectorSearch(settings.index_dir)

    def __enter__(self) -> IndexReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def search(self, text: str, kinds: Collection[Kind] | None = None, limit: int = 5) -> list[Hit]:
        """Return the *limit* items of *kinds* (None: all) that are most similar to *text*, the best first.

        Raises:
            VectorStoreError: There is no index, or its file is damaged or cannot be read.
            MixedIndexError: It has vectors of another model.
            ConfigurationError, IndexingError: See ``query_vector``.
        """
        if not is_index(self._path.parent):
            raise VectorStoreError(f"there is no index in {self._path.parent}; `python cli.py index --batch` makes it.")
        try:
            # Opened for each search, because the file may have been replaced.
            with VectorLedger(self._path, create=False) as ledger:
                recorded = SearchEntries(ledger).identity()
                if recorded is not None and not recorded.is_same_model(self.provider.identity):
                    raise MixedIndexError(mixed_message(recorded, self.provider.identity))
                return self._search.search(ledger, query_vector(self.provider, text), kinds, limit)
        except StateDirectoryError as exc:
            raise VectorStoreError(str(exc)) from exc

    def close(self) -> None:
        """Release files and memory, and close the provider."""
        self._search.close()
        self.provider.close()


def is_index(folder: Path) -> bool:
    """Return whether something was ever indexed into *folder*."""
    return (folder / LEDGER_FILE).is_file()

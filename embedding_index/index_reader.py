"""The index for searching: a copy of its newest finished state, and the provider that made it."""

from __future__ import annotations

from collections.abc import Collection
from types import TracebackType

from config.index_settings import IndexSettings
from embedding_index.index_copy import IndexCopy
from embedding_index.items import Hit, Kind
from embedding_index.providers.opening import open_provider
from embedding_index.query import query_vector


class IndexReader:
    """Searches beside a writer; use as ``with``, or close it. Nothing is read before the first search.

    Raises:
        ConfigurationError: The provider cannot be opened: a package or a key is missing.
    """

    def __init__(self, settings: IndexSettings) -> None:
        self.provider = open_provider(settings)
        self._copy = IndexCopy(settings.index_dir, identity=self.provider.identity)

    def __enter__(self) -> IndexReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def search(self, text: str, kinds: Collection[Kind] | None = None, limit: int = 5) -> list[Hit]:
        """Return at most *limit* items most like *text*, the best first; *kinds* None: all. Sees what was indexed last.

        Raises:
            VectorStoreError: There is no index, or it is damaged.
            MixedIndexError: Another model made it.
            ConfigurationError: *text* is empty.
            ProviderUnavailableError: The provider gives no vector for *text*.
        """
        self._copy.refresh()
        return self._copy.search(query_vector(self.provider, text), kinds, limit)

    def close(self) -> None:
        """Remove the copy and close the provider."""
        self._copy.close()
        self.provider.close()

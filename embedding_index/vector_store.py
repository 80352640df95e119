"""The vector store: the provider that computes vectors, the ledger that stores them, and the search."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path

from config.index_settings import IndexSettings, load_index_settings
from database_docs.items import IndexItem, Kind, OnEnded
from embedding_index.call_queue import RunOptions
from embedding_index.embedding_run import EmbeddingRun, RunCounts
from embedding_index.providers import open_provider
from embedding_index.providers.contract import ModelIdentity, Provider
from embedding_index.search_entries import Hit, SearchEntries, mixed_message
from embedding_index.search_graph import publish_graph
from embedding_index.vector_ledger import LEDGER_FILE, VectorLedger, restore_ledger, write_copy
from embedding_index.vector_search import VectorSearch, query_vector
from error_handler import MixedIndexError, StateDirectoryError
from storage.files import DirectoryLock

WRITE_AT = 100  # entries in one durable step


class SQLVectorStore:
    """Vectors of database documentation and conversations; only one process at a time may open a directory.

    Use as ``with``, or call ``close``. Without *settings*, they are read from the environment. Without *provider*, the one
    in the settings is opened, and closed with the store.

    Raises:
        DirectoryLockedError: Another process holds the index.
        MixedIndexError: It holds vectors of another model.
        ConfigurationError: A setting is wrong, or a package is missing.
    """

    def __init__(
        self,
        settings: IndexSettings | None = None,
        *,
        provider: Provider | None = None,
        rebuild: bool = False,
        stop: threading.Event | None = None,
    ) -> None:
        """Open or make the index. With *rebuild*, one of another model may be opened, to be replaced by ``Mending``."""
        self.settings = settings or load_index_settings()
        self.batch_size = self.settings.batch_size
        self.max_retries = self.settings.max_retries
        self.stop = stop or threading.Event()  # once set, no new call starts and the calls in flight are stored
        self.counts = RunCounts()  # of all calls through this store
        self.directory = self.settings.index_dir
        _make_private(self.directory)
        with contextlib.ExitStack() as stack:
            lock = DirectoryLock(self.directory)
            lock.acquire("wait for it to end, or set INDEX_DIR to another directory.")
            stack.callback(lock.release)
            self.provider = provider or open_provider(self.settings)
            if provider is None:
                stack.callback(self.provider.close)
            path = self.directory / LEDGER_FILE
            restore_ledger(path)
            self.ledger = stack.enter_context(VectorLedger(path))
            self.entries = SearchEntries(self.ledger)
            self._search = VectorSearch(self.directory)
            stack.callback(self._search.close)
            recorded = self.entries.identity()
            self.is_other_model = recorded is not None and not recorded.is_same_model(self.identity)
            if self.is_other_model and not rebuild:
                raise MixedIndexError(mixed_message(recorded, self.identity))
            stack.callback(self._publish)
            self._stack = stack.pop_all()

    def __enter__(self) -> SQLVectorStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Finish the files and release the lock."""
        self._stack.close()

    @property
    def identity(self) -> ModelIdentity:
        """The provider's model, with the length of its vectors if it is known."""
        asked = self.provider.identity
        return replace(asked, dimensions=self.ledger.dimensions(asked))

    def count(self) -> int:
        """Return the number of items that can be found."""
        return sum(self.entries.counts().values())

    def ids(self) -> set[str]:
        """Return the ids of the items that can be found."""
        return set(self.entries.hashes())

    def known(self, hashes: Collection[str]) -> set[str]:
        """Return those of *hashes* whose vector is stored."""
        return self.ledger.known(self.identity, hashes)

    def index(self, items: Sequence[IndexItem], on_ended: OnEnded) -> None:
        """Embed *items* and add them to the search entries.

        *on_ended* gets some at a time, each with None or its problem, once that is durable. Items of equal text are
        embedded once. After ``stop`` is set, some get no result.

        Raises:
            IndexingError: See ``EmbeddingRun.run``; all answers are stored.
        """
        by_hash: dict[str, list[IndexItem]] = {}
        for item in items:
            by_hash.setdefault(item.content_hash, []).append(item)
        options = RunOptions(self.batch_size, self.max_retries)
        run = EmbeddingRun(self.provider, self.ledger, options, self.stop, self.counts)
        waiting: list[IndexItem] = []
        texts = {found: same[0].text for found, same in by_hash.items()}
        try:
            with contextlib.closing(run.run(texts)) as ended:  # after an error, its threads end first
                for embedded in ended:
                    same = by_hash[embedded.content_hash]
                    if embedded.problem is None:
                        waiting += same
                    else:
                        on_ended([(item, embedded.problem) for item in same])
                    if len(waiting) >= WRITE_AT:
                        self._write(waiting, on_ended)
        finally:
            self._write(waiting, on_ended)

    def _write(self, waiting: list[IndexItem], on_ended: OnEnded) -> None:
        part, waiting[:] = waiting.copy(), []  # after an error here, ``index`` does not write them again
        if part:
            self.entries.put(self.identity, part)
            on_ended([(item, None) for item in part])

    def update_metadata(self, items: Sequence[IndexItem]) -> None:
        """Replace the metadata of *items*, which are in the index with the same text."""
        self.entries.update_metadata(items)

    def delete(self, kind: Kind, names: Collection[str]) -> None:
        """Delete items from the search entries; unknown names are ignored."""
        if names:
            self.entries.delete(kind, names)

    def search(self, text: str, kinds: Collection[Kind] | None = None, limit: int = 5) -> list[Hit]:
        """Return the *limit* items of *kinds* (None: all) that are most similar to *text*, the best first.

        Raises:
            IndexingError: The provider gives no vector for *text*.
        """
        return self._search.search(self.ledger, query_vector(self.provider, text), kinds, limit)

    def _publish(self) -> None:
        """Write the graph of a large index and the copy of the ledger; nothing deleted stays in a file."""
        publish_graph(self.entries, self.directory)
        write_copy(self.ledger)


def _make_private(directory: Path) -> None:
    try:
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as exc:
        raise StateDirectoryError(
            f"{directory} cannot be created ({exc.strerror}); fix its permissions, or set INDEX_DIR to another directory."
        ) from exc

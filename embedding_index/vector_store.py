"""The vectors of the index: what makes them, where they are kept for good, and where they are searched, as one."""

from __future__ import annotations

import contextlib
import itertools
import logging
import threading
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from types import TracebackType
from typing import Protocol

import numpy as np

from config.index_settings import IndexSettings, load_index_settings
from embedding_index.chroma_index import ChromaIndex, Entry
from embedding_index.embedding_run import EmbeddingRun, RunCounts, RunOptions
from embedding_index.items import Hit, IndexItem, Kind, MetadataValue, ModelIdentity
from embedding_index.providers.contract import Provider, Vectors
from embedding_index.providers.opening import open_provider
from embedding_index.query import query_vector
from embedding_index.vector_ledger import VectorLedger
from error_handler import StateDirectoryError
from storage.files import DirectoryLock

logger = logging.getLogger(__name__)

LEDGER_FILE = "vectors.sqlite3"
WRITE_AT = 1000  # entries written to ChromaDB at once: it is slow with small writes

# What is done with items that ended: each with None, or with why it is not in the index.
Ended = Sequence[tuple[IndexItem, str | None]]
OnEnded = Callable[[Ended], None]


class Indexed(Protocol):
    """An item that is offered, or as the documentation store knows it."""

    @property
    def kind(self) -> Kind: ...
    @property
    def id(self) -> str: ...
    @property
    def metadata(self) -> Mapping[str, MetadataValue]: ...
    @property
    def text(self) -> str | None: ...


class SQLVectorStore:
    """Vectors of database documentation and of conversations; one process at a time may hold one per directory.

    Use as ``with``, or call ``close``. *settings* None reads them from the environment; *provider* None opens the one
    that they name, and is closed with the store.

    Raises:
        DirectoryLockedError: Another process holds the index.
        MixedIndexError: It holds vectors of another model.
        ConfigurationError: A setting is wrong, or a package is missing.
    """

    def __init__(
        self, settings: IndexSettings | None = None, *, provider: Provider | None = None, rebuild: bool = False
    ) -> None:
        self.settings = settings or load_index_settings()
        self.batch_size = self.settings.batch_size
        self.max_retries = self.settings.max_retries
        self.stop = threading.Event()  # once set, no new call starts and what is in flight is stored
        self.counts = RunCounts()  # of all calls through this store
        self.on_embedded: Callable[[int], None] | None = (
            None  # told how many items of one ``index`` are embedded so far
        )
        self.directory = self.settings.index_dir
        _make_private(self.directory)
        with contextlib.ExitStack() as stack:
            lock = DirectoryLock(self.directory)
            lock.acquire("wait for it to end, or set INDEX_DIR to another directory.")
            stack.callback(lock.release)
            self.provider = provider or open_provider(self.settings)
            if provider is None:
                stack.callback(self.provider.close)
            self.ledger = stack.enter_context(VectorLedger(self.directory / LEDGER_FILE))
            self._chroma = stack.enter_context(ChromaIndex(self.directory, self.identity, discard=rebuild))
            self._stack = stack.pop_all()

    def __enter__(self) -> SQLVectorStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Finish what is on disk and let other processes in."""
        self._stack.close()

    @property
    def identity(self) -> ModelIdentity:
        """What makes the vectors, with their length where an answer has told it."""
        asked = self.provider.identity
        return replace(asked, dimensions=self.ledger.dimensions(asked))

    @property
    def needs_remake(self) -> str | None:
        """Why ChromaDB's files cannot be used as they are; None where they can."""
        return self._chroma.needs_rebuild

    @property
    def has_remains(self) -> bool:
        """Whether ChromaDB's files still have what was deleted or replaced, until ``remake``."""
        return self._chroma.has_remains

    def count(self) -> int:
        """Return how many items can be found."""
        return self._chroma.count()

    def ids(self) -> set[str]:
        """Return the ids of everything that can be found."""
        return self._chroma.ids()

    def known(self, hashes: Collection[str]) -> set[str]:
        """Return those of *hashes* whose vector is stored: they cost nothing."""
        return self.ledger.known(self.identity, hashes)

    def remake(self, items: Iterable[tuple[Indexed, str]], progress: Callable[[int], None] | None = None) -> None:
        """Make ChromaDB's files anew from *items* with their content hashes; asks no provider.

        An item whose vector is not stored is left out.
        """
        self._chroma.remake(self._entries(items), progress)

    def refill(self, hashes: Mapping[str, str]) -> None:
        """Store the vectors of items (id: content hash) again that were lost but can be found; not where ``needs_remake``."""
        found = self._chroma.vectors(hashes)
        self.ledger.add(self.identity, {hashes[id_]: vector / np.linalg.norm(vector) for id_, vector in found}, calls=0)

    def index(self, items: Sequence[IndexItem], on_ended: OnEnded) -> None:
        """Make *items* findable; *on_ended* gets each one, some at a time, with None or why it failed, when that is durable.

        Items of equal text are embedded once. After ``stop`` is set some get no result.

        Raises:
            ProviderUnavailableError: The provider stayed away too long; everything it answered is stored.
            VectorStoreError: ChromaDB cannot be written.
        """
        by_hash: dict[str, list[IndexItem]] = {}
        for item in items:
            by_hash.setdefault(item.content_hash, []).append(item)
        options = RunOptions(self.batch_size, self.max_retries)
        run = EmbeddingRun(self.provider, self.ledger, options, stop=self.stop)
        waiting: list[tuple[IndexItem, Vectors]] = []
        number = 0
        texts = {found: same[0].text for found, same in by_hash.items()}
        try:
            # Closed by us, so that its threads have ended before the calls are counted, also where a line below raises.
            with contextlib.closing(run.run(texts)) as ended:
                for embedded in ended:
                    same = by_hash[embedded.content_hash]
                    number += len(same)
                    if self.on_embedded is not None:
                        self.on_embedded(number)
                    for item in same:
                        if embedded.vector is None:
                            on_ended([(item, embedded.problem)])
                        else:
                            waiting.append((item, embedded.vector))
                    if len(waiting) >= WRITE_AT:
                        self._write(waiting, on_ended)
        finally:
            self.counts = _sum(self.counts, run.counts)
            self._write(waiting, on_ended)

    def _write(self, waiting: list[tuple[IndexItem, Vectors]], on_ended: OnEnded) -> None:
        part, waiting[:] = waiting.copy(), []  # what fails here is not tried a second time on the way out
        if part:
            self._chroma.upsert([_entry(item, vector) for item, vector in part])
            on_ended([(item, None) for item, _ in part])

    def update_metadata(self, items: Sequence[IndexItem]) -> None:
        """Replace the metadata of *items*, which are in the index with the same text."""
        self._chroma.update_metadata({item.id: item.metadata for item in items})

    def delete(self, kind: Kind, names: Collection[str]) -> None:
        """Take items out of the index; names that are not there are fine."""
        if names:
            self._chroma.delete([f"{kind}:{name}" for name in names])

    def forget_others(self, hashes: Collection[str]) -> None:
        """Delete every stored vector but those of *hashes*: of texts that no item has any more."""
        self.ledger.keep_only(hashes)

    def search(self, text: str, kinds: Collection[Kind] | None = None, limit: int = 5) -> list[Hit]:
        """Return at most *limit* items most like *text*, the best first; *kinds* None searches all.

        Raises:
            ProviderUnavailableError: The provider gives no vector for *text*.
        """
        return self._chroma.search(query_vector(self.provider, text), kinds, limit)

    def _entries(self, items: Iterable[tuple[Indexed, str]]) -> Iterable[Entry]:
        pairs = iter(items)
        while page := list(itertools.islice(pairs, WRITE_AT)):
            yield from self._stored(page)

    def _stored(self, page: Sequence[tuple[Indexed, str]]) -> Iterable[Entry]:
        vectors = self.ledger.vectors(self.identity, {found for _, found in page})
        return [_entry(item, vectors[found]) for item, found in page if found in vectors]


def _make_private(directory: Path) -> None:
    try:
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as exc:
        raise StateDirectoryError(
            f"{directory} cannot be made ({exc.strerror}); fix its rights, or set INDEX_DIR to another directory."
        ) from exc


def _entry(item: Indexed, vector: Vectors) -> Entry:
    return Entry(item.id, vector, item.metadata, None if item.kind is Kind.CONVERSATION else item.text)


def _sum(first: RunCounts, second: RunCounts) -> RunCounts:
    return RunCounts(
        **{field.name: getattr(first, field.name) + getattr(second, field.name) for field in fields(RunCounts)}
    )

"""Searches the entries of a ledger by cosine: exact for small kinds, by ChromaDB's graph for large ones."""

from __future__ import annotations

import logging
import threading
from collections.abc import Collection, Iterable
from pathlib import Path

import numpy as np

from config.index_settings import IndexSettings
from database_docs.items import Kind
from embedding_index.inputs import pack, split_text
from embedding_index.providers import open_provider
from embedding_index.providers.contract import Provider, Vector, checked_vectors, weighted_mean
from embedding_index.search_entries import Hit, Page, SearchEntries, mixed_message
from embedding_index.search_graph import SearchGraph, large_kinds, open_graph
from embedding_index.vector_ledger import LEDGER_FILE, VectorLedger
from error_handler import (
    ConfigurationError,
    MixedIndexError,
    StateDirectoryError,
    UnusableVectorsError,
    VectorStoreError,
)

logger = logging.getLogger(__name__)

Found = list[tuple[float, Kind, str]]


class VectorSearch:
    """Searches that keep the vectors of small kinds and the open graph of large ones in memory.

    Any thread may search; one at a time is served.
    """

    def __init__(self, folder: Path) -> None:
        """Search the index in *folder*; nothing is read yet."""
        self._folder = folder
        self._lock = threading.Lock()
        self._version: object = None
        self._pages: dict[Kind, list[Page]] = {}
        self._graph: SearchGraph | None = None

    def search(self, ledger: VectorLedger, vector: Vector, kinds: Iterable[Kind] | None, limit: int) -> list[Hit]:
        """Return at most *limit* hits of *kinds* (None: all), the most similar first, equal ones by kind and name.

        Raises:
            MixedIndexError: *vector* has another length than those in the index.
            UnusableVectorsError: *vector* is zero.
            StateDirectoryError: A stored vector was changed on disk.
        """
        if not vector.any():
            raise UnusableVectorsError("a vector of zeros has no direction to search in; embed the text again.")
        entries = SearchEntries(ledger)
        with self._lock, ledger.snapshot():
            identity = entries.identity()
            if identity is None:
                return []
            if identity.dimensions != len(vector):
                raise MixedIndexError(mixed_message(identity, f"a vector of length {len(vector)}"))
            self._follow(entries)
            found: Found = []
            for kind in dict.fromkeys(Kind if kinds is None else kinds):
                found += [(cosine, kind, name) for name, cosine in self._nearest(entries, kind, vector, limit)]
            return entries.hits(sorted(found, key=lambda hit: (-hit[0], hit[1], hit[2]))[:limit])

    def close(self) -> None:
        """Release files and memory."""
        with self._lock:
            self._forget()

    def _follow(self, entries: SearchEntries) -> None:
        """Drop what was kept of an older state of the entries."""
        if self._version != entries.version():
            self._forget()
            self._graph = open_graph(entries, self._folder)
            self._version = entries.version()

    def _forget(self) -> None:
        self._version, self._pages = None, {}
        graph, self._graph = self._graph, None
        if graph is not None:
            graph.close()

    def _nearest(self, entries: SearchEntries, kind: Kind, vector: Vector, limit: int) -> list[tuple[str, float]]:
        if kind not in large_kinds(entries):
            if kind not in self._pages:
                self._pages[kind] = list(entries.pages(kind))
            return nearest(self._pages[kind], vector, limit)
        if self._graph is not None:
            try:
                # The graph only proposes, so damage to its files can lose a hit, but cannot give a wrong one. It proposes
                # more than *limit*, so that equally similar ones are chosen by name.
                proposed = entries.vectors(kind, self._graph.nearest(kind, vector, limit * 2 + 10))
                return nearest([(list(proposed), np.array(list(proposed.values())))], vector, limit)
            except VectorStoreError as exc:  # a newer graph has replaced it
                logger.warning("%s This search compares all vectors.", exc)
        return nearest(entries.pages(kind), vector, limit)


def nearest(pages: Iterable[Page], vector: Vector, limit: int) -> list[tuple[str, float]]:
    """Return the *limit* most similar names of *pages* with their cosine, sorted by similarity, then name."""
    best: list[tuple[str, float]] = []
    unit = vector / np.linalg.norm(vector)
    for names, vectors in pages:
        if not names:
            continue
        # Rounded, because the cosines of equal vectors differ in the last digit.
        cosines = np.round(vectors @ unit, 6)
        cut = max(0, len(names) - limit)
        least = np.partition(cosines, cut)[cut]
        best += [(names[row], min(1.0, float(cosines[row]))) for row in np.flatnonzero(cosines >= least).tolist()]
        best = sorted(best, key=lambda hit: (-hit[1], hit[0]))[:limit]
    return best


def query_vector(provider: Provider, text: str) -> Vector:
    """Return the vector of *text*. A long text is embedded in pieces, as in the index, not truncated.

    Raises:
        ConfigurationError: *text* is empty, or the provider refuses key, address or model.
        ProviderUnavailableError, UnusableVectorsError: The provider gives no usable answer.
    """
    if not text.strip():
        raise ConfigurationError("The text to search for is empty; give some words.")
    count, limits = provider.count_tokens, provider.limits
    pieces = [piece for piece in split_text(text, limits.input_tokens, count) if piece.strip()]
    sizes = [count(piece) for piece in pieces]
    vectors: dict[int, Vector] = {}
    for places in pack(sizes, limits, limits.inputs):
        answer = provider.embed([pieces[place] for place in places])
        checked = checked_vectors(answer.vectors, len(places), provider.identity.dimensions)
        if checked.problems:
            raise UnusableVectorsError(
                f"The provider gives no vector for the text: {next(iter(checked.problems.values()))}; try again."
            )
        vectors |= {places[place]: vector for place, vector in checked.good.items()}
    mean = weighted_mean([vectors[place] for place in range(len(pieces))], sizes)
    if mean is None:
        raise UnusableVectorsError("The parts of the text cancel each other out; search for less at once.")
    return mean


class IndexReader:
    """Searches the index while another process may write it. Use as ``with``, or close it.

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

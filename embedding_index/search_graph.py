"""A graph of neighbours in ChromaDB, for kinds with too many items to compare all. The only user of chromadb.

It is a cache of the ledger's vectors. Its folder is named for the checksum of its entries and built beside the old one. It
never changes once the ledger names it (``search.graph``), so any number of processes may open it. A folder with another
checksum or count is not used; the next run that writes builds a new one.
"""

from __future__ import annotations

import logging
import os
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from database_docs.items import Kind
from embedding_index.providers.contract import Vector
from embedding_index.search_entries import SearchEntries
from error_handler import ConfigurationError, TriadError, VectorStoreError

if TYPE_CHECKING:
    from chromadb.api.client import Client
    from chromadb.api.collection_configuration import CreateHNSWConfiguration

logger = logging.getLogger(__name__)

FOLDER = "chroma"
EXACT_UP_TO_BYTES = 128 * 2**20  # of the vectors of one kind, as float32: 87,000 of 384 dimensions, 21,000 of 1,536

# Recall: docs/embedding-index.md. More neighbours and a wider search cost build time and improve recall.
HNSW: CreateHNSWConfiguration = {"space": "cosine", "max_neighbors": 32, "ef_construction": 200, "ef_search": 800}


class SearchGraph:
    """An open, finished folder of ChromaDB with a collection for each large kind.

    Raises (all methods):
        VectorStoreError: ChromaDB cannot read or write the folder.
    """

    def __init__(self, path: Path) -> None:
        """Open the folder *path*."""
        self.path = path
        with _Translated(path):
            self._client = _open_client(path)
            self._collections = {
                Kind(found.name): self._client.get_collection(found.name, embedding_function=None)
                for found in self._client.list_collections()
            }

    def is_of(self, counts: Mapping[Kind, int], checksum: str) -> bool:
        """Return whether it holds *counts* vectors, and was built of entries with *checksum*."""
        with _Translated(self.path):
            return {kind: found.count() for kind, found in self._collections.items()} == counts and all(
                (found.metadata or {}).get("checksum") == checksum for found in self._collections.values()
            )

    def nearest(self, kind: Kind, vector: Vector, number: int) -> list[str]:
        """Return the names of about the *number* nearest entries."""
        with _Translated(self.path):
            answer = self._collections[kind].query(query_embeddings=[vector.tolist()], n_results=number, include=[])
            return list(answer["ids"][0])

    def close(self) -> None:
        """Release files and memory."""
        with _Translated(self.path):
            self._client.close()


def large_kinds(entries: SearchEntries) -> dict[Kind, int]:
    """Return the kinds whose vectors take more than EXACT_UP_TO_BYTES, with their number of entries."""
    identity = entries.identity()
    vector_bytes = 4 * ((identity.dimensions if identity else None) or 0)
    return {kind: number for kind, number in entries.counts().items() if number * vector_bytes > EXACT_UP_TO_BYTES}


def open_graph(entries: SearchEntries, folder: Path) -> SearchGraph | None:
    """Return the graph that the ledger names, if it fits *entries*; None if there is none that can be used."""
    kinds, named = large_kinds(entries), entries.graph()
    if not kinds or named is None:
        return None
    checksum = entries.checksum(kinds)
    path = _path(folder, checksum)
    if named != checksum or not path.is_dir():
        return None
    try:
        graph = SearchGraph(path)
        if graph.is_of(kinds, checksum):
            return graph
        graph.close()
    except VectorStoreError as exc:
        logger.warning("%s Until then, searches compare all vectors.", exc)
    return None


def publish_graph(entries: SearchEntries, folder: Path) -> None:
    """Build the graph of *entries* if they need one and have none; remove others and the files of older versions.

    The caller holds the lock of *folder*.

    Raises:
        VectorStoreError: ChromaDB cannot write, or has lost vectors.
    """
    kinds, kept = large_kinds(entries), None
    graph = open_graph(entries, folder)
    if graph is not None:
        graph.close()
        kept = graph.path
    else:
        entries.set_graph(None)  # nobody opens a folder that is being built
        if kinds:
            checksum = entries.checksum(kinds)
            kept = _path(folder, checksum)
            _remove(kept)
            _build(kept, entries, kinds, checksum)
            entries.set_graph(checksum)
    for path in (folder / FOLDER).glob("*"):
        if path != kept:
            _remove(path)
    if kept is None:
        _remove(folder / FOLDER)
    for name in ("generation", "chroma.unfinished", "chroma.new", "chroma.old"):  # of format 1
        _remove(folder / name)


def _build(path: Path, entries: SearchEntries, counts: Mapping[Kind, int], checksum: str) -> None:
    path.mkdir(parents=True, mode=0o700)
    path.parent.chmod(0o700)
    with _Translated(path):
        client = _open_client(path)
        for kind in counts:
            collection = client.create_collection(
                kind.value,
                embedding_function=None,
                metadata={"checksum": checksum},
                configuration={"hnsw": HNSW},
            )
            for names, vectors in entries.pages(kind):
                collection.upsert(ids=names, embeddings=vectors)
            with warnings.catch_warnings():
                # ChromaDB warns about collections without one of its embedding functions.
                warnings.simplefilter("ignore", DeprecationWarning)
                collection.modify(configuration={"hnsw": {"sync_threshold": 2}})
        client.close()
    # After it is opened again, the first query makes ChromaDB write the rest of the graph. Later searches only read.
    graph = SearchGraph(path)
    for kind in counts:
        graph.nearest(kind, next(entries.pages(kind, 1))[1][0], 1)
    is_whole = graph.is_of(counts, checksum)
    graph.close()
    if not is_whole:
        raise VectorStoreError(f"ChromaDB lost vectors while it wrote {path}; run the same command again.")
    os.sync()  # all of its files are on disk before the ledger names the folder


def _path(folder: Path, checksum: str) -> Path:
    return folder / FOLDER / checksum[:16]


def _remove(path: Path) -> None:
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    except OSError as exc:
        raise VectorStoreError(
            f"{path} cannot be removed ({exc.strerror}); fix the permissions of its folder, then run again."
        ) from exc


class _Translated:
    """Translates the errors of ChromaDB to VectorStoreError.

    They have no common base: some are built in, and a panic of its Rust part is a BaseException of a class that cannot be
    imported, so no ``except`` can name it.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None or exc is None or isinstance(exc, TriadError):
            return
        from chromadb.errors import ChromaError  # noqa: PLC0415 - see _open_client

        foreign = (ChromaError, OSError, ValueError, TypeError, AttributeError, LookupError, RuntimeError)
        if isinstance(exc, foreign) or kind.__name__ == "PanicException":
            # Only the class: the text may quote what was to be stored.
            raise VectorStoreError(
                f"ChromaDB cannot read or write {self._path} ({kind.__name__}); free space or fix its permissions, then run "
                "`python cli.py index --batch`, which builds it again from the stored vectors without a call."
            ) from exc


def _open_client(path: Path) -> Client:
    try:
        # Loading chromadb takes a second, and most commands never need it.
        from chromadb.api import ServerAPI  # noqa: PLC0415
        from chromadb.api.client import Client  # noqa: PLC0415
        from chromadb.config import Settings, System  # noqa: PLC0415
    except ImportError as exc:
        raise ConfigurationError(
            "a large embedding index needs the package chromadb; run `pip install -r requirements-index.txt`."
        ) from exc
    except ValueError as exc:  # pydantic's; chromadb reads the environment and .env when it is imported
        raise ConfigurationError(
            "ChromaDB reads settings from the environment and .env by itself and refuses one of them (names like "
            "MIGRATIONS or IS_PERSISTENT); remove it, then run again."
        ) from exc
    # Everything that decides where data goes is set here, so that environment variables have no effect.
    settings = Settings(
        _env_file=None,
        chroma_api_impl="chromadb.api.rust.RustBindingsAPI",
        chroma_product_telemetry_impl="chromadb.telemetry.product.posthog.Posthog",
        anonymized_telemetry=False,
        chroma_otel_collection_endpoint="",
        migrations="apply",
        allow_reset=False,
        is_persistent=True,
        persist_directory=str(path),
    )
    # PersistentClient would return a system that was opened before, or one that failed to start.
    system = System(settings)
    system.instance(ServerAPI)  # type: ignore[type-abstract] # it looks the class up in the settings
    system.start()
    return Client.from_system(system)

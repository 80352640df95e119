"""One folder of ChromaDB: vectors with what belongs to them, searched by cosine. The only user of chromadb.

There is a collection for each kind, because a filter inside a search costs more than the search: ChromaDB reads the ids
of everything that passes the filter for every query. What comes back with a hit is one JSON text (*item*), because
ChromaDB merges the metadata of an upsert into the old, so a key that is gone would stay.
"""

from __future__ import annotations

import itertools
import json
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from embedding_index.exact_search import ExactSearch
from embedding_index.items import Hit, Kind, MetadataValue, ModelIdentity
from embedding_index.vector_checks import Vector
from error_handler import ConfigurationError, MixedIndexError, TriadError, UnusableVectorsError, VectorStoreError

if TYPE_CHECKING:
    from chromadb.api.client import Client
    from chromadb.api.models.Collection import Collection

T = TypeVar("T")

REMEDY = "`python cli.py index --rebuild` makes it anew from the stored vectors, for nothing"

# Measured: docs/performance.md. More neighbours and a wider search cost build time and buy recall.
MAX_NEIGHBORS = 32
EF_CONSTRUCTION = 200
EF_SEARCH = 800
SYNC_THRESHOLD = 1000  # records; ChromaDB writes its graph to disk when so many came since the last time
EXACT_UP_TO_BYTES = 128 * 2**20  # of the vectors of one kind, as float32: 87,000 of 384 dimensions, 21,000 of 1,536
READ_AT_ONCE = 1000  # vectors; ChromaDB hands them out as Python floats, 24 bytes each


@dataclass(frozen=True, slots=True)
class Entry:
    """One vector to be found. *id* is that of the IndexItem (``table:public.refunds``).

    *text* is kept in clear on disk and comes back with a hit; None: there is none to be kept. That of
    a conversation is never kept.
    """

    id: str
    vector: Vector
    metadata: Mapping[str, MetadataValue]
    text: str | None = None


class ChromaFolder:
    """An open folder of ChromaDB. Opening one changes its files, so at most one process may have it open.

    ``search`` may be called from several threads at once.

    Raises (all methods):
        VectorStoreError: ChromaDB cannot read or write the folder; what it holds is uncertain from then on.
    """

    def __init__(self, path: Path, identity: ModelIdentity) -> None:
        """Open *path*, or make it.

        *identity* goes into the metadata of the collections; its dimensions are learned from the first vector where
        they are None.
        """
        self.identity = identity
        with _Translated(path):
            path.mkdir(mode=0o700, exist_ok=True)
            self._client = _open_client(path)
            self._path = path
            known = {collection.name for collection in self._client.list_collections()}
            self._exact: dict[Kind, ExactSearch | None] = {}
            self._collections = {
                kind: self._client.get_collection(kind.value, embedding_function=None)
                for kind in Kind
                if kind.value in known
            }

    def upsert(self, entries: Sequence[Entry]) -> None:
        """Store *entries*; of two with one id, the later. Durable when it returns, also through a power cut.

        Raises:
            MixedIndexError: A vector has another length than those in the folder; nothing was stored.
            UnusableVectorsError: A vector is not finite, or zero; nothing was stored.
        """
        by_kind: dict[Kind, dict[str, Entry]] = defaultdict(dict)
        for entry in entries:
            self._check(entry)
            by_kind[kind_of(entry.id)][entry.id] = entry
        self._exact = {}
        with _Translated(self._path):
            for kind, unique in by_kind.items():
                collection = self._collection(kind)
                for part in batched(unique.values(), self._client.get_max_batch_size()):
                    collection.upsert(
                        ids=[entry.id for entry in part],
                        embeddings=np.stack([entry.vector for entry in part]).astype(np.float32, copy=False),
                        metadatas=[{"item": _item_json(entry.metadata, _kept_text(kind, entry))} for entry in part],
                    )

    def update_metadata(self, metadata: Mapping[str, Mapping[str, MetadataValue]]) -> None:
        """Replace the metadata of the ids in *metadata*; vectors and texts stay, ids that are not there are left out."""
        with _Translated(self._path):
            for kind, ids in _by_kind(metadata).items():
                if (collection := self._collections.get(kind)) is None:
                    continue
                for part in batched(ids, self._client.get_max_batch_size()):
                    found = collection.get(ids=list(part), include=["metadatas"])
                    texts = [_item(stored)["text"] for stored in found["metadatas"] or []]
                    if texts:
                        items = [
                            {"item": _item_json(metadata[id_], text)}
                            for id_, text in zip(found["ids"], texts, strict=True)
                        ]
                        collection.update(ids=found["ids"], metadatas=list(items))

    def delete(self, ids: Iterable[str]) -> None:
        """Remove *ids*; those that are not there are fine."""
        self._exact = {}
        with _Translated(self._path):
            for kind, own in _by_kind(ids).items():
                if collection := self._collections.get(kind):
                    for part in batched(own, self._client.get_max_batch_size()):
                        collection.delete(ids=list(part))

    def search(self, vector: Vector, kinds: Iterable[Kind] | None = None, limit: int = 5) -> list[Hit]:
        """Return at most *limit* hits, the most similar first, equal ones by id; *kinds* None: all.

        Exact while the vectors of a kind fit in EXACT_UP_TO_BYTES; beyond it by ChromaDB's graph.

        Raises:
            MixedIndexError: *vector* has another length than those in the folder.
            UnusableVectorsError: *vector* is zero.
        """
        self._check_length(len(vector))
        if not vector.any():
            raise UnusableVectorsError("a vector of zeros has no direction to search in; embed the text again.")
        found: list[Hit] = []
        with _Translated(self._path):
            for kind in dict.fromkeys(Kind if kinds is None else kinds):
                if kind in self._collections:
                    found += self._nearest(kind, vector, limit)
        return sorted(found, key=lambda hit: (-hit.similarity, hit.kind, hit.name))[:limit]

    def counts(self) -> dict[Kind, int]:
        """Return how many vectors there are of each kind that has a collection."""
        with _Translated(self._path):
            return {kind: collection.count() for kind, collection in self._collections.items()}

    def ids(self) -> set[str]:
        """Return the ids of all vectors."""
        with _Translated(self._path):
            return {id_ for collection in self._collections.values() for id_ in collection.get(include=[])["ids"]}

    def vectors(self, ids: Iterable[str]) -> Iterator[tuple[str, Vector]]:
        """Yield the vectors of those of *ids* that are there, read from the search structure."""
        for kind, own in _by_kind(ids).items():
            if collection := self._collections.get(kind):
                for part in batched(own, READ_AT_ONCE):
                    with _Translated(self._path):
                        found = collection.get(ids=list(part), include=["embeddings"])
                        vectors = np.asarray(found["embeddings"], dtype=np.float32)
                    yield from zip(found["ids"], vectors, strict=True)

    def load(self) -> None:
        """Read what a search needs, so that none has to wait for it."""
        with _Translated(self._path):
            for kind in self._collections:
                if self._exact_search(kind) is None:
                    self.catch_up()

    def catch_up(self) -> None:
        """Let ChromaDB bring its graph up to what was stored; any question makes it."""
        with _Translated(self._path):
            for collection in self._collections.values():
                first = collection.get(limit=1, include=["embeddings"])["embeddings"]
                if first is not None and len(first):
                    collection.query(query_embeddings=np.asarray(first[:1]).tolist(), n_results=1, include=[])

    def sync_at(self, records: int) -> None:
        """Set after how many records ChromaDB writes its graph; it follows when the folder is opened the next time."""
        with _Translated(self._path), warnings.catch_warnings():
            # A collection without an embedding function of ChromaDB's is "legacy" to it, which is as it is meant.
            warnings.simplefilter("ignore", DeprecationWarning)
            for collection in self._collections.values():
                collection.modify(configuration={"hnsw": {"sync_threshold": records}})

    def close(self) -> None:
        """Give back files and memory; a second time does nothing."""
        self._collections, self._exact = {}, {}
        with _Translated(self._path):
            self._client.close()

    def _nearest(self, kind: Kind, vector: Vector, limit: int) -> list[Hit]:
        collection = self._collections[kind]
        if (exact := self._exact_search(kind)) is None:
            # More than asked for, so that the cut among equally similar ones is by id, not by chance.
            answer = collection.query(
                query_embeddings=vector[np.newaxis].tolist(), n_results=limit * 2 + 10, include=["distances"]
            )
            pairs = zip(answer["ids"][0], (answer["distances"] or [[]])[0], strict=True)
            nearest = sorted(((id_, 1 - distance) for id_, distance in pairs), key=lambda hit: (-hit[1], hit[0]))[
                :limit
            ]
        else:
            nearest = exact.nearest(vector, limit)
        if not nearest:
            return []
        stored = collection.get(ids=[id_ for id_, _ in nearest], include=["metadatas"])
        items = dict(zip(stored["ids"], stored["metadatas"] or [], strict=True))
        return [_hit(id_, similarity, items[id_]) for id_, similarity in nearest]

    def _exact_search(self, kind: Kind) -> ExactSearch | None:
        """Return the vectors of *kind* in memory, None where they are too many for it."""
        if kind not in self._exact:
            collection = self._collections[kind]
            if collection.count() * (self.identity.dimensions or 0) * 4 > EXACT_UP_TO_BYTES:
                self._exact[kind] = None
            else:
                stored = dict(self.vectors(collection.get(include=[])["ids"]))
                self._exact[kind] = ExactSearch(list(stored), np.array(list(stored.values()))) if stored else None
        return self._exact[kind]

    def _collection(self, kind: Kind) -> Collection:
        if kind not in self._collections:
            self._collections[kind] = self._client.create_collection(
                kind.value,
                embedding_function=None,
                metadata={name: value for name, value in asdict(self.identity).items() if value is not None},
                configuration={
                    "hnsw": {
                        "space": "cosine",
                        "max_neighbors": MAX_NEIGHBORS,
                        "ef_construction": EF_CONSTRUCTION,
                        "ef_search": EF_SEARCH,
                        "sync_threshold": SYNC_THRESHOLD,
                    }
                },
            )
        return self._collections[kind]

    def _check(self, entry: Entry) -> None:
        self._check_length(len(entry.vector))
        if not np.isfinite(entry.vector).all() or not entry.vector.any():
            raise UnusableVectorsError(
                f"the vector of {entry.id} is zero or not finite; embed it again: python cli.py index --batch"
            )

    def _check_length(self, length: int) -> None:
        if self.identity.dimensions is None:
            self.identity = replace(self.identity, dimensions=length)
        elif length != self.identity.dimensions:
            raise MixedIndexError(mixed_message(self.identity, f"a vector of length {length}"))


class _Translated:
    """What ChromaDB raises, as VectorStoreError.

    Its errors have no common base: some are built in, and a panic of its Rust part is a BaseException of a class that
    cannot be imported, so no ``except`` can name it.
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
                f"ChromaDB cannot read or write {self._path} ({kind.__name__}); free space or fix its rights, then run "
                f"again; {REMEDY}."
            ) from exc


def chromadb_version() -> str:
    """Return the version of the installed chromadb, without loading it.

    Raises:
        ConfigurationError: It is not installed.
    """
    try:
        return version("chromadb")
    except PackageNotFoundError as exc:
        raise ConfigurationError(
            "the embedding index needs the package chromadb; run `pip install -r requirements-index.txt`."
        ) from exc


def kind_of(item_id: str) -> Kind:
    """Return the kind that the id of an item begins with."""
    return Kind(item_id.partition(":")[0])


def mixed_message(recorded: ModelIdentity, other: object) -> str:
    """Return the sentence of a MixedIndexError."""
    return (
        f"the index holds vectors of {recorded}, which cannot be compared with {other}; set EMBEDDING_PROVIDER and "
        "EMBEDDING_MODEL (and EMBEDDING_DIMENSIONS) back, or run `python cli.py index --rebuild` to make it anew."
    )


def batched(values: Iterable[T], size: int) -> Iterator[tuple[T, ...]]:
    """Yield *values* in tuples of *size*; the last may be shorter, none is empty."""
    rest = iter(values)
    while part := tuple(itertools.islice(rest, size)):
        yield part


def _open_client(path: Path) -> Client:
    chromadb_version()
    try:
        # Here, because loading chromadb takes a second, and most commands never need it.
        from chromadb.api import ServerAPI  # noqa: PLC0415
        from chromadb.api.client import Client  # noqa: PLC0415
        from chromadb.config import Settings, System  # noqa: PLC0415
    except ValueError as exc:  # pydantic's; chromadb reads the environment and .env when it is imported
        raise ConfigurationError(
            "ChromaDB takes settings from the environment and .env on its own and refuses one that is there "
            "(names like MIGRATIONS or IS_PERSISTENT); remove it, then run again."
        ) from exc
    # Everything that decides where data goes is given here, so that no variable of the environment does.
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
    # A system of its own: PersistentClient would hand out one that was opened before, or one that failed to start.
    system = System(settings)
    system.instance(ServerAPI)  # type: ignore[type-abstract] # it looks the class up in the settings
    system.start()
    return Client.from_system(system)


def _by_kind(ids: Iterable[str]) -> dict[Kind, list[str]]:
    kinds: dict[Kind, list[str]] = defaultdict(list)
    for id_ in dict.fromkeys(ids):
        kinds[kind_of(id_)].append(id_)
    return kinds


def _kept_text(kind: Kind, entry: Entry) -> str | None:
    # What customers wrote is never written to disk, not even where a caller forgot to leave it out.
    return None if kind is Kind.CONVERSATION else entry.text


def _item_json(metadata: Mapping[str, MetadataValue], text: str | None) -> str:
    return json.dumps({"metadata": dict(metadata), "text": text})


def _item(stored: Mapping[str, Any]) -> Any:
    return json.loads(stored["item"])


def _hit(id_: str, similarity: float, stored: Mapping[str, Any]) -> Hit:
    item = _item(stored)
    kind, _, name = id_.partition(":")
    similarity = min(1.0, max(-1.0, float(similarity)))
    return Hit(Kind(kind), name, similarity, item["metadata"], item["text"])

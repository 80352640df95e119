"""The vectors of the index in ChromaDB, for the one process that writes; whole, or known not to be.

Files of the folder::

    chroma/             what ChromaDB writes
    chroma.unfinished   stands from before the first change until everything written was verified and made durable
    generation          number, model, counts and checksums of the last finished state
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Self

from embedding_index.chroma_folder import (
    REMEDY,
    SYNC_THRESHOLD,
    ChromaFolder,
    Entry,
    batched,
    chromadb_version,
    mixed_message,
)
from embedding_index.finished_state import (
    CHROMA,
    FinishedState,
    file_hashes,
    is_unfinished,
    read_state,
    remove_marker,
    remove_unfinished_writes,
    set_marker,
    unfinished_identity,
    write_state,
)
from embedding_index.graph_files import blank_unused
from embedding_index.items import Hit, Kind, MetadataValue, ModelIdentity
from embedding_index.vector_checks import Vector
from error_handler import MixedIndexError, UnusableVectorsError, VectorStoreError
from storage.files import sync_folder

__all__ = ["ChromaIndex", "Entry", "check_identity"]

NEW, OLD = "chroma.new", "chroma.old"
REMADE_AT_ONCE = 1000  # entries between two reports of progress; larger parts are not faster


class ChromaIndex:
    """Vectors on disk that can be searched. Whoever opens it holds the lock of *folder*; one thread writes.

    ChromaDB itself is loaded and opened with the first call that needs it.

    Attributes:
        identity: Whose vectors these are; its dimensions are None until there is a vector.
        needs_rebuild: Why ``remake`` must be called before anything else; None where all is well.

    Raises (every method that reads or writes vectors):
        VectorStoreError: ChromaDB failed, or ``needs_rebuild`` is set. After a failure it is set, and ``close`` leaves
            the marker, so the next opening knows as well.
    """

    def __init__(self, folder: Path, identity: ModelIdentity, *, discard: bool = False) -> None:
        """Look at *folder*; with *discard*, what it holds is to be replaced, of whichever model it is.

        Raises:
            MixedIndexError: It holds vectors of another model, and not *discard*.
        """
        self._folder = folder
        self._remove_leftovers()
        self._state = read_state(folder)
        recorded = unfinished_identity(folder) or (self._state.identity if self._state else None)
        if recorded is not None and not discard:
            check_identity(recorded, identity)
            identity = replace(identity, dimensions=identity.dimensions or recorded.dimensions)
        self.identity = identity
        self.needs_rebuild: str | None = "it is to be replaced" if discard else self._damage()
        self._chroma: ChromaFolder | None = None
        self._ids: set[str] = set()
        self._written: set[str] = set()
        self._is_changed = False
        self._has_remains = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def generation(self) -> int:
        """The number of the last finished state; 0: there is none."""
        return self._state.generation if self._state else 0

    @property
    def has_remains(self) -> bool:
        """Whether the files still have what was deleted or replaced: ChromaDB only marks it, until ``remake``."""
        return self._has_remains or (self._state is not None and self._state.has_remains)

    def upsert(self, entries: Sequence[Entry]) -> None:
        """Store *entries*, durably; of two with one id, the later. Large lots are much faster than small ones.

        Raises:
            MixedIndexError: A vector has another length than those in the index; nothing was stored.
            UnusableVectorsError: A vector is not finite, or zero; nothing was stored.
        """
        with self._changing() as chroma:
            chroma.upsert(entries)
            self.identity = chroma.identity
            ids = {entry.id for entry in entries}
            self._has_remains |= not ids.isdisjoint(self._ids)
            self._ids |= ids
            self._written |= ids

    def update_metadata(self, metadata: Mapping[str, Mapping[str, MetadataValue]]) -> None:
        """Replace the metadata of the ids in *metadata*; vectors and texts stay, ids that are not there are left out."""
        with self._changing() as chroma:
            chroma.update_metadata(metadata)
            self._has_remains |= not self._ids.isdisjoint(metadata)

    def delete(self, ids: Iterable[str]) -> None:
        """Remove *ids*; those that are not there are fine."""
        gone = set(ids)
        with self._changing() as chroma:
            chroma.delete(gone)
            self._has_remains |= not gone.isdisjoint(self._ids)
            self._ids -= gone
            self._written -= gone

    def search(self, vector: Vector, kinds: Iterable[Kind] | None = None, limit: int = 5) -> list[Hit]:
        """Return at most *limit* hits, the most similar first, equal ones by id; *kinds* None: all.

        Raises:
            MixedIndexError: *vector* has another length than those in the index.
        """
        return self._open().search(vector, kinds, limit)

    def count(self) -> int:
        """Return how many vectors there are."""
        if self._chroma is None and self.needs_rebuild is None:
            return sum(self._state.counts.values()) if self._state else 0
        self._open()
        return len(self._ids)

    def ids(self) -> set[str]:
        """Return the ids of all vectors."""
        if self._chroma is None and self.count() == 0:
            return set()
        self._open()
        return set(self._ids)

    def vectors(self, ids: Iterable[str]) -> Iterator[tuple[str, Vector]]:
        """Yield those of *ids* that are there with their vectors, read from the search structure."""
        yield from self._open().vectors(ids)

    def remake(self, entries: Iterable[Entry], on_progress: Callable[[int], None] | None = None) -> None:
        """Make the index anew from *entries* alone, beside the old one, which is replaced when the new one is whole.

        *on_progress* is told how many are done. Readers see the old state until the new one is finished; a process that
        dies within leaves the old state as it was.

        Raises:
            MixedIndexError, UnusableVectorsError: As for ``upsert``; the old state is as it was, ``needs_rebuild`` set.
        """
        self._drop()
        self.needs_rebuild = self.needs_rebuild or "making it anew was not finished"
        new = self._folder / NEW
        self._remove_leftovers()
        chroma = ChromaFolder(new, self.identity)
        ids: set[str] = set()
        try:
            for part in batched(entries, REMADE_AT_ONCE):
                chroma.upsert(part)
                ids.update(entry.id for entry in part)
                if on_progress:
                    on_progress(len(ids))
            self.identity = chroma.identity
            chroma.sync_at(2)
        finally:
            chroma.close()
        counts = _verified(new, self.identity, ids, ids)
        set_marker(self._folder, self.identity)
        self._swap_in(new)
        self._publish(counts, is_new=True, has_remains=False)
        self.needs_rebuild = None

    def finish(self) -> None:
        """Verify what was written, make it durable and give it to the readers; writing may go on afterwards.

        Raises:
            VectorStoreError: Something that was written is not there; the marker stays, ``needs_rebuild`` says it.
        """
        if (chroma := self._chroma) is None or self.needs_rebuild is not None:
            return
        ids, written, is_changed, has_remains = self._ids, self._written, self._is_changed, self.has_remains
        self.needs_rebuild = "it was not finished"
        chroma.sync_at(2)
        self._drop()
        counts = _verified(self._folder / CHROMA, self.identity, ids, written)
        self._publish(counts, is_new=is_changed, has_remains=has_remains)
        self.needs_rebuild = None

    def close(self) -> None:
        """``finish``, then give back files and memory; after a failure, only that. A second time does nothing."""
        try:
            self.finish()
        finally:
            self._drop()

    def _damage(self) -> str | None:
        if is_unfinished(self._folder):
            return "the process that wrote it did not end well"
        chroma = self._folder / CHROMA
        if self._state is None:
            return "it does not say what it is" if chroma.exists() else None
        if self._state.chromadb != chromadb_version():
            return f"ChromaDB {self._state.chromadb} wrote it, and {chromadb_version()} is installed"
        if file_hashes(chroma) != self._state.files:
            return "its files are not those that were written"
        return None

    def _open(self) -> ChromaFolder:
        if self.needs_rebuild is not None:
            raise VectorStoreError(f"the index in {self._folder} is not usable: {self.needs_rebuild}; {REMEDY}.")
        if self._chroma is None:
            # Before opening, because opening already changes the files.
            set_marker(self._folder, self.identity)
            self.needs_rebuild = "it could not be opened"
            self._chroma = ChromaFolder(self._folder / CHROMA, self.identity)
            self._ids = self._chroma.ids()
            self.needs_rebuild = None
        return self._chroma

    @contextmanager
    def _changing(self) -> Iterator[ChromaFolder]:
        chroma = self._open()
        self._is_changed = True
        self.needs_rebuild = "a change was not finished"
        try:
            yield chroma
        except (MixedIndexError, UnusableVectorsError):
            self.needs_rebuild = None  # found before anything was written
            raise
        self.needs_rebuild = None

    def _drop(self) -> None:
        chroma, self._chroma = self._chroma, None
        self._ids, self._written = set(), set()
        self._is_changed = self._has_remains = False
        if chroma is not None:
            chroma.close()

    def _swap_in(self, new: Path) -> None:
        chroma, old = self._folder / CHROMA, self._folder / OLD
        try:
            if chroma.exists():
                os.rename(chroma, old)
            os.rename(new, chroma)
            sync_folder(self._folder)
        except OSError as exc:
            raise VectorStoreError(
                f"{chroma} cannot be replaced ({exc.strerror}); fix the rights of {self._folder}, then run again."
            ) from exc
        self._remove_leftovers()

    def _remove_leftovers(self) -> None:
        for name in (NEW, OLD):
            shutil.rmtree(self._folder / name, ignore_errors=True)
        remove_unfinished_writes(self._folder)

    def _publish(self, counts: Mapping[Kind, int], *, is_new: bool, has_remains: bool) -> None:
        blank_unused(self._folder / CHROMA)
        state = FinishedState(
            generation=self.generation + 1,
            identity=self.identity,
            chromadb=chromadb_version(),
            counts={kind.value: count for kind, count in counts.items()},
            files=file_hashes(self._folder / CHROMA, sync=True),
            has_remains=has_remains,
        )
        if not is_new and self._state is not None:
            state = replace(state, generation=self._state.generation, token=self._state.token)
        write_state(self._folder, state)
        self._state = state
        remove_marker(self._folder)
        sync_folder(self._folder)


def check_identity(recorded: ModelIdentity, asked: ModelIdentity) -> None:
    """Refuse to compare vectors of *recorded* with those of *asked*.

    Raises:
        MixedIndexError: They are of different models or lengths; the message names both and what to do.
    """
    if not recorded.is_same_model(asked):
        raise MixedIndexError(mixed_message(recorded, asked))


def _verified(path: Path, identity: ModelIdentity, ids: set[str], written: set[str]) -> dict[Kind, int]:
    """Return how many vectors of each kind are in the closed folder *path*, which ends up whole and closed.

    Opened the first time after ``sync_at(2)``, ChromaDB writes everything to its graph. Then *ids* must be exactly what
    is there, and each of *written* be in the graph: reading its vector fails where it is not.
    """
    chroma = ChromaFolder(path, identity)
    try:
        chroma.catch_up()
        found = chroma.ids()
        in_graph = sum(1 for _ in chroma.vectors(written))
        counts = chroma.counts()
        chroma.sync_at(SYNC_THRESHOLD)
    finally:
        chroma.close()
    if found != ids or in_graph != len(written) or sum(counts.values()) != len(ids):
        raise VectorStoreError(
            f"{path} holds {len(found)} vectors, {len(ids)} were written, {len(written) - in_graph} of them are not in "
            f"the graph; {REMEDY}."
        )
    return counts

"""What searches the index while another process may write it: a private copy of the last finished state.

No lock: the writer sets its marker before its first change, and ``generation`` has the checksum of each file. A copy is
taken only where neither changed while it was made and every checksum is right, so it is a finished state, or nothing.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from embedding_index.chroma_folder import REMEDY, ChromaFolder
from embedding_index.chroma_index import check_identity
from embedding_index.finished_state import CHROMA, FinishedState, file_hashes, is_unfinished, read_state
from embedding_index.items import Hit, Kind, ModelIdentity
from embedding_index.vector_checks import Vector
from error_handler import VectorStoreError

PREFIX = "embedding-index-copy-"
IN_USE = "in-use"  # locked by the process whose copy it is, for as long as that lives
UNUSED_AFTER_S = 3600  # a folder without that file: its process died in the instant between the two


@dataclass(slots=True)
class _Copy:
    """One open copy; *searches* are those under way, and the last of them closes it once it *is_retired*."""

    state: FinishedState
    folder: Path
    in_use: int
    chroma: ChromaFolder
    searches: int = 0
    is_retired: bool = False


class IndexCopy:
    """The index to be searched, from any number of threads and beside a writer. Nothing is read until it is needed.

    Raises (``search``, ``refresh``):
        VectorStoreError: There is no finished state yet, or it cannot be copied; a state taken earlier stays.
        MixedIndexError: The newest state is of another model than *identity*; a state taken earlier stays.
    """

    def __init__(self, folder: Path, *, identity: ModelIdentity | None = None, work_dir: Path | None = None) -> None:
        """Search the index of *folder*.

        *identity* is who makes the vectors that will be searched for; None: not checked. *work_dir* has room for two
        copies of the index; None: the folder for temporary files.
        """
        self._folder = folder
        self._expected = identity
        self._work_dir = work_dir or Path(tempfile.gettempdir())
        self._current: _Copy | None = None
        self._lock = threading.Lock()  # of _current and of the counts in it
        self._refreshing = threading.Lock()
        self._is_closed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def state(self) -> FinishedState | None:
        """The state that is searched: its number, model and counts; None before the first ``refresh`` or ``search``."""
        current = self._current
        return current.state if current else None

    def refresh(self) -> bool:
        """Take the newest finished state where there is a newer one; return whether it did. Cheap where there is not."""
        # One thread copies; the others go on with what there is, unless there is nothing.
        if not self._refreshing.acquire(blocking=self._current is None):
            return False
        try:
            if self._is_closed:  # a copy made now would have nobody to remove it
                raise VectorStoreError(f"the copy of the index in {self._folder} was closed; open another.")
            newest = self._newest()
            if newest is None:
                return False
            if self._expected is not None:
                check_identity(newest.identity, self._expected)
            copy = self._copied(newest)
            if copy is None:
                return False
            with self._lock:
                old, self._current = self._current, copy
            self._retire(old)
            return True
        finally:
            self._refreshing.release()

    def search(self, vector: Vector, kinds: Iterable[Kind] | None = None, limit: int = 5) -> list[Hit]:
        """Return at most *limit* hits, the most similar first, equal ones by id; *kinds* None: all.

        Searches the state of the last ``refresh``; the first search takes one itself.
        """
        if self._current is None:
            self.refresh()
        with self._searching() as chroma:
            return chroma.search(vector, kinds, limit)

    def close(self) -> None:
        """Remove the copy, when the searches under way are done. A second time does nothing."""
        with self._refreshing, self._lock:
            self._is_closed = True
            old, self._current = self._current, None
        self._retire(old)

    def _newest(self) -> FinishedState | None:
        """Return the state to be copied, None where the one at hand is the newest that can be had."""
        current = self.state
        if is_unfinished(self._folder):
            if current is None:
                raise VectorStoreError(
                    f"the index in {self._folder} is being written, or its writer was killed; wait for its end, or run "
                    "`python cli.py index --batch`, which repairs it from the stored vectors."
                )
            return None
        newest = read_state(self._folder)
        if newest is None and current is None:
            raise VectorStoreError(f"there is no index in {self._folder}; `python cli.py index --batch` makes it.")
        return None if newest is None or newest.is_content_of(current) else newest

    def _copied(self, newest: FinishedState) -> _Copy | None:
        """Return *newest* as an open copy, None where it changed meanwhile and there is one at hand."""
        _remove_abandoned(self._work_dir)
        folder, in_use = _private_folder(self._work_dir)
        copy = None
        try:
            if self._copy_files(newest, folder / CHROMA):
                chroma = ChromaFolder(folder / CHROMA, newest.identity)
                chroma.load()
                copy = _Copy(newest, folder, in_use, chroma)
        finally:
            if copy is None:
                _remove_folder(folder, in_use)
        if copy is None and self._current is None:
            raise VectorStoreError(f"the index in {self._folder} is being written at this moment; try again.")
        return copy

    def _copy_files(self, newest: FinishedState, target: Path) -> bool:
        """Copy the files of *newest*; return whether it was still there when that was done.

        Raises:
            VectorStoreError: It was, and its files are not those that were written; or there is no room.
        """
        problem = ""
        try:
            shutil.copytree(self._folder / CHROMA, target)
        except (shutil.Error, OSError) as exc:
            problem = f"cannot be copied to {target.parent} ({getattr(exc, 'strerror', None) or 'some files'})"
        else:
            if file_hashes(target) != newest.files:
                problem = "is damaged"
        if is_unfinished(self._folder) or read_state(self._folder) != newest:
            return False
        if problem:
            raise VectorStoreError(f"{self._folder / CHROMA} {problem}; free space there, or {REMEDY}.")
        return True

    @contextmanager
    def _searching(self) -> Iterator[ChromaFolder]:
        with self._lock:
            current = self._current
            if current is None:
                raise VectorStoreError(f"the copy of the index in {self._folder} was closed; open another.")
            current.searches += 1
        try:
            yield current.chroma
        finally:
            with self._lock:
                current.searches -= 1
            self._dispose(current)

    def _retire(self, old: _Copy | None) -> None:
        if old is not None:
            with self._lock:
                old.is_retired = True
            self._dispose(old)

    def _dispose(self, copy: _Copy) -> None:
        with self._lock:
            if not copy.is_retired or copy.searches:
                return
            copy.is_retired = False  # whoever comes here next finds nothing to do
        try:
            copy.chroma.close()
        finally:
            _remove_folder(copy.folder, copy.in_use)


def _private_folder(work_dir: Path) -> tuple[Path, int]:
    """Make a folder that only this user can read; return it and the open handle whose lock says that it is in use."""
    try:
        work_dir.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=work_dir))
        # Locked before it has its name: no other process ever sees it unlocked while this one lives.
        unnamed = folder / f".{IN_USE}"
        handle = os.open(unnamed, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        fcntl.flock(handle, fcntl.LOCK_EX)
        os.rename(unnamed, folder / IN_USE)
    except OSError as exc:
        raise VectorStoreError(
            f"{work_dir} cannot hold a copy of the index ({exc.strerror}); free space or fix its rights, or set TMPDIR."
        ) from exc
    return folder, handle


def _remove_folder(folder: Path, in_use: int) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    os.close(in_use)


def _remove_abandoned(work_dir: Path) -> None:
    """Remove the copies of processes that died; only this user's, only folders, never through a link."""
    for folder in work_dir.glob(f"{PREFIX}*"):
        with suppress(OSError):  # somebody else's, or removed by another process at this moment
            facts = folder.lstat()
            if facts.st_uid != os.geteuid() or folder.is_symlink() or not folder.is_dir():
                continue
            if not (folder / IN_USE).exists():
                if time.time() - facts.st_mtime > UNUSED_AFTER_S:
                    shutil.rmtree(folder, ignore_errors=True)
                continue
            handle = os.open(folder / IN_USE, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(handle)

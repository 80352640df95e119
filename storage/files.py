"""Durable local files: atomic replacement, the directory lock, and the journal of a batch.

A crash or power cut leaves the old content of a replaced file or the new one, and whole lines of a journal. If the disk is
full or a folder does not allow a change, StateDirectoryError names the file and the remedy; nothing has changed then.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

from filelock import FileLock, Timeout

from error_handler import DirectoryLockedError, Reason, StateDirectoryError
from storage import extended_json

Event = Literal["started", "asked", "released", "answered", "skipped", "failed"]

MAX_DEATHS_PROCESSING = 2  # crashes while the process worked on this document
MAX_DEATHS_WAITING = 5  # crashes while it waited for the model; mostly not its fault

UNKNOWN_UUID = "unknown"  # in the identity of a source whose user may not list collections

logger = logging.getLogger(__name__)

# What file systems of a network answer, and those of FUSE that have no such call.
_CANNOT_SYNC = frozenset({errno.EINVAL, errno.EBADF, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOTTY})

_warned_devices: set[int] = set()

SPACE = "free space or fix the permissions"


@contextmanager
def explained(problem: str, remedy: str = "fix the permissions") -> Iterator[None]:
    """Raise an OSError as a StateDirectoryError that states *problem*, the cause and *remedy*."""
    try:
        yield
    except OSError as exc:
        raise StateDirectoryError(f"{problem} ({exc.strerror}); {remedy}, then run again.") from exc


def replace_file(path: Path, content: bytes) -> None:
    """Replace the content of *path* with *content*, durably, with mode 0600.

    Write a temporary file in the same folder, fsync it, rename it over *path*, then fsync the folder, without which
    a power cut may undo the rename.
    """
    with replacement(path) as file:
        file.write(content)


@contextmanager
def replacement(path: Path) -> Iterator[BinaryIO]:
    """Yield a file for the new content of *path*, which replaces the old one at the end, as ``replace_file`` does.

    After an error inside, the old content is unchanged and the new file is removed. An OSError inside becomes a
    StateDirectoryError about *path*.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    with explained(f"{path} cannot be written", SPACE):
        try:
            with open_private(temporary) as file:
                yield file
                publish(file, path)
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)  # after an error; else it has the name of *path* by now


def open_private(path: Path, buffering: int = -1) -> BinaryIO:
    """Open *path* for writing with mode 0600; an old file of that name is emptied."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW
    return open(path, "wb", buffering, opener=lambda name, _: os.open(name, flags, 0o600))


def publish(file: BinaryIO, target: Path) -> None:
    """Make the content of *file*, which is in the folder of *target*, durable under the name of *target*."""
    file.flush()
    os.fsync(file.fileno())
    os.replace(file.name, target)
    sync_folder(target.parent)


def move_file(path: Path, target: Path) -> None:
    """Move *path* to *target* in another folder of the same disk, durably."""
    with explained(f"{path} cannot be moved to {target.parent}"):
        os.rename(path, target)
        sync_folder(target.parent)
        sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make the renames and removals in *folder* durable, if its file system can; warn once if it cannot."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    except OSError as exc:
        if exc.errno not in _CANNOT_SYNC:
            raise
        _warn_once(folder, os.fstat(handle).st_dev)
    finally:
        os.close(handle)


def _warn_once(folder: Path, device: int) -> None:
    if device not in _warned_devices:
        _warned_devices.add(device)
        logger.warning(
            "the file system of %s cannot sync folders (as CIFS and sshfs); after a power cut the last files may be missing, "
            "and the next run repeats their documents",
            folder,
        )


def require_replaceable(path: Path, name: str) -> None:
    """Check that ``replace_file`` can write *path*, which the flag *name* gave, before work depends on it.

    Raises:
        StateDirectoryError: *path* is no regular file, or its folder is missing or does not allow new files.
    """
    if path.is_dir() or (path.exists() and not path.is_file()):
        raise StateDirectoryError(f"{name} {path} is not a file; name a file, which may be a new one.")
    with explained(f"{name} {path} cannot be written", "create the folder, or name another file"):
        probe = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
        open_private(probe).close()
        probe.unlink()


def remove_file(path: Path) -> None:
    """Remove *path*, if it exists."""
    with explained(f"{path} cannot be removed"):
        path.unlink(missing_ok=True)


class DirectoryLock:
    """The lock of *directory*: a file ``.lock`` in it."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._lock = FileLock(directory / ".lock", timeout=0, mode=0o600)

    def acquire(self, remedy: str) -> None:
        """Take the lock; raise DirectoryLockedError, whose message ends with *remedy*, if another process holds it."""
        with explained(f"{self._directory} cannot be locked"):
            try:
                self._lock.acquire()
            except Timeout as exc:
                raise DirectoryLockedError(f"another worker is using {self._directory}; {remedy}") from exc

    def release(self) -> None:
        """Release the lock, if it is held."""
        self._lock.release()


@dataclass(frozen=True, slots=True)
class Verdict:
    """Why a document has no result; *is_final*: another round cannot help; *is_skipped*: there is nothing to classify."""

    reason: Reason
    problem: str
    is_final: bool = False
    is_skipped: bool = False


@dataclass(slots=True)
class JournalEntry:
    """The journal's record of one document; *result* is the document to store.

    *processing* and *waiting* count the crashes while it was processed, and while it waited for the model.
    """

    processing: int = 0
    waiting: int = 0
    result: dict[str, Any] | None = None
    verdict: Verdict | None = None

    @property
    def is_poison(self) -> bool:
        """True if the document ended the process too often for another attempt."""
        is_open = self.result is None and self.verdict is None
        return is_open and (self.processing >= MAX_DEATHS_PROCESSING or self.waiting >= MAX_DEATHS_WAITING)


class BatchJournal:
    """The append-only journal of one batch at *path*; opened at the first event, closed by ``close``.

    Each event is one line of Extended JSON in one ``write``, so a killed process leaves whole lines. The journal is not
    fsynced: after a power cut the model is asked again, and nothing is lost.

    Events: ``started`` before a document is processed, ``asked`` before it waits for the model, ``released`` if the run
    stops meanwhile, ``answered``, ``skipped`` and ``failed`` at its end. At a crash, a document that was *started* but not
    *asked* was being processed by this process, which makes it a suspect; one that was *asked* was only waiting.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._handle: int | None = None

    def add(self, event: Event, document_id: Any, **details: Any) -> None:
        """Append *event* of the document with its *details*: ``result``, or the fields of a Verdict."""
        line = extended_json.dumps({"e": event, "id": document_id, **details}) + b"\n"
        if self._handle is None:
            self._handle = open_for_append(self.path)
        append_line(self._handle, self.path, line)

    def close(self) -> None:
        """Close the file and keep it."""
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None


def open_for_append(path: Path) -> int:
    """Open *path*, or create it with mode 0600, and return the descriptor; first end a line that was truncated."""
    with explained(f"{path} cannot be written", SPACE):
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o600)
        size = os.fstat(handle).st_size
        if size and os.pread(handle, 1, size - 1) != b"\n":
            os.write(handle, b"\n")
    return handle


def append_line(handle: int, path: Path, line: bytes) -> None:
    """Append *line* to the file *path*, open as *handle*, in one ``write``."""
    try:  # without ``explained``, because each document has several lines
        written = os.write(handle, line)
    except OSError as exc:
        raise StateDirectoryError(f"{path} cannot be written ({exc.strerror}); {SPACE}, then run again.") from exc
    if written != len(line):
        raise StateDirectoryError(f"{path} could only be written in part (disk full?); free space, then run again.")


def replay_journal(path: Path) -> dict[bytes, JournalEntry]:
    """Return the entries of the journal at *path* by ``id_key``; a missing journal is empty, torn lines are ignored."""
    entries: dict[bytes, JournalEntry] = {}
    with explained(f"{path} cannot be read"), contextlib.suppress(FileNotFoundError), open(path, "rb") as file:
        for line in file:
            with contextlib.suppress(ValueError, KeyError, TypeError):
                _apply(entries, extended_json.loads(line))
    return entries


def _apply(entries: dict[bytes, JournalEntry], event: dict[str, Any]) -> None:
    entry = entries.setdefault(extended_json.id_key(event["id"]), JournalEntry())
    match event["e"]:
        case "started":
            entry.processing += 1
            entry.verdict = None  # --retry-failed processes it again
        case "asked":
            entry.processing -= 1
            entry.waiting += 1
        case "released":
            entry.waiting -= 1
        case "answered":
            entry.result, entry.verdict = event["result"], None
        case "skipped" | "failed":
            is_final, is_skipped = event.get("is_final") is True, event["e"] == "skipped"
            entry.verdict = Verdict(Reason(event["reason"]), str(event["problem"]), is_final, is_skipped)

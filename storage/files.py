"""Atomic file replacement and the directory lock: a crash or power cut leaves the old content or the new one."""

from __future__ import annotations

import contextlib
import os
import secrets
from pathlib import Path

from filelock import FileLock, Timeout

from error_handler import DirectoryLockedError, StateDirectoryError


def replace_file(path: Path, content: bytes) -> None:
    """Make *content* the content of *path*, durably, with mode 0600.

    Write a temporary file in the same folder, fsync it, rename it over *path*, then fsync the folder, without which
    a power cut may undo the rename.

    Raises:
        StateDirectoryError: The disk is full, or the folder is not writable. The old content stays.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        try:
            handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
            with open(handle, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(handle)
            os.replace(temporary, path)
        except OSError:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise
        sync_folder(path.parent)
    except OSError as exc:
        raise StateDirectoryError(
            f"{path} cannot be written ({exc.strerror}); free space or fix the permissions, then run again."
        ) from exc


def move_file(path: Path, target: Path) -> None:
    """Move *path* to *target* in another folder of the same disk, durably.

    Raises:
        StateDirectoryError: A folder does not allow it; the file has not moved.
    """
    try:
        os.rename(path, target)
        sync_folder(target.parent)
        sync_folder(path.parent)
    except OSError as exc:
        raise StateDirectoryError(
            f"{path} cannot be moved to {target.parent} ({exc.strerror}); fix the permissions, then run again."
        ) from exc


def sync_folder(folder: Path) -> None:
    """Make the renames and removals in *folder* durable."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove_file(path: Path) -> None:
    """Remove *path*, if it exists.

    Raises:
        StateDirectoryError: The folder does not allow it.
    """
    try:
        path.unlink(missing_ok=True)
    except OSError as exc:
        raise StateDirectoryError(
            f"{path} cannot be removed ({exc.strerror}); fix the permissions, then run again."
        ) from exc


class DirectoryLock:
    """The lock of *directory*: a file ``.lock`` in it."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._lock = FileLock(directory / ".lock", timeout=0, mode=0o600)

    def acquire(self, remedy: str) -> None:
        """Take the lock without waiting; *remedy* is the end of the message if another process holds it.

        Raises:
            DirectoryLockedError: Another process holds it.
            StateDirectoryError: The directory does not allow a lock.
        """
        try:
            self._lock.acquire()
        except Timeout as exc:
            raise DirectoryLockedError(f"another worker is using {self._directory}; {remedy}") from exc
        except OSError as exc:
            raise StateDirectoryError(
                f"{self._directory} cannot be locked ({exc.strerror}); fix its permissions, then run again."
            ) from exc

    def release(self) -> None:
        """Release the lock, if it is held."""
        self._lock.release()

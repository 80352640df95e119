"""One worker per directory: a lock that the kernel releases when its holder dies."""

from __future__ import annotations

from pathlib import Path

from filelock import FileLock, Timeout

from error_handler import DirectoryLockedError, StateDirectoryError


class DirectoryLock:
    """The lock of *directory*, a file ``.lock`` in it."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._lock = FileLock(directory / ".lock", timeout=0, mode=0o600)

    def acquire(self, remedy: str) -> None:
        """Take the lock, at once or not at all; *remedy* is what to do where another process holds it.

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
                f"{self._directory} cannot be locked ({exc.strerror}); fix its rights, then run again."
            ) from exc

    def release(self) -> None:
        """Give the lock back; without it, this does nothing."""
        self._lock.release()

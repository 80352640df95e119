"""The answers of a client run that are there already: an append-only file, so that none is asked for twice.

One line per answer, in one ``write`` each, so that a killed process leaves whole lines. The first
line names the service. It is not fsynced: after a power cut its last answers are asked for again.
Memory holds only where each answer lies.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from pathlib import Path
from typing import Any

import orjson

from error_handler import ConfigurationError, DirectoryLockedError, StateDirectoryError
from storage.files import remove_file


class AnswerJournal:
    """The journal at *path*, of answers by the service at *url*; whoever makes it calls ``close``."""

    def __init__(self, path: Path, url: str) -> None:
        """Open the journal, or start one, and read what it has.

        Raises:
            DirectoryLockedError: Another run writes it.
            ConfigurationError: It holds the answers of another service.
            StateDirectoryError: It cannot be read or written.
        """
        self.path = path
        self._places: dict[bytes, tuple[int, int]] = {}
        try:
            self._handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o600)
        except OSError as exc:
            raise self._unusable(exc) from exc
        with contextlib.ExitStack() as on_error:
            on_error.callback(os.close, self._handle)
            self._lock()
            self._replay(url)
            on_error.pop_all()

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, key: bytes) -> bool:
        return key in self._places

    def keep(self, key: bytes, answer: dict[str, Any]) -> None:
        """Append *answer*.

        Raises:
            StateDirectoryError: The disk is full or gone; what was kept before stays.
        """
        self._places[key] = self._append({"key": key.hex(), "answer": answer})

    def read(self, key: bytes) -> bytes:
        """Return the answer kept for *key*, as JSON.

        Raises:
            KeyError: There is none.
        """
        offset, length = self._places[key]
        try:
            return orjson.dumps(orjson.loads(os.pread(self._handle, length, offset))["answer"])
        except (OSError, orjson.JSONDecodeError) as exc:
            raise StateDirectoryError(f"{self.path} was changed during the run; run again.") from exc

    def close(self, *, remove: bool = False) -> None:
        """Close the file, which gives the lock back; *remove* it where it is needed no more."""
        if remove:
            remove_file(self.path)
        os.close(self._handle)

    def _lock(self) -> None:
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as exc:
            raise DirectoryLockedError(f"Another run writes {self.path}; wait for its end.") from exc

    def _replay(self, url: str) -> None:
        offset, head, torn = 0, None, False
        with os.fdopen(os.dup(self._handle), "rb") as file:
            for line in file:
                try:
                    event = orjson.loads(line)
                    if head is None:
                        head = str(event["service"])
                    else:
                        event["answer"]["classification"]
                        self._places[bytes.fromhex(event["key"])] = (offset, len(line))
                except (orjson.JSONDecodeError, ValueError, KeyError, TypeError):
                    pass  # a torn line: its answer is asked for again
                offset += len(line)
                torn = not line.endswith(b"\n")
        if head is not None and head != url:
            raise ConfigurationError(
                f"{self.path} holds answers of {head}; finish that run with --url {head}, or discard them with --restart."
            )
        if torn:
            self._write(b"\n")
        if head is None:
            self._append({"service": url})

    def _append(self, event: dict[str, Any]) -> tuple[int, int]:
        line = orjson.dumps(event) + b"\n"
        self._write(line)
        return os.lseek(self._handle, 0, os.SEEK_CUR) - len(line), len(line)

    def _write(self, data: bytes) -> None:
        try:
            written = os.write(self._handle, data)
        except OSError as exc:
            raise self._unusable(exc) from exc
        if written != len(data):
            raise StateDirectoryError(
                f"{self.path} could only be written in part (disk full?); free space, then run again."
            )

    def _unusable(self, exc: OSError) -> StateDirectoryError:
        return StateDirectoryError(
            f"{self.path} cannot be written ({exc.strerror}); free space or fix the rights, then run again."
        )

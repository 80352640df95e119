"""The answers of a client run: an append-only file, so that a resumed run requests no answer twice.

One line per answer, each in one ``write``, so that a killed process leaves whole lines. The first line names the
service. The file is not fsynced: after a power failure the last answers are requested again. Memory holds only the
position of each answer.
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
    """The journal at *path* with the answers of the service at *url*; the caller closes it."""

    def __init__(self, path: Path, url: str) -> None:
        """Open or create the journal and read its answers.

        Raises:
            DirectoryLockedError: Another run has it open.
            ConfigurationError: It holds the answers of another service.
            StateDirectoryError: It cannot be read or written.
        """
        self.path = path
        self._spans: dict[bytes, tuple[int, int]] = {}  # offset and length by key
        with contextlib.ExitStack() as on_error:
            try:
                self._handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o600)
                on_error.callback(os.close, self._handle)
                fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as exc:
                raise DirectoryLockedError(f"Another run is using {path}; wait until it ends.") from exc
            except OSError as exc:
                raise self._unusable(exc) from exc
            self._replay(url)
            on_error.pop_all()

    def __len__(self) -> int:
        return len(self._spans)

    def __contains__(self, key: bytes) -> bool:
        return key in self._spans

    def keep(self, key: bytes, answer: dict[str, Any]) -> None:
        """Append *answer*.

        Raises:
            StateDirectoryError: The disk is full or gone; earlier answers are kept.
        """
        line = orjson.dumps({"key": key.hex(), "answer": answer}) + b"\n"
        self._write(line)
        self._spans[key] = os.lseek(self._handle, 0, os.SEEK_CUR) - len(line), len(line)

    def read(self, key: bytes) -> bytes:
        """Return the answer for *key* as JSON; raise KeyError if there is none."""
        offset, length = self._spans[key]
        try:
            return orjson.dumps(orjson.loads(os.pread(self._handle, length, offset))["answer"])
        except (OSError, orjson.JSONDecodeError) as exc:
            raise StateDirectoryError(f"{self.path} was changed during the run; run the same command again.") from exc

    def close(self, *, remove: bool = False) -> None:
        """Close the file and release its lock; *remove* deletes it."""
        if remove:
            remove_file(self.path)
        os.close(self._handle)

    def _replay(self, url: str) -> None:
        offset, head, line = 0, None, b"\n"
        with self.path.open("rb") as file:
            for line in file:
                # A torn line is skipped: its answer is requested again.
                with contextlib.suppress(orjson.JSONDecodeError, ValueError, KeyError, TypeError):
                    event = orjson.loads(line)
                    if head is None:
                        head = str(event["service"])
                    elif event["answer"]["classification"]:
                        self._spans[bytes.fromhex(event["key"])] = (offset, len(line))
                offset += len(line)
        if head is not None and head != url:
            raise ConfigurationError(
                f"{self.path} holds answers of {head}; finish that run with --url {head}, or discard them with --restart."
            )
        if not line.endswith(b"\n"):
            self._write(b"\n")
        if head is None:
            self._write(orjson.dumps({"service": url}) + b"\n")

    def _write(self, data: bytes) -> None:
        try:
            written = os.write(self._handle, data)
        except OSError as exc:
            raise self._unusable(exc) from exc
        if written != len(data):
            raise StateDirectoryError(f"{self.path} was written only in part (disk full?); free space, then run again.")

    def _unusable(self, exc: OSError) -> StateDirectoryError:
        return StateDirectoryError(
            f"Cannot write {self.path} ({exc.strerror}); free space or fix its permissions, then run again."
        )

"""JSONL files within the limits of the Batch API, written as they come: memory does not grow with their size."""

from __future__ import annotations

import base64
import hashlib
import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from error_handler import JobProcessingError, StateDirectoryError
from openai_batch.job_config import BatchConfig
from storage.files import sync_folder

BYTES_PER_TOKEN = 3.0  # on the safe side: English has about 4.5, code fewer
TOKENS_PER_MESSAGE = 4
UNFINISHED = ".part"  # what a name ends in until the file is complete


@dataclass(frozen=True, slots=True)
class ShardFile:
    """A complete file on disk; *tokens* is the estimate of its prompts."""

    path: Path
    sha256: str
    lines: int
    bytes: int
    tokens: int


def custom_id_of(run_id: str, document_id: str, attempt: int) -> str:
    """Return the id of one line: at most 64 ASCII characters, without anything of the document.

    *document_id* is canonical Extended JSON, so that 1 and "1" differ; *attempt* makes each sending its own.
    """
    digest = hashlib.sha256(document_id.encode()).digest()
    return f"{run_id}:{base64.urlsafe_b64encode(digest)[:22].decode()}:{attempt}"


def request_line(custom_id: str, endpoint: str, body: Mapping[str, Any]) -> bytes:
    """Return one line, its line end included.

    Raises:
        JobProcessingError: *body* holds what JSON cannot hold.
    """
    fields = {"custom_id": custom_id, "method": "POST", "url": endpoint, "body": body}
    try:
        return orjson.dumps(fields, option=orjson.OPT_APPEND_NEWLINE)
    except orjson.JSONEncodeError as exc:
        raise JobProcessingError(
            "the request holds what JSON cannot hold, such as half an emoji", is_final=True
        ) from exc


def estimated_tokens(body: Mapping[str, Any]) -> int:
    """Return about how many prompt tokens *body* has, rather too many than too few."""
    messages = body.get("messages", ())
    # Bytes, not characters: other scripts have up to one token for each character.
    size = sum(len(str(message.get("content", "")).encode(errors="replace")) for message in messages)
    schema = orjson.dumps(body["response_format"]) if body.get("response_format") else b""
    return int((size + len(schema)) / BYTES_PER_TOKEN) + TOKENS_PER_MESSAGE * len(messages) + 1


def require_room(line: bytes, tokens: int, config: BatchConfig) -> None:
    """Raise JobProcessingError where *line* is over a limit even if it is alone in its file."""
    limit = config.enqueued_token_limit
    if len(line) > config.max_file_bytes or (limit is not None and tokens > limit):
        raise JobProcessingError(
            f"the request has {len(line)} bytes and about {tokens} tokens, which no batch may hold; shorten the prompt",
            is_final=True,
        )


class ShardWriter:
    """Writes one file; ``add`` until ``has_room`` says no, then ``finish``, or ``discard``."""

    def __init__(self, folder: Path, config: BatchConfig) -> None:
        """Open a temporary file in *folder*, mode 0600.

        Raises:
            StateDirectoryError: The folder is not writable.
        """
        self._folder = folder
        self._config = config
        self._path = folder / f"{secrets.token_hex(8)}{UNFINISHED}"
        self._digest = hashlib.sha256()
        self.lines = self.bytes = self.tokens = 0
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            handle = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        except OSError as exc:
            raise self._unwritable(exc) from exc
        self._file = os.fdopen(handle, "wb", buffering=1 << 20)

    def has_room(self, line: bytes, tokens: int) -> bool:
        """Whether *line* still fits; an empty file takes any."""
        config = self._config
        limit = config.enqueued_token_limit
        return self.lines == 0 or (
            self.lines < config.max_lines
            and self.bytes + len(line) <= config.max_file_bytes
            and (limit is None or self.tokens + tokens <= limit)
        )

    def add(self, line: bytes, tokens: int) -> None:
        """Append *line*, which has room.

        Raises:
            StateDirectoryError: The disk is full.
        """
        try:
            self._file.write(line)
        except OSError as exc:
            raise self._unwritable(exc) from exc
        self._digest.update(line)
        self.lines += 1
        self.bytes += len(line)
        self.tokens += tokens

    def finish(self, name: str) -> ShardFile:
        """Make the file durable under *name*, in which ``{sha256}`` stands for the first 16 digits of its hash.

        Raises:
            StateDirectoryError: The disk is full; nothing of that name is there.
        """
        sha256 = self._digest.hexdigest()
        path = self._folder / name.replace("{sha256}", sha256[:16])
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            os.replace(self._path, path)
            sync_folder(self._folder)
        except OSError as exc:
            raise self._unwritable(exc) from exc
        return ShardFile(path, sha256, self.lines, self.bytes, self.tokens)

    def discard(self) -> None:
        """Throw the file away; after ``finish`` this does nothing."""
        self._file.close()
        self._path.unlink(missing_ok=True)

    def _unwritable(self, exc: OSError) -> StateDirectoryError:
        return StateDirectoryError(
            f"{self._folder} cannot be written ({exc.strerror}); free space or fix the rights, then run again."
        )

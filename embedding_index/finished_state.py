"""What tells whether ``chroma/`` is whole, without opening it: the marker, and the file ``generation``.

ChromaDB's graph carries no checksum: a damaged one answers wrongly, or ends the process that loads it (SIGSEGV). So
``generation`` holds the SHA-256 of every file of the finished state, and nothing is opened that differs.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

from embedding_index.items import ModelIdentity
from error_handler import VectorStoreError
from storage.files import remove_file, replace_file

CHROMA = "chroma"
MARKER = "chroma.unfinished"
GENERATION = "generation"


@dataclass(frozen=True, slots=True)
class FinishedState:
    """One finished state of the index.

    *generation* grows with each; *token* tells two of one number apart, where the folder was made anew. *counts* is the
    vectors of each kind, *files* the SHA-256 of each file by its path in ``chroma/``, *chromadb* the version that wrote.
    *has_remains*: the files still have what was deleted or replaced.
    """

    generation: int
    identity: ModelIdentity
    chromadb: str
    counts: Mapping[str, int]
    files: Mapping[str, str]
    token: str = field(default_factory=lambda: secrets.token_hex(8))
    has_remains: bool = False

    def is_content_of(self, other: FinishedState | None) -> bool:
        """Whether both are the same vectors; the files may differ, since opening changes them."""
        return other is not None and (self.generation, self.token) == (other.generation, other.token)


def read_state(folder: Path) -> FinishedState | None:
    """Return the last finished state of *folder*, None where there is none or it cannot be understood.

    Raises:
        VectorStoreError: The file cannot be read.
    """
    content = _read(folder / GENERATION)
    try:
        fields = json.loads(content or "null")
        return FinishedState(**{**fields, "identity": ModelIdentity(**fields["identity"])})
    except (ValueError, TypeError, KeyError):
        return None


def write_state(folder: Path, state: FinishedState) -> None:
    """Record *state*, durably.

    Raises:
        StateDirectoryError: The folder does not allow it; the last state stands.
    """
    replace_file(folder / GENERATION, json.dumps(asdict(state)).encode())


def set_marker(folder: Path, identity: ModelIdentity) -> None:
    """Say, durably, that ``chroma/`` is being written with vectors of *identity*.

    Raises:
        StateDirectoryError: The folder does not allow it.
    """
    replace_file(folder / MARKER, json.dumps(asdict(identity)).encode())


def remove_marker(folder: Path) -> None:
    """Say that ``chroma/`` is what ``generation`` says.

    Raises:
        StateDirectoryError: The folder does not allow it.
    """
    remove_file(folder / MARKER)


def remove_unfinished_writes(folder: Path) -> None:
    """Remove what a process that was killed left of a file that it had not given its name yet."""
    for name in (GENERATION, MARKER):
        for path in folder.glob(f".{name}.*.tmp"):
            with suppress(OSError):
                path.unlink()


def is_unfinished(folder: Path) -> bool:
    """Whether somebody is writing ``chroma/``, or was killed while writing."""
    return (folder / MARKER).exists()


def unfinished_identity(folder: Path) -> ModelIdentity | None:
    """Return whose vectors the marker says are being written; None without a marker that can be read."""
    try:
        return ModelIdentity(**json.loads(_read(folder / MARKER) or "null"))
    except (ValueError, TypeError):
        return None


def file_hashes(chroma: Path, *, sync: bool = False) -> dict[str, str]:
    """Return the SHA-256 of each file under *chroma* by its relative path; with *sync*, make them durable first.

    Raises:
        VectorStoreError: A file cannot be read.
    """
    hashes = {}
    try:
        for parent, _, names in os.walk(chroma):
            for name in sorted(names):
                path = Path(parent, name)
                with path.open("rb") as file:
                    if sync:
                        os.fsync(file.fileno())
                    hashes[str(path.relative_to(chroma))] = hashlib.file_digest(file, "sha256").hexdigest()
            if sync:
                handle = os.open(parent, os.O_RDONLY | os.O_DIRECTORY)
                try:
                    os.fsync(handle)
                finally:
                    os.close(handle)
    except OSError as exc:
        raise VectorStoreError(f"{chroma} cannot be read ({exc.strerror}); fix its rights, then run again.") from exc
    return hashes


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return None
    except OSError as exc:
        raise VectorStoreError(f"{path} cannot be read ({exc.strerror}); fix its rights, then run again.") from exc

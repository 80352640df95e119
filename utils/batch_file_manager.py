"""The local files of one worker: batches in work, failed documents, completed batches.

::

    batch_files/
        .lock                                   held while a worker runs (released by the kernel)
        checkpoint.json                         contiguous low-water mark, counts, job id
        pending/batch_001_pending.json          a batch in work, and batch_001_pending.journal beside it
        retry/batch_001_retry_queue.json        failed documents that get another round
        quarantine/batch_001_quarantine.json    failed documents that get none
        completed/batch_001_completed.json      ids and counts, no text
        progress/                               written by worker.progress

All are Extended JSON with mode 0600 in folders with mode 0700. MongoDB is the source of truth; these files record
what a crash interrupted, and keep results that could not be written yet.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import orjson

from error_handler import ConfigurationError, StateDirectoryError
from storage import extended_json
from storage.files import (
    UNKNOWN_UUID,
    BatchJournal,
    DirectoryLock,
    JournalEntry,
    explained,
    remove_file,
    replace_file,
    replay_journal,
)
from utils.failed_documents import DamagedFileError, FailedDocument, content_of, read_failures, round_journal

logger = logging.getLogger(__name__)

FOLDERS = ("pending", "retry", "quarantine", "completed", "progress")
_NUMBER = re.compile(r"batch_(\d{3,})_")

T = TypeVar("T")
FailureKind = Literal["retry", "quarantine"]
FAILURE_KINDS: tuple[FailureKind, ...] = get_args(FailureKind)


@dataclass(slots=True)
class BatchFile:
    """A batch on disk: new documents (``pending/``) or failed ones for another round (``retry/``)."""

    number: int
    path: Path
    journal: BatchJournal
    documents: list[dict[str, Any]]
    size: int = 0  # bytes on disk
    failures: dict[bytes, FailedDocument] = field(default_factory=dict)  # by extended_json.id_key
    replay: dict[bytes, JournalEntry] = field(default_factory=dict)  # by extended_json.id_key

    @property
    def keyed(self) -> list[tuple[bytes, orjson.Fragment, dict[str, Any]]]:
        """The documents, each with the ``id_key`` of its id, and the id as ``extended_json.written``."""
        ids = [document.get("_id") for document in self.documents]
        return list(zip(map(extended_json.id_key, ids), map(extended_json.written, ids), self.documents, strict=True))

    @property
    def name(self) -> str:
        """``batch_001``: its name in logs and in sibling files."""
        return f"batch_{self.number:03d}"


class BatchFiles:
    """The files under *directory*; missing folders are created.

    Raises:
        StateDirectoryError: The directory is a symbolic link, or cannot be created or read.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.lost_failures = False  # a corrupt retry file was renamed: only the status in MongoDB is still failed
        self._lock = DirectoryLock(directory)
        with explained(f"{directory} cannot be used", "fix the permissions or give another --batch-files-dir"):
            for folder in (directory, *(directory / name for name in FOLDERS)):
                if folder.is_symlink():
                    raise StateDirectoryError(
                        f"{folder} is a symbolic link; replace it with a real folder, or name another directory with --batch-files-dir."
                    )
                folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            known = (path for folder in FOLDERS for path in (directory / folder).glob("batch_*"))
            self._last_number = max((_number(path) or 0 for path in known), default=0)

    def acquire(self) -> None:
        """Lock the directory for this process; the kernel releases the lock when the process ends.

        Raises:
            DirectoryLockedError: Another worker holds it.
        """
        self._lock.acquire("wait for it, or name another directory with --batch-files-dir.")
        for stale in self.directory.rglob(".*.tmp"):
            remove_file(stale)
        for journal in self.directory.glob("*/batch_*.journal"):
            if not journal.with_name(journal.name.partition(".")[0] + ".json").exists():
                remove_file(journal)  # of a settled batch: the crash came between the two removals

    def release(self) -> None:
        """Release the lock, if it is held."""
        self._lock.release()

    def save_pending(self, documents: list[dict[str, Any]]) -> BatchFile:
        """Save new *documents* (at least one) as the next batch, durably, before any of them is processed."""
        self._last_number += 1
        batch = _batch_at(self._path("pending", self._last_number), documents)
        now = datetime.now(UTC)
        content = {
            "batch_id": batch.name,
            "created_at": now,
            "first_object_id": documents[0].get("_id"),
            "last_object_id": documents[-1].get("_id"),
            "conversation_count": len(documents),
            "conversations": [
                {"_id": document.get("_id"), "conversation_data": document, "created_at": now} for document in documents
            ],
        }
        data = extended_json.dumps(content)
        batch.size = len(data)
        replace_file(batch.path, data)
        return batch

    def save_failed(self, kind: FailureKind, number: int, failures: Iterable[FailedDocument]) -> None:
        """Add *failures* to the file of batch *number*; they replace entries of the same documents."""
        path = self._path(kind, number)
        entries = {entry.key: entry for entry in (*(self._read(path, read_failures) or ()), *failures)}
        self.write_failures(path, entries.values())

    def save_completed(self, batch: BatchFile, counts: dict[str, int], document_ids: list[Any]) -> None:
        """Record that every document of *batch* is settled, then remove its pending file and journal."""
        content = {
            "batch_id": batch.name,
            "completed_at": datetime.now(UTC),
            "conversation_count": len(document_ids),
            **counts,
            "conversation_ids": document_ids,
        }
        replace_file(self._path("completed", batch.number), extended_json.dumps(content))
        batch.journal.close()
        remove_file(batch.path)
        remove_file(batch.journal.path)  # last: a journal without its batch is ignored

    def finish_retry(self, batch: BatchFile, failures: Iterable[FailedDocument]) -> None:
        """Write *failures* to a finished retry file, or remove the file if there are none."""
        self.write_failures(batch.path, failures)
        batch.journal.close()
        remove_file(batch.journal.path)

    def load_pending(self) -> Iterator[BatchFile]:
        """Yield the batches that a crash or stop interrupted, and files that an operator moved to ``pending/``.

        A corrupt file is renamed to ``.corrupt`` and logged; its documents are still pending in MongoDB.
        """
        for path in batch_paths(self.directory / "pending"):
            batch = self._read(path, self._parse_pending)
            if batch is not None:
                yield batch

    def load_retry(self) -> Iterator[BatchFile]:
        """Yield each retry file as a batch whose ``failures`` hold the entries."""
        for path in batch_paths(self.directory / "retry"):
            failures = self._read(path, read_failures)
            if failures:
                yield self._failed_batch(path, failures)
            elif path.exists():  # a crash during its removal, before that of its journal
                remove_file(path)
                self._remove_rounds(path)

    def failure_files(self, kind: FailureKind) -> Iterator[tuple[Path, list[FailedDocument]]]:
        """Yield the files of *kind* in the order of their numbers; a corrupt one is set aside. Needs the lock."""
        for path in batch_paths(self.directory / kind):
            yield path, self._read(path, read_failures) or []

    def failed_keys(self, *kinds: FailureKind) -> set[bytes]:
        """Return the ``id_key`` of each document in the files of *kinds*; by default in both."""
        files = (entries for kind in kinds or FAILURE_KINDS for _, entries in self.failure_files(kind))
        return {entry.key for entries in files for entry in entries}

    def new_path(self, kind: str, suffix: str) -> Path:
        """Return a path in the folder *kind* with a new batch number."""
        self._last_number += 1
        return self.directory / kind / f"batch_{self._last_number:03d}_{suffix}.json"

    def write_failures(self, path: Path, failures: Iterable[FailedDocument]) -> None:
        """Write *failures* to *path* durably, or remove the file if there are none."""
        if lines := [extended_json.dumps(entry.as_dict()) for entry in failures]:
            replace_file(path, b"[\n" + b",\n".join(lines) + b"\n]")  # whatever damages a line spares the others
        elif path.exists():
            replace_file(path, b"[]")  # if a power cut undoes the removal, the file is empty
            remove_file(path)

    def require_source(self, source: str) -> None:
        """Check that unfinished work belongs to *source*, as DocumentStore.identity returns it.

        Raises:
            ConfigurationError: The directory has pending or retry files of another source.
        """
        other = (self.read_state("checkpoint.json") or {}).get("source")
        has_work = any(batch_paths(self.directory / kind) for kind in ("pending", "retry"))
        if has_work and other is not None and not is_same_source(other, source):
            raise ConfigurationError(
                f"{self.directory} holds unfinished work of {other}, and this run is for {source}; finish that run first, "
                "or name another directory with --batch-files-dir."
            )

    def read_state(self, name: str) -> dict[str, Any] | None:
        """Return the object in *name* (``checkpoint.json``); None if it is missing, or was corrupt and set aside."""
        content = self._read(self.directory / name, _value)
        return content if isinstance(content, dict) else None

    def write_state(self, name: str, content: dict[str, Any]) -> None:
        """Replace *name* with *content*."""
        replace_file(self.directory / name, extended_json.dumps(content))

    def _parse_pending(self, path: Path) -> BatchFile | None:
        data = content_of(path)
        if data is None:
            return None
        if data.lstrip().startswith(b"["):  # a retry or quarantine file that an operator moved here
            return self._failed_batch(path, read_failures(path), fresh=True)
        content = extended_json.loads(data)
        batch = _batch_at(path, [_document(entry) for entry in content["conversations"]])
        if not batch.documents or content["conversation_count"] != len(batch.documents):
            raise ValueError("the count does not match")
        batch.size = len(data)
        batch.replay = replay_journal(batch.journal.path)
        return batch

    def _failed_batch(self, path: Path, failures: list[FailedDocument], *, fresh: bool = False) -> BatchFile:
        documents = [entry.conversation_data or {"_id": entry.conversation_id} for entry in failures]
        batch = BatchFile(_number(path) or 0, path, BatchJournal(round_journal(path, failures)), documents)
        batch.size = path.stat().st_size
        self._remove_rounds(path, but=batch.journal.path)
        for entry in failures:
            if fresh:
                entry.retry_count = 0
            batch.failures[entry.key] = entry
        batch.replay = replay_journal(batch.journal.path)
        return batch

    def _remove_rounds(self, path: Path, but: Path | None = None) -> None:
        for earlier in path.parent.glob(f"{path.stem}.*.journal"):
            if earlier != but:
                remove_file(earlier)

    def _path(self, kind: str, number: int) -> Path:
        suffix = "retry_queue" if kind == "retry" else kind
        return self.directory / kind / f"batch_{number:03d}_{suffix}.json"

    def _read(self, path: Path, parse: Callable[[Path], T]) -> T | None:
        """Return what *parse* makes of *path*; rename a corrupt file, and go on with its readable entries, if any."""
        survivors: list[FailedDocument] = []
        try:
            return parse(path)
        except (KeyError, TypeError, ValueError) as exc:
            aside = path.with_name(path.name + ".corrupt")
            if isinstance(exc, DamagedFileError):
                survivors = exc.survivors
                self.lost_failures |= path.parent.name != "quarantine"
        with explained(f"{path} is corrupt and cannot be renamed"):
            if survivors:  # at each moment one of the files holds them
                replace_file(aside, path.read_bytes())
                self.write_failures(path, survivors)
            else:
                path.replace(aside)
        logger.error(
            "%s is corrupt and was renamed to %s; %d readable entries of it are kept, and a sweep or --retry-failed finds the "
            "other documents in MongoDB",
            *(path.name, aside.name, len(survivors)),
        )
        return parse(path) if survivors else None


def is_same_source(one: str, other: str) -> bool:
    """Return whether two identities of DocumentStore may be of one source; without a UUID the names decide."""
    unknown = f"({UNKNOWN_UUID})"
    if unknown in (one[-len(unknown) :], other[-len(unknown) :]):
        return one.rpartition(" (")[0] == other.rpartition(" (")[0]
    return one == other


def batch_paths(folder: Path) -> list[Path]:
    """Return the batch files in *folder* in the order of their numbers, without links and other files."""
    paths = [path for path in folder.glob("batch_*.json") if _number(path) is not None and not path.is_symlink()]
    return sorted(paths, key=lambda path: (_number(path) or 0, path))


def _value(path: Path) -> Any:
    data = content_of(path)
    value = None if data is None else extended_json.loads(data)
    if data is not None and value is None:
        raise ValueError("null")  # not the same as no file
    return value


def _batch_at(path: Path, documents: list[dict[str, Any]]) -> BatchFile:
    return BatchFile(_number(path) or 0, path, BatchJournal(path.with_suffix(".journal")), documents)


def _document(entry: dict[str, Any]) -> dict[str, Any]:
    document = entry["conversation_data"]
    if not isinstance(document, dict):
        raise TypeError("not a document")
    extended_json.id_key(document["_id"])
    return document


def _number(path: Path) -> int | None:
    found = _NUMBER.match(path.name)
    return int(found.group(1)) if found else None

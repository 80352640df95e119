"""Failed documents for the page: in the files of a worker that this machine shares, or as MongoDB knows them."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol

from aggregator import aggregate_conversation
from config import Settings
from domain.conversation import Turn
from domain.text import counted, one_line
from error_handler import ConfigurationError, SkippedDocumentError
from mongo_client import DocumentStore
from storage import extended_json
from storage.extended_json import id_text
from utils.batch_file_manager import BatchFiles
from utils.failed_documents import FailedDocument
from worker.failed_status import NO_REASON, FailedInMongoDB, FailedStatus
from worker.quarantine import discard, list_failed, requeue

SHOWN = 100  # documents in the list
ERROR_CHARACTERS = 600


@dataclass(frozen=True, slots=True)
class FailedRow:
    """A failed document without its text. *id_json* is its ``_id`` as canonical Extended JSON, *tries* a phrase."""

    id_json: str
    id_text: str
    reason: str
    failed_at: datetime | None = None
    tries: str = ""
    error: str = ""


@dataclass(frozen=True, slots=True)
class FailedList:
    """The *rows* that failed last, at most SHOWN; *counts* of all by reason; names of *unreadable* files."""

    rows: list[FailedRow]
    counts: dict[str, int]
    unreadable: Sequence[str] = field(default_factory=list)

    @property
    def total(self) -> int:
        """The number of all failed documents."""
        return sum(self.counts.values())


@dataclass(frozen=True, slots=True)
class FailedDetail:
    """One failed document. *labels* are those of an answer that could not be stored; *turns* None if there is no text."""

    row: FailedRow
    labels: dict[str, Any]
    turns: Sequence[Turn] | None


@dataclass(frozen=True, slots=True)
class Selected:
    """Failed documents by *ids* (Extended JSON), or by *reason*; all of them if both are None."""

    ids: tuple[str, ...] | None = None
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class Outcome:
    """How many documents were *done*, and how many *stayed* because their batch is not finished."""

    done: int
    stayed: int = 0


class Quarantine(Protocol):
    """What the page can do with failed documents. Errors are TriadErrors with a remedy."""

    can_drop: bool
    place: str

    async def listed(self, reason: str | None) -> FailedList:
        """Return the failed documents; *reason* None returns all."""

    async def detail(self, id_json: str) -> FailedDetail | None:
        """Return one failed document; None if it is not there any more."""

    async def replay(self, selected: Selected) -> Outcome:
        """Give *selected* documents a full set of attempts."""

    async def drop(self, selected: Selected, /) -> Outcome:
        """Remove *selected* documents from quarantine for good."""


class QuarantineFiles:
    """The quarantine in the *directory* of a worker, as ``cli.py quarantine`` sees it; changes need its lock."""

    can_drop = True

    def __init__(self, directory: Path) -> None:
        self.place = f"the quarantine of {directory.name}"
        self._directory = directory

    async def listed(self, reason: str | None) -> FailedList:
        """Return the documents in quarantine. Needs no lock."""
        found = await asyncio.to_thread(list_failed, self._directory, "quarantine")
        counts = Counter(str(entry.reason) for entry in found.entries)
        rows = [_row(entry) for entry in found.entries if reason is None or str(entry.reason) == reason]
        return FailedList(rows[:SHOWN], dict(counts.most_common()), found.unreadable)

    async def detail(self, id_json: str) -> FailedDetail | None:
        """Return the entry of one document."""
        found = await asyncio.to_thread(list_failed, self._directory, "quarantine")
        entry = next((one for one in found.entries if _canonical(one.conversation_id) == id_json), None)
        if entry is None:
            return None
        labels = (entry.classification_result or {}).get("classification") or {}
        return FailedDetail(_row(entry), labels, _turns(entry.conversation_data))

    async def replay(self, selected: Selected) -> Outcome:
        """Move documents to ``pending/``; the next run retries them.

        Raises:
            DirectoryLockedError: A worker uses the directory.
        """
        return await asyncio.to_thread(self._move, selected, is_replay=True)

    async def drop(self, selected: Selected) -> Outcome:
        """Remove documents from quarantine. Their status in MongoDB stays failed.

        Raises:
            DirectoryLockedError: A worker uses the directory.
        """
        return await asyncio.to_thread(self._move, selected, is_replay=False)

    def _move(self, selected: Selected, *, is_replay: bool) -> Outcome:
        list_failed(self._directory, "quarantine")  # BatchFiles would create a directory that is missing
        files = BatchFiles(self._directory)
        files.acquire()
        try:
            keys = {
                entry.key
                for entry in list_failed(self._directory, "quarantine").entries
                if (selected.ids is None or _canonical(entry.conversation_id) in selected.ids)
                and (selected.reason is None or str(entry.reason) == selected.reason)
            }
            done = (requeue if is_replay else discard)(files, keys) if keys else 0
            return Outcome(done, len(keys) - done)
        finally:
            files.release()


class QuarantineInMongoDB:
    """The documents whose status is failed. There is nothing to drop."""

    can_drop = False
    place = "MongoDB"

    def __init__(self, store: DocumentStore, settings: Settings) -> None:
        self._store = store
        self._failed = FailedInMongoDB(store, settings)

    async def listed(self, reason: str | None) -> FailedList:
        """Return the documents with the status failed."""
        newest, counts = await asyncio.gather(self._failed.newest(reason, SHOWN), self._failed.counts())
        return FailedList([_status_row(one) for one in newest], counts)

    async def detail(self, id_json: str) -> FailedDetail | None:
        """Return one failed document."""
        document_id = _id_of(id_json)
        found = await self._store.read_documents("failed", [document_id])
        if not found:
            return None
        reason = found[0].get(self._store.states.reason)
        shown = NO_REASON if reason is None else one_line(str(reason), ERROR_CHARACTERS)
        row = FailedRow(id_json, id_text(document_id), shown)
        return FailedDetail(row, {}, _turns(found[0]))

    async def replay(self, selected: Selected) -> Outcome:
        """Make documents pending again, if they are still failed."""
        ids = None if selected.ids is None else [_id_of(text) for text in selected.ids]
        return Outcome(await self._failed.retry(ids, selected.reason))

    async def drop(self, _selected: Selected, /) -> Outcome:
        """Raise ConfigurationError: only a worker's files have a quarantine."""
        raise ConfigurationError(
            "Nothing can be dropped without the files of a worker; set DASHBOARD_BATCH_FILES_DIR, or use cli.py quarantine."
        )


def open_quarantine(store: DocumentStore, settings: Settings, directory: Path | None) -> Quarantine:
    """Return the quarantine in *directory*; None means that of MongoDB."""
    return QuarantineInMongoDB(store, settings) if directory is None else QuarantineFiles(directory)


def _row(entry: FailedDocument) -> FailedRow:
    return FailedRow(
        id_json=_canonical(entry.conversation_id),
        id_text=id_text(entry.conversation_id),
        reason=str(entry.reason),
        failed_at=entry.failed_at,
        tries=counted(entry.retry_count, "round"),
        error=one_line(entry.error, ERROR_CHARACTERS),
    )


def _status_row(failed: FailedStatus) -> FailedRow:
    return FailedRow(
        id_json=_canonical(failed.document_id),
        id_text=id_text(failed.document_id),
        reason=one_line(failed.reason, ERROR_CHARACTERS),
        failed_at=failed.failed_at,
        tries="" if failed.attempts is None else counted(failed.attempts, "attempt"),
    )


def _canonical(document_id: Any) -> str:
    return extended_json.canonical(document_id)


def _id_of(text: str) -> Any:
    try:
        return extended_json.loads(text)
    except ValueError as exc:
        raise ConfigurationError("An id is not Extended JSON; reload the page and try again.") from exc


def _turns(document: dict[str, Any] | None) -> Sequence[Turn] | None:
    with suppress(SkippedDocumentError):
        return aggregate_conversation(document).turns if document is not None else None
    return None

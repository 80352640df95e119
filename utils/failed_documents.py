"""The entries of the retry queue and the quarantine, and how their files are read, also damaged ones."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from error_handler import Reason
from storage import extended_json
from storage.files import explained

FailureStatus = Literal["llm_failed", "write_failed"]


@dataclass(slots=True)
class FailedDocument:
    """An entry of the retry queue or of the quarantine.

    *retry_count* is the number of retry rounds so far; 0 after the first failure. *classification_result* is the
    finished result if only its write failed, else None.
    """

    conversation_id: Any
    status: FailureStatus
    conversation_data: dict[str, Any] | None
    retry_count: int
    reason: Reason
    error: str
    classification_result: dict[str, Any] | None = None
    failed_at: datetime = field(default_factory=lambda: datetime.now(UTC))

    @property
    def key(self) -> bytes:
        """The ``id_key`` of the document."""
        return extended_json.id_key(self.conversation_id)

    def as_dict(self) -> dict[str, Any]:
        """Return the entry as the file stores it."""
        return {entry.name: getattr(self, entry.name) for entry in fields(self)} | {"reason": str(self.reason)}

    @classmethod
    def from_dict(cls, entry: dict[str, Any]) -> FailedDocument:
        """Return the entry stored as *entry*; raise KeyError, TypeError or ValueError if it is not one."""
        status: FailureStatus = "write_failed" if entry["status"] == "write_failed" else "llm_failed"
        data, result = entry["conversation_data"], entry.get("classification_result")
        if not isinstance(data, dict | None) or not isinstance(result, dict | None):
            raise TypeError("not a document")
        extended_json.id_key(entry["conversation_id"])
        reason = Reason(entry.get("reason", Reason.TRANSPORT))
        at = entry.get("failed_at")
        at = at if isinstance(at, datetime) else datetime.now(UTC)
        count = int(entry.get("retry_count", 0))
        return cls(entry["conversation_id"], status, data, count, reason, str(entry.get("error")), result, at)


class DamagedFileError(ValueError):
    """A retry or quarantine file has entries that cannot be read; *survivors* are the others."""

    def __init__(self, survivors: list[FailedDocument]) -> None:
        super().__init__("not a file of failed documents")
        self.survivors = survivors


def read_failures(path: Path) -> list[FailedDocument]:
    """Return the entries of a retry or quarantine file; none if the file is gone.

    Needs no lock: files are replaced as a whole, so this is safe beside a running worker.

    Raises:
        DamagedFileError: Not all of it can be read.
        StateDirectoryError: The file cannot be read.
    """
    data = content_of(path)
    if data is None:
        return []
    survivors: list[FailedDocument] = []
    try:
        content = extended_json.loads(data)
        if not isinstance(content, list):
            raise DamagedFileError([])
        return [FailedDocument.from_dict(entry) for entry in content]
    except (KeyError, TypeError, AttributeError, ValueError) as exc:
        for row in extended_json.rows(data):
            with suppress(KeyError, TypeError, AttributeError, ValueError):
                survivors.append(FailedDocument.from_dict(extended_json.loads(row)))
        raise DamagedFileError(survivors) from exc


def round_journal(path: Path, failures: list[FailedDocument]) -> Path:
    """Return the journal of the next round of *failures*, the content of *path*.

    Each round has its own: events of a finished round must not count against the next.
    """
    return path.with_suffix(f".{len(failures)}x{sum(entry.retry_count for entry in failures)}.journal")


def content_of(path: Path) -> bytes | None:
    """Return the content of *path*; None if it is gone."""
    with explained(f"{path} cannot be read"):
        try:
            return path.read_bytes()
        except FileNotFoundError:
            return None

"""Failed documents as MongoDB knows them, for programs that do not share the files of a worker.

A run that is in progress may go on meanwhile: a document is only set back if it is still failed, its lease and its result
are looked at again before the model is asked, and the results have a unique index.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from config import Settings
from mongo_client import DURABLE, DocumentStore, call_repeatedly
from storage.extended_json import Document
from storage.selection import StateFields
from utils.retry_utils import RetryPolicy

NO_REASON = "no reason"  # of documents whose status another program has set


@dataclass(frozen=True, slots=True)
class FailedStatus:
    """A source document that failed. *attempts* is None for conversations, *failed_at* for single queries."""

    document_id: Any
    reason: str
    failed_at: datetime | None
    attempts: int | None


class FailedInMongoDB:
    """The failed documents of the source collection. Every method raises StoreError if MongoDB fails."""

    def __init__(self, store: DocumentStore, settings: Settings) -> None:
        self._store, self._states = store, store.states
        self._source = store.database.get_collection(settings.source_collection, write_concern=DURABLE)
        self._policy = RetryPolicy(settings.mongodb_max_retries, settings.mongodb_backoff_s)

    async def counts(self) -> dict[str, int]:
        """Return the number of failed documents by reason, the most frequent first."""
        stages: list[Document] = [
            {"$match": self._states.queries["failed"]},
            {"$group": {"_id": {"$ifNull": [f"${self._states.reason}", NO_REASON]}, "n": {"$sum": 1}}},
            {"$sort": {"n": -1, "_id": 1}},
        ]
        found = await self._store.aggregate("count the failed documents", stages)
        return {str(row["_id"]): row["n"] for row in found}

    async def newest(self, reason: str | None, limit: int) -> list[FailedStatus]:
        """Return up to *limit* failed documents, those that failed last first; *reason* None returns all reasons."""
        stages: list[Document] = [
            {"$match": _query(self._states, None, reason)},
            {"$project": dict.fromkeys((self._states.reason, self._states.processed_at, "processing_attempts"), 1)},
            {"$sort": {self._states.processed_at: -1, "_id": 1}},
            {"$limit": limit},
        ]
        return [_failed(self._states, row) for row in await self._store.aggregate("list the failed documents", stages)]

    async def retry(self, document_ids: Sequence[Any] | None = None, reason: str | None = None) -> int:
        """Make failed documents pending again, as the next run with ``--retry-failed`` would select them.

        Args:
            document_ids: None means all.
            reason: None means all.

        Returns:
            How many there were. Documents that are no longer failed are left alone.
        """
        query = _query(self._states, document_ids, reason)
        changed = await call_repeatedly(
            "set failed documents back", lambda: self._source.update_many(query, _set_back(self._states)), self._policy
        )
        return int(changed.modified_count)


def _set_back(states: StateFields) -> list[Document]:
    """Return the update that makes a document pending. A single query has no status, and none is added."""
    path = f"${states.status}"
    pending = {"$cond": [{"$eq": [path, "failed"]}, "pending", path]}
    return [{"$set": {states.status: pending}}, {"$unset": states.reason}]


def _query(states: StateFields, document_ids: Sequence[Any] | None, reason: str | None) -> Document:
    query = dict(states.queries["failed"])
    if document_ids is not None:
        query["_id"] = {"$in": list(document_ids)}
    if reason is not None:
        query[states.reason] = {"$eq": None if reason == NO_REASON else reason}
    return query


def _failed(states: StateFields, row: Document) -> FailedStatus:
    at, attempts, reason = (row.get(name) for name in (states.processed_at, "processing_attempts", states.reason))
    failed_at = at.replace(tzinfo=at.tzinfo or UTC) if isinstance(at, datetime) else None
    return FailedStatus(
        row["_id"],
        NO_REASON if reason is None else str(reason),
        failed_at,
        attempts if isinstance(attempts, int) and not isinstance(attempts, bool) else None,
    )

"""What the batch worker needs of a document store; ``mongo_client.DocumentStore`` has it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Protocol

from error_handler import StoreRejectedError

Document = dict[str, Any]
Selection = Literal["pending", "sweep", "failed", "all"]
FinalStatus = Literal["processed", "failed", "skipped"]


class Store(Protocol):
    """Pages of source documents, their leases and statuses, and the results."""

    async def ensure_source_indexes(self) -> None: ...
    async def foreign_statuses(self) -> list[str]: ...
    async def count(self, selection: Selection) -> int: ...
    async def upper_bound(self) -> list[Any]: ...
    async def read_page(
        self, selection: Selection, after: Sequence[Any], bound: Sequence[Any], limit: int
    ) -> list[Document]: ...
    async def result_keys(self, document_ids: list[Any], job_id: str | None = None) -> set[bytes]: ...
    async def write_results(self, results: list[Document], *, replace: bool) -> dict[int, StoreRejectedError]: ...
    async def mark_processing(self, document_ids: list[Any]) -> None: ...
    async def mark(
        self, document_ids: list[Any], status: FinalStatus, reason: str | None, *, queries: bool
    ) -> None: ...
    async def claim(self, document_ids: list[Any]) -> set[bytes]: ...
    async def renew_leases(self) -> None: ...
    async def release(self, document_ids: list[Any]) -> None: ...


def selection_filter(selection: Selection) -> Document:
    """Return the query for the documents of *selection*, a missing status counting as pending.

    ``sweep`` adds documents that say processing: their worker died, unless a lease says otherwise.
    Single queries have no status; theirs are ``processed`` and ``status_reason``.
    """
    undone = {"status": None, "processed": {"$ne": True}}
    if selection == "all":
        return {}
    if selection == "failed":
        return {"$or": [{"status": "failed"}, {**undone, "status_reason": {"$ne": None}}]}
    statuses = ["pending", "processing"] if selection == "sweep" else ["pending"]
    return {"$or": [{"status": {"$in": statuses}}, {**undone, "status_reason": None}]}


def range_filter(after: Sequence[Any], bound: Sequence[Any]) -> Document:
    """Return the query for ids after *after* up to *bound*, across BSON types.

    Each holds one id, or none where that side is open; ids may be null, so None cannot say so.
    """
    limits = [{"$gt": ["$_id", {"$literal": value}]} for value in after]
    limits += [{"$lte": ["$_id", {"$literal": value}]} for value in bound]
    return {"$expr": {"$and": limits}} if limits else {}


MAX_POOL_SIZE, MIN_POOL_SIZE = 20, 5  # connections of one process
CLOSE_WAIT_S = 2.0  # for the driver to end its connections
SERVER_SELECTION_MS = 10_000  # a wrong address is to be said soon; three attempts bridge half a minute

DUPLICATE_KEY = 11000
FORBIDDEN_CODES = frozenset({13, 18, 8000})
INDEX_CODES = frozenset({85, 86})
TOO_LARGE_CODES = frozenset({10334, 17419})  # a document would grow beyond 16 MiB
# Server states and time limits that pass: NotPrimary, shutdown, stepdown, host unreachable, disk full, ...
TRANSIENT_CODES = frozenset(
    {6, 7, 24, 43, 50, 64, 89, 91, 112, 189, 262, 9001, 10107, 11600, 11602, 13435, 13436, 14031}
)

SOURCE_INDEXES = ("status", "conversation_number", "last_processed_at")
RESULT_INDEXES = (
    "conversation_number",
    "processing_metadata.batch_job_id",
    "processing_metadata.processed_at",
    "classification.intent",
    "classification.topic",
    "classification.sentiment",
)


def index_sentence(code: int | None, collection: str) -> str | None:
    """Return what to say where error *code* prevented an index of *collection*; None where it is none of that kind."""
    if code == DUPLICATE_KEY:
        return (
            f"{collection} holds several results for one document, so its unique index cannot be made; find them "
            f"with db.{collection}.aggregate([{{$group: {{_id: '$source_conversation_id', n: {{$sum: 1}}}}}}, "
            "{$match: {n: {$gt: 1}}}]) and remove the surplus."
        )
    if code in INDEX_CODES:
        return (
            f"{collection} has an index on the same field with other options; compare db.{collection}.getIndexes() "
            "with docs/operations.md and drop the odd one."
        )
    return None

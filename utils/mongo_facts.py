"""Numbers and names of MongoDB that the store and the diagnosis share: limits, error codes, indexes."""

from __future__ import annotations

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

"""Numbers and names of MongoDB that the store and the diagnosis share: limits, error codes, indexes."""

from __future__ import annotations

MAX_POOL_SIZE, MIN_POOL_SIZE = 20, 5  # connections of one process
SERVER_SELECTION_MS = 10_000  # a wrong address is to be said soon; three attempts bridge half a minute

DUPLICATE_KEY = 11000
FORBIDDEN_CODES = frozenset({13, 18, 8000})
INDEX_CODES = frozenset({85, 86})
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

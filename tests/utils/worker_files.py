"""Helpers for tests of the local files of a worker."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import bson

from error_handler import Reason
from utils.batch_file_manager import BatchFile, BatchFiles
from utils.failed_documents import FailedDocument

IDS = [bson.ObjectId(), "doc0", bson.Int64(7), 1.5, None, {"a": 1}, b"\x01", datetime(2024, 5, 1, tzinfo=UTC)]
DOCUMENTS = [{"_id": value, "text": f"text of {place}"} for place, value in enumerate(IDS)]
AT = datetime(2024, 5, 1, 10, 30, tzinfo=UTC)


def failed(document_id: Any = "a", **changes: Any) -> FailedDocument:
    """Return a document that failed, with *changes* to its fields."""
    fields: dict[str, Any] = {
        "conversation_id": document_id,
        "status": "llm_failed",
        "conversation_data": {"_id": document_id, "text": "hello"},
        "retry_count": 0,
        "reason": Reason.EMPTY,
        "error": "the answer is empty",
        "failed_at": AT,
    }
    return FailedDocument(**{**fields, **changes})


def content_of(path: Path) -> Any:
    """Return the JSON in a file."""
    return json.loads(path.read_bytes())


def names(folder: Path) -> list[str]:
    """Return the sorted file names of a folder."""
    return sorted(path.name for path in folder.iterdir())


def pending(files: BatchFiles) -> list[BatchFile]:
    """Return the batches in the pending folder."""
    return list(files.load_pending())

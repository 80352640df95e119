"""Failed documents by their status in MongoDB: list, count, set back."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from pymongo.database import Database

from mongo_client import DocumentStore
from tests.review.review_site import settings_of
from worker.failed_status import NO_REASON, FailedInMongoDB

Data = Database[dict[str, Any]]
AT = datetime(2026, 5, 1, 10, 30, tzinfo=UTC)


def failed(number: int, reason: str = "timeout") -> dict[str, Any]:
    at = AT + timedelta(minutes=number)
    return {"_id": number, "status": "failed", "status_reason": reason, "last_processed_at": at, "messages": []}


QUERY = {"_id": "q", "text": "Hi", "processed": False, "processing_attempts": 2, "status_reason": "empty"}


@pytest.fixture
async def store(mongodb_uri: str, db_name: str) -> AsyncIterator[DocumentStore]:
    opened = DocumentStore(settings_of(mongodb_uri, db_name))
    yield opened
    await opened.close()


@pytest.fixture
def in_mongodb(store: DocumentStore, mongodb_uri: str, db_name: str, database: Data) -> FailedInMongoDB:
    """Return the failed documents 1 (timeout), 2 (empty), 3 (timeout) and one single query, among others."""
    others = [{"_id": 8, "status": "processed"}, {"_id": 9, "status": "skipped", "status_reason": "skipped_no_text"}]
    database["conversation_set"].insert_many([failed(1), failed(2, "empty"), failed(3), QUERY, *others])
    return FailedInMongoDB(store, settings_of(mongodb_uri, db_name))


async def test_failed_documents_are_counted_and_listed(in_mongodb: FailedInMongoDB) -> None:
    """Conversations and single queries, the newest first."""
    assert await in_mongodb.counts() == {"empty": 2, "timeout": 2}
    newest = await in_mongodb.newest(None, 3)
    assert [(one.document_id, one.attempts) for one in newest] == [(3, None), (2, None), (1, None)]
    assert newest[0].failed_at == AT + timedelta(minutes=3)
    assert [(one.document_id, one.attempts) for one in await in_mongodb.newest("empty", 9)] == [(2, None), ("q", 2)]


async def test_documents_are_set_back_as_their_shape_requires(in_mongodb: FailedInMongoDB, database: Data) -> None:
    """A conversation becomes pending; a single query loses its reason and gets no status; nothing else changes."""
    assert await in_mongodb.retry([1, "q"]) == 2
    changed = {one["_id"]: one for one in database["conversation_set"].find()}
    assert changed[1]["status"] == "pending"
    assert "status_reason" not in changed[1]
    assert changed["q"] == {name: value for name, value in QUERY.items() if name != "status_reason"}
    assert await in_mongodb.counts() == {"empty": 1, "timeout": 1}
    assert await in_mongodb.retry(reason="empty") == 1
    assert await in_mongodb.retry() == 1
    assert await in_mongodb.counts() == {}


async def test_documents_without_a_reason_are_listed_and_set_back(in_mongodb: FailedInMongoDB, database: Data) -> None:
    """Another program has set their status."""
    database["conversation_set"].insert_many([{"_id": 6, "status": "failed"}, failed(7, "") | {"status_reason": None}])
    assert (await in_mongodb.counts())[NO_REASON] == 2
    assert {one.reason for one in await in_mongodb.newest(NO_REASON, 9)} == {NO_REASON}
    assert await in_mongodb.retry(reason=NO_REASON) == 2


async def test_only_failed_documents_are_set_back(in_mongodb: FailedInMongoDB, database: Data) -> None:
    """A worker may have finished one since the page was read."""
    database["conversation_set"].update_one({"_id": 1}, {"$set": {"status": "processed"}})
    assert await in_mongodb.retry([1, 8, 9, 404]) == 0
    states = {one["_id"]: one["status"] for one in database["conversation_set"].find({"status": {"$ne": None}})}
    assert (states[1], states[8], states[9]) == ("processed", "processed", "skipped")

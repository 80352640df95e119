"""Statuses and leases on a real mongod: the store's changes to source documents, and sharing them among workers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from datetime import UTC, datetime, timedelta
from typing import Any

import bson
import pytest
from pymongo.database import Database

from error_handler import StoreRejectedError
from mongo_client import DocumentStore, FinalStatus
from storage.extended_json import id_key
from tests.embedding_index.stores import DRIVERS, open_store

CONVERSATION = {
    "conversation_number": "1",
    "messages": [{"sender": "customer", "text": "hello"}],
    "note": {"kept": [1]},
}
QUERY = {"text": "hello", "metadata": {"source": "web"}, "processed": False, "processing_attempts": 0}


@pytest.fixture(params=DRIVERS)
async def stores(
    request: pytest.FixtureRequest, mongodb_uri: str, db_name: str
) -> AsyncIterator[tuple[DocumentStore, DocumentStore]]:
    """Two workers on one collection."""
    async with AsyncExitStack() as stack:
        first, second = [
            await stack.enter_async_context(open_store(mongodb_uri, db_name, request.param, worker_id=name))
            for name in ("worker-1", "worker-2")
        ]
        await first.check()
        yield first, second


@pytest.fixture
def store(stores: tuple[DocumentStore, DocumentStore]) -> DocumentStore:
    return stores[0]


def source(database: Database[dict[str, Any]], document_id: Any) -> dict[str, Any]:
    found = database["conversation_set"].find_one({"_id": {"$eq": document_id}})
    assert found is not None
    return found


def keys(*values: Any) -> set[bytes]:
    return {id_key(value) for value in values}


# Statuses


@pytest.mark.parametrize(
    ("status", "reason"),
    [("processed", None), ("failed", "empty: the answer is empty"), ("skipped", "skipped_no_text: no turn")],
)
async def test_the_status_of_a_conversation(
    store: DocumentStore, database: Database[dict[str, Any]], status: FinalStatus, reason: str | None
) -> None:
    """Status, time, and the reason where there is one; nothing else changes."""
    database["conversation_set"].insert_many([{"_id": n, "status": "pending", **CONVERSATION} for n in (1, 2)])
    before = datetime.now(UTC) - timedelta(seconds=1)
    await store.mark_processing([1])
    assert source(database, 1) == {"_id": 1, "status": "processing", **CONVERSATION}
    await store.mark([1], status, reason, queries=False)
    changed = source(database, 1)
    assert before <= changed.pop("last_processed_at") <= datetime.now(UTC) + timedelta(seconds=1)
    assert changed == {"_id": 1, "status": status, **CONVERSATION, **({"status_reason": reason} if reason else {})}
    assert source(database, 2) == {"_id": 2, "status": "pending", **CONVERSATION}


@pytest.mark.parametrize(
    ("status", "reason", "processed"),
    [("processed", None, True), ("failed", "empty: x", False), ("skipped", "skipped_no_text: x", True)],
)
async def test_the_status_of_a_query(
    store: DocumentStore, database: Database[dict[str, Any]], status: FinalStatus, reason: str | None, processed: bool
) -> None:
    """Processed when done or skipped, one more attempt, and the reason; it gets no status."""
    database["conversation_set"].insert_one({"_id": "doc0", **QUERY, "processing_attempts": 2})
    await store.mark(["doc0"], status, reason, queries=True)
    expected = {"_id": "doc0", **QUERY, "processed": processed, "processing_attempts": 3}
    assert source(database, "doc0") == {**expected, **({"status_reason": reason} if reason else {})}


async def test_success_takes_the_earlier_reason_away(store: DocumentStore, database: Database[dict[str, Any]]) -> None:
    """Of conversations and of queries."""
    database["conversation_set"].insert_many(
        [
            {"_id": 1, **CONVERSATION, "status": "failed", "status_reason": "x"},
            {"_id": 2, **QUERY, "status_reason": "x"},
        ]
    )
    await store.mark([1], "processed", None, queries=False)
    await store.mark([2], "processed", None, queries=True)
    assert "status_reason" not in source(database, 1)
    assert "status_reason" not in source(database, 2)


async def test_statuses_of_ids_of_any_type(store: DocumentStore, database: Database[dict[str, Any]]) -> None:
    """One update for all of them; a document that was deleted meanwhile is nobody's problem."""
    ids = [1, "1", None, {"a": 1}, bson.ObjectId(), b"\x01"]
    database["conversation_set"].insert_many([{"_id": value} for value in [*ids, 2]])
    await store.mark([*ids, "deleted"], "processed", None, queries=False)
    found = list(database["conversation_set"].find({"status": "processed"}))
    assert {id_key(document["_id"]) for document in found} == keys(*ids)
    assert database["conversation_set"].count_documents({}) == 7


async def test_new_documents_are_counted(store: DocumentStore, database: Database[dict[str, Any]]) -> None:
    """One that is there already is left as it is."""
    assert await store.insert_documents([{"_id": 1, "n": 1}, {"_id": 2, "n": 1}]) == 2
    assert await store.insert_documents([{"_id": 2, "n": 2}, {"_id": "2", "n": 2}]) == 1
    assert source(database, 2)["n"] == 1
    with pytest.raises(StoreRejectedError):
        await store.insert_documents([{"_id": 3, "n": 2**80}])


# Leases


async def test_a_document_belongs_to_who_claims_it_first(stores: tuple[DocumentStore, DocumentStore]) -> None:
    """By the exact id; the second worker gets the rest."""
    first, second = stores
    assert await first.claim([1, "1", None]) == keys(1, "1", None)
    assert await second.claim([1, "1", None]) == set()
    assert await second.claim([1, 2, None, {"a": 1}]) == keys(2, {"a": 1})
    assert await first.claim([2, 3]) == keys(3)


async def test_only_free_documents_are_claimed_for_their_priority(stores: tuple[DocumentStore, DocumentStore]) -> None:
    """A page of the same worker, or another worker, may have the others in work."""
    first, second = stores
    await first.claim([1])
    await second.claim([2])
    assert await first.claim([1, 2, 3], only_free=True) == keys(3)
    assert await first.claim([1, 2, 3]) == keys(1, 3)


async def test_claiming_again_is_harmless(store: DocumentStore, database: Database[dict[str, Any]]) -> None:
    """A repeated call, or the same worker after a crash, keeps its own; the expiry moves."""
    await store.claim([1, 2])
    database["conversation_set_leases"].update_many({}, {"$set": {"expires_at": datetime.now(UTC)}})
    assert await store.claim([1, 2, 3]) == keys(1, 2, 3)
    for lease in database["conversation_set_leases"].find():
        assert lease["expires_at"] > datetime.now(UTC) + timedelta(seconds=250)


async def test_a_lease_that_expired_is_taken_over(
    stores: tuple[DocumentStore, DocumentStore], database: Database[dict[str, Any]]
) -> None:
    """Others, of the same worker, are not."""
    first, second = stores
    await first.claim([1, 2])
    past = datetime.now(UTC) - timedelta(seconds=1)
    database["conversation_set_leases"].update_one({"_id": 1}, {"$set": {"expires_at": past}})
    assert await second.claim([1, 2]) == keys(1)
    assert await first.claim([1, 2]) == keys(2)


class AnyDatetime(type):
    """Lets the clock below pass for the class it replaces."""

    def __instancecheck__(cls, value: Any) -> bool:
        return isinstance(value, datetime)


class AnHourAhead(datetime, metaclass=AnyDatetime):
    """The clock of a machine that is set wrong."""

    @classmethod
    def now(cls, tz: Any = None) -> Any:
        return datetime.now(tz) + timedelta(hours=1)


async def test_time_is_the_servers(
    stores: tuple[DocumentStore, DocumentStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker whose clock is an hour ahead takes nobody's documents, and its own leases end in time."""
    first, second = stores
    await first.claim([1])
    monkeypatch.setattr("mongo_client.datetime", AnHourAhead)
    await second.check()
    assert await second.claim([1, 2]) == keys(2)
    monkeypatch.undo()
    await first.claim([2])
    lease = await first.database["conversation_set_leases"].find_one({"_id": 2})
    assert lease["expires_at"].replace(tzinfo=UTC) < datetime.now(UTC) + timedelta(minutes=10)


async def test_release_ends_ones_own_leases_only(stores: tuple[DocumentStore, DocumentStore]) -> None:
    """So the other worker may have them; releasing twice is harmless."""
    first, second = stores
    await first.claim([1, 2])
    await second.claim([3])
    for _ in range(2):
        await first.release([1, 3])
    assert await first.claim([3]) == set()
    assert await second.claim([1, 2, 3]) == keys(1, 3)


async def test_renewing_moves_every_lease_of_this_worker(
    stores: tuple[DocumentStore, DocumentStore], database: Database[dict[str, Any]]
) -> None:
    """And of no other."""
    first, second = stores
    await first.claim([1, 2])
    await second.claim([3])
    soon = datetime.now(UTC) + timedelta(seconds=10)
    database["conversation_set_leases"].update_many({}, {"$set": {"expires_at": soon}})
    await first.renew_leases()
    left = {lease["_id"]: lease["expires_at"] for lease in database["conversation_set_leases"].find()}
    assert left[1] == left[2] > soon + timedelta(seconds=200)
    assert left[3] < soon + timedelta(seconds=1)


async def test_workers_that_claim_at_once_share_without_overlap(
    mongodb_uri: str, db_name: str, database: Database[dict[str, Any]]
) -> None:
    """Each document has exactly one owner, free or expired before."""
    ids = list(range(200))
    past = datetime.now(UTC) - timedelta(seconds=1)
    database["conversation_set_leases"].insert_many(
        [{"_id": number, "worker": "dead", "expires_at": past} for number in range(0, 200, 2)]
    )
    async with AsyncExitStack() as stack:
        workers = [
            await stack.enter_async_context(open_store(mongodb_uri, db_name, DRIVERS[n % 2], worker_id=f"worker-{n}"))
            for n in range(4)
        ]
        shares = await asyncio.gather(*(worker.claim(ids if n % 2 else ids[::-1]) for n, worker in enumerate(workers)))
    assert sum(len(share) for share in shares) == 200
    assert set().union(*shares) == keys(*ids)
    owners = {lease["_id"]: lease["worker"] for lease in database["conversation_set_leases"].find()}
    for number, share in enumerate(shares):
        assert {id_key(value) for value, owner in owners.items() if owner == f"worker-{number}"} == share

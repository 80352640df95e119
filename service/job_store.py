"""Jobs in MongoDB: one document for each job and one for each of its conversations.

Times are those of the server (``$$NOW``), so the clocks of several services need not agree. A conversation is ``open``
until its result is stored; ``free_at`` says from when on it may be claimed, which makes a lease and a wait of it.
"""

from __future__ import annotations

import uuid
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

from config import Settings
from mongo_client import DURABLE, DocumentStore, call_repeatedly, insert_new
from storage.extended_json import Document
from storage.mongo_indexes import create_indexes, job_indexes, job_item_indexes
from utils.retry_utils import RetryPolicy

T = TypeVar("T")

OPEN, DONE = "open", "done"
# Of a webhook; it is sent when its job is done.
PENDING, DELIVERED, GIVEN_UP = "pending", "delivered", "failed"
MAX_WEBHOOK_WAIT_S = 3600
SEND_MS = 15_000  # for an attempt to end, before the wait for the next one


@dataclass(frozen=True, slots=True)
class ClaimedItem:
    """A conversation that this process works on; *attempts* counts this one."""

    document_id: str
    job: str
    token: str
    attempts: int
    request: dict[str, Any]


@dataclass(frozen=True, slots=True)
class DueWebhook:
    """A webhook to send now; *attempts* counts this one."""

    job: Document
    url: str
    attempts: int


class JobStore:
    """The jobs beside the results of *store*. Each call is retried as *settings* say, then raises a StoreError."""

    def __init__(self, store: DocumentStore, settings: Settings, retention_s: float, lease_s: float) -> None:
        """A job is removed *retention_s* after it was accepted; one of its conversations is claimed for *lease_s*."""
        self._store = store
        options = store.database.codec_options.with_options(tz_aware=True)
        name = f"{settings.results_collection}_job"
        self._jobs = store.database.get_collection(f"{name}s", codec_options=options, write_concern=DURABLE)
        self._items = store.database.get_collection(f"{name}_items", codec_options=options, write_concern=DURABLE)
        self._retention = timedelta(seconds=retention_s)
        self._lease_ms = int(1000 * lease_s)
        self._policy = RetryPolicy(settings.mongodb_max_retries, settings.mongodb_backoff_s)

    async def prepare(self) -> None:
        """Connect, and create the indexes."""
        await self._store.check()
        await create_indexes(self._jobs, job_indexes(), self._call)
        await create_indexes(self._items, job_item_indexes(), self._call)

    async def add(self, head: Document, requests: Sequence[Document]) -> Document | None:
        """Store a job of *requests* durably and return it; None if its caller has another one with the same ``key``.

        The conversations are stored first, because a job exists as soon as its own document does.
        """
        now = self._store.server_time()
        job, now = uuid.uuid4().hex, now.replace(microsecond=now.microsecond // 1000 * 1000)  # as MongoDB keeps it
        times = {"created_at": now, "expires_at": now + self._retention}
        document = {"_id": job, **head, "state": OPEN, "total": len(requests), **times}
        items = [
            {"_id": f"{job}-{place}", "job": job, "position": place, "state": OPEN, "attempts": 0, "request": request}
            for place, request in enumerate(requests)
        ]
        stored = [{**item, **times, "free_at": now} for item in items]
        await self._call("store a job", lambda: insert_new(self._items, stored))
        has_refused = await self._call("store a job", lambda: insert_new(self._jobs, [document]))
        if has_refused and await self.find({"_id": job}) is None:
            await self._remove_items(job)
            return None
        return document

    async def find(self, query: Document) -> Document | None:
        """Return the job that *query* finds; None if there is none."""
        return await self._call("read a job", lambda: self._jobs.find_one(query))

    async def open_jobs(self) -> list[str]:
        """Return the ids of the jobs that are not done."""
        found = await self._call("read the jobs", lambda: self._jobs.find({"state": OPEN}, {"_id": 1}).to_list(None))
        return [document["_id"] for document in found]

    async def counts(self, job: str) -> dict[int | None, int]:
        """Return the number of conversations of *job* by the status of their results; None counts those that are open."""
        stages: list[Document] = [{"$match": {"job": job}}, {"$group": {"_id": "$result.status", "count": {"$sum": 1}}}]

        async def read() -> dict[int | None, int]:
            cursor = await self._items.aggregate(stages)
            return {document["_id"]: document["count"] async for document in cursor}

        return await self._call("count the results of a job", read)

    async def page(self, job: str, offset: int, limit: int) -> list[Document]:
        """Return up to *limit* conversations of *job* from position *offset* on, in order, with their results."""
        query = {"job": job, "position": {"$gte": offset, "$lt": offset + limit}}
        fields = {"result": 1, "request.id": 1, "request.conversation_number": 1}
        return await self._call(
            "read the results of a job", lambda: self._items.find(query, fields, sort=[("position", 1)]).to_list(None)
        )

    async def remove(self, job: str, caller: str) -> bool:
        """Remove *job* of *caller* with its conversations and results; return False if there is none."""
        removed = await self._call("remove a job", lambda: self._jobs.delete_one({"_id": job, "caller": caller}))
        if removed.deleted_count:
            await self._remove_items(job)
        return bool(removed.deleted_count)

    async def has_work(self) -> bool:
        """Return whether a conversation can be claimed."""
        found = await self._call("look for work", lambda: self._items.find_one(_CLAIMABLE, {"_id": 1}))
        return found is not None

    async def claim(self) -> ClaimedItem | None:
        """Claim a conversation; None if there is none. First those at the head of their jobs, so all jobs advance."""
        token = uuid.uuid4().hex
        fields = {"owner": token, "attempts": {"$add": ["$attempts", 1]}, "free_at": _in_ms(self._lease_ms)}
        order = [("position", 1), ("created_at", 1)]
        found = await self._call(
            "claim a conversation",
            lambda: self._items.find_one_and_update(_CLAIMABLE, [{"$set": fields}], sort=order, return_document=True),
        )
        if found is None:
            return None
        return ClaimedItem(found["_id"], found["job"], token, found["attempts"], found["request"])

    async def settle(self, item: ClaimedItem, result: Document) -> bool:
        """Store *result* and remove the text; return False if another process has claimed *item*, or its job is gone."""
        # What the page shows of the request stays.
        kept = {name: item.request[name] for name in ("id", "conversation_number") if name in item.request}
        change = {
            "$set": {"state": DONE, "result": result, "request": kept},
            "$unset": {"owner": "", "free_at": ""},
        }
        changed = await self._call("store a result", lambda: self._items.update_one(_held(item), change))
        return bool(changed.matched_count)

    async def give_back(self, item: ClaimedItem, wait_s: float, *, counts: bool) -> None:
        """Let others claim *item* in *wait_s*; *counts* says whether this was one of its attempts."""
        fields = {"free_at": _in_ms(int(1000 * wait_s)), "attempts": item.attempts - (not counts), "owner": None}
        await self._call("give back a conversation", lambda: self._items.update_one(_held(item), [{"$set": fields}]))

    async def finish(self, job: str) -> bool:
        """Mark *job* as done if no conversation is open; return whether this call did it."""
        query = {"job": job, "state": OPEN}
        if await self._call("look for work", lambda: self._items.find_one(query, {"_id": 1})) is not None:
            return False
        fields = {"state": DONE, "finished_at": "$$NOW"}
        changed = await self._call(
            "finish a job", lambda: self._jobs.update_one({"_id": job, "state": OPEN}, [{"$set": fields}])
        )
        return bool(changed.modified_count)

    async def next_webhook(self) -> DueWebhook | None:
        """Claim a webhook that is due: nobody else sends it before its next attempt is due. None if there is none."""
        query = {
            "state": DONE,
            "webhook.state": PENDING,
            "$expr": {"$lte": ["$webhook.next_at", "$$NOW"]},
        }
        wait_ms = {"$multiply": [1000, {"$min": [MAX_WEBHOOK_WAIT_S, {"$pow": [2, "$webhook.attempts"]}]}]}
        fields = {
            "webhook.attempts": {"$add": ["$webhook.attempts", 1]},
            "webhook.next_at": {"$add": ["$$NOW", wait_ms, SEND_MS]},
        }
        found = await self._call(
            "look for webhooks",
            lambda: self._jobs.find_one_and_update(query, [{"$set": fields}], return_document=True),
        )
        return found and DueWebhook(found, found["webhook"]["url"], found["webhook"]["attempts"])

    async def settle_webhook(self, job: str, state: str) -> None:
        """Record that the webhook of *job* is DELIVERED or GIVEN_UP."""
        change = {"$set": {"webhook.state": state}}
        await self._call("store the state of a webhook", lambda: self._jobs.update_one({"_id": job}, change))

    async def _remove_items(self, job: str) -> None:
        await self._call("remove a job", lambda: self._items.delete_many({"job": job}))

    async def _call(self, what: str, operation: Callable[[], Awaitable[T]]) -> T:
        return await call_repeatedly(what, operation, self._policy)


_CLAIMABLE: Document = {"state": OPEN, "$expr": {"$lte": ["$free_at", "$$NOW"]}}


def _held(item: ClaimedItem) -> Document:
    return {"_id": item.document_id, "state": OPEN, "owner": item.token}


def _in_ms(milliseconds: int) -> Document:
    return {"$add": ["$$NOW", milliseconds]}

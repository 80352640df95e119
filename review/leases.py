"""Leases on conversations under review, so that two people do not get the same one.

A lease also holds what its reviewer sees: the labels of the model, the fingerprint of the result, and why the
conversation is shown. It ends with a decision, or can be taken over after its expiry, by the server's clock.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from datetime import timedelta
from typing import Any, TypeVar

from config import Settings
from mongo_client import DURABLE, DocumentStore, call_repeatedly, insert_new
from storage.extended_json import Document
from utils.retry_utils import RetryPolicy

T = TypeVar("T")


class ReviewLeases:
    """The leases of the results of *store*; one lasts *lease_s* seconds."""

    def __init__(self, store: DocumentStore, settings: Settings, lease_s: float) -> None:
        self._store = store
        options = store.database.codec_options.with_options(tz_aware=True)
        name = f"{settings.results_collection}_review_leases"
        self._collection = store.database.get_collection(name, codec_options=options, write_concern=DURABLE)
        self._lease = timedelta(seconds=lease_s)
        self._policy = RetryPolicy(settings.mongodb_max_retries, settings.mongodb_backoff_s)

    async def take(self, document_id: Any, reviewer: str, seen: Document) -> bool:
        """Lease *document_id* to *reviewer*, who sees *seen*; return False if another reviewer holds it.

        One atomic operation decides: the insert, or the update of a lease that has expired or is the reviewer's.
        """
        fields = {"reviewer": reviewer, "expires_at": self._store.server_time() + self._lease, **seen}
        new = [{"_id": document_id, **fields}]
        if not await self._call("lease a conversation", lambda: insert_new(self._collection, new)):
            return True
        free = {"$or": [{"reviewer": reviewer}, {"expires_at": {"$lt": self._store.server_time()}}]}
        return await self._update({"_id": {"$eq": document_id}, **free}, fields)

    async def renew(self, document_id: Any, reviewer: str) -> Document | None:
        """Extend the lease of *reviewer* and return it; None if it was taken over or has ended."""
        query = {"_id": {"$eq": document_id}, "reviewer": reviewer}
        if not await self._update(query, {"expires_at": self._store.server_time() + self._lease}):
            return None
        return await self._find_one(query)

    async def held_by(self, reviewer: str) -> Document | None:
        """Return the newest lease that *reviewer* holds and that has not expired; None if there is none.

        After an undo there are two: that of the conversation to decide again, and that of the one shown before.
        """
        query = {"reviewer": reviewer, "expires_at": {"$gte": self._store.server_time()}}
        return await self._find_one(query, sort=[("expires_at", -1)])

    async def release(self, document_id: Any, reviewer: str) -> None:
        """End the lease of *reviewer* on *document_id*."""
        query = {"_id": {"$eq": document_id}, "reviewer": reviewer}
        await self._call("end a lease", lambda: self._collection.delete_one(query))

    async def add_to_control_sample(self, document_id: Any, probability: float) -> None:
        """Record that the random control sample has drawn *document_id*, which a reviewer is looking at."""
        await self._update(
            {"_id": {"$eq": document_id}, "sampling_probability": None}, {"sampling_probability": probability}
        )

    async def _update(self, query: Document, fields: Document) -> bool:
        changed = await self._call("lease a conversation", lambda: self._collection.update_one(query, {"$set": fields}))
        return bool(changed.matched_count)

    async def _find_one(self, query: Document, **options: Any) -> Document | None:
        return await self._call("read a lease", lambda: self._collection.find_one(query, **options))

    async def _call(self, what: str, operation: Callable[[], Awaitable[T]]) -> T:
        return await call_repeatedly(what, operation, self._policy)

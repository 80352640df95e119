"""The context windows that workers use: in MongoDB, one document for each worker and model server.

A worker renews its document while it runs; one that is older than LIVES_S does not count. All times are those of MongoDB's
clock.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pymongo import WriteConcern, timeout

from storage.mongo_errors import translated

COLLECTION = "model_windows"
RENEW_S = 2.0
LIVES_S = 10
CALL_S = 2.0  # the timeout of one call


@dataclass(frozen=True, slots=True)
class UsedWindow:
    """The window of *worker* with *model* on *server*. Its methods raise StoreError if MongoDB does not answer within CALL_S.

    They raise ConfigurationError if MONGODB_URI cannot be used.
    """

    database: Any
    worker: str
    server: str
    model: str

    async def of_others(self) -> int | None:
        """Return the largest window, in tokens, of other workers with this model on this server; None without one."""
        since = {"$dateSubtract": {"startDate": "$$NOW", "unit": "second", "amount": LIVES_S}}
        others = {"server": self.server, "model": self.model, "worker": {"$ne": self.worker}}
        condition = {**others, "$expr": {"$gt": ["$renewed_at", since]}}
        with translated("read the context windows of other workers"), timeout(CALL_S):
            found = await self.database[COLLECTION].find_one(condition, sort=[("num_ctx", -1)])
        return None if found is None else int(found["num_ctx"])

    async def renew(self, num_ctx: int) -> None:
        """Store that the worker uses *num_ctx* tokens."""
        fields = {"server": self.server, "model": self.model, "worker": self.worker, "num_ctx": num_ctx}
        literal = {name: {"$literal": value} for name, value in fields.items()}
        with translated("store the context window"), timeout(CALL_S):
            await self._windows.update_one(
                {"_id": self._id}, [{"$set": {**literal, "renewed_at": "$$NOW"}}], upsert=True
            )

    async def end(self) -> None:
        """Remove the document, and those of workers that died."""
        long_ago = {"$dateSubtract": {"startDate": "$$NOW", "unit": "second", "amount": 10 * LIVES_S}}
        with translated("remove the context window"), timeout(CALL_S):
            await self._windows.delete_many({"$or": [{"_id": self._id}, {"$expr": {"$lt": ["$renewed_at", long_ago]}}]})

    @property
    def _id(self) -> str:
        return f"{self.worker} {self.server} {self.model}"

    @property
    def _windows(self) -> Any:
        return self.database.get_collection(COLLECTION, write_concern=WriteConcern(1))

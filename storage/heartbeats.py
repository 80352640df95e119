"""Heartbeats: the documents by which workers report their state and take orders, one for each start of a worker.

All times are those of MongoDB's clock, because the machines' clocks differ. A worker that dies leaves its document as it
is; its age shows that it is lost.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from pymongo import DESCENDING, ReturnDocument, WriteConcern, timeout

from storage.mongo_errors import translated

Action = Literal["pause", "resume", "stop"]
ACTIONS: tuple[Action, ...] = get_args(Action)

BEAT_S = 2.0  # between two writes of a worker
LOST_AFTER_S = 15.0  # without a write
KEPT = 100  # documents; the oldest are removed
ORDERS_KEPT = 20  # for each worker
CALL_S = 2.0  # the timeout of one call of a worker


@dataclass(frozen=True, slots=True)
class Order:
    """The last order of a worker; *by* is the name of the API key that gave it, or ``anonymous``."""

    action: Action
    by: str


def collection_name(results_collection: str) -> str:
    """Return the name of the collection for the workers that write *results_collection*."""
    return f"{results_collection}_workers"


def heartbeats(database: Any, results_collection: str) -> Any:
    """Return the collection. Its writes wait for one server only: the next one comes soon."""
    return database.get_collection(collection_name(results_collection), write_concern=WriteConcern(1))


async def beat(collection: Any, heartbeat_id: str, state: Mapping[str, Any]) -> Order | None:
    """Store *state* as the document *heartbeat_id*, and return its last order.

    Raises:
        StoreError: MongoDB did not store it within CALL_S.
    """
    with translated("write the heartbeat of the worker"), timeout(CALL_S):
        stored = await collection.find_one_and_update(
            {"_id": heartbeat_id},
            [{"$set": _fields(state)}],
            projection={"orders": {"$slice": -1}},
            upsert=True,
            return_document=ReturnDocument.AFTER,
        )
    orders = (stored or {}).get("orders") or [{}]
    action, by = orders[-1].get("action"), orders[-1].get("by")
    return Order(action, str(by)) if action in ACTIONS else None


async def end(collection: Any, heartbeat_id: str, state: Mapping[str, Any]) -> None:
    """Store *state* a last time, and that the worker has ended.

    Raises:
        StoreError: MongoDB did not store it within CALL_S.
    """
    fields = {**_fields(state), "ended_at": "$$NOW"}
    with translated("write the end of the worker"), timeout(CALL_S):
        await collection.update_one({"_id": heartbeat_id}, [{"$set": fields}], upsert=True)


async def forget(collection: Any, heartbeat_id: str) -> None:
    """Remove the document.

    Raises:
        StoreError: MongoDB did not do it within CALL_S.
    """
    with translated("remove the heartbeat of the worker"), timeout(CALL_S):
        await collection.delete_one({"_id": heartbeat_id})


async def tidy(collection: Any, heartbeat_id: str, worker: str) -> None:
    """End the documents of earlier starts of *worker*, which died; keep the KEPT newest documents of all workers.

    Raises:
        StoreError: MongoDB did not do it within CALL_S.
    """
    died = {"worker": worker, "_id": {"$ne": heartbeat_id}, "ended_at": None}
    with translated("tidy the heartbeats of workers"), timeout(CALL_S):
        await collection.update_many(died, [{"$set": {"status": "died", "ended_at": "$beat_at"}}])
        newest = collection.find({}, projection={"_id": 1}, sort=[("beat_at", DESCENDING)], skip=KEPT)
        old = [document["_id"] for document in await newest.to_list(None)]
        if old:
            await collection.delete_many({"_id": {"$in": old}})


async def give_order(collection: Any, heartbeat_id: str, order: Order) -> bool:
    """Store *order* for a worker that has not ended; return whether there is one. The worker obeys at its next beat.

    Raises:
        StoreError: MongoDB does not store it.
    """
    entry = {"action": order.action, "by": {"$literal": order.by}, "at": "$$NOW"}
    orders = {"$slice": [{"$concatArrays": [{"$ifNull": ["$orders", []]}, [entry]]}, -ORDERS_KEPT]}
    with translated("give an order to a worker"):
        outcome = await collection.update_one({"_id": heartbeat_id, "ended_at": None}, [{"$set": {"orders": orders}}])
    return bool(outcome.matched_count)


async def read_all(collection: Any) -> list[dict[str, Any]]:
    """Return the documents of all workers, the newest start first.

    Adds *silent_s*, the seconds since the last write, and *ran_s*, the seconds from the start to the last write.

    Raises:
        StoreError: MongoDB does not answer.
    """

    def seconds(since: str, until: str) -> dict[str, Any]:
        return {"$divide": [{"$subtract": [until, since]}, 1000]}

    stages = [
        {"$sort": {"beat_at": -1}},
        {"$limit": KEPT},
        {"$set": {"silent_s": seconds("$beat_at", "$$NOW"), "ran_s": seconds("$started_at", "$beat_at")}},
        {"$sort": {"started_at": -1, "_id": 1}},
    ]
    with translated("read the heartbeats of workers"):
        async with await collection.aggregate(stages) as cursor:
            found: list[dict[str, Any]] = await cursor.to_list(None)
    return found


def _fields(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return *state* with its times for a pipeline, which would read a text with ``$`` as the name of a field."""
    literal = {name: {"$literal": value} for name, value in state.items()}
    return {**literal, "beat_at": "$$NOW", "started_at": {"$ifNull": ["$started_at", "$$NOW"]}}

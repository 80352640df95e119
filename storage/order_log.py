"""What people changed on the page ``/dashboard``: one document for each order on failed documents. None is ever removed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from storage.mongo_errors import translated


def collection_name(results_collection: str) -> str:
    """Return the name of the collection beside *results_collection*."""
    return f"{results_collection}_orders"


async def begin(collection: Any, order: Mapping[str, Any]) -> Any:
    """Store *order* before it is carried out, with the server's time as ``at``; return its id.

    Raises:
        StoreError: MongoDB does not store it, so the order must not be carried out.
    """
    with translated("write down the order"):
        stored = await collection.insert_one(dict(order))
        await collection.update_one({"_id": stored.inserted_id}, [{"$set": {"at": "$$NOW"}}])
    return stored.inserted_id


async def end(collection: Any, order_id: Any, outcome: Mapping[str, Any]) -> None:
    """Add *outcome* to an order.

    Raises:
        StoreError: MongoDB does not store it.
    """
    with translated("write down the outcome of the order"):
        await collection.update_one({"_id": order_id}, {"$set": dict(outcome)})


async def newest(collection: Any, limit: int) -> list[dict[str, Any]]:
    """Return the last *limit* orders, the newest first.

    Raises:
        StoreError: MongoDB does not answer.
    """
    with translated("read the orders"):
        found: list[dict[str, Any]] = await collection.find({}, sort=[("_id", -1)], limit=limit).to_list(None)
    return found

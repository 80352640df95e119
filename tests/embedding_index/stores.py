"""A DocumentStore on the real mongod, through either driver, and a plain client that looks beneath it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from motor.motor_asyncio import AsyncIOMotorClient

from config import load_settings
from mongo_client import DocumentStore

DRIVERS = ["pymongo", "motor"]


@asynccontextmanager
async def open_store(uri: str, db_name: str, driver: str = "pymongo", **given: Any) -> AsyncIterator[DocumentStore]:
    """Open a store that loses no time with waits; *given* are settings, and ``worker_id``."""
    worker_id = given.pop("worker_id", "worker")
    settings = load_settings(None, **{"mongodb_uri": uri, "db_name": db_name, "mongodb_backoff_s": 0, **given})
    client: Any = AsyncIOMotorClient(uri) if driver == "motor" else None
    store = DocumentStore(settings, worker_id=worker_id, client=client)
    try:
        yield store
    finally:
        await store.close()
        if client is not None:
            client.close()

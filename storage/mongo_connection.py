"""Open and close connections to MongoDB."""

from __future__ import annotations

import asyncio
import warnings
from typing import Any

from pymongo import AsyncMongoClient, WriteConcern
from pymongo.errors import PyMongoError

from config import Settings
from error_handler import ConfigurationError
from storage.contract import Document

DURABLE = WriteConcern("majority", j=True)
MAX_POOL_SIZE, MIN_POOL_SIZE = 20, 5  # connections of one process
CLOSE_WAIT_S = 2.0  # for the driver to end its connections
SERVER_SELECTION_MS = 10_000  # short, to report a wrong address soon; three attempts cover half a minute


def open_client(settings: Settings) -> AsyncMongoClient[Document]:
    """Return a client for the running event loop; raise ConfigurationError if MONGODB_URI is not a usable address."""
    try:
        with warnings.catch_warnings(action="error", category=UserWarning):  # misspelt options
            return AsyncMongoClient(
                settings.mongodb_uri.get_secret_value(),
                maxPoolSize=MAX_POOL_SIZE,
                minPoolSize=MIN_POOL_SIZE,
                serverSelectionTimeoutMS=min(settings.mongodb_timeout_ms, SERVER_SELECTION_MS),
                timeoutMS=settings.mongodb_timeout_ms,
                appname="customer-support-triad",
                # One odd document must not end a run: dates after the year 9999, strings that are not UTF-8.
                datetime_conversion="DATETIME_AUTO",
                unicode_decode_error_handler="replace",
            )
    except (PyMongoError, ValueError, UserWarning) as exc:
        raise ConfigurationError("MONGODB_URI is not a usable address; expected mongodb://host:27017.") from exc


async def close_client(client: Any) -> None:
    """Close *client*, and wait at most CLOSE_WAIT_S for it; the event loop ends the rest.

    PyMongo waits 20 s for its monitor if a server accepts connections but never responds.
    """
    task = asyncio.create_task(client.close())
    await asyncio.wait([task], timeout=CLOSE_WAIT_S)
    if task.done():
        task.result()

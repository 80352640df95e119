"""A worker in the mode stream in the process of the test, and what may happen to its MongoDB."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

from batch_processor import BatchProcessor
from tests.worker.site import POLL_S, Site

NEVER_S = 86_400.0
MORE = {"sender": "customer", "text": "The parcel came, but it is broken and I want my money back"}


def stream_processor(site: Site, **settings: Any) -> BatchProcessor:
    """Return a worker of *site* that labels grown conversations at once."""
    assert site.model is not None
    fast = {
        "ollama_endpoint": site.model.url,
        "settle_s": 0.0,
        "mongodb_backoff_s": 0.1,
        "mongodb_timeout_ms": 5000,
        "worker_heartbeat": False,
    }
    return BatchProcessor(
        mongodb_uri=site.uri,
        db_name=site.database.name,
        ollama_model="llama3.2",
        batch_files_dir=site.directory,
        mode="stream",
        **{**fast, **settings},
    )


@contextlib.asynccontextmanager
async def following(
    site: Site, sweep_every_s: float = NEVER_S, *, run: bool = True, **settings: Any
) -> AsyncIterator[dict[str, Any]]:
    """Follow *site* in a task; when the block ends, stop it and put its statistics into what was yielded."""
    stats: dict[str, Any] = {}
    async with stream_processor(site, **settings) as processor:
        if run:
            await processor.run()
        task = asyncio.create_task(processor.follow(sweep_every_s))
        try:
            yield stats
        finally:
            processor.stop.set()
            stats |= await task


async def until(condition: Callable[[], object], timeout_s: float = 30.0) -> None:
    """Return as soon as *condition* holds; fail after *timeout_s*."""
    deadline = time.monotonic() + timeout_s
    while not await asyncio.to_thread(condition):
        assert time.monotonic() < deadline, "it did not happen in time"
        await asyncio.sleep(POLL_S)


def has_result(site: Site, document_id: Any, earlier: int = 0) -> bool:
    """Return whether the document has a result, with *earlier* labels in its history."""
    found = site.results.find_one({"source_conversation_id": document_id})
    return found is not None and len(found.get("history") or []) == earlier


def grow(site: Site, document_id: Any) -> None:
    """Add a message to a conversation."""
    site.source.update_one({"_id": document_id}, {"$push": {"messages": MORE}})

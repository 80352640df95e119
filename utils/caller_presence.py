"""Work for a caller ends when the caller leaves."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, MutableMapping
from typing import Any, TypeVar

from utils.service_errors import CallerLeftError

T = TypeVar("T")
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]


async def while_caller_waits(work: Coroutine[Any, Any, T], receive: Receive) -> T:
    """Return what *work* returns; *receive* is that of the request, its body read.

    Raises:
        CallerLeftError: The connection was closed first. *work* was cancelled and has ended.
    """
    job = asyncio.create_task(work)
    watcher = asyncio.create_task(_until_left(receive))
    try:
        await asyncio.wait((job, watcher), return_when=asyncio.FIRST_COMPLETED)
        if job.done():
            return job.result()
        raise CallerLeftError
    finally:
        watcher.cancel()
        if not job.done():
            job.cancel()
            await asyncio.wait((job,))


async def _until_left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass

"""Makes sure that a task that was cancelled ends."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

T = TypeVar("T")


async def cancellable(operation: Callable[[], Awaitable[T]]) -> T:
    """Return what *operation* returns; a cancellation that it swallowed is raised after it.

    ``asyncio.wait_for`` of Python 3.11 returns as if nothing had been asked of it when it is cancelled at the
    moment its future is done (python/cpython#86296), and pymongo sends with it. A task of a run that has
    ended would go on and be waited for without end.
    """
    task = asyncio.current_task()
    requests = task.cancelling() if task is not None else 0
    outcome = await operation()
    if task is not None and task.cancelling() > requests:
        raise asyncio.CancelledError
    return outcome

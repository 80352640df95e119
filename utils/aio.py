"""Makes sure that a task that was cancelled ends."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Generic, TypeVar

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


async def close_within(closing: Coroutine[Any, Any, None], wait_s: float) -> None:
    """Wait for *closing*, at most *wait_s*: what it waits for then is ended with the event loop.

    A client of pymongo waits for its monitor to be done with a server that accepts connections and says nothing: 20 s.
    """
    task = asyncio.create_task(closing)
    await asyncio.wait([task], timeout=wait_s)
    if task.done():
        task.result()


class GroupCommit(Generic[T]):
    """Hands submitted items to *write* in groups of at most *max_group*, one group at a time.

    *write* settles each item itself, and raises only what shall end the run.
    """

    def __init__(self, write: Callable[[list[T]], Awaitable[None]], max_group: int = 200) -> None:
        self._write = write
        self._max_group = max_group
        self._ready: list[T] = []
        self._arrived = asyncio.Event()
        self._empty = asyncio.Event()
        self._empty.set()

    def submit(self, item: T) -> None:
        """Write *item* as soon as possible; returns at once."""
        self._ready.append(item)
        self._empty.clear()
        self._arrived.set()

    async def run(self) -> None:
        """Write what is submitted until cancelled; raises what *write* raised."""
        while True:
            await self._arrived.wait()
            while self._ready:
                group, self._ready = self._ready[: self._max_group], self._ready[self._max_group :]
                await self._write(group)
            self._arrived.clear()
            self._empty.set()

    async def drained(self) -> None:
        """Wait until everything submitted is settled; for as long as ``run`` runs."""
        await self._empty.wait()

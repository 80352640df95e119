"""Write what is ready together: at once when nothing is being written, else with the next group.

The way databases commit: under light load each item is written alone and immediately, under heavy
load a group shares the cost of one durable write. No timer delays anything.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

T = TypeVar("T")


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

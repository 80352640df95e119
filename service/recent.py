"""Figures that take seconds to compute: computed in the background while somebody looks, and kept for some seconds."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Hashable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Generic, TypeVar

from error_handler import RequestError, TriadError
from service import errors

logger = logging.getLogger(__name__)

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")

FRESH_S = 10.0
PAUSE = 5  # figures that took t seconds are kept for at least 5 t: at most a sixth of the time is spent on them
MAX_KEPT = 32
MAX_WAITING = 8


@dataclass(frozen=True, slots=True)
class Figures(Generic[V]):
    """A *value*, computed in *duration_s* and ready *at* that time (UTC)."""

    value: V
    at: datetime
    duration_s: float


class Recent(Generic[K, V]):
    """The last figures for each key. One computation runs at a time, so that many viewers cost MongoDB no more than one."""

    def __init__(self, compute: Callable[[K], Awaitable[V]], clock: Callable[[], float] = time.monotonic) -> None:
        self._compute = compute
        self._clock = clock
        self._kept: OrderedDict[K, tuple[Figures[V], float]] = OrderedDict()  # with the time of the clock
        self._running: dict[K, asyncio.Task[Figures[V]]] = {}
        self._problems: dict[K, TriadError] = {}
        self._one = asyncio.Lock()

    def last(self, key: K) -> Figures[V] | None:
        """Return the last figures, which may be old; None if there are none yet.

        Old or missing ones are computed in the background: ask again.

        Raises:
            RequestError: QUEUE_FULL if MAX_WAITING other computations wait.
            TriadError: The first computation failed, by a bug if it is INTERNAL; the next call tries again.
        """
        if key in self._problems:
            raise self._problems.pop(key)
        figures, at = self._kept.get(key, (None, 0.0))
        if figures is not None:
            self._kept.move_to_end(key)
            if self._clock() - at < max(FRESH_S, PAUSE * figures.duration_s):
                return figures
        if key not in self._running:
            if len(self._running) < MAX_WAITING:
                task = self._running[key] = asyncio.create_task(self._computed(key))
                task.add_done_callback(lambda done: self._ended(key, done))
            elif figures is None:
                raise errors.unavailable(errors.QUEUE_FULL)
        return figures

    async def close(self) -> None:
        """Cancel what is being computed."""
        running = list(self._running.values())
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)

    async def _computed(self, key: K) -> Figures[V]:
        async with self._one:
            start_s = time.monotonic()
            value = await self._compute(key)
            return Figures(value, datetime.now(UTC), time.monotonic() - start_s)

    def _ended(self, key: K, task: asyncio.Task[Figures[V]]) -> None:
        del self._running[key]
        if task.cancelled():
            return
        problem = task.exception()
        if problem is None:
            self._kept[key] = (task.result(), self._clock())
            self._kept.move_to_end(key)
            while len(self._kept) > MAX_KEPT:
                self._kept.popitem(last=False)
            return
        if isinstance(problem, TriadError):
            logger.warning("dashboard: %s", problem)
        else:
            logger.error("dashboard: figures cannot be computed", exc_info=problem)
            problem = RequestError(errors.INTERNAL)
        if key not in self._kept:
            self._problems[key] = problem
            if len(self._problems) > MAX_KEPT:  # the oldest, which nobody has asked for again
                del self._problems[next(iter(self._problems))]

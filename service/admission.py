"""Concurrency slots at the model with a short queue, deadlines, and cancellation when the caller disconnects."""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import Awaitable
from typing import TypeVar

from starlette.types import Receive

from error_handler import RequestError
from service.errors import QUEUE_FULL, STOPPING, TOO_SLOW, CallerLeftError, unavailable

MAX_RETRY_AFTER_S = 60
INITIAL_HOLD_S = 1.0  # how long a slot is held, until the first one is released
LAST_WEIGHT = 0.1

T = TypeVar("T")


class AdmissionQueue:
    """Grants *slots* concurrent slots, first come, first served; up to *queue_size* requests wait for one."""

    def __init__(self, slots: int, queue_size: int) -> None:
        self.size = slots
        self.running = self.waiting = 0
        self._queue_size = queue_size
        self._slots = asyncio.Semaphore(slots)
        self._held_s = INITIAL_HOLD_S
        self._turned_away = 0  # since the queue was last empty, minus those served since then

    def require_room(self) -> None:
        """Raise RequestError (QUEUE_FULL) if ``acquire`` would, so that the body need not be read."""
        if self._slots.locked() and self.waiting >= self._queue_size:
            self._turned_away += 1
            raise RequestError(QUEUE_FULL, retry_after_s=self._retry_after_s())

    def _retry_after_s(self) -> int:
        """Return when to retry, 1 to MAX_RETRY_AFTER_S seconds.

        Random within the time needed to serve all waiting and rejected requests, so that clients do not all
        return at once.
        """
        first_s = self._held_s * (self.waiting / 2 + 1) / self.size
        last_s = self._held_s * (self.waiting + self._turned_away) / self.size
        return max(1, min(MAX_RETRY_AFTER_S, math.ceil(random.uniform(first_s, max(first_s, last_s)))))

    async def acquire(self) -> None:
        """Wait for a slot; the caller releases it.

        Raises:
            RequestError: QUEUE_FULL, without waiting.
        """
        self.require_room()
        self.waiting += 1
        try:
            await self._slots.acquire()
        finally:
            self.waiting -= 1
        self.running += 1

    def release(self, held_s: float) -> None:
        """Release a slot that was held for *held_s*."""
        self._held_s += LAST_WEIGHT * (held_s - self._held_s)
        self._turned_away = max(0, self._turned_away - 1) if self.waiting else 0
        self.running -= 1
        self._slots.release()


class Deadlines:
    """Per-request deadlines, capped by the shutdown grace period. Times are those of the running loop."""

    def __init__(self) -> None:
        self._running: set[asyncio.Timeout] = set()
        self._stop_at = math.inf

    def stop(self, grace_s: float) -> None:
        """Cap all deadlines, present and future, at *grace_s* seconds from now."""
        self._stop_at = asyncio.get_running_loop().time() + grace_s
        for timeout in self._running:
            timeout.reschedule(min(timeout.when() or math.inf, self._stop_at))

    async def until(self, deadline: float, work: Awaitable[T]) -> T:
        """Return the result of *work*, which is cancelled at *deadline* or at the end of the grace period.

        Raises:
            RequestError: TOO_SLOW or STOPPING.
        """
        timeout = asyncio.timeout_at(min(deadline, self._stop_at))
        try:
            async with timeout:
                self._running.add(timeout)
                return await work
        except TimeoutError as exc:
            if not timeout.expired():
                raise
            if self._stop_at < deadline:
                raise unavailable(STOPPING) from exc
            raise RequestError(TOO_SLOW) from exc
        finally:
            self._running.discard(timeout)


async def cancel_on_disconnect(work: Awaitable[T], receive: Receive) -> T:
    """Return the result of *work*. *receive* is that of the request, with its body read.

    *work* stays in the task of the request: each further task would be another turn of the event loop.

    Raises:
        CallerLeftError: The caller closed the connection first. *work* was cancelled and has ended.
    """
    presence = asyncio.timeout(None)
    try:
        async with presence:
            watcher = asyncio.create_task(_expire_on_disconnect(presence, receive))
            try:
                return await work
            finally:
                watcher.cancel()
    except TimeoutError as exc:
        if presence.expired():
            raise CallerLeftError from exc
        raise


async def _expire_on_disconnect(presence: asyncio.Timeout, receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    presence.reschedule(asyncio.get_running_loop().time())

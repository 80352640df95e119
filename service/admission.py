"""Concurrency slots at the model with a short queue, deadlines, and cancellation when the caller disconnects."""

from __future__ import annotations

import asyncio
import contextlib
import math
import random
from collections import deque
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from starlette.types import Receive

from error_handler import RequestError
from service.errors import QUEUE_FULL, STOPPING, STOPPING_RETRY_AFTER_S, TOO_SLOW, CallerLeftError

MAX_RETRY_AFTER_S = 60
INITIAL_HOLD_S = 1.0  # how long a slot is held, until the first one is released
LAST_WEIGHT = 0.1


class AdmissionQueue:
    """Grants *slots* concurrent slots, first come, first served; up to *queue_size* requests wait for one."""

    def __init__(self, slots: int, queue_size: int) -> None:
        self.size = slots
        self._queue_size = queue_size
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._held_s = INITIAL_HOLD_S
        self._turned_away = 0  # since the queue was last empty, minus those served since then
        self.running = 0

    @property
    def waiting(self) -> int:
        """The number of requests that wait for a slot."""
        return len(self._waiting)

    def require_room(self) -> None:
        """Raise RequestError (QUEUE_FULL) if ``slot`` would, so that the body need not be read."""
        if self.running >= self.size and len(self._waiting) >= self._queue_size:
            self._turned_away += 1
            raise RequestError(QUEUE_FULL, retry_after_s=self.retry_after_s())

    def retry_after_s(self) -> int:
        """Return when to retry, 1 to MAX_RETRY_AFTER_S seconds.

        Random within the time needed to serve all waiting and rejected requests, so that clients do not all
        return at once.
        """
        first_s = self._held_s * (len(self._waiting) / 2 + 1) / self.size
        last_s = self._held_s * (len(self._waiting) + self._turned_away) / self.size
        return max(1, min(MAX_RETRY_AFTER_S, math.ceil(random.uniform(first_s, max(first_s, last_s)))))

    @contextlib.asynccontextmanager
    async def slot(self) -> AsyncIterator[None]:
        """Hold a slot for the block, and release it however the block ends, cancellation included.

        Raises:
            RequestError: QUEUE_FULL, without waiting.
        """
        await self._acquire()
        start = asyncio.get_running_loop().time()
        try:
            yield
        finally:
            self._held_s += LAST_WEIGHT * (asyncio.get_running_loop().time() - start - self._held_s)
            self._release()

    async def _acquire(self) -> None:
        self.require_room()
        if self.running < self.size:
            self.running += 1
            return
        turn = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.cancelled():
                with contextlib.suppress(ValueError):  # removed by _release
                    self._waiting.remove(turn)
            else:  # the slot was granted at the moment of the cancellation
                self._release()
            raise

    def _release(self) -> None:
        self._turned_away = max(0, self._turned_away - 1)
        while self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_result(None)
                return
        self.running -= 1
        self._turned_away = 0


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

    @asynccontextmanager
    async def until(self, deadline: float) -> AsyncIterator[None]:
        """Cancel the block at *deadline*, or at the end of the grace period.

        Raises:
            RequestError: TOO_SLOW or STOPPING.
        """
        timeout = asyncio.timeout_at(min(deadline, self._stop_at))
        try:
            async with timeout:
                self._running.add(timeout)
                yield
        except TimeoutError as exc:
            if not timeout.expired():
                raise
            if self._stop_at < deadline:
                raise RequestError(STOPPING, retry_after_s=STOPPING_RETRY_AFTER_S) from exc
            raise RequestError(TOO_SLOW) from exc
        finally:
            self._running.discard(timeout)


T = TypeVar("T")


async def cancel_on_disconnect(work: Coroutine[Any, Any, T], receive: Receive) -> T:
    """Return what *work* returns. *receive* is that of the request, with its body read.

    Raises:
        CallerLeftError: The caller closed the connection first. *work* was cancelled and has ended.
    """
    job = asyncio.create_task(work)
    watcher = asyncio.create_task(_wait_for_disconnect(receive))
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


async def _wait_for_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass

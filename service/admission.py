"""The places at the model, and the short queue before them."""

from __future__ import annotations

import asyncio
import contextlib
import math
import random
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, MutableMapping
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from error_handler import RequestError
from service.errors import QUEUE_FULL, STOPPING, TOO_SLOW, CallerLeftError

MAX_RETRY_AFTER_S = 60
FIRST_GUESS_S = 1.0  # how long a place is held, before one was given back
WEIGHT_OF_LAST = 0.1


class AdmissionQueue:
    """Lets *places* holders in at once and *queue_size* wait, in the order they came."""

    def __init__(self, places: int, queue_size: int) -> None:
        self.size = places
        self._queue_size = queue_size
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._held_s = FIRST_GUESS_S
        self._turned_away = 0  # since the queue was empty last, less those served since then
        self.running = 0

    @property
    def waiting(self) -> int:
        """How many wait for a place."""
        return len(self._waiting)

    def require_room(self) -> None:
        """Raise RequestError (QUEUE_FULL) where ``place`` would: for a caller that has not read its request yet."""
        if self.running >= self.size and len(self._waiting) >= self._queue_size:
            self._turned_away += 1
            raise RequestError(QUEUE_FULL, retry_after_s=self.retry_after_s())

    def retry_after_s(self) -> int:
        """Return when to come back, 1 to MAX_RETRY_AFTER_S seconds.

        Drawn at random from the time that it takes to serve all who wait or were turned away, so that
        they do not all come back together.
        """
        first_s = self._held_s * (len(self._waiting) / 2 + 1) / self.size
        last_s = self._held_s * (len(self._waiting) + self._turned_away) / self.size
        return max(1, min(MAX_RETRY_AFTER_S, math.ceil(random.uniform(first_s, max(first_s, last_s)))))

    @contextlib.asynccontextmanager
    async def place(self) -> AsyncIterator[None]:
        """Hold a place inside; it is given back however the inside ends, cancellation included.

        Raises:
            RequestError: QUEUE_FULL, at once.
        """
        await self._take()
        start = asyncio.get_running_loop().time()
        try:
            yield
        finally:
            self._held_s += WEIGHT_OF_LAST * (asyncio.get_running_loop().time() - start - self._held_s)
            self._give_on()

    async def _take(self) -> None:
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
                with contextlib.suppress(ValueError):  # it was passed over meanwhile
                    self._waiting.remove(turn)
            else:  # the place was handed over at the moment of the cancellation
                self._give_on()
            raise

    def _give_on(self) -> None:
        self._turned_away = max(0, self._turned_away - 1)
        while self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_result(None)
                return
        self.running -= 1
        self._turned_away = 0


STOPPING_RETRY_AFTER_S = 5


class Deadlines:
    """The ends of the requests in hand. Times are those of the running loop."""

    def __init__(self) -> None:
        self._running: set[asyncio.Timeout] = set()
        self._stop_at = math.inf

    def stop(self, grace_s: float) -> None:
        """Let nothing run for longer than *grace_s* from now on."""
        self._stop_at = asyncio.get_running_loop().time() + grace_s
        for timeout in self._running:
            timeout.reschedule(min(timeout.when() or math.inf, self._stop_at))

    @asynccontextmanager
    async def until(self, deadline: float) -> AsyncIterator[None]:
        """Cancel the inside at *deadline*, or at the end of the grace period.

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
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]


async def cancel_on_disconnect(work: Coroutine[Any, Any, T], receive: Receive) -> T:
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

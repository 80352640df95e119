"""Bounds on calls to the model: slots with a short queue, deadlines, cancellation on disconnect, Idempotency-Keys."""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from starlette.types import Receive

from error_handler import RequestError
from service.errors import KEY_REUSED, QUEUE_FULL, STOPPING, TOO_SLOW, CallerLeftError, unavailable

MAX_RETRY_AFTER_S = 60
INITIAL_HOLD_S = 1.0  # how long a slot is held, until the first one is released
LAST_WEIGHT = 0.1

T = TypeVar("T")
Key = tuple[str, str]  # caller, Idempotency-Key


class AdmissionQueue:
    """Grants *slots* concurrent slots, first come, first served; up to *queue_size* requests wait for one."""

    def __init__(self, slots: int, queue_size: int) -> None:
        self.size = slots
        self.running = self.waiting = 0
        self.entered = asyncio.Event()  # set by each request that gets a place
        self._queue_size = queue_size
        self._slots = asyncio.Semaphore(slots)
        self._background = 0
        self._freed = asyncio.Event()  # wakes those that wait outside the queue
        self._held_s = INITIAL_HOLD_S
        self._turned_away = 0  # since the queue was last empty, minus those served since then

    @property
    def requests(self) -> int:
        """The number of requests that have a slot or wait for one; background work does not count."""
        return self.running - self._background + self.waiting

    @property
    def background_slots(self) -> int:
        """The most slots that background work may have: all but one, which a request finds free."""
        return max(1, self.size - 1)

    @property
    def _is_full(self) -> bool:
        return self._slots.locked() and self.waiting >= self._queue_size

    def require_room(self) -> None:
        """Raise RequestError (QUEUE_FULL) if ``acquire`` would, so that the body need not be read."""
        if self._is_full:
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

    async def acquire(self, *, patiently: bool = False) -> None:
        """Wait for a slot; the caller releases it. *patiently* also waits while the queue is full.

        Raises:
            RequestError: QUEUE_FULL, without waiting.
        """
        while patiently and self._is_full:
            await self._wait_for_release()
        self.require_room()
        self.entered.set()
        self.waiting += 1
        try:
            await self._slots.acquire()
        finally:
            self.waiting -= 1
            self._freed.set()
        self.running += 1

    async def acquire_in_background(self) -> None:
        """Wait until less than ``background_slots`` are in use; the caller releases the slot.

        Requests go first: while one waits, all slots are in use, and a free one is handed to it.
        """
        while self.running >= self.background_slots:
            await self._wait_for_release()
        await self._slots.acquire()  # one is free
        self.running += 1
        self._background += 1

    def release_in_background(self) -> None:
        """Release a slot of ``acquire_in_background``."""
        self._background -= 1
        self.running -= 1
        self._slots.release()
        self._freed.set()

    async def _wait_for_release(self) -> None:
        self._freed.clear()
        await self._freed.wait()

    def release(self, held_s: float) -> None:
        """Release a slot that was held for *held_s*."""
        self._held_s += LAST_WEIGHT * (held_s - self._held_s)
        self._turned_away = max(0, self._turned_away - 1) if self.waiting else 0
        self.running -= 1
        self._slots.release()
        self._freed.set()


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


@dataclass(slots=True)
class _Entry(Generic[T]):
    fingerprint: bytes
    task: asyncio.Task[T]
    started_at: float
    waiters: int = 0


class IdempotencyStore(Generic[T]):
    """Keeps up to *max_keys* answers in memory for *retention_s* seconds; a restart forgets them.

    Failures are not kept: the next request with the key asks again. *clock* returns seconds.
    """

    def __init__(self, retention_s: float, max_keys: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._retention_s = retention_s
        self._max_keys = max_keys
        self._clock = clock
        self._entries: OrderedDict[Key, _Entry[T]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    async def answer(self, key: Key, fingerprint: bytes, ask: Callable[[], Coroutine[Any, Any, T]]) -> tuple[T, bool]:
        """Return the answer for *key*, and whether an earlier request asked for it.

        The first request starts *ask*; concurrent ones with the key wait for the same task. It is cancelled when the
        last of them is cancelled.

        Raises:
            RequestError: KEY_REUSED if *fingerprint* differs from that of the first request; or what *ask* raises.
        """
        self._forget()
        entry = self._entries.get(key)
        replayed = entry is not None
        if entry is None:
            entry = self._entries[key] = _Entry(fingerprint, asyncio.create_task(ask()), self._clock())
            self._forget()
        elif entry.fingerprint != fingerprint:
            raise RequestError(KEY_REUSED)
        task = entry.task
        entry.waiters += 1
        try:
            return await asyncio.shield(task), replayed
        finally:
            entry.waiters -= 1
            if not task.done() and not entry.waiters:
                self._drop(key, entry)
                task.cancel()
                await asyncio.wait([task])
            if task.done() and (task.cancelled() or task.exception() is not None):
                self._drop(key, entry)

    def _drop(self, key: Key, entry: _Entry[T]) -> None:
        if self._entries.get(key) is entry:
            del self._entries[key]

    def _forget(self) -> None:
        """Drop old answers, and the oldest of too many. Running tasks are kept; the slots limit their number."""
        before = self._clock() - self._retention_s
        while True:
            key = next((key for key, entry in self._entries.items() if entry.task.done()), None)
            if key is None or (self._entries[key].started_at > before and len(self._entries) <= self._max_keys):
                break
            del self._entries[key]

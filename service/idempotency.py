"""One answer for each Idempotency-Key, for repeated and concurrent requests."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from error_handler import RequestError
from service.errors import KEY_REUSED

T = TypeVar("T")
Key = tuple[str, str]  # caller, Idempotency-Key


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

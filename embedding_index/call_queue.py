"""A queue of calls to the provider with bounded concurrency, delayed retries, and a gate for rate limits."""

from __future__ import annotations

import heapq
import itertools
import threading
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from embedding_index.inputs import Piece

POLL_S = 0.1  # how soon a waiting thread sees a stop


@dataclass(frozen=True, slots=True)
class Call:
    """One request. *attempt* counts from 1; *failed_at_s* is the ``time.monotonic`` of its first failure, or of the first
    failure of the larger call it is a part of.
    """

    pieces: tuple[Piece, ...]
    attempt: int = 1
    failed_at_s: float | None = None


class CallQueue:
    """The calls of one run. The run is over when no call waits and none is taken."""

    def __init__(self, calls: Iterable[Call], slots: int, stop: threading.Event) -> None:
        """Allow at most *slots* calls at once. After *stop* no new call starts."""
        self._ready = deque(calls)
        self._later: list[tuple[float, int, Call]] = []
        self._numbers = itertools.count()
        self._slots = slots
        self._in_slot: set[int] = set()
        self._taken = 0
        self._gate_s = 0.0
        self._stop = stop
        self._is_aborted = False
        self._changed = threading.Condition()

    def take(self) -> Call | None:
        """Wait for a call that may start, give it a slot and return it; None when the run is over."""
        with self._changed:
            while not self._is_over():
                now_s = time.monotonic()
                while self._later and self._later[0][0] <= now_s:
                    self._ready.append(heapq.heappop(self._later)[2])
                if self._ready and self._gate_s <= now_s and len(self._in_slot) < self._slots:
                    call = self._ready.popleft()
                    self._in_slot.add(id(call))
                    self._taken += 1
                    return call
                due_s = self._later[0][0] if self._later else now_s
                self._changed.wait(
                    min(POLL_S, *(at_s - now_s for at_s in (due_s, self._gate_s) if at_s > now_s), POLL_S)
                )
            self._changed.notify_all()
            return None

    def free_slot(self, call: Call) -> None:
        """Release the slot of *call*: another one may start while its answer is read and stored."""
        with self._changed:
            self._in_slot.discard(id(call))
            self._changed.notify()

    def settle(self, call: Call, first: Iterable[Call] = (), later: Iterable[Call] = (), wait_s: float = 0.0) -> None:
        """Finish *call*. The calls *first* are next; the calls *later* follow after *wait_s* seconds and all others."""
        with self._changed:
            self._in_slot.discard(id(call))
            self._taken -= 1
            self._ready.extendleft(reversed(list(first)))
            for each in later:
                heapq.heappush(self._later, (time.monotonic() + wait_s, next(self._numbers), each))
            self._changed.notify_all()

    def close_gate(self, wait_s: float) -> None:
        """Let no call start for at least *wait_s* seconds."""
        with self._changed:
            self._gate_s = max(self._gate_s, time.monotonic() + wait_s)

    def unsettled(self) -> int:
        """Return the number of calls that wait or are taken."""
        with self._changed:
            return len(self._ready) + len(self._later) + self._taken

    def abort(self) -> None:
        """Let no new call start."""
        with self._changed:
            self._is_aborted = True
            self._changed.notify_all()

    def _is_over(self) -> bool:
        return self._is_aborted or self._stop.is_set() or not (self._ready or self._later or self._taken)

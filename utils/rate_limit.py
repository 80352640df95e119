"""How many requests a caller may send: a token bucket for each."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable

MAX_CALLERS = 10_000


class RateLimiter:
    """Lets each caller send *per_minute* requests a minute, and as many at once after a quiet minute.

    0 means no limit. Remembers MAX_CALLERS callers; the one that was silent longest is forgotten,
    which can only give it tokens back. *clock* counts seconds.
    """

    def __init__(self, per_minute: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._capacity = float(per_minute)
        self._per_s = per_minute / 60
        self._clock = clock
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()  # caller -> tokens, at

    def take(self, caller: str) -> float:
        """Count one request of *caller*; return 0.0, or the seconds until the next one is allowed.

        A refused request costs nothing.
        """
        if not self._capacity:
            return 0.0
        now = self._clock()
        tokens, at = self._buckets.pop(caller, (self._capacity, now))
        tokens = min(self._capacity, tokens + (now - at) * self._per_s)
        allowed = tokens >= 1.0
        self._buckets[caller] = (tokens - 1.0 if allowed else tokens, now)
        if len(self._buckets) > MAX_CALLERS:
            self._buckets.popitem(last=False)
        return 0.0 if allowed else (1.0 - tokens) / self._per_s

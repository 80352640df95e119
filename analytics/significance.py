"""Intervals of shares and tests of their changes, in the standard library: neither a report nor the service needs scipy. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist

LEVEL = 0.95
LEAST = 10  # occurrences in both periods together; below, the normal approximation is not good enough for a test
_Z = NormalDist().inv_cdf((1 + LEVEL) / 2)


def wilson(hits: float, n: float) -> tuple[float, float]:
    """Return Wilson's 95 % interval of *hits* / *n*; (0, 1) if *n* is 0."""
    if n <= 0:
        return 0.0, 1.0
    share, spread = hits / n, _Z * _Z / n
    centre, reach = share + spread / 2, _Z * math.sqrt(share * (1 - share) / n + spread / (4 * n))
    low, high = ((centre + sign * reach) / (1 + spread) for sign in (-1, 1))
    return min(max(0.0, low), share), max(min(1.0, high), share)


def two_proportions(hits: int, n: int, earlier: int, n_earlier: int) -> float | None:
    """Return the two-sided p-value of the pooled z-test of *hits* / *n* against *earlier* / *n_earlier*.

    It is None if there are fewer than LEAST occurrences, or than LEAST results without the label, in both together.
    """
    both, total = hits + earlier, n + n_earlier
    if not n or not n_earlier or min(both, total - both) < LEAST:
        return None
    pooled = both / total
    error = math.sqrt(pooled * (1 - pooled) * (1 / n + 1 / n_earlier))
    return math.erfc(abs(hits / n - earlier / n_earlier) / error / math.sqrt(2))


def holm(values: Sequence[float]) -> list[float]:
    """Return the p-values *values* corrected for their number by Holm's method, in the same order."""
    corrected, largest = [0.0] * len(values), 0.0
    for rank, place in enumerate(sorted(range(len(values)), key=lambda place: values[place])):
        largest = max(largest, min(1.0, (len(values) - rank) * values[place]))
        corrected[place] = largest
    return corrected

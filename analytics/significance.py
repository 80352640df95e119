"""Tests of the changes of shares, in the standard library: neither a report nor the service needs scipy. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence

LEAST = 10  # occurrences in both periods together; below, the normal approximation is not good enough for a test


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

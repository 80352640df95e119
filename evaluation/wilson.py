"""Wilson's interval of a share, in the standard library: neither a report nor the service needs scipy. Pure."""

from __future__ import annotations

import math
from statistics import NormalDist

LEVEL = 0.95
_Z = NormalDist().inv_cdf((1 + LEVEL) / 2)


def wilson(hits: float, n: float) -> tuple[float, float]:
    """Return Wilson's 95 % interval of *hits* / *n*; (0, 1) if *n* is 0."""
    if n <= 0:
        return 0.0, 1.0
    share, spread = hits / n, _Z * _Z / n
    centre, reach = share + spread / 2, _Z * math.sqrt(share * (1 - share) / n + spread / (4 * n))
    low, high = ((centre + sign * reach) / (1 + spread) for sign in (-1, 1))
    return min(max(0.0, low), share), max(min(1.0, high), share)

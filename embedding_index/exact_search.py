"""Search by comparing with every vector: exact, and fast enough while all of them fit in little memory. Pure: no I/O.

A graph of neighbours misses some, and of many equal vectors (one text sent by a thousand customers) it may lose all: they
are each other's only neighbours, so no way leads to them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


class ExactSearch:
    """The vectors of *ids*, one row of *vectors* each."""

    def __init__(self, ids: Sequence[str], vectors: NDArray[np.float32]) -> None:
        self._ids = ids
        self._units = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    def nearest(self, vector: NDArray[np.float32], limit: int) -> list[tuple[str, float]]:
        """Return the *limit* most similar ids with their cosine, the most similar first, equal ones by id."""
        limit = min(limit, len(self._ids))
        if limit < 1:
            return []
        # Rounded, because equal vectors differ in the last digit by the place of their row.
        cosines = np.round(self._units @ (vector / np.linalg.norm(vector)), 6)
        least = np.partition(cosines, -limit)[-limit]
        found = [(self._ids[row], float(cosines[row])) for row in np.flatnonzero(cosines >= least).tolist()]
        return sorted(found, key=lambda hit: (-hit[1], hit[0]))[:limit]

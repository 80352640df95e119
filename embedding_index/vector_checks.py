"""Whether an answer holds the vectors that were asked for, and the vector of a text in pieces. Pure: no I/O.

Vectors are kept at length 1: only their direction is compared (cosine), and what a provider sends is kept but for scale.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from embedding_index.providers.contract import Vectors
from error_handler import MixedIndexError, UnusableVectorsError

Vector = NDArray[np.float32]
"""One vector of length 1; shape (dimensions,)."""

# Models give lengths of 1 to some hundred; beyond these it is no vector of a text, or a broken computation.
SHORTEST, LONGEST = 1e-6, 1e6


@dataclass(frozen=True, slots=True)
class CheckedVectors:
    """The vectors of one answer by the place of their input; *problems* says of the other places what is wrong.

    *dimensions* is None where no vector is good and none was known before.
    """

    good: Mapping[int, Vector]
    problems: Mapping[int, str]
    dimensions: int | None


def checked_vectors(vectors: Sequence[Sequence[float] | Vectors], count: int, dimensions: int | None) -> CheckedVectors:
    """Return which of *vectors* can be used, for *count* inputs; *dimensions* None: as most of them have.

    Raises:
        UnusableVectorsError: More or fewer came than asked for: which belongs to which input is not known.
        MixedIndexError: All of several have another dimension than *dimensions*: the model is not the one it was.
    """
    if len(vectors) != count:
        raise UnusableVectorsError(
            f"the provider sent {len(vectors)} vectors for {count} texts, so none of them can be trusted; if it goes on, "
            "check what stands at its address."
        )
    problems: dict[int, str] = {}
    good = _directions(vectors)
    for place in [place for place in range(count) if place not in good]:
        found = _direction(vectors[place])
        if isinstance(found, str):
            problems[place] = found
        else:
            good[place] = found
    lengths = Counter(len(vector) for vector in good.values())
    if dimensions is not None and len(lengths) == 1 and len(good) > 1 and dimensions not in lengths:
        raise mixed_dimensions(dimensions, next(iter(lengths)))
    if dimensions is None and lengths:
        dimensions = lengths.most_common(1)[0][0]
    for place in [place for place, vector in good.items() if len(vector) != dimensions]:
        problems[place] = f"its vector has {len(good.pop(place))} dimensions instead of {dimensions}"
    return CheckedVectors(good, problems, dimensions)


def mixed_dimensions(known: int, found: int) -> MixedIndexError:
    """Return the error for vectors of *found* dimensions where all others have *known*."""
    return MixedIndexError(
        f"the provider sends vectors of {found} dimensions, and the stored ones have {known}: they cannot be compared; "
        "set EMBEDDING_MODEL and EMBEDDING_DIMENSIONS as they were, or make the index anew with --rebuild."
    )


def weighted_mean(vectors: Sequence[Vector], weights: Sequence[float]) -> Vector | None:
    """Return the mean of the pieces of one text at length 1; None where they cancel each other out.

    *weights* are the lengths of the pieces (tokens): each token counts the same, in whichever piece it is.
    """
    mean = np.average(np.stack(vectors).astype(np.float64), axis=0, weights=weights)
    found = _direction(mean)
    return None if isinstance(found, str) else found


def _directions(vectors: Sequence[Sequence[float] | Vectors]) -> dict[int, Vector]:
    """Return the usable ones of *vectors* by place, all in one step; none where they are not a table of numbers."""
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        try:
            table = np.asarray(vectors, dtype=np.float32)
        except (TypeError, ValueError):
            return {}
        if table.ndim != 2 or not table.size:
            return {}
        norms = np.sqrt(np.einsum("ij,ij->i", table, table))
        # Far inside the bounds, where float32 computes well; what is near them is looked at one by one.
        usable = np.isfinite(norms) & (norms > 1e3 * SHORTEST) & (norms < 1e-3 * LONGEST)
        table = table / norms[:, None]
    return {int(place): table[place] for place in np.flatnonzero(usable)}


def _direction(vector: Sequence[float] | Vectors | NDArray[np.float64]) -> Vector | str:
    """Return *vector* at length 1, or what is wrong with it."""
    try:
        numbers = np.asarray(vector, dtype=np.float64)
    except (TypeError, ValueError):
        return "its vector does not consist of numbers"
    if numbers.ndim != 1 or not numbers.size:
        return "its vector is not a list of numbers"
    if not np.isfinite(numbers).all():
        return "its vector holds numbers that are not finite (NaN)"
    # By the largest first: the square of a huge number is not finite.
    largest = float(np.abs(numbers).max())
    if largest == 0.0:
        return "its vector is all zeros"
    norm = largest * float(np.linalg.norm(numbers / largest))
    if not SHORTEST <= norm <= LONGEST:
        return f"its vector has the absurd length {norm:.3g}"
    return (numbers / norm).astype(np.float32)

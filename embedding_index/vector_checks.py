"""Checks the vectors of an answer, and computes the mean vector of a text in pieces. No I/O.

Vectors are stored with length 1, because only their direction is compared (cosine).
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

# Models give lengths from 1 to some hundred; a length outside these bounds is an error of the server.
SHORTEST, LONGEST = 1e-6, 1e6


@dataclass(frozen=True, slots=True)
class CheckedVectors:
    """The *good* vectors of one answer by the place of their input, and the *problems* of the other places.

    *dimensions* is None if no vector is good and none was known before.
    """

    good: Mapping[int, Vector]
    problems: Mapping[int, str]
    dimensions: int | None


def checked_vectors(vectors: Sequence[Sequence[float] | Vectors], count: int, dimensions: int | None) -> CheckedVectors:
    """Return the usable *vectors* for *count* inputs. *dimensions* None: the length that most of them have.

    Raises:
        UnusableVectorsError: Their number is not *count*, so none can be assigned to an input.
        MixedIndexError: There are several, all with another length than *dimensions*: the model has changed.
    """
    if len(vectors) != count:
        raise UnusableVectorsError(
            f"the provider sent {len(vectors)} vectors for {count} texts, so none of them can be trusted; if this repeats, "
            "check the server at its address."
        )
    found = dict(enumerate(map(_direction, vectors)))
    problems = {place: each for place, each in found.items() if isinstance(each, str)}
    good = {place: each for place, each in found.items() if not isinstance(each, str)}
    lengths = Counter(len(vector) for vector in good.values())
    if dimensions is not None and len(lengths) == 1 and len(good) > 1 and dimensions not in lengths:
        raise mixed_dimensions(dimensions, next(iter(lengths)))
    if dimensions is None and lengths:
        dimensions = lengths.most_common(1)[0][0]
    for place in [place for place, vector in good.items() if len(vector) != dimensions]:
        problems[place] = f"its vector has {len(good.pop(place))} dimensions instead of {dimensions}"
    return CheckedVectors(good, problems, dimensions)


def mixed_dimensions(known: int, found: int) -> MixedIndexError:
    """Return the error for vectors of *found* dimensions if the stored ones have *known*."""
    return MixedIndexError(
        f"the provider sends vectors of {found} dimensions, and the stored ones have {known}: they cannot be compared; "
        "set EMBEDDING_MODEL and EMBEDDING_DIMENSIONS back, or rebuild the index with --rebuild."
    )


def weighted_mean(vectors: Sequence[Vector], weights: Sequence[float]) -> Vector | None:
    """Return the mean of *vectors*, weighted by *weights* (tokens), with length 1; None if they cancel each other out."""
    mean = np.average(np.stack(vectors).astype(np.float64), axis=0, weights=weights)
    found = _direction(mean)
    return None if isinstance(found, str) else found


def _direction(vector: Sequence[float] | Vectors | NDArray[np.float64]) -> Vector | str:
    """Return *vector* with length 1, or the problem with it."""
    try:
        numbers = np.asarray(vector, dtype=np.float64)
    except (TypeError, ValueError, OverflowError):
        return "its vector does not consist of numbers"
    if numbers.ndim != 1 or not numbers.size:
        return "its vector is not a list of numbers"
    if not np.isfinite(numbers).all():
        return "its vector holds numbers that are not finite (NaN)"
    with np.errstate(over="ignore"):  # the length of huge numbers is infinite
        norm = float(np.linalg.norm(numbers))
    if norm == 0.0:
        return "its vector is all zeros"
    if not SHORTEST <= norm <= LONGEST:
        return f"its vector has the implausible length {norm:.3g}"
    return (numbers / norm).astype(np.float32)

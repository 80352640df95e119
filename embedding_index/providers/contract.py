"""The interface of all embedding providers, the check of their answers, and the token estimate that several share. No I/O.

Vectors are stored with length 1, because only their direction is compared (cosine).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from error_handler import MixedIndexError, UnusableVectorsError
from model_server.tokens import most_tokens

# Models give lengths from 1 to some hundred; a length outside these bounds is an error of the server.
SHORTEST, LONGEST = 1e-6, 1e6
END_TOKENS = 2  # models of the BERT family put them around each input

Vectors = NDArray[np.float32]
Vector = NDArray[np.float32]
"""One vector of length 1; shape (dimensions,)."""


@dataclass(frozen=True, slots=True)
class ModelIdentity:
    """The model that made a vector. Vectors of different identities must never be compared.

    *dimensions* is the length of the vectors; None until the provider's first answer.
    """

    provider: str
    model: str
    dimensions: int | None = None

    def __str__(self) -> str:
        size = f", {self.dimensions} dimensions" if self.dimensions else ""
        return f"{self.model} of {self.provider}{size}"

    def is_same_model(self, other: ModelIdentity) -> bool:
        """Return whether vectors of both can be compared; an unknown length fits any."""
        sizes = {self.dimensions, other.dimensions} - {None}
        return (self.provider, self.model) == (other.provider, other.model) and len(sizes) <= 1


@dataclass(frozen=True, slots=True)
class RequestLimits:
    """Limits of one call: *input_tokens* for one input, *request_tokens* for all its inputs together (None: unlimited)."""

    inputs: int
    input_tokens: int
    request_tokens: int | None


@dataclass(frozen=True, slots=True)
class Answer:
    """The vectors of one call as the provider sent them, in the order of the inputs, otherwise unchecked.

    *vectors* may be of any number and lengths. *tokens* are as billed, None if unknown.
    """

    vectors: Sequence[Sequence[float] | Vectors]
    tokens: int | None


class Provider(Protocol):
    """A source of vectors. At most *max_concurrent* calls of ``embed`` may wait for an answer; more threads may read one.

    *is_external*: texts leave this machine.
    """

    identity: ModelIdentity
    limits: RequestLimits
    max_concurrent: int
    is_external: bool

    def count_tokens(self, text: str) -> int:
        """Return the tokens of *text*, or the most it may have if that is only estimated; at least 1."""

    def embed(self, texts: Sequence[str], on_answer: Callable[[], None] | None = None) -> Answer:
        """Return the vectors of *texts*, which are within the limits and not empty. One request, no retry.

        *on_answer* is called, from any thread, when the body of a good answer begins: another call may start while this
        answer is read. It need not be called.

        Raises:
            ProviderBusyError: Nothing was done; the error has the time to wait.
            ProviderUnavailableError: No usable answer; a retry may help.
            ProviderRejectedError: It will never accept this request.
            ConfigurationError: The key, the address or the model is wrong, so every request fails.
        """

    def close(self) -> None:
        """Release connections, threads and memory."""


def estimated_tokens(text: str) -> int:
    """Return the most tokens that *text* is likely to have for a model whose tokenizer is not installed, at least 1.

    Text that is no language (base64, random letters) can have half as many tokens again. Most models have fewer.
    """
    return math.ceil(most_tokens(text)) + END_TOKENS


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
    with np.errstate(over="ignore", invalid="ignore"):
        norm = math.sqrt(numbers.dot(numbers))  # cheaper than np.linalg.norm
    if SHORTEST <= norm <= LONGEST:
        return (numbers / norm).astype(np.float32)
    if not np.isfinite(numbers).all():
        return "its vector holds numbers that are not finite (NaN)"
    return f"its vector has the implausible length {norm:.3g}" if norm else "its vector is all zeros"

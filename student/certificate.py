"""Certifies from which confidence on a student agrees with the model often enough.

The thresholds are tried from the surest share down, each with the exact binomial test, until one fails: fixed sequence testing
(Angelopoulos et al., Learn then Test, arXiv 2110.01052), which needs no correction for the number of thresholds. The owner of
scipy.special.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import betainc, betaincinv

ERROR = 0.05
STEPS = 10  # shares that are tried: 0.1, 0.2 ... 1


@dataclass(frozen=True, slots=True)
class Certificate:
    """What a random sample of conversations allows a student to take.

    ``threshold`` is the lowest certified confidence, 0 to 1; None means that no threshold was certified, and ``reason`` is one
    sentence that names the cause and the remedy. ``taken`` of the ``sample`` conversations have at least that confidence
    (``share`` of them, 0 to 1), ``agreed`` of those have the model's labels in every field, and ``lower_bound`` is the exact
    lower bound of their agreement. Without a threshold, ``taken``, ``agreed`` and ``share`` are 0 and the bound is None.
    """

    promise: float
    threshold: float | None
    taken: int
    agreed: int
    sample: int
    share: float
    lower_bound: float | None
    reason: str


def certify(scores: Sequence[float], agreed: Sequence[bool], promise: float, *, error: float = ERROR) -> Certificate:
    """Return the lowest threshold whose labels agree with the model's at least *promise* of the time.

    With a probability of at least 1 - *error*, the labels of future conversations with a score of at least the threshold
    keep the promise.

    Args:
        scores: The student's confidence that all of its labels are the model's, 0 to 1, for a random sample of conversations
            that the student was not trained on.
        agreed: Whether all of its labels are the model's, in the order of *scores*.
        promise: The agreement to certify, above 0 and below 1.
        error: The probability that a certificate is wrong, above 0 and below 1.

    Raises:
        ValueError: *scores* and *agreed* differ in length.
    """
    if len(scores) != len(agreed):
        raise ValueError(f"{len(scores)} scores, but {len(agreed)} comparisons")
    sample = len(scores)
    order = np.argsort(-np.asarray(scores, float), kind="stable")
    ranked, hits = np.asarray(scores, float)[order], np.cumsum(np.asarray(agreed, bool)[order])
    found: tuple[float, int, int] | None = None
    for step in range(1, STEPS + 1):
        place = -(-sample * step // STEPS)
        if place < labels_needed(promise, error=error):
            continue
        threshold = float(ranked[place - 1])
        taken = int(np.count_nonzero(ranked >= threshold))
        agreeing = int(hits[taken - 1])
        if betainc(agreeing, taken - agreeing + 1, promise) > error:
            break
        found = threshold, taken, agreeing
    if found is None:
        return Certificate(promise, None, 0, 0, sample, 0.0, None, "No threshold keeps the promise.")
    threshold, taken, agreeing = found
    bound = float(betaincinv(agreeing, taken - agreeing + 1, error))
    return Certificate(promise, threshold, taken, agreeing, sample, taken / sample, bound, "The promise is certified.")


def labels_needed(promise: float, *, error: float = ERROR) -> int:
    """Return the smallest number of taken labels that certifies *promise*: all of them agree."""
    return int(np.ceil(np.log(error) / np.log(promise)))

"""Certifies from which confidence on a student agrees with the model, and estimates beforehand whether it can.

Shares of the sample are tried, the surest first, each with the exact binomial test (Clopper and Pearson). The error is divided among
them, and a share that passes hands its part to the next one: the fallback procedure (Wiens and Dmitrienko 2005,
doi 10.1081/BIP-200067988). The owner of scipy.special.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

ERROR = 0.05
SHARES = 10  # of the sample are tried: 0.1, 0.2 ... 1
ROOM = 0.3  # of the disagreements that the promise tolerates are left for those that a drift adds
MOST_LABELS = 20_000  # larger samples are not suggested


@dataclass(frozen=True, slots=True)
class Certificate:
    """What a random sample of conversations allows a student to take.

    ``threshold`` is the lowest certified confidence, 0 to 1. None means that no threshold is certified. ``taken`` of the ``sample``
    conversations have at least that confidence, which is the ``share`` of them, 0 to 1; ``agreed`` of those have the model's labels
    in every field, and ``lower_bound`` is the lower bound of their agreement, at the level of the test that was passed.
    Without a threshold they are 0, and the bound is None. ``reason`` is one sentence; it names the cause and the remedy of a refusal.
    """

    promise: float
    threshold: float | None
    taken: int
    agreed: int
    sample: int
    share: float
    lower_bound: float | None
    reason: str


@dataclass(frozen=True, slots=True)
class Feasibility:
    """Whether the sample allows any certificate.

    ``most`` is the largest share of the conversations that a student of this risk can take, 0 to 1. ``needed`` is the size of the
    sample that usually certifies it; None if it is larger than ``MOST_LABELS``. ``sentence`` names both.
    """

    possible: bool
    most: float
    needed: int | None
    sentence: str


@dataclass(frozen=True, slots=True)
class _Trial:
    """The surest *taken* conversations, down to *threshold*; *agreed* of them agree."""

    threshold: float
    taken: int
    agreed: int

    @property
    def rate(self) -> float:
        return self.agreed / self.taken


def certify(scores: Sequence[float], agreed: Sequence[bool], promise: float, *, error: float = ERROR) -> Certificate:
    """Return the lowest threshold whose labels agree with the model's at least *promise* of the time.

    With a probability of at least 1 - *error*, the labels of other conversations of the same traffic with at least that score
    keep the promise. This presupposes that conversations with a higher score do not agree less often than others. In the sample, they
    leave ROOM of what the promise tolerates, because a run also takes wrong labels before the audit finds a drift.

    Args:
        scores: The student's confidence that all of its labels are the model's, 0 to 1, for a random sample of conversations
            that it was not trained on.
        agreed: Whether all of its labels are the model's, in the order of *scores*.
        promise: The agreement to certify, above 0 and below 1.
        error: The probability that a certificate is wrong, above 0 and below 1.

    Raises:
        ValueError: *scores* and *agreed* differ in length, a score is no number, or *promise* or *error* is not between 0 and 1.
    """
    if len(scores) != len(agreed):
        raise ValueError(f"there are {len(scores)} scores, but {len(agreed)} comparisons")
    if not (0 < promise < 1 and 0 < error < 1):
        raise ValueError("promise and error are above 0 and below 1")
    ranked = np.asarray(scores, float)
    if np.isnan(ranked).any():
        raise ValueError("a score is no number")
    trials = _trials(ranked, np.asarray(agreed, bool))
    passed, level, without_room = None, 0.0, None
    for trial in trials:
        level += error / SHARES
        if _p_value(trial.agreed, trial.taken, promise) > level:
            level = 0.0
        elif 1 - trial.rate <= _most_wrong(promise):
            passed = trial, level
        else:
            without_room = trial
    sample = len(ranked)
    if passed is None:
        reason = _no_room(without_room, sample, promise) if without_room else ""
        reason = reason or _refusal(trials, sample, promise, error / SHARES)
        return Certificate(promise, None, 0, 0, sample, 0.0, None, reason)
    best, level = passed
    from scipy.special import betaincinv  # noqa: PLC0415 - a run with a student does without scipy

    bound = float(betaincinv(best.agreed, best.taken - best.agreed + 1, level))
    reason = (
        f"{best.agreed} of the surest {best.taken} of {sample} conversations agree with the model, "
        f"which certifies an agreement of {promise:g} from a confidence of {best.threshold:.4f}"
    )
    return Certificate(promise, best.threshold, best.taken, best.agreed, sample, best.taken / sample, bound, reason)


def feasibility(risk: float, sample: int, promise: float, *, error: float = ERROR) -> Feasibility:
    """Return whether a student of this *risk* can be certified, before anything is certified.

    Of what it takes, 1 - *promise* may be wrong, and of what it leaves to the model everything. So it takes at most
    (1 - *risk*) / *promise* of the conversations (arXiv 2606.29054).

    Args:
        risk: How often a student that takes every conversation disagrees with the model in some field, 0 to 1.
        sample: The number of conversations that are kept for the certificate.
        promise: The agreement to certify, above 0 and below 1.
        error: The probability that a certificate is wrong, above 0 and below 1.
    """
    most = min(1.0, (1 - risk) / promise)
    # The student may use up half of what is tolerated; the other half is room for the bound.
    usual = _sample_needed(labels_needed(promise, (1 + promise) / 2, error=error / SHARES), most)
    least = _sample_needed(labels_needed(promise, error=error / SHARES), most)
    possible = least is not None and sample >= least
    start = f"with a promise of {promise:g}, the student can take at most {100 * most:.0f} % of the conversations"
    if possible and usual is not None:
        end = f"the certificate has {sample} held-out conversations and usually needs about {usual}"
    elif usual is not None:
        end = f"the certificate has {sample} held-out conversations and needs at least {least}, better {usual}"
    else:
        end = "no certificate is likely: use a lower promise, or only the model"
    return Feasibility(possible, most, usual, f"{start}; {end}")


@functools.cache
def labels_needed(promise: float, rate: float = 1.0, *, error: float = ERROR / SHARES) -> int | None:
    """Return how many labels certify *promise* in one test if *rate* of them agree; None if more than ``MOST_LABELS``.

    *error* is that of the one test.
    """
    if rate <= promise:
        return None
    taken = np.concatenate([np.arange(1, 1000), np.arange(1000, MOST_LABELS + 1, 10)])
    enough = np.flatnonzero(_p_value(np.floor(rate * taken + 1e-9), taken, promise) <= error)
    return int(taken[enough[0]]) if len(enough) else None


def _sample_needed(taken: int | None, share: float) -> int | None:
    """Return the size of a sample of whose surest *share* there are *taken* conversations."""
    return None if taken is None or taken > share * MOST_LABELS else int(np.ceil(taken / share))


def _trials(scores: NDArray[np.float64], agreed: NDArray[np.bool_]) -> list[_Trial]:
    """Return the shares of a sample, the surest first; none of an empty one."""
    order = np.argsort(-scores, kind="stable")
    ranked, hits = scores[order], np.cumsum(agreed[order])
    found = []
    for step in range(1, SHARES + 1) if len(scores) else ():
        threshold = ranked[-(-len(scores) * step // SHARES) - 1]
        taken = int(np.searchsorted(-ranked, -threshold, side="right"))
        found.append(_Trial(float(threshold), taken, int(hits[taken - 1])))
    return found


def _p_value(agreed: ArrayLike, taken: ArrayLike, promise: float) -> NDArray[np.float64]:
    """Return the probability of at least *agreed* of *taken* if each agrees with the probability *promise*."""
    from scipy.special import bdtrc  # noqa: PLC0415 - as above

    return np.asarray(bdtrc(np.subtract(agreed, 1), taken, promise), float)


def _no_room(trial: _Trial, sample: int, promise: float) -> str:
    return (
        f"{trial.agreed} of the surest {trial.taken} of {sample} conversations agree with the model ({100 * trial.rate:.1f} %), and a "
        f"promise of {promise:g} needs {100 * (1 - _most_wrong(promise)):.1f} % in the sample, because a drift adds wrong labels: "
        "train with more results, or use a lower promise"
    )


def _most_wrong(promise: float) -> float:
    """Return the share of the sample that may disagree: what *promise* tolerates, less the room for a drift."""
    return (1 - promise) * (1 - ROOM) + 1e-9


def _refusal(trials: Sequence[_Trial], sample: int, promise: float, level: float) -> str:
    """Return why nothing is certified and what to do about it; *level* is that of one test."""
    least = labels_needed(promise, error=level)
    if least is None or sample < least:
        return (
            f"the sample has {sample} conversations, and a promise of {promise:g} needs at least {least or MOST_LABELS} that all "
            "agree: collect more results of the model, or use a lower promise"
        )
    best = min(trials, key=lambda trial: float(_p_value(trial.agreed, trial.taken, promise)))
    found = f"{best.agreed} of the surest {best.taken} of {sample} conversations agree with the model"
    needed = _sample_needed(labels_needed(promise, best.rate, error=level), best.taken / sample)
    if needed is None:
        return (
            f"{found} ({100 * best.rate:.1f} %), which is no evidence for a promise of {promise:g}: "
            "train with more results, or use a lower promise"
        )
    if 1 - best.rate > _most_wrong(promise):
        return _no_room(best, sample, promise)
    return (
        f"{found} ({100 * best.rate:.1f} %), too few to certify a promise of {promise:g}: "
        f"about {needed} conversations are needed for the certificate instead of {sample}"
    )

"""95 % intervals: Wilson's for proportions, a bootstrap for means of F1 and for differences. The owner of scipy."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import NormalDist

import numpy
import numpy.typing

from evaluation.values import Estimate

Array = numpy.typing.NDArray[numpy.float64]

LEVEL = 0.95
SAMPLES, SEED = 2000, 20261130  # of a bootstrap; the same input gives the same interval


def proportion(hits: int, n: int) -> Estimate:
    """Return *hits* / *n* with Wilson's score interval."""
    if n == 0:
        return Estimate(None, None, None, 0)
    share, z = hits / n, NormalDist().inv_cdf((1 + LEVEL) / 2)
    centre = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    low, high = 0.0 if hits == 0 else centre - half, 1.0 if hits == n else centre + half
    return Estimate(share, low, high, n)


def lower_bound(hits: int, n: int) -> float:
    """Return the exact (Clopper-Pearson) lower bound of *hits* / *n*, one-sided at LEVEL; *n* is at least 1."""
    from scipy.special import betaincinv  # noqa: PLC0415 - only some reports need it

    return float(betaincinv(hits, n - hits + 1, 1 - LEVEL)) if hits else 0.0


def f1_score(true_positive: int, false_positive: int, false_negative: int, n: int) -> Estimate:
    """Return the F1 of one label, whose interval is Wilson's for J = TP / (TP + FP + FN), as F1 = 2 J / (1 + J).

    *n* is the number of gold labels. A bootstrap would call an F1 of 1 from three conversations exact.
    """
    share = proportion(true_positive, true_positive + false_positive + false_negative)
    if share.value is None or share.low is None or share.high is None:
        return Estimate(None, None, None, n)
    value, low, high = (2 * part / (1 + part) for part in (share.value, share.low, share.high))
    return Estimate(value, low, high, n)


def mcnemar(only_first: int, only_second: int) -> float:
    """Return the two-sided p-value of McNemar's exact test; 1.0 if nothing differs."""
    from scipy.special import bdtr  # noqa: PLC0415 - only comparisons need it; scipy.stats takes a second to import

    return min(1.0, 2 * float(bdtr(min(only_first, only_second), only_first + only_second, 0.5)))


def bootstrap(counts: Sequence[int], statistic: Callable[[Array], Array], least: float = 0.0) -> Estimate:
    """Return *statistic*, from *least* to 1, with its normal bootstrap interval over resamples of the conversations.

    *counts* holds how many conversations have each combination of labels. *statistic* gets an array of such counts, one
    row per sample, and returns one number per row. The interval is corrected for bias (as ``boot.ci(type = "norm")`` in
    R), because the macro-F1 of a resample, which lacks some of the labels, is too low on average.
    """
    n = int(sum(counts))
    if n == 0:
        return Estimate(None, None, None, 0)
    observed = numpy.asarray([counts], dtype=float)
    samples = numpy.random.default_rng(SEED).multinomial(n, observed[0] / n, SAMPLES).astype(float)
    value, resampled = float(statistic(observed)[0]), statistic(samples)
    centre, reach = 2 * value - float(resampled.mean()), NormalDist().inv_cdf((1 + LEVEL) / 2) * float(resampled.std())
    if reach < 1e-9:  # all conversations are alike, so resamples are as well: as wide as for what was never seen in n
        reach = proportion(0, n).high or 0.0
    return Estimate(value, max(least, centre - reach), min(1.0, centre + reach), n)


def macro_f1(pairs: Sequence[tuple[frozenset[str], frozenset[str]]]) -> Callable[[Array], Array]:
    """Return the statistic for ``bootstrap``: the mean F1 of the labels that occur in gold or model.

    *pairs* are the combinations of gold and model labels, in the order of the counts.
    """
    names = sorted({label for pair in pairs for labels in pair for label in labels})
    gold = numpy.array([[label in pair[0] for label in names] for pair in pairs], dtype=float)
    model = numpy.array([[label in pair[1] for label in names] for pair in pairs], dtype=float)

    def statistic(counts: Array) -> Array:
        both, either = counts @ (gold * model), counts @ (gold + model)  # TP, and 2 TP + FP + FN
        occurring = either > 0
        scores = numpy.divide(2 * both, either, out=numpy.zeros_like(both), where=occurring)
        means: Array = scores.sum(axis=1) / numpy.maximum(1, occurring.sum(axis=1))
        return means

    return statistic


def share_of(is_hit: Sequence[float]) -> Callable[[Array], Array]:
    """Return the statistic for ``bootstrap``: the mean of *is_hit*, a value per combination, in the order of the counts."""
    values = numpy.asarray(is_hit, dtype=float)

    def statistic(counts: Array) -> Array:
        means: Array = counts @ values / counts.sum(axis=1)
        return means

    return statistic

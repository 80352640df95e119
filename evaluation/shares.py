"""The share of each label in a whole collection, from many labels of a model and a few gold labels.

Prediction-powered inference with power tuning (PPI++, Angelopoulos, Duchi and Zrnic 2023, arXiv 2311.01453): the share
of the model, corrected by its error on the gold conversations. For shares, the estimator needs only five counts, so it
is computed here; tests compare it with the reference implementation ``ppi_py.ppi_mean_ci``. One conversation is added
for each of the two kinds of error, as Bonett and Price (2012) do for differences of paired proportions: without them,
the interval of a label on which the model has made no error among the gold labels has almost no width.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist

from evaluation.intervals import proportion
from evaluation.values import Estimate, Labels, Pair, Row
from evaluation.wilson import LEVEL

ADDED = 1  # pseudo-conversations of each kind of error


@dataclass(frozen=True, slots=True)
class Agreement:
    """The gold conversations by whether gold and model have a label: both, one of them, or neither."""

    both: int
    only_gold: int
    only_model: int
    neither: int

    @property
    def n(self) -> int:
        """The number of gold conversations."""
        return self.both + self.only_gold + self.only_model + self.neither


@dataclass(frozen=True, slots=True)
class ShareFigures:
    """Three estimates of the share of *label*: by the model alone, by gold alone, and by both (PPI++).

    *model* has no interval: its error is not random. *combined* is *gold* if no conversation is without gold label.
    """

    label: str
    model: float
    gold: Estimate
    combined: Estimate


@dataclass(frozen=True, slots=True)
class FieldShares:
    """The shares of one field, from *n_gold* gold labels and *n_model* labels of the model, these included."""

    field: str
    n_gold: int
    n_model: int
    labels: list[ShareFigures]


def field_shares(name: str, rows: Sequence[Row], counts: Counter[Labels], known: Sequence[str]) -> FieldShares:
    """Return the shares of the field *name*; *counts* are the labels in the whole collection."""
    pairs: Counter[Pair] = Counter(
        (row.gold[name], row.labelled.labels[name]) for row in rows if name in row.gold and name in row.labelled.labels
    )
    n, total = pairs.total(), counts.total()
    occurring = {label for labels in counts for label in labels} | {label for gold, _ in pairs for label in gold}
    figures = []
    for label in [label for label in known if label in occurring] + sorted(occurring - set(known)):
        in_model = sum(count for labels, count in counts.items() if label in labels)
        table = Counter((label in gold, label in model) for gold, model in pairs.elements())
        agreement = Agreement(table[True, True], table[True, False], table[False, True], table[False, False])
        gold_share = proportion(agreement.both + agreement.only_gold, n)
        # Results may have been deleted, or labelled again, between the two reads.
        without_gold = min(max(0, in_model - agreement.both - agreement.only_model), total - n)
        combined = prediction_powered(agreement, without_gold, total - n) if n and total > n else gold_share
        figures.append(ShareFigures(label, in_model / total if total else 0.0, gold_share, combined))
    return FieldShares(name, n, total, figures)


def prediction_powered(agreement: Agreement, hits: int, total: int, added: int = ADDED) -> Estimate:
    """Return the share of a label by PPI++; *hits* of *total* (>= 1) conversations without gold have it by the model.

    The added conversations widen the interval and leave the estimate alone.
    """
    value, _ = _value_and_error(agreement, hits, total)
    widened = replace(agreement, only_gold=agreement.only_gold + added, only_model=agreement.only_model + added)
    centre, error = _value_and_error(widened, hits, total)
    reach = NormalDist().inv_cdf((1 + LEVEL) / 2) * error
    low, value, high = (min(1.0, max(0.0, each)) for each in (centre - reach, value, centre + reach))
    return Estimate(value, min(low, value), max(high, value), agreement.n)


def _value_and_error(agreement: Agreement, hits: int, total: int) -> tuple[float, float]:
    both, n = agreement.both, agreement.n
    gold, model, unlabelled = (both + agreement.only_gold) / n, (both + agreement.only_model) / n, hits / total
    covariance = both / n - gold * model
    pooled = (both + agreement.only_model + hits) / (n + total)
    variance = pooled * (1 - pooled) * (n + total) / (n + total - 1)
    power = min(1.0, max(0.0, covariance / ((1 + n / total) * variance))) if variance else 0.0
    of_rectifier = gold * (1 - gold) + power**2 * model * (1 - model) - 2 * power * covariance
    error = math.sqrt(power**2 * unlabelled * (1 - unlabelled) / total + max(0.0, of_rectifier) / n)
    return power * unlabelled + gold - power * model, error

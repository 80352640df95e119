"""Agreement between reviewers: Cohen's kappa for each field and pair of reviewers. Pure."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import AsyncIterable, Hashable, Sequence
from dataclasses import dataclass

from review.labels import Correction, label_key
from storage.extended_json import id_key

Z = 1.959964  # of a 95 % interval
ROUNDING = 1e-9  # a smaller variance is 0


@dataclass(frozen=True, slots=True)
class Kappa:
    """Cohen's kappa of *n* pairs of labels, of which the share *agreed* is equal (0 to 1).

    *value* is None if it is undefined, because both reviewers gave one and the same label to all. *interval* (95 %) is
    None if it cannot be estimated: without a value, or if the formula has the variance 0, such as without a disagreement.
    """

    n: int
    agreed: float
    value: float | None
    interval: tuple[float, float] | None


@dataclass(frozen=True, slots=True)
class Agreement:
    """The agreement of two *reviewers*, in alphabetical order, on *field*."""

    field: str
    reviewers: tuple[str, str]
    kappa: Kappa


def cohens_kappa(pairs: Sequence[tuple[Hashable, Hashable]]) -> Kappa:
    """Return Cohen's kappa of *pairs*, at least one, with the asymptotic interval of Fleiss, Cohen and Everitt (1969)."""
    n = len(pairs)
    cells = {pair: count / n for pair, count in Counter(pairs).items()}
    first = {label: count / n for label, count in Counter(one for one, _ in pairs).items()}
    second = {label: count / n for label, count in Counter(other for _, other in pairs).items()}
    agreed = math.fsum(share for (one, other), share in cells.items() if one == other)
    expected = math.fsum(share * second.get(label, 0.0) for label, share in first.items())
    if math.isclose(expected, 1.0):
        return Kappa(n, agreed, None, None)
    value = (agreed - expected) / (1 - expected)
    on = math.fsum(
        share * (1 - (first[one] + second[one]) * (1 - value)) ** 2
        for (one, other), share in cells.items()
        if one == other
    )
    off = math.fsum(
        share * (second.get(one, 0.0) + first.get(other, 0.0)) ** 2
        for (one, other), share in cells.items()
        if one != other
    )
    variance = on + (1 - value) ** 2 * off - (value - expected * (1 - value)) ** 2
    if variance < ROUNDING:  # the interval would have no width, as if kappa were exact
        return Kappa(n, agreed, value, None)
    half = Z * math.sqrt(variance) / ((1 - expected) * math.sqrt(n))
    return Kappa(n, agreed, value, (max(-1.0, value - half), min(1.0, value + half)))


async def agreement(corrections: AsyncIterable[Correction]) -> list[Agreement]:
    """Return the agreement of each pair of reviewers on each field that both decided, by field and names."""
    decided: dict[tuple[bytes, str], dict[str, Hashable]] = {}
    async for one in corrections:
        labels = decided.setdefault((id_key(one.source_conversation_id), one.field), {})
        labels[one.reviewer] = label_key(one.label_to)
    pairs: dict[tuple[str, str, str], list[tuple[Hashable, Hashable]]] = {}
    for (_, field), labels in decided.items():
        for first, second in itertools.combinations(sorted(labels), 2):
            pairs.setdefault((field, first, second), []).append((labels[first], labels[second]))
    return [
        Agreement(field, (one, other), cohens_kappa(pairs[field, one, other])) for field, one, other in sorted(pairs)
    ]

"""Compares the labels of two sources conversation by conversation, with gold labels if there are any."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from evaluation.intervals import bootstrap, macro_f1, mcnemar, proportion, share_of
from evaluation.sources import LabelSource
from evaluation.values import Estimate, Labelled, Labels, Row

LISTED = 10_000  # conversations in the list of differences


@dataclass(frozen=True, slots=True)
class Difference:
    """A conversation to which A and B give other labels in *field*; *gold* is None if it has no gold label."""

    id: str
    conversation_number: str | None
    field: str
    gold: Labels | None
    a: Labels
    b: Labels


@dataclass(frozen=True, slots=True)
class FieldComparison:
    """The difference of A and B in one field. The last seven need gold labels and are None without them.

    *accuracy_change* and *macro_f1_change* are B minus A. *only_a* conversations are right in A alone, *only_b* in B
    alone; *p_value* is McNemar's exact test of these two.
    """

    field: str
    agreement: Estimate
    accuracy_a: Estimate | None = None
    accuracy_b: Estimate | None = None
    accuracy_change: Estimate | None = None
    macro_f1_change: Estimate | None = None
    only_a: int | None = None
    only_b: int | None = None
    p_value: float | None = None

    @property
    def accuracy_n(self) -> int:
        """The number of conversations with a gold label."""
        return 0 if self.accuracy_a is None else self.accuracy_a.n


@dataclass(slots=True)
class Provenance:
    """The origin of the labels of one source. *models* counts its conversations by model."""

    source: str
    models: Counter[str] = field(default_factory=Counter)


@dataclass(slots=True)
class Comparison:
    """The comparison of A and B.

    *n* conversations are in both; *missing* ones only in A. *same_fingerprint* of them were labelled by the same model,
    prompt and options. *differences* has at most LISTED of *differing*.
    """

    a: Provenance
    b: Provenance
    n: int = 0
    missing: int = 0
    same_fingerprint: int = 0
    differing: int = 0
    fields: list[FieldComparison] = field(default_factory=list)
    differences: list[Difference] = field(default_factory=list)


_Triple = tuple[Labels | None, Labels, Labels]  # gold, A, B


class Comparer:
    """Counts the combinations of labels, page by page, so that collections need not fit into memory."""

    def __init__(self, a: LabelSource, b: LabelSource, fields: Sequence[str]) -> None:
        self._b = b
        self._counts: dict[str, Counter[_Triple]] = {name: Counter() for name in fields}
        self._comparison = Comparison(Provenance(a.name), Provenance(b.name))

    async def add(self, page: Sequence[Row]) -> None:
        """Add conversations with the labels of A; *gold* of a row may be empty."""
        found = {one.key: one for one in await self._b.find([row.labelled.document_id for row in page], [])}
        for row in page:
            if row.labelled.key in found:
                self._add(row.gold, row.labelled, found[row.labelled.key])
            else:
                self._comparison.missing += 1

    def _add(self, gold: Mapping[str, Labels], a: Labelled, b: Labelled) -> None:
        comparison = self._comparison
        comparison.n += 1
        comparison.same_fingerprint += a.fingerprint == b.fingerprint != ""
        comparison.a.models[a.model] += 1
        comparison.b.models[b.model] += 1
        is_different = False
        for name, counts in self._counts.items():
            if name not in a.labels or name not in b.labels:
                continue
            triple = (gold.get(name), a.labels[name], b.labels[name])
            counts[triple] += 1
            if triple[1] != triple[2]:
                is_different = True
                if len(comparison.differences) < LISTED:
                    comparison.differences.append(Difference(a.name, a.number, name, *triple))
        comparison.differing += is_different

    def comparison(self) -> Comparison:
        """Return the comparison of what was added."""
        figures = [_compared(name, counts) for name, counts in self._counts.items() if counts]
        self._comparison.fields = figures
        return self._comparison


def _compared(name: str, counts: Counter[_Triple]) -> FieldComparison:
    same = sum(count for (_, a, b), count in counts.items() if a == b)
    agreement = proportion(same, counts.total())
    judged = [(gold, a, b, count) for (gold, a, b), count in counts.items() if gold is not None]
    if not judged:
        return FieldComparison(name, agreement)
    n, amounts = sum(count for *_, count in judged), [count for *_, count in judged]
    right_a, right_b = [gold == a for gold, a, _, _ in judged], [gold == b for gold, _, b, _ in judged]
    only_a = sum(count for count, a, b in zip(amounts, right_a, right_b, strict=True) if a and not b)
    only_b = sum(count for count, a, b in zip(amounts, right_a, right_b, strict=True) if b and not a)
    f1_a = macro_f1([(frozenset(gold), frozenset(a)) for gold, a, _, _ in judged])
    f1_b = macro_f1([(frozenset(gold), frozenset(b)) for gold, _, b, _ in judged])
    return FieldComparison(
        name,
        agreement,
        proportion(sum(count for count, is_right in zip(amounts, right_a, strict=True) if is_right), n),
        proportion(sum(count for count, is_right in zip(amounts, right_b, strict=True) if is_right), n),
        bootstrap(amounts, share_of([b - a for a, b in zip(right_a, right_b, strict=True)]), -1.0),
        bootstrap(amounts, lambda samples: f1_b(samples) - f1_a(samples), -1.0),
        only_a,
        only_b,
        mcnemar(only_a, only_b),
    )

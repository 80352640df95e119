"""The figures behind the tab Labels, counted by MongoDB: labels by field, by time and channel, and by each other."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec

from analytics.aggregates import Confidences, Counts, Example, FieldCounts, LabelAnalytics, Labels, Order
from config import Settings, Taxonomy
from mongo_client import DocumentStore
from service.labels_query import LabelsQuery
from service.recent import Figures, Recent

LIMIT_S = 120.0  # for one pass over the results
EXAMPLES = 20
CROSSED = ("topic", "sentiment")  # fields of the taxonomy that is shipped


@dataclass(frozen=True, slots=True)
class Share:
    """The share of a label (0 to 1), and its 95 % interval if there is gold."""

    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, slots=True)
class FieldFigures:
    """The labels of one field: *shares* by label, the most frequent first, estimated from *n_gold* reviewed conversations."""

    counts: FieldCounts
    shares: Mapping[str, Share]
    n_gold: int = 0


@dataclass(frozen=True, slots=True)
class LabelsFigures:
    """All figures of a view. *crossed* counts the labels of the two fields *across* with each other."""

    fields: Sequence[FieldFigures]
    across: tuple[str, str] | None
    crossed: Counter[tuple[str, str]]
    confidences: Confidences

    @property
    def n(self) -> int:
        """The number of results in the view."""
        return max((one.counts.total.n for one in self.fields), default=0)


class LabelsTab:
    """Figures and examples of each view, computed in the background."""

    def __init__(self, store: DocumentStore, settings: Settings, taxonomy: Taxonomy) -> None:
        self.taxonomy = taxonomy
        self.figures = Recent[LabelsQuery, LabelsFigures](self._compute)
        self.examples = Recent[tuple[LabelsQuery, Order], list[Example]](self._find)
        self._store = store
        self._analytics = LabelAnalytics(store, settings, taxonomy, limit_s=LIMIT_S)
        self._passes: dict[LabelsQuery, int] = {}  # that are done

    def last(self, query: LabelsQuery) -> Figures[LabelsFigures] | None:
        """Return the figures of *query*; None while the first ones are computed. See ``Recent.last``."""
        return self.figures.last(query)

    def last_examples(self, query: LabelsQuery, order: Order) -> Figures[list[Example]] | None:
        """Return up to EXAMPLES results of *query*; None while the first ones are looked up. See ``Recent.last``."""
        return self.examples.last((replace(query, by="week"), order))  # the step does not matter

    def progress(self, query: LabelsQuery) -> tuple[int, int]:
        """Return how many passes over the results are done for *query*, and of how many."""
        return self._passes.get(query, 0), len(self.taxonomy.field_names) + 2

    async def close(self) -> None:
        """Cancel what is being computed."""
        await self.figures.close()
        await self.examples.close()

    async def _compute(self, query: LabelsQuery) -> LabelsFigures:
        view, names = query.slice, self.taxonomy.field_names
        await self._store.check()  # a pass has much time, so it would notice late that MongoDB is away
        try:
            fields = []
            for name in names:
                fields.append(await self._field(name, query))
                self._passes[query] = len(fields)
            across = CROSSED if set(CROSSED) <= set(names) else (names[0], names[1]) if len(names) > 1 else None
            crossed = await self._analytics.crossed(*across, view) if across else Counter[tuple[str, str]]()
            self._passes[query] = len(fields) + 1
            return LabelsFigures(fields, across, crossed, await self._analytics.confidences(view))
        finally:
            self._passes.pop(query, None)

    async def _field(self, name: str, query: LabelsQuery) -> FieldFigures:
        counts = await self._analytics.field_counts(name, query.by, query.slice)
        n = max(1, counts.total.n)
        shares = {label: Share(count / n) for label, count in counts.total.labels.most_common()}
        # A filter by label, corrections applied, makes the control sample a sample of something else.
        pairs = Counter() if query.labels else await self._analytics.gold_pairs(name, query.slice)
        if not pairs or not can_estimate():
            return FieldFigures(counts, shares)
        of_model = await self._analytics.field_counts(name, query.by, query.slice, is_corrected=False)
        estimated = estimates(pairs, of_model.total)
        ordered = dict(sorted(estimated.items(), key=lambda item: -item[1].value))
        return FieldFigures(counts, ordered, pairs.total())

    async def _find(self, key: tuple[LabelsQuery, Order]) -> list[Example]:
        query, order = key
        await self._store.check()
        return await self._analytics.examples(query.slice, order, EXAMPLES)


def can_estimate() -> bool:
    """Return whether the packages for intervals are installed (requirements-evaluation.txt)."""
    return all(find_spec(name) for name in ("numpy", "scipy"))


def estimates(pairs: Counter[tuple[Labels, Labels]], of_model: Counts) -> dict[str, Share]:
    """Return the share of each label by PPI++, see ``evaluation.shares``.

    *pairs* counts gold labels with labels of the model in the control sample, *of_model* the labels of the model in all
    results, these included.
    """
    from evaluation import shares  # noqa: PLC0415 - scipy is optional, and takes a second to import
    from evaluation.intervals import proportion  # noqa: PLC0415

    n, found = pairs.total(), {}
    for label in {*of_model.labels, *(label for gold, _ in pairs for label in gold)}:
        table = Counter((label in gold, label in model) for gold, model in pairs.elements())
        agreement = shares.Agreement(table[True, True], table[True, False], table[False, True], table[False, False])
        hits, total = of_model.labels[label] - agreement.both - agreement.only_model, of_model.n - n
        if total > 0:
            one = shares.prediction_powered(agreement, max(0, min(hits, total)), total)
        else:
            one = proportion(agreement.both + agreement.only_gold, n)
        found[label] = Share(one.value or 0.0, one.low, one.high)
    return found

"""The figures of ``cli.py report``: shares of labels, their changes, and where they come from."""

from __future__ import annotations

import asyncio
import importlib.util
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import TypeVar

from analytics.aggregates import LabelAnalytics
from analytics.figures import Confidences, Counts, Example, FieldCounts, Labels, ModelUse
from analytics.significance import holm, two_proportions
from analytics.slices import Period, Slice
from evaluation.wilson import wilson

T = TypeVar("T")

PASSES = 2  # over the results at a time; each keeps a core of MongoDB busy
LAST_DAYS = timedelta(days=7)  # compared if no period is given
LEAST_GOLD = 30  # labels of the control sample; with fewer, the intervals are Wilson's
SIGNIFICANT = 0.05
EXAMPLES = 20
MOST_CROSSED = 3  # heat maps


@dataclass(frozen=True, slots=True)
class Share:
    """*hits* results have *label*. *value* is its share with a 95 % interval: counted, or corrected by gold labels."""

    label: str
    hits: int
    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Change:
    """The share of *label* of *field* in a period and in the one before, without corrections.

    *p_value* is corrected for the number of labels tested; None if the label is too rare for a test.
    """

    field: str
    label: str
    now: float
    before: float
    p_value: float | None

    @property
    def is_significant(self) -> bool:
        """True if the change is larger than chance explains."""
        return self.p_value is not None and self.p_value < SIGNIFICANT


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two periods of equal length, ending at *until*; *n* and *n_before* results. *changes* are the largest first."""

    before: datetime
    since: datetime
    until: datetime
    n: int
    n_before: int
    changes: list[Change]


@dataclass(frozen=True, slots=True)
class FieldReport:
    """The shares of one field. *n_gold* is the size of the control sample that corrects them, 0 for Wilson's intervals."""

    counts: FieldCounts
    shares: list[Share]
    n_gold: int
    is_multiple: bool


@dataclass(frozen=True, slots=True)
class Crossing:
    """The count of each label of the field *rows* with each label of the field *columns*.

    *totals* are the results of each row: fewer than its counts together, if a result can have several of *columns*.
    """

    rows: str
    columns: str
    counts: Counter[tuple[str, str]]
    totals: Counter[str]


@dataclass(slots=True)
class LabelReport:
    """Everything that the page shows. Texts come from outside and are not escaped; there is no conversation text."""

    results: str
    view: Slice
    by: Period
    time_zone: str
    n: int
    n_corrected: int
    fields: list[FieldReport]
    crossings: list[Crossing]
    comparison: Comparison | None
    confidences: Confidences
    models: list[ModelUse]
    failures: Mapping[str, Counter[str]]
    lowest: list[Example]
    newest: list[Example]
    notes: list[str]
    created_at: datetime = field(default_factory=lambda: datetime.now(UTC))


async def make_report(
    analytics: LabelAnalytics, results: str, view: Slice, by: Period, tell: Callable[[str], None]
) -> LabelReport:
    """Return the report on *view*; *results* names the collection, and *tell* gets each step before it begins."""
    notes: list[str] = []
    gate = asyncio.Semaphore(PASSES)

    async def step(name: str, figures: Awaitable[T]) -> T:
        async with gate:
            tell(name)
            return await figures

    models = await step("models", analytics.models(view))
    newest = max((one.last for one in models if one.last is not None), default=None)
    async with asyncio.TaskGroup() as group:
        fields = [
            group.create_task(step(f"labels of {name}", field_report(analytics, name, by, view, notes)))
            for name in analytics.fields
        ]
        comparison = group.create_task(step("changes", _compared(analytics, view, newest)))
        confidences = group.create_task(step("confidence", analytics.confidences(view)))
        failures = group.create_task(step("failures", analytics.failures()))
        corrected = group.create_task(step("corrections", analytics.corrected(view)))
        lowest = group.create_task(step("examples", analytics.examples(view, "confidence", EXAMPLES)))
        latest = group.create_task(step("examples", analytics.examples(view, "newest", EXAMPLES)))
    pairs = crossed_fields([one.result() for one in fields])
    async with asyncio.TaskGroup() as group:
        crossings = [
            group.create_task(step(f"{columns} by {rows}", analytics.crossed(rows, columns, view)))
            for rows, columns in pairs
        ]
    return LabelReport(
        results=results,
        view=view,
        by=by,
        time_zone=analytics.time_zone,
        n=sum(one.n for one in models),
        n_corrected=corrected.result(),
        fields=[one.result() for one in fields],
        crossings=[Crossing(*pair, *one.result()) for pair, one in zip(pairs, crossings, strict=True)],
        comparison=comparison.result(),
        confidences=confidences.result(),
        models=models,
        failures=failures.result(),
        lowest=lowest.result(),
        newest=latest.result(),
        notes=sorted(notes),
    )


async def field_report(analytics: LabelAnalytics, name: str, by: Period, view: Slice, notes: list[str]) -> FieldReport:
    """Return the shares of the field *name* in *view*; *notes* gets a sentence if gold labels could not be used."""
    counts = await analytics.field_counts(name, by, view)
    if counts.is_cut:
        notes.append(f"{name} has too many labels, channels and periods; the rarest combinations are not counted.")
    gold = Counter[tuple[Labels, Labels]]() if view.labels else await analytics.gold_pairs(name, view)
    n_gold = gold.total()
    problem = ""
    if n_gold and n_gold < LEAST_GOLD:
        problem = f"the control sample has only {n_gold} of the {LEAST_GOLD} labels that a correction needs"
    elif n_gold and importlib.util.find_spec("numpy") is None:  # evaluation.shares needs it
        problem = "the packages of requirements-evaluation.txt are not installed"
    if problem:
        notes.append(f"The shares of {name} are not corrected by gold labels: {problem}.")
    of_model = await analytics.field_counts(name, by, view, is_corrected=False) if n_gold and not problem else None
    shares = counted_shares(counts.total) if of_model is None else gold_shares(counts.total, of_model.total, gold)
    return FieldReport(counts, shares, 0 if of_model is None else n_gold, analytics.taxonomy.field(name).is_multiple)


def counted_shares(counts: Counts) -> list[Share]:
    """Return the shares of the labels in *counts* with Wilson's intervals, the most frequent first."""
    return [
        Share(label, hits, hits / counts.n, *wilson(hits, counts.n))
        for label, hits in sorted(counts.labels.items(), key=lambda item: (-item[1], item[0]))
    ]


def gold_shares(counts: Counts, of_model: Counts, gold: Counter[tuple[Labels, Labels]]) -> list[Share]:
    """Return the shares by prediction-powered inference from the labels *of_model* and the pairs *gold*.

    *gold* are pairs of a gold label and one of the model in a random sample. It needs requirements-evaluation.txt.
    """
    from evaluation.shares import Agreement, prediction_powered  # noqa: PLC0415 - loads numpy

    found = []
    occurring = counts.labels.keys() | of_model.labels.keys()
    for label in occurring:
        cells = Counter[tuple[bool, bool]]()
        for (by_person, by_model), n in gold.items():
            cells[label in by_person, label in by_model] += n
        agreement = Agreement(cells[True, True], cells[True, False], cells[False, True], cells[False, False])
        rest = of_model.n - agreement.n
        if rest > 0:
            hits = max(0, of_model.labels[label] - agreement.both - agreement.only_model)
            estimate = prediction_powered(agreement, hits, rest)
            value, low, high = estimate.value or 0.0, estimate.low or 0.0, estimate.high or 0.0
        else:  # every result has a gold label
            hits = agreement.both + agreement.only_gold
            value, (low, high) = hits / agreement.n, wilson(hits, agreement.n)
        found.append(Share(label, counts.labels[label], value, low, high))
    return sorted(found, key=lambda share: (-share.value, share.label))


def crossed_fields(fields: Sequence[FieldReport]) -> list[tuple[str, str]]:
    """Return pairs of fields for heat maps: each field, as rows, by the one with the fewest labels."""
    used = [one for one in fields if one.shares]
    if len(used) < 2:
        return []
    columns = min(used, key=lambda one: len(one.shares))
    return [(one.counts.name, columns.counts.name) for one in used if one is not columns][-MOST_CROSSED:]


async def _compared(analytics: LabelAnalytics, view: Slice, newest: datetime | None) -> Comparison | None:
    """Return the changes against the period before; None if there is nothing before, or no time.

    Without an end, that is the *newest* conversation, or now: a wrong date in the future would leave two empty periods.
    """
    moment = timedelta(milliseconds=1)  # the end is exclusive
    ends = [view.until] if view.until else [min(newest, datetime.now(UTC)) + moment, newest + moment] if newest else []
    for until in dict.fromkeys(ends):
        if found := await _compared_until(until, analytics, view):
            return found
    return None


async def _compared_until(until: datetime, analytics: LabelAnalytics, view: Slice) -> Comparison | None:
    since = view.since or until - LAST_DAYS
    if since >= until or until - since > since - datetime.min.replace(tzinfo=UTC):
        return None
    before = since - (until - since)
    now: dict[str, Counts] = {}
    earlier: dict[str, Counts] = {}
    for name in analytics.fields:
        for found, start, end in ((now, since, until), (earlier, before, since)):
            # As the model gave them: fewer results of one period than of the other have a correction.
            part = replace(view, since=start, until=end)
            found[name] = (await analytics.field_counts(name, "week", part, is_corrected=False)).total
    n, n_before = (max((counts.n for counts in found.values()), default=0) for found in (now, earlier))
    if not n or not n_before:
        return None
    return Comparison(before, since, until, n, n_before, changes_between(now, earlier))


def changes_between(now: Mapping[str, Counts], before: Mapping[str, Counts]) -> list[Change]:
    """Return the change of each label, with p-values corrected by Holm's method for all labels that were tested."""
    changes: list[Change] = []
    values: list[float] = []
    for name, counts in now.items():
        earlier = before[name]
        if not counts.n or not earlier.n:
            continue
        for label in sorted(counts.labels.keys() | earlier.labels.keys()):
            p_value = two_proportions(counts.labels[label], counts.n, earlier.labels[label], earlier.n)
            values += [] if p_value is None else [p_value]
            share, share_before = counts.labels[label] / counts.n, earlier.labels[label] / earlier.n
            changes.append(Change(name, label, share, share_before, p_value))
    corrected = iter(holm(values))
    changes = [one if one.p_value is None else replace(one, p_value=next(corrected)) for one in changes]
    return sorted(changes, key=lambda one: (not one.is_significant, -abs(one.now - one.before)))

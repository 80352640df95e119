"""Charts are small enough for a page, whatever the number of results."""

from __future__ import annotations

from collections import Counter
from datetime import date, timedelta

import pytest

from analytics.figures import Confidences, Counts, FieldCounts
from analytics.label_report import Crossing, FieldReport, counted_shares
from analytics.periods import MOST, period_named
from analytics.report_page import confidence_chart, crossing_chart, field_charts
from analytics.slices import BINS, Period
from config import load_taxonomy

MAX_CHARTS = 38_000  # bytes, of the 50 KB of a page


def counts(labels: tuple[str, ...], seed: int) -> Counts:
    """Return counts of a million results, different for each *seed*."""
    found = Counter({label: 3 + (7919 * (seed + 3) * (place + 2)) % 90_001 for place, label in enumerate(labels)})
    return Counts(found.total(), found)


def report_of(name: str, by: Period) -> FieldReport:
    labels = load_taxonomy().names(name)
    step = timedelta(days=7 if by == "week" else 1)
    periods = {
        period_named(date(2025, 12, 1) + number * step, by): counts(labels, number) for number in range(MOST[by])
    }
    channels = {f"channel {number}": counts(labels, number) for number in range(4)} | {"": counts(labels, 9)}
    total = counts(labels, 1)
    return FieldReport(FieldCounts(name, total, periods, channels), counted_shares(total), 0, is_multiple=False)


@pytest.mark.parametrize("by", ["week", "day"])
def test_charts_of_the_shipped_taxonomy_fit_into_a_page(by: Period) -> None:
    """A year of weeks, or a quarter of days."""
    names = load_taxonomy().field_names
    drawn = [chart for name in names for chart in field_charts(report_of(name, by), by)]
    for name in ("intent", "topic"):
        pairs = Counter({(row, column): 77 for row in load_taxonomy().names(name) for column in ("P", "N", "X")})
        drawn.append(crossing_chart(Crossing(name, "sentiment", pairs, Counter(row for row, _ in pairs))))
    confidence = confidence_chart(Confidences(tuple(range(1, BINS + 1)), {}, 0))
    assert confidence is not None
    sizes = {chart.title: len(chart.with_link("tables?by=day")) for chart in [*drawn, confidence]}
    assert sum(sizes.values()) <= MAX_CHARTS, sizes

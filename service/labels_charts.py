"""The charts of the tab Labels. Pure."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from markupsafe import Markup

from analytics import charts
from analytics.aggregates import BINS, Counts
from analytics.slices import NO_CHANNEL
from analytics.svg import SERIES
from service.labels import FieldFigures, LabelsFigures

BARS = 20  # labels in a chart of shares; the table of a taxonomy with more labels ends there as well
PERIODS, CHANNELS = 60, 12
NO_CHANNEL_NAME = "no channel"


@dataclass(frozen=True, slots=True)
class FieldCharts:
    """The charts of one field, and its labels with their counts as they are stored, corrections applied."""

    name: str
    figures: FieldFigures
    charts: list[Markup]
    labels: list[tuple[str, int]]


def field_charts(one: FieldFigures, by: str) -> FieldCharts:
    """Return the charts of a field: shares, over time, and by channel if there are several."""
    counts, name = one.counts, one.counts.name
    title = f"{name}: shares"
    if one.n_gold:
        title += f", estimated with {one.n_gold:,} reviewed conversations"
    rows = [
        charts.Bar(label, share.value, share.low, share.high, f"{counts.total.labels[label]:,}")
        for label, share in list(one.shares.items())[:BARS]
    ]
    drawn = [charts.bars(title, rows, detail="results")]
    periods = list(counts.periods)[-PERIODS:]
    if len(periods) > 1:
        cut = f" (the last {PERIODS})" if len(counts.periods) > PERIODS else ""
        series = _series(counts.total, [counts.periods[period] for period in periods])
        drawn.append(charts.lines(f"{name} by {by}{cut}", periods, series))
    channels = list(counts.channels)[:CHANNELS]
    if len(channels) > 1:
        series = _series(counts.total, [counts.channels[channel] for channel in channels])
        names = [channel_name(channel) for channel in channels]
        drawn.append(charts.stacked(f"{name} by channel", names, series))
    return FieldCharts(name, one, drawn, counts.total.labels.most_common(BARS))


def shared_charts(figures: LabelsFigures) -> list[Markup]:
    """Return the charts of more than one field: two fields with each other, and the confidence."""
    drawn = []
    if figures.across and figures.crossed:
        first, second = figures.across
        rows, columns = Counter[str](), Counter[str]()
        for (row, column), n in figures.crossed.items():
            rows[row] += n
            columns[column] += n
        shares = {(row, column): n / rows[row] for (row, column), n in figures.crossed.items()}
        names = [name for name, _ in rows.most_common(BARS)], [name for name, _ in columns.most_common(SERIES)]
        drawn.append(charts.heat_map(f"{second} within each {first}, in percent", *names, shares))
    bins = figures.confidences.bins
    if n := sum(bins):
        bars = [
            charts.Bar(f"{place / BINS:.2f} to {(place + 1) / BINS:.2f}", count / n, detail=f"{count:,}")
            for place, count in enumerate(bins)
        ]
        drawn.append(charts.bars("lowest confidence in a result", bars, detail="results"))
    return drawn


def channel_name(channel: str) -> str:
    """Return *channel* for people."""
    return NO_CHANNEL_NAME if channel == NO_CHANNEL else channel


def _series(total: Counts, places: list[Counts]) -> list[charts.Series]:
    """Return the share of each of the most frequent labels at *places*."""
    return [
        charts.Series(label, [one.labels[label] / one.n if one.n else None for one in places])
        for label, _ in total.labels.most_common(SERIES)
    ]

"""Renders a label report as one HTML page: no script, and no request to any server."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from datetime import datetime, tzinfo
from pathlib import Path

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from analytics import charts
from analytics.charts import Bar, Chart, Series, percent
from analytics.figures import Confidences, Counts
from analytics.label_report import Crossing, FieldReport, LabelReport
from analytics.periods import shown_periods
from analytics.slices import BINS, Period
from analytics.svg import SERIES, patterns
from domain.text import counted

TEMPLATE = Path(__file__).with_name("report.html.j2")
MOST_CHANNELS, MOST_ROWS = 12, 30
OTHERS, WITHOUT_CHANNEL = "(all other labels)", "(no channel)"
SHOWN_CHANGES = 30


def render_report(report: LabelReport, zone: tzinfo) -> str:
    """Return the page of *report*, with times in *zone*. Labels, channels and ids are escaped."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)

    def shown_time(at: datetime | None) -> str:
        return charts.NONE if at is None else f"{at.astimezone(zone):%Y-%m-%d %H:%M}"

    environment.filters |= {
        "time": shown_time,
        "percent": percent,
        "p": p_text,
        "points": points_text,
        "counted": counted,
    }
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    return template.render(
        report=report,
        style=Markup(charts.STYLE),  # noqa: S704 - a constant
        patterns=patterns(),
        summary=summary(report),
        sections=[(one.counts.name, field_charts(one, report.by)) for one in report.fields],
        crossings=[crossing_chart(one) for one in report.crossings],
        confidence=confidence_chart(report.confidences),
        shown_changes=SHOWN_CHANGES,
    )


def summary(report: LabelReport) -> list[str]:
    """Return what the report is about, in sentences; also for the terminal."""
    sentences = [f"{counted(report.n, 'result')} of {report.results}, times in {report.time_zone}."]
    if report.n_corrected:
        sentences.append(f"{counted(report.n_corrected, 'conversation')} with labels decided by people; these count.")
    for one in report.fields:
        if one.shares:
            most = one.shares[0]
            sentences.append(f"Most frequent {one.counts.name}: {most.label}, {percent(most.value)}.")
    if report.comparison is not None:
        changed = [one for one in report.comparison.changes if one.is_significant]
        sentences.append(f"{counted(len(changed), 'significant change')} against the period before.")
    failed = sum(report.failures["failed"].values())
    if failed:
        sentences.append(f"{counted(failed, 'document')} failed; python cli.py quarantine list shows them.")
    return sentences


def field_charts(one: FieldReport, by: Period) -> list[Chart]:
    """Return the charts of a field: shares, by period, by channel."""
    name, counts = one.counts.name, one.counts
    if not one.shares:
        return []
    rows = [Bar(share.label, share.value, share.low, share.high, f"{share.hits:,}") for share in one.shares[:MOST_ROWS]]
    drawn = [charts.bars(f"Shares of {name}", rows, detail="results")]
    periods = shown_periods(counts.periods, by)
    labels = [share.label for share in one.shares]
    if periods:
        by_period = [counts.periods.get(period, Counts()) for period in periods]
        series = [Series(label, [_share(each, label) for each in by_period]) for label in labels[:MOST_ROWS]]
        drawn.append(charts.lines(f"{name} by {by}", periods, series, [each.n for each in by_period]))
    drawn.append(channel_chart(one, labels))
    return drawn


def channel_chart(one: FieldReport, labels: Sequence[str]) -> Chart:
    """Return the shares of *labels* in each channel: stacked, or as a heat map if a result can have several labels."""
    channels = list(one.counts.channels.items())[:MOST_CHANNELS]
    names = [f"{channel or WITHOUT_CHANNEL} ({counts.n:,})" for channel, counts in channels]
    title = f"{one.counts.name} by channel"
    if one.is_multiple:
        values = {
            (label, name): _share(counts, label) or 0.0
            for label in labels[:MOST_ROWS]
            for name, (_, counts) in zip(names, channels, strict=True)
        }
        return charts.heat_map(title, labels[:MOST_ROWS], names, values)
    drawn = labels if len(labels) <= SERIES else labels[: SERIES - 1]
    series = [Series(label, [_share(counts, label) for _, counts in channels]) for label in drawn]
    if len(drawn) < len(labels):
        rest = [1 - sum(each.values[place] or 0.0 for each in series) for place in range(len(channels))]
        series.append(Series(OTHERS, [max(0.0, share) for share in rest]))
    return charts.stacked(title, names, series)


def crossing_chart(crossing: Crossing) -> Chart:
    """Return the heat map of the shares within each row."""
    of_columns = Counter[str]()
    for (_, column), n in crossing.counts.items():
        of_columns[column] += n
    columns = _most_frequent(of_columns)[:MOST_CHANNELS]
    rows, totals = _most_frequent(crossing.totals)[:MOST_ROWS], crossing.totals
    values = {(row, column): crossing.counts[row, column] / totals[row] for row in rows for column in columns}
    title = f"{crossing.columns} by {crossing.rows}, % of each row"
    return charts.heat_map(title, rows, columns, values, [totals[row] for row in rows])


def confidence_chart(confidences: Confidences) -> Chart | None:
    """Return how often each range of confidence occurs; None if no result has confidence."""
    bins, total = confidences.bins, sum(confidences.bins)
    if not total:
        return None
    rows = [
        Bar(f"{place / BINS:.2f} to {(place + 1) / BINS:.2f}", n / total, detail=f"{n:,}")
        for place, n in enumerate(bins)
    ]
    return charts.bars("Lowest confidence of a result", rows, detail="results")


def p_text(value: float | None) -> str:
    """Return a p-value for people."""
    return "too rare" if value is None else "< 0.001" if value < 0.001 else f"{value:.3f}"


def points_text(change: float) -> str:
    """Return a difference of shares in percentage points, with its sign."""
    return f"{100 * change:+.1f}"


def _share(counts: Counts, label: str) -> float | None:
    return counts.labels[label] / counts.n if counts.n else None


def _most_frequent(totals: Counter[str]) -> list[str]:
    return sorted(totals, key=lambda label: (-totals[label], label))

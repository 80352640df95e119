"""Days and ISO weeks as they are named in charts, such as 2026-11-30 and 2026-W49."""

from __future__ import annotations

from collections.abc import Collection
from datetime import UTC, date, datetime, timedelta

from analytics.slices import Period

MOST: dict[Period, int] = {"day": 92, "week": 53}  # periods in a chart: a quarter, a year


def first_day(period: str) -> date:
    """Return the first day of *period*; the Monday of a week."""
    year, _, week = period.partition("-W")
    return date.fromisocalendar(int(year), int(week), 1) if week else date.fromisoformat(period)


def period_named(day: date, by: Period) -> str:
    """Return the name of the period that *day* is in."""
    year, week, _ = day.isocalendar()
    return f"{year:04d}-W{week:02d}" if by == "week" else day.isoformat()


def shown_periods(occurring: Collection[str], by: Period) -> list[str]:
    """Return the periods from the first of *occurring* to the last, empty ones included; of more than MOST, the latest.

    Those in the future are left out if there are others: one wrong date would push all others out of the chart.
    """
    tomorrow = period_named(datetime.now(UTC).date() + timedelta(days=1), by)  # it has begun in some time zones
    occurring = [period for period in occurring if period <= tomorrow] or occurring
    if not occurring:
        return []
    step = timedelta(days=7 if by == "week" else 1)
    day, first = first_day(max(occurring)), first_day(min(occurring))
    found: list[str] = []
    while day >= first and len(found) < MOST[by]:
        found.append(period_named(day, by))
        day -= step
    return found[::-1]

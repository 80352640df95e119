"""What the tab Labels shows, in the query of its address: filters that can be bookmarked."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta, tzinfo
from typing import Any
from urllib.parse import parse_qsl, urlencode

from analytics.aggregates import MAX_CHARACTERS
from analytics.slices import NO_CHANNEL, Period, Slice
from config import Taxonomy
from error_handler import RequestError
from service import errors

PREFIX = "label."  # of the parameter of a field, which may have the name of another filter
NAMES = ("since", "until", "channel", "no_channel", "model", "min", "max", "by")
MAX_PARAMETERS = 32


@dataclass(frozen=True, slots=True)
class LabelsQuery:
    """The filters of one view; hashable, so that figures are kept by it.

    *since* (inclusive) and *until* (exclusive) are midnights, *labels* are (field, label) pairs, *least* and *most*
    bound the lowest confidence of a result (0 to 1). *channel* is NO_CHANNEL for results without one. None does not filter.
    *by* is the step of the charts over time.
    """

    since: datetime | None = None
    until: datetime | None = None
    channel: str | None = None
    model: str | None = None
    labels: tuple[tuple[str, str], ...] = ()
    least: float | None = None
    most: float | None = None
    by: Period = "week"

    @property
    def last_day(self) -> datetime | None:
        """The last day of the view, which *until* excludes."""
        return self.until and self.until - timedelta(days=1)

    @property
    def is_filtered(self) -> bool:
        """True if the view leaves out results."""
        return replace(self, by="week") != LabelsQuery()

    def address(self, **changes: Any) -> str:
        """Return the query string of this view with *changes*: ``?channel=email``, or ``?`` without filters.

        Raises:
            TypeError: A name in *changes* is no filter.
        """
        view = replace(self, **changes)
        values = {
            "since": view.since and f"{view.since:%Y-%m-%d}",
            "until": view.last_day and f"{view.last_day:%Y-%m-%d}",
            "channel": view.channel or None,
            "no_channel": "1" if view.channel == NO_CHANNEL else None,
            "model": view.model,
            "min": view.least,
            "max": view.most,
            "by": view.by if view.by != "week" else None,
        }
        pairs = [
            (name, str(value).removesuffix(".0") if isinstance(value, float) else value)
            for name, value in values.items()
        ]
        pairs += [(PREFIX + field, label) for field, label in view.labels]
        return "?" + urlencode([(name, value) for name, value in pairs if value is not None])

    @property
    def slice(self) -> Slice:
        """The filter of ``analytics``."""
        is_bounded = self.least is not None or self.most is not None
        confidence = (self.least or 0.0, 1.0 if self.most is None else self.most) if is_bounded else None
        return Slice(self.since, self.until, self.channel, self.labels, confidence, self.model)

    def options(self, field: str, taxonomy: Taxonomy) -> list[str]:
        """Return the labels to choose from: those of *taxonomy*, and the one of this view, which may be of an earlier one."""
        chosen = (label for name, label in self.labels if name == field)
        return list(dict.fromkeys((*taxonomy.names(field), *chosen)))

    def with_label(self, field: str, label: str) -> str:
        """Return the query string of this view with one label more; another label of *field* is replaced."""
        return self.address(labels=(*(pair for pair in self.labels if pair[0] != field), (field, label)))

    def without_label(self, field: str) -> str:
        """Return the query string of this view without the filter on *field*."""
        return self.address(labels=tuple(pair for pair in self.labels if pair[0] != field))


def labels_query(query_string: bytes, taxonomy: Taxonomy, zone: tzinfo = UTC) -> LabelsQuery:
    """Return the view in *query_string*, whose days begin in *zone*. Empty values are no filters: a form sends all fields.

    Raises:
        RequestError: INVALID; the message names the parameter and never quotes the query.
    """
    try:
        pairs = parse_qsl(query_string.decode(), errors="strict", max_num_fields=MAX_PARAMETERS)
    except ValueError as exc:  # UnicodeDecodeError is one
        raise RequestError(errors.INVALID, "The query is not percent-encoded UTF-8, or is too long.") from exc
    values = dict(pairs)
    if len(values) != len(pairs):
        raise RequestError(errors.INVALID, "The query names a parameter twice; name each once.")
    fields = {PREFIX + name: name for name in taxonomy.field_names}
    if values.keys() - {*NAMES, *fields}:
        raise RequestError(errors.INVALID, "The query has an unknown parameter; docs/dashboard.md lists them.")
    for name, value in values.items():
        if len(value) > MAX_CHARACTERS:
            raise RequestError(errors.INVALID, f"{name}: at most {MAX_CHARACTERS} characters.")
    since, until = _day(values, "since", zone), _day(values, "until", zone)
    view = LabelsQuery(
        since=since,
        until=until and until + timedelta(days=1),  # people mean the whole day
        channel=values.get("channel", NO_CHANNEL if "no_channel" in values else None),
        model=values.get("model"),
        labels=tuple((field, values[name]) for name, field in fields.items() if name in values),
        least=_share(values, "min"),
        most=_share(values, "max"),
        by=_step(values),
    )
    if view.since and view.until and view.since >= view.until:
        raise RequestError(errors.INVALID, "since: must not be after until.")
    return view


def _day(values: Mapping[str, str], name: str, zone: tzinfo) -> datetime | None:
    if name not in values:
        return None
    try:
        day = datetime.strptime(values[name], "%Y-%m-%d").replace(tzinfo=zone)
    except ValueError as exc:
        raise RequestError(errors.INVALID, f"{name}: must be a day such as 2026-11-30.") from exc
    if not 1970 <= day.year < 9999:  # room for one more day
        raise RequestError(errors.INVALID, f"{name}: must be between 1970 and 9998.")
    return day


def _share(values: Mapping[str, str], name: str) -> float | None:
    if name not in values:
        return None
    try:
        share = float(values[name])
    except ValueError:
        share = math.nan
    if not 0 <= share <= 1:
        raise RequestError(errors.INVALID, f"{name}: must be a number from 0 to 1.")
    return share


def _step(values: Mapping[str, str]) -> Period:
    step = values.get("by", "week")
    if step not in ("week", "day"):
        raise RequestError(errors.INVALID, "by: must be week or day.")
    return "day" if step == "day" else "week"

"""Dates such as 03/04/2026, whose meaning only the whole column shows."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from aggregator import parse_time

LOOKED_AT = 20  # values: a column without such dates among the first ones is not read to its end

_NUMERIC = re.compile(
    r"(?P<a>\d{1,2})(?P<sign>[/.-])(?P<b>\d{1,2})(?P=sign)(?P<year>\d{4}|\d\d)"
    r"(?:[,T ]+(?P<hour>\d{1,2})[:.](?P<minute>\d\d)(?:[:.](?P<second>\d\d))?(?:\.\d+)?\s*(?P<noon>[ap]\.?m\.?)?)?"
    r"\s*(?P<zone>z|utc|gmt|[+-]\d\d:?\d\d)?",
    re.IGNORECASE | re.ASCII,
)


@dataclass(frozen=True, slots=True)
class DateOrder:
    """How numeric dates of a file are read.

    *is_day_first* is None if the values allow both orders, or contradict each other. Dates with dots always begin with
    the day.
    """

    is_day_first: bool | None = None

    def read(self, value: Any) -> datetime | None:
        """Return *value* as an aware time (UTC if it has no zone); None if it is not readable, or has two meanings."""
        return parse_time(value) or self.numeric(value)

    def numeric(self, value: Any) -> datetime | None:
        """Return the numeric date *value*; None if it is none, or has two meanings."""
        found = _match(value)
        is_day_first = True if found and found["sign"] == "." else self.is_day_first
        if not found or is_day_first is None:
            return None
        day, month = (found["a"], found["b"]) if is_day_first else (found["b"], found["a"])
        year = found["year"] if len(found["year"]) == 4 else f"20{found['year']}"
        hour = int(found["hour"] or 0)
        if noon := found["noon"]:
            hour = hour % 12 + (12 if noon[0] in "pP" else 0)
        zone = (found["zone"] or "").lower().replace("utc", "z").replace("gmt", "z")
        try:
            at = datetime.fromisoformat(
                f"{year}-{int(month):02}-{int(day):02}T{hour:02}:{found['minute'] or '00'}:{found['second'] or '00'}{zone}"
            )
        except ValueError:
            return None
        return at if at.tzinfo else at.replace(tzinfo=UTC)


def is_ambiguous(value: Any) -> bool:
    """Return whether *value* is a date that is valid in both orders."""
    found = _match(value)
    return found is not None and found["sign"] != "." and max(int(found["a"]), int(found["b"])) <= 12


def date_order(values: Iterable[Any]) -> DateOrder:
    """Return the order that *values*, those of a whole file, show: a part above 12 is the day."""
    day_first = month_first = False
    is_numeric = False
    for number, value in enumerate(values, 1):
        found = _match(value)
        if found and found["sign"] != ".":
            is_numeric = True
            day_first |= int(found["a"]) > 12
            month_first |= int(found["b"]) > 12
        elif not is_numeric and number >= LOOKED_AT:
            break
    return DateOrder(None if day_first == month_first else day_first)


def _match(value: Any) -> re.Match[str] | None:
    return _NUMERIC.fullmatch(value.strip()) if isinstance(value, str) and len(value) <= 60 else None

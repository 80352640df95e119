"""Cron expressions are checked before the first run, and tell when the next one starts."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone

import pytest

from commands.flags import seconds_until_next
from error_handler import ConfigurationError


@pytest.mark.parametrize("expression", ["0 2 * * *", "*/15 * * * *", "30 8-18 * * mon-fri", "0 0 1 1 *", "0 0 29 2 *"])
def test_accepted(expression: str) -> None:
    """Five fields."""
    seconds_until_next(expression, datetime.now(UTC))


@pytest.mark.parametrize(
    "expression",
    ["", "2:00", "@daily", "* * * *", "0 2 * * * *", "60 2 * * *", "0 25 * * *", "a b c d e", "0 0 31 2 *"],
)
def test_refused(expression: str) -> None:
    """An invalid cron expression, or a day that never comes, is refused with an example of a valid one."""
    with pytest.raises(ConfigurationError, match="0 2"):
        seconds_until_next(expression, datetime.now(UTC))


@pytest.mark.parametrize(
    ("expression", "now", "seconds"),
    [
        ("0 2 * * *", datetime(2024, 5, 1, 1, 30, tzinfo=UTC), 1800),
        ("0 2 * * *", datetime(2024, 5, 1, 2, 0, tzinfo=UTC), 86_400),
        ("0 2 * * *", datetime(2024, 5, 1, 1, 30, tzinfo=timezone(timedelta(hours=5, minutes=30))), 1800),
        ("*/15 * * * *", datetime(2024, 5, 1, 1, 14, 59, 500_000, tzinfo=UTC), 0.5),
        ("0 0 1 1 *", datetime(2024, 12, 31, 23, 0, tzinfo=UTC), 3600),
    ],
)
def test_seconds_until_next(expression: str, now: datetime, seconds: float) -> None:
    """From now, in the zone of now; the present moment is not the next time."""
    assert seconds_until_next(expression, now) == pytest.approx(seconds)

"""Cron expressions for ``--schedule``."""

from __future__ import annotations

from datetime import datetime

from error_handler import ConfigurationError


def require_cron(expression: str) -> None:
    """Raise ConfigurationError if *expression* is not a cron expression of five fields."""
    from croniter import croniter  # noqa: PLC0415 - most runs have no schedule and start faster without it

    try:
        comes = len(expression.split()) == 5 and bool(croniter(expression).get_next())
    except ValueError:  # not cron, or a day that does not exist
        comes = False
    if not comes:
        raise ConfigurationError(
            f'--schedule {expression!r} is not a cron expression; for every day at 2:00, use "0 2 * * *".'
        )


def seconds_until_next(expression: str, now: datetime) -> float:
    """Return the seconds from *now* (aware, in the local time zone) to the next match of *expression*."""
    from croniter import croniter  # noqa: PLC0415 - see require_cron

    following: datetime = croniter(expression, now).get_next(datetime)
    return max(0.0, (following - now).total_seconds())

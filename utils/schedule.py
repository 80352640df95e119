"""When the next pass of a run starts: at once and never again, after a pause, or by a cron expression."""

from __future__ import annotations

from datetime import datetime

from error_handler import ConfigurationError


def require_cron(expression: str) -> None:
    """Raise ConfigurationError where *expression* is not a cron expression of five fields."""
    from croniter import croniter  # noqa: PLC0415 - most runs have no schedule and start sooner without it

    try:
        comes = len(expression.split()) == 5 and bool(croniter(expression).get_next())
    except ValueError:  # not cron, or a day that no month has
        comes = False
    if not comes:
        raise ConfigurationError(
            f'--schedule {expression!r} is not a cron expression; "0 2 * * *" is every day at 2:00.'
        )


def seconds_until_next(expression: str, now: datetime) -> float:
    """Return the seconds from *now* (aware, the local zone decides what "2:00" means) to the next time."""
    from croniter import croniter  # noqa: PLC0415 - see require_cron

    following: datetime = croniter(expression, now).get_next(datetime)
    return max(0.0, (following - now).total_seconds())

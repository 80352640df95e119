"""The flags that limit a command to a part of the source documents."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime

from config import Settings
from error_handler import ConfigurationError
from exporting.filters import end_of, start_of
from storage.subset import Subset, parsed_query


def time_flag(parse: Callable[[str], datetime]) -> Callable[[str], datetime]:
    """Return the type of a flag with a time that *parse* reads."""

    def parsed(text: str) -> datetime:
        with suppress(ValueError, OverflowError):
            return parse(text).astimezone(UTC)
        raise argparse.ArgumentTypeError("must be a date or a time, for example 2026-11-01 or 2026-11-01T08:00+01:00")

    return parsed


def add_filter_flag(group: argparse._ActionsContainer) -> None:
    """Add ``--filter``."""
    group.add_argument(
        "--filter",
        dest="document_filter",
        metavar="JSON",
        help='only source documents that this MongoDB query finds, as Extended JSON, for example \'{"channel": "email"}\'',
    )


def add_subset_flags(group: argparse._ActionsContainer) -> None:
    """Add the flags that ``subset_of`` reads."""
    add_filter_flag(group)
    group.add_argument(
        "--since",
        type=time_flag(start_of),
        metavar="TIME",
        help="only documents of TIME or later (TIME_FIELD; created_at)",
    )
    group.add_argument(
        "--until", type=time_flag(end_of), metavar="TIME", help="only those before TIME; a date includes the whole day"
    )


def filter_of(arguments: argparse.Namespace) -> Subset:
    """Return the subset of ``--filter`` alone; raise ConfigurationError if it is not usable."""
    given = arguments.document_filter
    return Subset() if given is None else Subset(parsed_query(given, "--filter"))


def subset_of(arguments: argparse.Namespace, settings: Settings) -> Subset:
    """Return the subset that *arguments* name; raise ConfigurationError if it is not usable, or cannot have a document."""
    require_span(arguments)
    return Subset(filter_of(arguments).query, arguments.since, arguments.until, settings.time_field)


def require_span(arguments: argparse.Namespace) -> None:
    """Raise ConfigurationError if nothing can be between ``--since`` and ``--until``."""
    since, until = arguments.since, arguments.until
    if since and until and since >= until:
        raise ConfigurationError(f"--since {since:%Y-%m-%d %H:%M} UTC is not before --until; exchange them.")

"""The flags of the import that describe its file. Pure: opens nothing."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from error_handler import ConfigurationError
from help_desks.columns import FIELDS, FORMATS, Options, parsed_maps
from help_desks.reader import Export


def add_file_flags(group: argparse._ArgumentGroup) -> None:
    """Add the flags that say how ``--file`` is read."""
    group.add_argument(
        "--format", choices=FORMATS, default="auto", help="help desk that wrote the file (auto: detected)"
    )
    group.add_argument(
        "--map",
        action="append",
        default=[],
        metavar="FIELD=COLUMN",
        help=f"column, or dotted path in JSON, of a field: {', '.join(FIELDS)}; empty: none. May be repeated",
    )
    group.add_argument(
        "--drop-column", action="append", default=[], metavar="NAME", help="leave this column out; may be repeated"
    )
    group.add_argument(
        "--customer-role", action="append", default=[], metavar="NAME", help="sender who is a customer; may be repeated"
    )
    group.add_argument(
        "--dates", choices=["day-first", "month-first"], help="order of dates such as 03/04/2026 (column)"
    )
    group.add_argument("--encoding", metavar="NAME", help="encoding of the file, for example cp1252 (detected)")
    group.add_argument("--private-notes", action="store_true", help="import notes of agents among themselves as turns")
    group.add_argument("--dry-run", action="store_true", help="write nothing; print the mapping and two conversations")


def export_of(arguments: argparse.Namespace, on_rows: Callable[[int], None], *, adds_status: bool) -> Export | None:
    """Return the file of ``--file``; None if there is none. *on_rows* is called with the number of rows read so far."""
    if not arguments.file:
        _require_no_file_flags(arguments)
        return None
    options = Options(
        layout=arguments.format,
        maps=parsed_maps(arguments.map),
        dropped=arguments.drop_column,
        customer_roles=frozenset(name.strip().lower() for name in arguments.customer_role),
        is_day_first=None if arguments.dates is None else arguments.dates == "day-first",
        encoding=arguments.encoding,
        private_notes=arguments.private_notes,
        adds_status=adds_status,
    )
    return Export(arguments.file, options, on_rows)


def _require_no_file_flags(arguments: argparse.Namespace) -> None:
    given = [
        *(("--map",) if arguments.map else ()),
        *(("--drop-column",) if arguments.drop_column else ()),
        *(("--customer-role",) if arguments.customer_role else ()),
        *(("--format",) if arguments.format != "auto" else ()),
        *(("--dates",) if arguments.dates else ()),
        *(("--encoding",) if arguments.encoding else ()),
        *(("--private-notes",) if arguments.private_notes else ()),
    ]
    if given:
        raise ConfigurationError(f"{given[0]} is about the file to import; add --file FILE.")

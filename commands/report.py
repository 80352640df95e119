"""``cli.py report``: write the labels of the results as charts, in one HTML file."""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from contextlib import ExitStack, suppress
from datetime import UTC, datetime, timedelta, tzinfo
from pathlib import Path

from pydantic import SecretStr

from analytics.aggregates import LabelAnalytics
from analytics.label_report import LabelReport, make_report
from analytics.report_page import render_report, summary
from analytics.slices import Slice
from commands.flags import Command
from config import Settings, load_taxonomy
from config.report_settings import load_report_settings
from domain.text import escaped
from error_handler import ConfigurationError, ExitCode
from mongo_client import DocumentStore
from storage.files import replace_file, require_replaceable
from utils.process import tell_line

EMBEDDED_DATABASE = Path(__file__).parent.parent / "data" / "embedded" / "db"
LINE_EVERY_S = 5.0


def _add_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("report")
    group.add_argument("--output", type=Path, required=True, metavar="FILE", help="HTML file to write")
    group.add_argument(
        "--since", type=_time, metavar="TIME", help="only conversations whose last message is at TIME or later"
    )
    group.add_argument(
        "--until", type=_time, metavar="TIME", help="only those before TIME; a date includes the whole day"
    )
    group.add_argument("--by", choices=["week", "day"], default="week", help="period of the charts (week)")
    group.add_argument(
        "--time-zone", metavar="ZONE", help="time zone of days and weeks, such as Europe/Berlin (REPORT_TIME_ZONE; UTC)"
    )
    group.add_argument("--embedded", action="store_true", help="use the embedded MongoDB, with the results of make run")


def _time(text: str) -> tuple[datetime, bool]:
    """Return a time, and whether *text* is a date; without a zone, it is in the zone of the report."""
    with suppress(ValueError):
        if "W" not in text:  # a week, which Python takes for its Monday
            return datetime.fromisoformat(text), len(text) <= len("2026-11-30")
    raise argparse.ArgumentTypeError("must be a date or a time, for example 2026-11-01 or 2026-11-01T08:00+01:00")


def _view(arguments: argparse.Namespace, zone: tzinfo) -> Slice:
    """Return the period that *arguments* name; raise ConfigurationError if it is empty."""

    def at(given: tuple[datetime, bool] | None, day: timedelta) -> datetime | None:
        if given is None:
            return None
        try:
            moment = given[0] + (day if given[1] else timedelta())
            return (moment if moment.tzinfo else moment.replace(tzinfo=zone)).astimezone(UTC)
        except OverflowError as exc:
            raise ConfigurationError("--since and --until need years from 2 to 9998.") from exc

    since, until = at(arguments.since, timedelta()), at(arguments.until, timedelta(days=1))
    if since and until and since >= until:
        raise ConfigurationError(f"--since {since:%Y-%m-%d %H:%M} UTC is not before --until; exchange them.")
    return Slice(since, until)


async def _run(arguments: argparse.Namespace, settings: Settings) -> int:
    require_replaceable(arguments.output, "--output")
    zone = load_report_settings(time_zone=arguments.time_zone)
    view = _view(arguments, zone.zone)
    with ExitStack() as stack:
        if arguments.embedded:
            from embedded.replica_set import ReplicaSetMongod  # noqa: PLC0415 - only for --embedded

            mongod = await asyncio.to_thread(stack.enter_context, ReplicaSetMongod(EMBEDDED_DATABASE))
            settings = settings.model_copy(update={"mongodb_uri": SecretStr(mongod.uri)})
        report = await _report(arguments, settings, view, zone.time_zone)
    replace_file(arguments.output, render_report(report, zone.zone).encode())
    for sentence in summary(report):
        print(escaped(sentence))
    print(f"Report: {arguments.output}")
    if not report.n:
        sys.stderr.write(
            f"cli.py report: {report.results} has no results{' in this period' if view != Slice() else ''}.\n"
        )
        return ExitCode.INCOMPLETE
    return ExitCode.DONE


async def _report(arguments: argparse.Namespace, settings: Settings, view: Slice, time_zone: str) -> LabelReport:
    shown_s = time.monotonic()

    def tell(step: str) -> None:
        nonlocal shown_s
        if time.monotonic() - shown_s >= LINE_EVERY_S:
            shown_s = time.monotonic()
            tell_line(f"report: counting {step} ...")

    store = DocumentStore(settings)
    try:
        await store.check()
        analytics = LabelAnalytics(store, settings, load_taxonomy(settings.taxonomy_file), time_zone)
        note = await analytics.refresh(view, lambda done, total: tell(f"days, {done:,} of {total:,} are done"))
        if note:
            tell_line(f"report: {note}")
        results = f"{settings.db_name}.{settings.results_collection}"
        return await make_report(analytics, results, view, arguments.by, tell)
    finally:
        await store.close()


COMMAND = Command("report", "Write charts of the labels by week and channel as one HTML file.", _add_flags, _run)

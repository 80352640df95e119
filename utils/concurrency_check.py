"""Measures how many calls the model server runs at once; see commands/diagnosis/slots.py."""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:  # started as a file: modules in this folder must not hide packages of the same name
    _folder = Path(__file__).resolve().parent
    sys.path[:] = [str(_folder.parent), *(entry for entry in sys.path if Path(entry).resolve() != _folder)]

if __name__ == "__main__":
    from utils.interpreter import require_packages

    require_packages()

import argparse
import asyncio
import json
import statistics
from collections.abc import Sequence
from functools import partial
from typing import Any

from rich.console import Console
from rich.table import Table

from commands.diagnosis.slots import Measurement, measure, without_second_attempts
from commands.flags import add_model_flags, command_settings, positive
from config import Settings
from error_handler import ExitCode
from logger import configure_logging
from utils.process import Parser, exit_code_of


def main(argv: Sequence[str] | None = None) -> int:
    """Measure with the flags in *argv* (None: those of the process) and return the exit code."""
    parser = Parser(
        prog="concurrency_check.py",
        description="Measure how many calls the model server runs at once, to choose --max-concurrent.",
        epilog="Exit codes: 0 measured, 2 usage, configuration or model, 3 the server is not reachable.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--max", type=positive, default=16, metavar="K", help="maximum concurrent requests when probing for slots (16)"
    )
    parser.add_argument("--rounds", type=positive, default=3, metavar="N", help="rounds per number of requests (3)")
    parser.add_argument("--json", action="store_true", help="print the measurement as JSON")
    add_model_flags(parser)
    parser.add_argument("--verbose", action="store_true", help="show log lines, and a traceback after an error")
    arguments = parser.parse_args(argv)

    def run() -> int:
        configure_logging("DEBUG" if arguments.verbose else "ERROR")
        return asyncio.run(_check(arguments, without_second_attempts(command_settings(arguments))))

    return exit_code_of(run, parser.prog, verbose=arguments.verbose)


async def _check(arguments: argparse.Namespace, settings: Settings) -> int:
    talk = Console(stderr=True)
    with talk.status("Looking up the model ...") as status:
        # Without a terminal rich shows no status, and a measurement on a CPU takes many minutes.
        tell = status.update if talk.is_terminal else partial(print, file=sys.stderr, flush=True)
        measurement = await measure(settings, arguments.max, arguments.rounds, tell)
    if arguments.json:
        print(json.dumps(_as_json(measurement), indent=2))
    else:
        _print_table(measurement, Console())
    return ExitCode.DONE


def _as_json(measurement: Measurement) -> dict[str, Any]:
    """Return *measurement* as plain values; waits and window are null if the server does not report them."""
    levels = []
    for level in measurement.levels:
        waits_s = level.queue_waits_s
        levels.append(
            {
                "at_once": level.at_once,
                "requests_per_s": round(level.requests_per_s, 3),
                "latency_s": round(level.latency_s, 4),
                "queue_wait_s_median": round(statistics.median(waits_s), 4) if waits_s else None,
                "queue_wait_s_max": round(max(waits_s), 4) if waits_s else None,
                "waited": level.waited,
            }
        )
    return {
        "model": measurement.model,
        "server_url": measurement.server_url,
        "num_ctx": measurement.num_ctx,
        "slots": measurement.slots,
        "slots_is_minimum": measurement.is_minimum,
        "queue_wait_from": measurement.queue_wait_from,
        "enough_at_once": measurement.enough,
        "stopped": measurement.stopped,
        "levels": levels,
    }


def _print_table(measurement: Measurement, console: Console) -> None:
    window = f", context window {measurement.num_ctx} tokens" if measurement.num_ctx else ""
    table = Table(title=f"{measurement.model} at {measurement.server_url}{window}", title_justify="left")
    for heading in ("at once", "answers/s", "s per answer", "s in queue, median", "s in queue, most", "waited"):
        table.add_column(heading, justify="right")
    for level in measurement.levels:
        waits = level.queue_waits_s
        table.add_row(
            str(level.at_once),
            f"{level.requests_per_s:.2f}",
            f"{level.latency_s:.2f}",
            f"{statistics.median(waits):.2f}" if waits else "unknown",
            f"{max(waits):.2f}" if waits else "unknown",
            f"{level.waited} of {level.at_once}",
        )
    console.print(table)
    if measurement.stopped:
        console.print(f"Stopped {measurement.stopped}", soft_wrap=True, markup=False)
    slots, enough = measurement.slots, measurement.enough
    if measurement.queue_wait_from == "latency":
        console.print("The server does not report queue times; latency shows which calls waited.", soft_wrap=True)
    if measurement.is_minimum:
        sentence = f"The server runs at least {slots} at once: no call waited. Use --max {2 * slots} to probe further."
    else:
        sentence = (
            f"The server runs {slots} at once; --max-concurrent {slots + 1} keeps one call ready for a free slot."
        )
    console.print(sentence, soft_wrap=True)
    if 2 * enough <= slots:
        console.print(f"More than {enough} at once hardly increases throughput.", soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())

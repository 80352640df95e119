"""Measures how many calls the model server runs at once; see commands/diagnosis/slots.py."""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:  # started as a file: modules in this folder must not hide packages of the same name
    _folder = Path(__file__).resolve().parent
    sys.path[:] = [str(_folder.parent), *(entry for entry in sys.path if Path(entry).resolve() != _folder)]

import argparse
import asyncio
import json
import statistics
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from commands.diagnosis.slots import Measurement, measure, without_second_attempts
from config import Settings, load_settings
from error_handler import ExitCode
from logger import configure_logging
from utils.process import exit_code_of


def main(argv: Sequence[str] | None = None) -> int:
    """Measure with the flags in *argv* (None: those of the process) and return the exit code."""
    arguments = _create_parser().parse_args(argv)

    def run() -> int:
        configure_logging("DEBUG" if arguments.verbose else "ERROR")
        return asyncio.run(_check(arguments, _settings(arguments)))

    return exit_code_of(run, "concurrency_check.py", verbose=arguments.verbose)


def _create_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="concurrency_check.py",
        description="Measure how many calls the model server runs at once, to choose --max-concurrent.",
        epilog="Exit codes: 0 measured, 2 usage, configuration or model, 3 the server is not reachable.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--max", type=_positive, default=16, metavar="K", help="maximum concurrent requests when probing for slots (16)"
    )
    parser.add_argument("--rounds", type=_positive, default=3, metavar="N", help="rounds per number of requests (3)")
    parser.add_argument("--json", action="store_true", help="print the measurement as JSON")
    parser.add_argument("--model", help="model (default: OLLAMA_MODEL, or LLM_MODEL with LLM_API_URL)")
    parser.add_argument(
        "--ollama-endpoint", help="address of Ollama (default: OLLAMA_ENDPOINT or http://localhost:11434)"
    )
    parser.add_argument("--verbose", action="store_true", help="show log lines, and a traceback after an error")
    return parser


def _settings(arguments: argparse.Namespace) -> Settings:
    """Return the settings for *arguments*."""
    settings = without_second_attempts(load_settings(ollama_endpoint=arguments.ollama_endpoint))
    if arguments.model:
        return settings.model_copy(update={"llm_model" if settings.llm_api_url else "ollama_model": arguments.model})
    return settings


async def _check(arguments: argparse.Namespace, settings: Settings) -> int:
    talk = Console(stderr=True)
    with talk.status("Looking up the model ...") as status:
        measurement = await measure(settings, arguments.max, arguments.rounds, status.update)
    if arguments.json:
        print(json.dumps(as_json(measurement), indent=2))
    else:
        _print_table(measurement, Console())
    return ExitCode.DONE


def as_json(measurement: Measurement) -> dict[str, Any]:
    """Return *measurement* as plain values; waits and window are null if the server does not report them."""
    return {
        "model": measurement.model,
        "server_url": measurement.server_url,
        "num_ctx": measurement.num_ctx,
        "slots": measurement.slots,
        "slots_is_minimum": measurement.is_minimum,
        "queue_wait_from": "server" if measurement.levels[-1].queue_waits_s else "latency",
        "enough_at_once": measurement.enough,
        "stopped": measurement.stopped,
        "levels": [
            {
                "at_once": level.at_once,
                "requests_per_s": round(level.requests_per_s, 3),
                "latency_s": round(level.latency_s, 4),
                "queue_wait_s_median": _rounded(statistics.median, level.queue_waits_s),
                "queue_wait_s_max": _rounded(max, level.queue_waits_s),
                "waited": level.waited,
            }
            for level in measurement.levels
        ],
    }


def _rounded(reduce: Any, values: list[float]) -> float | None:
    return round(reduce(values), 4) if values else None


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
    if not measurement.levels[-1].queue_waits_s:
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


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be 1 or more")
    return value


if __name__ == "__main__":
    sys.exit(main())

"""The flags of ``cli.py`` and what they mean for the settings. Pure: nothing is opened here.

``python cli.py`` is the batch run; ``python cli.py NAME`` is one of the commands, each a module with a ``Command``.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Coroutine, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from config import Settings, load_settings
from domain.staleness import SELECTABLE
from error_handler import ConfigurationError
from utils.schedule import require_cron
from worker.intake import RunOptions

PRESETS = {"conservative": (3, 50), "balanced": (5, 100), "aggressive": (10, 200)}  # max_concurrent, batch_size

# What each monitoring mode switches on: console progress, log lines, progress files.
MONITORING = {
    "development": (True, True, False),
    "production": (False, True, True),
    "interactive": (True, False, True),
}

SETTING_FLAGS = (
    "batch_size",
    "max_concurrent",
    "mongodb_uri",
    "db_name",
    "source_collection",
    "results_collection",
    "log_level",
    "mode",
    "batch_files_dir",
    "ollama_endpoint",
    "review_below",
    "on_long",
)


@dataclass(frozen=True, slots=True)
class Command:
    """One command of ``cli.py``.

    *add_flags* adds its own flags to a parser that has those of ``add_place_flags`` and ``add_log_flags``. *run*
    returns the exit code, or raises a TriadError, which becomes one sentence.
    """

    name: str
    summary: str
    add_flags: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace, Settings], Coroutine[Any, Any, int]]


def create_command_parser(command: Command) -> argparse.ArgumentParser:
    """Return the parser of ``cli.py NAME``."""
    parser = argparse.ArgumentParser(prog=f"cli.py {command.name}", description=command.summary, allow_abbrev=False)
    add_place_flags(parser.add_argument_group("what to work on"))
    add_log_flags(parser.add_argument_group("what to show"))
    command.add_flags(parser)
    return parser


def add_place_flags(group: argparse._ArgumentGroup) -> None:
    """Add the flags that say where the documents are, and the state of the worker."""
    group.add_argument("--mongodb-uri", help="where MongoDB is (MONGODB_URI; mongodb://localhost:27017)")
    group.add_argument("--db-name", help="database (MONGODB_DB; customer_support)")
    group.add_argument(
        "--source-collection",
        "--queries-collection",
        help="collection with the conversations (MONGODB_SOURCE_COLLECTION; conversation_set)",
    )
    group.add_argument(
        "--results-collection", help="collection for results (MONGODB_RESULTS_COLLECTION; sentimental_analysis)"
    )
    group.add_argument(
        "--batch-files-dir", type=Path, help="run-time files of this worker (BATCH_FILES_DIR; batch_files)"
    )


def add_model_flags(group: argparse._ArgumentGroup | argparse.ArgumentParser) -> None:
    """Add the flags that say which model is asked."""
    group.add_argument("--model", help="model to ask (OLLAMA_MODEL, or LLM_MODEL with LLM_API_URL)")
    group.add_argument("--ollama-endpoint", help="where Ollama is (OLLAMA_ENDPOINT; http://localhost:11434)")


def add_log_flags(group: argparse._ArgumentGroup) -> None:
    """Add the flags that say how much is told about the work."""
    group.add_argument(
        "--log-level", type=str.upper, choices=["DEBUG", "INFO", "WARNING", "ERROR"], help="(LOG_LEVEL; INFO)"
    )
    group.add_argument("--verbose", action="store_true", help="log lines of level DEBUG, and tracebacks")


def create_parser(commands: Iterable[Command] = ()) -> argparse.ArgumentParser:
    """Return the parser of the run; its help names *commands*.

    A flag that was not given is None, so that the environment can decide.
    """
    parser = argparse.ArgumentParser(
        prog="cli.py",
        description="Label support conversations in MongoDB with intent, topic and sentiment,\nby a local language model.",
        epilog="commands beside the run, each with its own --help:\n"
        + "".join(f"  cli.py {command.name:<12} {command.summary}\n" for command in commands)
        + "\nFlags win over the environment, that over .env, that over defaults. Exit codes: docs/operations.md.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    what = parser.add_argument_group("what to work on")
    add_place_flags(what)
    what.add_argument("--limit", type=positive, help="take at most this many documents")
    what.add_argument(
        "--reprocess", action="store_true", help="ask again for documents that have a result, and replace it"
    )
    what.add_argument(
        "--retry-failed", action="store_true", help="take up failed and quarantined documents with fresh attempts"
    )
    what.add_argument(
        "--only", choices=SELECTABLE, help="take just these documents (python cli.py plan counts them); see the docs"
    )
    what.add_argument(
        "--no-dedupe", dest="dedupe", action="store_false", help="ask for each of several identical conversations"
    )
    what.add_argument("--dry-run", action="store_true", help="report what a run would do, and change nothing")
    what.add_argument(
        "--embedded", action="store_true", help="bring a MongoDB and sample conversations; nothing to install"
    )
    _add_work_flags(parser.add_argument_group("how to work"))
    shown = parser.add_argument_group("what to show")
    shown.add_argument("--monitoring-mode", choices=MONITORING, help="a choice of the three flags that follow")
    shown.add_argument("--console", action="store_true", help="progress on the terminal")
    shown.add_argument("--logs", action="store_true", help="log lines on stderr")
    shown.add_argument(
        "--progress-files", action="store_true", help="progress as JSON and CSV under batch_files/progress/"
    )
    add_log_flags(shown)
    shown.add_argument("--output", type=Path, metavar="FILE", help="write the run's statistics as JSON")
    return parser


def _add_work_flags(group: argparse._ArgumentGroup) -> None:
    add_model_flags(group)
    group.add_argument("--batch-size", type=int, help="documents per batch (BATCH_SIZE; 100)")
    group.add_argument(
        "--max-concurrent",
        "--concurrent",
        type=concurrency,
        metavar="N",
        help="model calls in flight at once, or auto: as many as the server runs (MAX_CONCURRENT; 5)",
    )
    group.add_argument("--preset", choices=PRESETS, help="concurrency and batch size: 3/50, 5/100 or 10/200")
    group.add_argument(
        "--review-below",
        type=float,
        metavar="P",
        help="mark results for review where a label's probability is below P, 0 to 1 (REVIEW_BELOW)",
    )
    group.add_argument(
        "--mode", choices=["batch", "continuous", "scheduled"], help="until done, polling, or by --schedule"
    )
    group.add_argument(
        "--on-long",
        choices=["fit", "skip", "fail"],
        help="a conversation longer than the context window is cut knowingly, skipped, or quarantined (ON_LONG; fit)",
    )
    group.add_argument("--poll-interval", type=positive, default=30, metavar="S", help="seconds between polls (30)")
    group.add_argument("--schedule", metavar="CRON", help='when a scheduled run starts, such as "0 2 * * *"')


def command_settings(arguments: argparse.Namespace) -> Settings:
    """Return the settings that *arguments*, environment and ``.env`` make; a flag that a command lacks is not given.

    Raises:
        ConfigurationError: One of them is wrong.
    """
    given = {name: getattr(arguments, name, None) for name in SETTING_FLAGS}
    if getattr(arguments, "preset", None):
        concurrency, size = PRESETS[arguments.preset]
        given |= {"max_concurrent": concurrency} if given["max_concurrent"] is None else {}
        given |= {"batch_size": size} if given["batch_size"] is None else {}
    if arguments.verbose:
        given["log_level"] = "DEBUG"
    settings = load_settings(**given)
    if getattr(arguments, "model", None):
        field = "llm_model" if settings.llm_api_url else "ollama_model"
        settings = load_settings(**given, **{field: arguments.model})
    return settings


def settings_from(arguments: argparse.Namespace) -> Settings:
    """Return the settings of a run; see ``command_settings``.

    Raises:
        ConfigurationError: One of them is wrong, or mode and schedule do not fit.
    """
    settings = command_settings(arguments)
    if arguments.schedule and settings.mode != "scheduled":
        raise ConfigurationError("--schedule needs --mode scheduled.")
    if settings.mode == "scheduled":
        if not arguments.schedule:
            raise ConfigurationError('--mode scheduled needs --schedule, for example --schedule "0 2 * * *".')
        require_cron(arguments.schedule)
    for flag in ("reprocess", "retry_failed"):
        if arguments.only and getattr(arguments, flag):
            raise ConfigurationError(f"--only and --{flag.replace('_', '-')} each choose the documents; leave one out.")
    return settings


def run_options(arguments: argparse.Namespace, settings: Settings) -> RunOptions:
    """Return what the run that *arguments* describe shall do."""
    return RunOptions(
        settings.batch_size,
        arguments.limit,
        arguments.reprocess,
        arguments.retry_failed,
        only=arguments.only,
        dedupe=arguments.dedupe,
    )


def monitoring(arguments: argparse.Namespace) -> tuple[bool, bool, bool]:
    """Return whether to show console progress, log lines, progress files; by default the first and last."""
    flags = (arguments.console, arguments.logs, arguments.progress_files)
    console, logs, files = MONITORING[arguments.monitoring_mode or "interactive"]
    if any(flags) and not arguments.monitoring_mode:
        console, logs, files = flags
    return console or flags[0], logs or flags[1] or arguments.verbose, files or flags[2]


def concurrency(text: str) -> int | str:
    """Return *text* as a number or as "auto": a type for argparse; the settings judge the number."""
    return text if text == "auto" else int(text)


def positive(text: str) -> int:
    """Return *text* as a whole number of at least 1: a type for argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError("must be a whole number, 1 or more")
    return int(text)


def dollars(text: str) -> float:
    """Return *text* as US dollars, 0 or more: a type for argparse."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1e9:
        raise argparse.ArgumentTypeError("must be a sum of US dollars, 0 or more")
    return value

"""The command-line flags of ``cli.py`` and their settings. Pure: opens nothing.

``python cli.py`` is the batch run; ``python cli.py NAME`` runs a subcommand, a module with a ``COMMAND``.
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Callable, Coroutine, Iterable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from commands.subset_flags import add_subset_flags, subset_of
from config import Settings, load_settings
from domain.conversation import PROCESSOR_VERSION
from error_handler import ConfigurationError
from utils.process import Parser, number_between
from worker.staleness import SELECTABLE

# Types of flags.
positive = number_between(int, 1)
dollars = number_between(float, 0)

PRESETS = {"conservative": (3, 50), "balanced": (5, 100), "aggressive": (10, 200)}  # max_concurrent, batch_size

# Console progress, log lines, progress files.
MONITORING = {
    "development": (True, True, False),
    "production": (False, True, True),
    "interactive": (True, False, True),
}


@dataclass(frozen=True, slots=True)
class Command:
    """A subcommand of ``cli.py``.

    *add_flags* adds its flags to those of ``add_place_flags`` and ``add_log_flags``. *run* returns the exit code, or
    raises a TriadError, which becomes one sentence.
    """

    name: str
    summary: str
    add_flags: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace, Settings], Coroutine[Any, Any, int]]


def create_command_parser(command: Command) -> argparse.ArgumentParser:
    """Return the parser of ``cli.py NAME``."""
    parser = Parser(prog=f"cli.py {command.name}", description=command.summary, allow_abbrev=False)
    add_place_flags(parser.add_argument_group("documents"))
    add_log_flags(parser.add_argument_group("output"))
    command.add_flags(parser)
    return parser


def add_database_flags(group: argparse._ActionsContainer) -> None:
    """Add the flags that name the database and the collections."""
    group.add_argument("--mongodb-uri", help="MongoDB connection string (MONGODB_URI; mongodb://localhost:27017)")
    group.add_argument("--db-name", help="database (MONGODB_DB; customer_support)")
    group.add_argument(
        "--source-collection",
        "--queries-collection",
        help="collection of the conversations (MONGODB_SOURCE_COLLECTION; conversation_set)",
    )
    group.add_argument(
        "--status-field",
        metavar="NAME",
        help="field of a document with the state of this product, if another program uses status (STATUS_FIELD; status)",
    )
    group.add_argument(
        "--results-collection", help="collection of the results (MONGODB_RESULTS_COLLECTION; sentimental_analysis)"
    )


def add_place_flags(group: argparse._ActionsContainer) -> None:
    """Add the flags that name the database, the collections and the state directory."""
    add_database_flags(group)
    group.add_argument(
        "--batch-files-dir", type=Path, help="state directory of this worker (BATCH_FILES_DIR; batch_files)"
    )


def add_model_flags(group: argparse._ActionsContainer) -> None:
    """Add the flags that name the model, its server and its reply."""
    group.add_argument("--model", help="model name (OLLAMA_MODEL, or LLM_MODEL with LLM_API_URL)")
    group.add_argument(
        "--ollama-endpoint",
        action="append",
        help="URL of Ollama; several servers share a run if the flag is repeated (OLLAMA_ENDPOINT; http://localhost:11434)",
    )
    group.add_argument(
        "--allow-mixed-models",
        action="store_true",
        default=None,
        help="several servers may differ in model, window or version; each result names its model (ALLOW_MIXED_MODELS)",
    )
    group.add_argument(
        "--reply",
        dest="reply_style",
        choices=["full", "labels", "list", "score", "auto"],
        help="reply of the model: full (a sentence, then the labels), labels, list (an array of labels), score "
        "(probabilities of labels; llama.cpp and vLLM), or auto (REPLY_STYLE; full)",
    )


def add_log_flags(group: argparse._ActionsContainer) -> None:
    """Add the logging flags."""
    group.add_argument(
        "--log-level",
        type=str.upper,
        choices=["DEBUG", "INFO", "WARNING", "ERROR"],
        help="lowest level of log lines (LOG_LEVEL; INFO)",
    )
    group.add_argument("--verbose", action="store_true", help="log at level DEBUG and print tracebacks")


def create_parser(commands: Iterable[Command] = ()) -> argparse.ArgumentParser:
    """Return the parser of the batch run; its help lists *commands*.

    A flag that is not given is None, so that the environment decides.
    """
    parser = Parser(
        prog="cli.py",
        description="Label support conversations in MongoDB with intent, topic and sentiment,\nusing a local language model.",
        epilog="subcommands, each with its own --help:\n"
        + "".join(f"  cli.py {command.name:<12} {command.summary}\n" for command in commands)
        + "\nPrecedence: flags, environment, .env, defaults. Exit codes: docs/operations.md.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"customer-support-triad {PROCESSOR_VERSION}")
    what = parser.add_argument_group("documents")
    add_place_flags(what)
    what.add_argument("--limit", type=positive, metavar="N", help="process at most N documents")
    add_subset_flags(what)
    what.add_argument(
        "--reprocess", action="store_true", help="reclassify documents that already have a result, and replace it"
    )
    what.add_argument(
        "--retry-failed", action="store_true", help="retry failed and quarantined documents with a full set of attempts"
    )
    what.add_argument(
        "--only",
        choices=(*SELECTABLE, "facts"),
        help="process only these documents (python cli.py plan counts them); facts: add the times, turns and channel of their "
        "conversations to results that lack them, without a model",
    )
    what.add_argument(
        "--no-dedupe",
        dest="dedupe",
        action="store_false",
        help="classify every conversation, even if an identical one has a result",
    )
    what.add_argument(
        "--describe",
        action="store_true",
        help="after the run, write the one-line sentence into results that lack it (all values of --reply but full)",
    )
    what.add_argument("--dry-run", action="store_true", help="report what a run would do; change nothing")
    what.add_argument(
        "--embedded-student",
        action="store_true",
        help="with --embedded and no model server, let the trained student label",
    )
    what.add_argument("--embedded", action="store_true", help="use the embedded MongoDB and the sample conversations")
    _add_work_flags(parser.add_argument_group("processing"))
    _add_engine_flags(parser.add_argument_group("several machines"))
    _add_output_flags(parser.add_argument_group("output"))
    return parser


def _add_engine_flags(group: argparse._ActionsContainer) -> None:
    group.add_argument(
        "--engine", choices=["ray"], help="run workers on a Ray cluster (docs/scaling.md); one worker in this process"
    )
    group.add_argument(
        "--workers",
        type=number_between(int, 1, 256),
        metavar="N",
        help="with --engine ray: number of workers; one for each model_server or node of the cluster",
    )
    group.add_argument(
        "--ray-address",
        metavar="HOST:PORT",
        help="with --engine ray: the running cluster, or auto to find it; a cluster on this machine for this run",
    )


def _add_output_flags(shown: argparse._ActionsContainer) -> None:
    shown.add_argument("--monitoring-mode", choices=MONITORING, help="preset for the next three flags")
    shown.add_argument("--console", action="store_true", help="show progress on the terminal")
    shown.add_argument("--logs", action="store_true", help="write log lines to stderr")
    shown.add_argument(
        "--progress-files", action="store_true", help="write progress as JSON and CSV to batch_files/progress/"
    )
    shown.add_argument(
        "--metrics-port",
        type=int,
        metavar="PORT",
        help="serve Prometheus metrics over HTTP; implies --progress-files (METRICS_PORT; off)",
    )
    shown.add_argument(
        "--metrics-address", metavar="HOST", help="address to serve them on (METRICS_ADDRESS; 127.0.0.1)"
    )
    add_log_flags(shown)
    shown.add_argument("--output", type=Path, metavar="FILE", help="write the statistics of the run to FILE as JSON")


def _add_work_flags(group: argparse._ActionsContainer) -> None:
    add_model_flags(group)
    group.add_argument("--batch-size", type=int, metavar="N", help="documents per batch (BATCH_SIZE; 100)")
    group.add_argument(
        "--max-concurrent",
        "--concurrent",
        metavar="N",
        help="concurrent model calls, or auto to follow the slots of the server (MAX_CONCURRENT; 5)",
    )
    group.add_argument(
        "--preset", choices=PRESETS, help="concurrent calls and batch size: 3 and 50, 5 and 100, or 10 and 200"
    )
    group.add_argument(
        "--review-below",
        type=float,
        metavar="P",
        help="mark a result for review if the probability of a label is below P, 0 to 1 (REVIEW_BELOW)",
    )
    group.add_argument(
        "--student",
        type=float,
        metavar="P",
        help="let the trained student answer where at least P of its labels agree with the model's, for example 0.95 (STUDENT)",
    )
    group.add_argument(
        "--mode",
        choices=["batch", "continuous", "scheduled", "stream"],
        help="run once, poll for new documents, start at the times of --schedule, or label conversations within a second of their "
        "insertion (BATCH_PROCESSOR_MODE; batch)",
    )
    group.add_argument(
        "--on-long",
        choices=["fit", "skip", "fail"],
        help="conversations longer than the context window: fit (drop middle turns), skip, or fail (ON_LONG; fit)",
    )
    group.add_argument(
        "--poll-interval",
        type=positive,
        default=30,
        metavar="S",
        help="seconds between polls with --mode continuous, and between two looks at all pending documents with stream (30)",
    )
    group.add_argument(
        "--settle-s",
        type=float,
        metavar="S",
        help="with --mode stream, label a conversation again if it grew and was quiet for S seconds (SETTLE_S; 30)",
    )
    group.add_argument("--schedule", metavar="CRON", help='start times with --mode scheduled, for example "0 2 * * *"')


def command_settings(arguments: argparse.Namespace) -> Settings:
    """Return the settings from *arguments*, the environment and ``.env``.

    Raises:
        ConfigurationError: A value is invalid.
    """
    given = {name: value for name, value in vars(arguments).items() if name in Settings.model_fields}
    if getattr(arguments, "preset", None):
        for name, preset in zip(("max_concurrent", "batch_size"), PRESETS[arguments.preset], strict=True):
            given[name] = preset if given[name] is None else given[name]
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
        ConfigurationError: A value is invalid, or two flags contradict each other.
    """
    settings = command_settings(arguments)
    _require_flags_of_mode(arguments, settings.mode)
    if arguments.embedded_student and not arguments.embedded:
        raise ConfigurationError("--embedded-student requires --embedded; with a model server, use --student P.")
    if subset_of(arguments, settings).name and arguments.only == "facts":
        raise ConfigurationError("--only facts fills all results; leave out --filter, --since and --until.")
    _check_engine(arguments, settings)
    for flag in ("reprocess", "retry_failed"):
        if arguments.only and getattr(arguments, flag):
            raise ConfigurationError(f"--only and --{flag.replace('_', '-')} both select documents; use one of them.")
    return settings


def _require_flags_of_mode(arguments: argparse.Namespace, mode: str) -> None:
    """Raise ConfigurationError if a flag does not go with *mode*, or one is missing."""
    if arguments.schedule and mode != "scheduled":
        raise ConfigurationError("--schedule requires --mode scheduled.")
    if mode == "scheduled":
        if not arguments.schedule:
            raise ConfigurationError('--mode scheduled requires --schedule, for example --schedule "0 2 * * *".')
        seconds_until_next(arguments.schedule, datetime.now().astimezone())  # refuses what is not cron
    if mode == "stream":
        for flag in ("limit", "reprocess", "only", "describe"):
            if getattr(arguments, flag):
                raise ConfigurationError(
                    f"--mode stream labels each new conversation, so it does not go with --{flag}; remove one of them."
                )


def _check_engine(arguments: argparse.Namespace, settings: Settings) -> None:
    """Refuse flags that need ``--engine ray``, and those that workers on a cluster do not have."""
    if not arguments.engine:
        for flag in ("workers", "ray_address"):
            if getattr(arguments, flag) is not None:
                raise ConfigurationError(f"--{flag.replace('_', '-')} requires --engine ray.")
        return
    not_there = {
        "--embedded: start MongoDB where all nodes reach it": arguments.embedded,
        "--reprocess, because each worker would replace the results of the others: use --only stale": arguments.reprocess,
        "--describe: run it without --engine ray afterwards": arguments.describe,
        f"--mode {settings.mode}: start the command again, for example from cron": settings.mode != "batch",
        "--student (STUDENT): it is trained and used by one worker": settings.student is not None,
        "--reply auto: python cli.py --reply auto without --engine ray finds the style; name it": settings.reply_style
        == "auto",
    }
    for what, is_given in not_there.items():
        if is_given:
            raise ConfigurationError(f"--engine ray does not work with {what}.")


def monitoring(arguments: argparse.Namespace) -> tuple[bool, bool, bool]:
    """Return whether to show console progress, log lines and progress files; by default the first and the last."""
    flags = (arguments.console, arguments.logs, arguments.progress_files)
    mode = (False, False, False)
    if arguments.monitoring_mode or not any(flags):
        mode = MONITORING[arguments.monitoring_mode or "interactive"]
    console, logs, files = (one or other for one, other in zip(mode, flags, strict=True))
    return console, logs or arguments.verbose, files


def require_packages(user: str, modules: Iterable[str], remedy: str) -> None:
    """Check that *modules*, which *user* needs, can be imported; *remedy* is the command that installs them.

    Raises:
        ConfigurationError: Some cannot; the message names them.
    """
    if missing := [name for name in modules if importlib.util.find_spec(name) is None]:
        raise ConfigurationError(f"{user} needs packages that are not installed ({', '.join(missing)}): run {remedy}.")


def seconds_until_next(expression: str, now: datetime) -> float:
    """Return the seconds from *now* (aware, in the local time zone) to the next match of *expression*.

    Raises:
        ConfigurationError: *expression* is not a cron expression of five fields, or its day does not exist.
    """
    from croniter import croniter  # noqa: PLC0415 - most runs have no schedule and start faster without it

    try:
        if len(expression.split()) != 5:
            raise ValueError("not five fields")
        following: datetime = croniter(expression, now).get_next(datetime)
    except ValueError as exc:
        raise ConfigurationError(
            f'--schedule {expression!r} is not a cron expression; for every day at 2:00, use "0 2 * * *".'
        ) from exc
    return max(0.0, (following - now).total_seconds())

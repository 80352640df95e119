"""The flags of ``cli.py`` and what they mean for the settings. Pure: nothing is opened here."""

from __future__ import annotations

import argparse
from pathlib import Path

from config import Settings, load_settings
from error_handler import ConfigurationError
from utils.schedule import require_cron

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
)


def create_parser() -> argparse.ArgumentParser:
    """Return the parser; a flag that was not given is None, so that the environment can decide."""
    parser = argparse.ArgumentParser(
        prog="cli.py",
        description="Label support conversations in MongoDB with intent, topic and sentiment, by a local language model.",
        epilog="Flags win over the environment, that over .env, that over defaults. Exit codes: docs/operations.md.",
        allow_abbrev=False,
    )
    what = parser.add_argument_group("what to work on")
    what.add_argument("--mongodb-uri", help="where MongoDB is (MONGODB_URI; mongodb://localhost:27017)")
    what.add_argument("--db-name", help="database (MONGODB_DB; customer_support)")
    what.add_argument(
        "--source-collection",
        "--queries-collection",
        help="collection with the conversations (MONGODB_SOURCE_COLLECTION; conversation_set)",
    )
    what.add_argument(
        "--results-collection", help="collection for results (MONGODB_RESULTS_COLLECTION; sentimental_analysis)"
    )
    what.add_argument("--limit", type=_positive, help="take at most this many documents")
    what.add_argument(
        "--reprocess", action="store_true", help="ask again for documents that have a result, and replace it"
    )
    what.add_argument(
        "--retry-failed", action="store_true", help="take up failed and quarantined documents with fresh attempts"
    )
    what.add_argument("--dry-run", action="store_true", help="report what a run would do, and change nothing")
    what.add_argument(
        "--embedded", action="store_true", help="bring a MongoDB and sample conversations; nothing to install"
    )
    how = parser.add_argument_group("how to work")
    how.add_argument("--model", help="model to ask (OLLAMA_MODEL, or LLM_MODEL with LLM_API_URL)")
    how.add_argument("--ollama-endpoint", help="where Ollama is (OLLAMA_ENDPOINT; http://localhost:11434)")
    how.add_argument("--batch-size", type=int, help="documents per batch (BATCH_SIZE; 100)")
    how.add_argument(
        "--max-concurrent", "--concurrent", type=int, help="model calls in flight at once (MAX_CONCURRENT; 5)"
    )
    how.add_argument("--preset", choices=PRESETS, help="concurrency and batch size: 3/50, 5/100 or 10/200")
    how.add_argument(
        "--mode", choices=["batch", "continuous", "scheduled"], help="until done, polling, or by --schedule"
    )
    how.add_argument("--poll-interval", type=_positive, default=30, metavar="S", help="seconds between polls (30)")
    how.add_argument("--schedule", metavar="CRON", help='when a scheduled run starts, such as "0 2 * * *"')
    how.add_argument(
        "--batch-files-dir", type=Path, help="run-time files of this worker (BATCH_FILES_DIR; batch_files)"
    )
    shown = parser.add_argument_group("what to show")
    shown.add_argument("--monitoring-mode", choices=MONITORING, help="a choice of the three flags that follow")
    shown.add_argument("--console", action="store_true", help="progress on the terminal")
    shown.add_argument("--logs", action="store_true", help="log lines on stderr")
    shown.add_argument(
        "--progress-files", action="store_true", help="progress as JSON and CSV under batch_files/progress/"
    )
    shown.add_argument(
        "--log-level", type=str.upper, choices=["DEBUG", "INFO", "WARNING", "ERROR"], help="(LOG_LEVEL; INFO)"
    )
    shown.add_argument("--verbose", action="store_true", help="log lines of level DEBUG, and tracebacks")
    shown.add_argument("--output", type=Path, metavar="FILE", help="write the run's statistics as JSON")
    return parser


def settings_from(arguments: argparse.Namespace) -> Settings:
    """Return the settings that *arguments*, environment and ``.env`` make.

    Raises:
        ConfigurationError: One of them is wrong.
    """
    given = {name: getattr(arguments, name) for name in SETTING_FLAGS}
    if arguments.preset:
        concurrency, size = PRESETS[arguments.preset]
        given |= {"max_concurrent": concurrency} if given["max_concurrent"] is None else {}
        given |= {"batch_size": size} if given["batch_size"] is None else {}
    if arguments.verbose:
        given["log_level"] = "DEBUG"
    settings = load_settings(**given)
    if arguments.model:
        field = "llm_model" if settings.llm_api_url else "ollama_model"
        settings = load_settings(**given, **{field: arguments.model})
    if arguments.schedule and settings.mode != "scheduled":
        raise ConfigurationError("--schedule needs --mode scheduled.")
    if settings.mode == "scheduled":
        if not arguments.schedule:
            raise ConfigurationError('--mode scheduled needs --schedule, for example --schedule "0 2 * * *".')
        require_cron(arguments.schedule)
    return settings


def monitoring(arguments: argparse.Namespace) -> tuple[bool, bool, bool]:
    """Return whether to show console progress, log lines, progress files; by default the first and last."""
    flags = (arguments.console, arguments.logs, arguments.progress_files)
    console, logs, files = MONITORING[arguments.monitoring_mode or "interactive"]
    if any(flags) and not arguments.monitoring_mode:
        console, logs, files = flags
    return console or flags[0], logs or flags[1] or arguments.verbose, files or flags[2]


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError("must be a whole number, 1 or more")
    return int(text)

"""Flags become settings or one error; nothing is opened and no process is started."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr

import cli
import main as service_main
from commands.flags import create_parser, monitoring, settings_from
from config.settings import Settings
from domain.conversation import PROCESSOR_VERSION
from error_handler import ConfigurationError
from tests.cases import mostly_thorough


@pytest.fixture(autouse=True)
def wide_terminal(nothing_is_set: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Help texts have the width of a wide terminal."""
    monkeypatch.setenv("COLUMNS", "200")


def settings_of(*argv: str) -> Settings:
    return settings_from(create_parser().parse_args(argv))


def said(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    with pytest.raises(SystemExit) as ended:
        cli.main(argv)
    assert ended.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "field", "expected"),
    mostly_thorough(
        [
            (["--mongodb-uri", "mongodb://h:1"], "mongodb_uri", "mongodb://h:1"),
            (["--db-name", "d"], "db_name", "d"),
            (["--source-collection", "s"], "source_collection", "s"),
            (["--queries-collection", "s"], "source_collection", "s"),
            (["--results-collection", "r"], "results_collection", "r"),
            (["--batch-size", "7"], "batch_size", 7),
            (["--max-concurrent", "8"], "max_concurrent", 8),
            (["--concurrent", "8"], "max_concurrent", 8),
            (["--log-level", "warning"], "log_level", "WARNING"),
            (["--verbose"], "log_level", "DEBUG"),
            (["--verbose", "--log-level", "ERROR"], "log_level", "DEBUG"),
            (["--mode", "continuous"], "mode", "continuous"),
            (["--batch-files-dir", "x/y"], "batch_files_dir", Path("x/y")),
            (["--ollama-endpoint", "http://gpu:1"], "ollama_endpoint", "http://gpu:1"),
            (
                ["--ollama-endpoint", "gpu", "--ollama-endpoint", "b:1"],
                "ollama_endpoint",
                "http://gpu:11434,http://b:1",
            ),
            (["--allow-mixed-models"], "allow_mixed_models", True),
            (["--model", "phi4"], "ollama_model", "phi4"),
            (["--preset", "conservative"], "max_concurrent", 3),
            (["--preset", "conservative"], "batch_size", 50),
            (["--preset", "balanced"], "max_concurrent", 5),
            (["--preset", "balanced"], "batch_size", 100),
            (["--preset", "aggressive"], "max_concurrent", 10),
            (["--preset", "aggressive"], "batch_size", 200),
            (["--preset", "aggressive", "--max-concurrent", "4"], "max_concurrent", 4),
            (["--preset", "aggressive", "--max-concurrent", "4"], "batch_size", 200),
            (["--preset", "aggressive", "--batch-size", "4"], "batch_size", 4),
        ],
        3,
    ),
    ids=lambda value: " ".join(value) if isinstance(value, list) else str(value),
)
def test_flag_sets_its_setting(argv: list[str], field: str, expected: Any) -> None:
    """Every flag, its other spellings, and the presets."""
    value = getattr(settings_of(*argv), field)
    assert (value.get_secret_value() if isinstance(value, SecretStr) else value) == expected


def test_defaults_without_flags() -> None:
    settings = settings_of()
    assert settings.mongodb_uri.get_secret_value() == "mongodb://localhost:27017"
    assert (settings.db_name, settings.source_collection) == ("customer_support", "conversation_set")
    assert (settings.results_collection, settings.batch_size, settings.max_concurrent) == (
        "sentimental_analysis",
        100,
        5,
    )
    assert (settings.mode, settings.log_level, settings.ollama_model) == ("batch", "INFO", None)


def test_missing_flag_leaves_the_environment_in_force(monkeypatch: pytest.MonkeyPatch) -> None:
    """Precedence: flags, environment, .env, defaults; a preset is a flag."""
    Path(".env").write_text("BATCH_SIZE=11\nMAX_CONCURRENT=12\nOLLAMA_MODEL=from-file\n")
    monkeypatch.setenv("BATCH_SIZE", "21")
    settings = settings_of()
    assert (settings.batch_size, settings.max_concurrent, settings.ollama_model) == (21, 12, "from-file")
    assert settings_of("--batch-size", "31").batch_size == 31
    assert settings_of("--preset", "conservative").batch_size == 50


def test_model_flag_sets_llm_model_with_llm_api_url(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLM_API_URL", "http://h/v1/chat/completions")
    settings = settings_of("--model", "phi4")
    assert (settings.llm_model, settings.ollama_model, settings.model) == ("phi4", None, "phi4")


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["--batch-size", "many"], "argument --batch-size: invalid int value: 'many'"),
        (["--limit", "0"], "argument --limit: must be a whole number, 1 or more"),
        (["--limit", "-5"], "argument --limit: must be a whole number, 1 or more"),
        (["--limit", "ten"], "argument --limit: must be a whole number, 1 or more"),
        (["--poll-interval", "0.5"], "argument --poll-interval: must be a whole number, 1 or more"),
        (["--preset", "wild"], "argument --preset: invalid choice: 'wild' (choose from "),
        (["--mode", "sometimes"], "argument --mode: invalid choice: 'sometimes' (choose from "),
        (["--monitoring-mode", "all"], "argument --monitoring-mode: invalid choice: 'all' (choose from "),
        (["--log-level", "LOUD"], "argument --log-level: invalid choice: 'LOUD' (choose from "),
        (["--batch"], "unrecognized arguments: --batch"),
        (["run"], "unknown command 'run'; without a command, cli.py runs the worker. cli.py --help"),
        (
            ["docter"],
            "unknown command 'docter'; without a command, cli.py runs the worker. Did you mean doctor? cli.py --help",
        ),
        (
            ["--max-concurent", "5"],
            "unrecognized arguments: --max-concurent 5. Did you mean --max-concurrent? cli.py --help",
        ),
        (["--batchsize=5"], "unrecognized arguments: --batchsize=5. Did you mean --batch-size? cli.py --help"),
        (["--model"], "argument --model: expected one argument"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_invalid_flag_is_one_usage_error(argv: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    """One line names the flag, and what it may stand for; abbreviations are not used; exit code 2."""
    (line,) = said(capsys, *argv).splitlines()
    assert line.startswith(f"cli.py: {sentence}")
    assert line.endswith("cli.py --help lists the flags.")


def test_action_is_the_only_argument_that_quarantine_requires(capsys: pytest.CaptureFixture[str]) -> None:
    assert "the following arguments are required: action. " in said(capsys, "quarantine")


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["--batch-size", "0"], "BATCH_SIZE"),
        (["--max-concurrent", "0"], "MAX_CONCURRENT"),
        (["--max-concurrent", "0", "--preset", "balanced"], "MAX_CONCURRENT"),
        (["--batch-size", "0", "--preset", "balanced"], "BATCH_SIZE"),
        (["--mongodb-uri", "localhost"], "MONGODB_URI"),
        (["--ollama-endpoint", "ftp://localhost"], "OLLAMA_ENDPOINT"),
        (["--db-name", ""], "MONGODB_DB"),
        (["--source-collection", "same", "--results-collection", "same"], "MONGODB_RESULTS_COLLECTION"),
        (["--mode", "scheduled"], "--schedule"),
        (["--schedule", "0 2 * * *"], "--mode scheduled"),
        (["--mode", "scheduled", "--schedule", "every day"], "--schedule 'every day' is not a cron expression"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_invalid_value_names_the_setting(argv: list[str], named: str) -> None:
    """By the name of its environment variable."""
    with pytest.raises(ConfigurationError) as caught:
        settings_of(*argv)
    assert named in str(caught.value)


@pytest.mark.parametrize(
    ("flag", "value", "problem"),
    [
        ("--mongodb-uri", "localhost:27017", "MONGODB_URI: must start with mongodb:// or mongodb+srv://."),
        ("--db-name", "a b", 'MONGODB_DB: must be the name of a database, without spaces and / \\ . " $ * < > : | ?.'),
        (
            "--source-collection",
            "a$",
            "MONGODB_SOURCE_COLLECTION: must be a name without $ and without a dot at an end.",
        ),
    ],
)
def test_invalid_name_is_explained_in_words(flag: str, value: str, problem: str) -> None:
    """The message has neither a regular expression nor the settings that depend on the wrong one."""
    with pytest.raises(ConfigurationError) as caught:
        settings_of(flag, value)
    assert str(caught.value) == f"Wrong setting: {problem}"


def test_scheduled_mode_with_a_cron_expression() -> None:
    assert settings_of("--mode", "scheduled", "--schedule", "0 2 * * *").mode == "scheduled"


@pytest.mark.parametrize(
    ("argv", "console", "logs", "files"),
    [
        ([], True, False, True),
        (["--monitoring-mode", "development"], True, True, False),
        (["--monitoring-mode", "production"], False, True, True),
        (["--monitoring-mode", "interactive"], True, False, True),
        (["--console"], True, False, False),
        (["--logs"], False, True, False),
        (["--progress-files"], False, False, True),
        (["--console", "--logs", "--progress-files"], True, True, True),
        (["--monitoring-mode", "production", "--console"], True, True, True),
        (["--verbose"], True, True, True),
        (["--verbose", "--console"], True, True, False),
    ],
    ids=lambda value: (" ".join(value) or "none") if isinstance(value, list) else "",
)
def test_monitoring_flags_choose_the_outputs(argv: list[str], console: bool, logs: bool, files: bool) -> None:
    """A mode, or exactly the given flags; --verbose always adds log lines."""
    assert monitoring(create_parser().parse_args(argv)) == (console, logs, files)


def test_flags_of_a_single_run_are_not_settings() -> None:
    arguments = create_parser().parse_args(
        [
            "--limit",
            "5",
            "--dry-run",
            "--reprocess",
            "--retry-failed",
            "--embedded",
            "--poll-interval",
            "7",
            "--output",
            "f",
        ]
    )
    assert (arguments.limit, arguments.poll_interval, arguments.output) == (5, 7, Path("f"))
    assert arguments.dry_run
    assert arguments.reprocess
    assert arguments.retry_failed
    assert arguments.embedded
    assert create_parser().parse_args([]).poll_interval == 30


def test_version_of_worker_and_service_is_that_of_the_results(capsys: pytest.CaptureFixture[str]) -> None:
    """One version, also in processing_metadata.processor_version and in /openapi.json."""
    for main in (cli.main, service_main.main):
        with pytest.raises(SystemExit) as ended:
            main(["--version"])
        assert ended.value.code == 0
        assert capsys.readouterr().out == f"customer-support-triad {PROCESSOR_VERSION}\n"
    assert service_main.app.version == PROCESSOR_VERSION

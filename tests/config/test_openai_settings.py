"""Settings of document jobs: argument, environment, .env, default; a wrong one is named and never shown."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from config.loading import variables_of
from config.openai_settings import OpenAISettings, load_openai_settings
from config.settings import known_environment_names, load_settings
from error_handler import ConfigurationError
from openai_batch import AppConfig, BatchConfig, NotificationConfig, OpenAIConfig
from tests.cases import mostly_thorough
from tests.config.values import read

SECRET = "hunter2"

# A valid value other than the default for each field, as the environment writes it and as it is read.
VALUES: dict[str, tuple[str, Any]] = {
    "api_key": ("sk-1", "sk-1"),
    "base_url": ("http://127.0.0.1:8600/v1/", "http://127.0.0.1:8600/v1"),
    "model": ("gpt-4.1-mini", "gpt-4.1-mini"),
    "temperature": ("0.7", 0.7),
    "max_tokens": ("900", 900),
    "batch_size": ("7", 7),
    "completion_window": ("24h", "24h"),
    "poll_interval_s": ("12.5", 12.5),
    "max_retries": ("5", 5),
    "system_prompt": ("Be short.", "Be short."),
    "user_prompt_template": ("Say {{ text }}", "Say {{ text }}"),
    "webhook_url": ("https://hooks.example.com/x", "https://hooks.example.com/x"),
    "webhook_secret": ("s3cret", "s3cret"),
    "email": ("ops@example.com", "ops@example.com"),
    "smtp_server": ("mail.example.com:587", "mail.example.com:587"),
    "smtp_login": ("user:pass:word", "user:pass:word"),
    "smtp_from": ("triad@example.com", "triad@example.com"),
    "allow_external": ("true", True),
}
NAMES = [(field, variables_of(OpenAISettings, field)[0]) for field in VALUES]


def test_every_setting_is_tried_below() -> None:
    """And has one variable that the check of .env knows."""
    assert set(VALUES) == set(OpenAISettings.model_fields)
    assert {name for field in VALUES for name in variables_of(OpenAISettings, field)} <= known_environment_names()
    assert all(len(variables_of(OpenAISettings, field)) == 1 for field in VALUES)


@pytest.mark.parametrize(("field", "name"), mostly_thorough(NAMES, 3), ids=[name for _, name in NAMES])
def test_precedence_is_argument_environment_file_default(
    field: str, name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """For each setting."""
    written, expected = VALUES[field]
    if field != "completion_window":  # OpenAI has one value only
        assert read(load_openai_settings(None), field) != expected
    dotenv = tmp_path / "own.env"
    dotenv.write_text(f"{name}='{written}'\n")
    assert read(load_openai_settings(dotenv), field) == expected
    dotenv.write_text(f"{name}=not-this\n")
    monkeypatch.setenv(name, written)
    assert read(load_openai_settings(dotenv), field) == expected
    monkeypatch.setenv(name, "not-this")
    assert read(load_openai_settings(None, **{field: expected}), field) == expected
    monkeypatch.setenv(name, "")
    assert load_openai_settings(None) == load_openai_settings(None, **{field: None})


def test_settings_of_other_classes_in_env_file_are_accepted(tmp_path: Path) -> None:
    """Both classes read the same .env; a typo is still reported."""
    (tmp_path / ".env").write_text("OPENAI_MODEL=gpt-4.1-mini\nMONGODB_DB=clinic\n")
    assert load_settings().db_name == "clinic"
    assert load_openai_settings().model == "gpt-4.1-mini"
    (tmp_path / ".env").write_text("OPENAI_MODLE=gpt-4.1-mini\n")
    with pytest.raises(ConfigurationError, match=r"did you mean OPENAI_MODEL\?"):
        load_settings()


WRONG = [
    ("OPENAI_API_KEY", f"{SECRET} "),
    ("OPENAI_API_KEY", f"{SECRET}\nX-Other: 1"),
    ("OPENAI_API_KEY", f"{SECRET}é"),
    ("OPENAI_BASE_URL", "api.openai.com/v1"),
    ("OPENAI_BASE_URL", "ftp://host/v1"),
    ("OPENAI_BASE_URL", "http://"),
    ("OPENAI_BASE_URL", f"http://user:{SECRET}@host/v1"),
    ("OPENAI_BASE_URL", f"http://host/v1?key={SECRET}"),
    ("OPENAI_BASE_URL", f"http://host:{SECRET}"),
    ("OPENAI_BASE_URL", "http://host:0"),
    ("OPENAI_BASE_URL", f"http://[{SECRET}"),
    ("OPENAI_TEMP", "2.1"),
    ("OPENAI_TEMP", "nan"),
    ("OPENAI_TEMP", "warm"),
    ("OPENAI_MAX_TOKENS", "0"),
    ("OPENAI_MAX_TOKENS", "1.5"),
    ("BATCH_SIZE", "0"),
    ("COMPLETION_WINDOW", "48h"),
    ("POLL_INTERVAL", "0"),
    ("POLL_INTERVAL", "inf"),
    ("POLL_INTERVAL", "5m"),
    ("MAX_RETRIES", "0"),
    ("MAX_RETRIES", "many"),
    ("NOTIFICATION_WEBHOOK_SECRET", f"{SECRET}\n"),
    ("NOTIFICATION_EMAIL", f"{SECRET}"),
    ("NOTIFICATION_EMAIL", f"a@b.example\nBcc: {SECRET}@c.example"),
    ("SMTP_SERVER", f"{SECRET}"),
    ("SMTP_SERVER", "host:mail"),
    ("SMTP_LOGIN", SECRET),
    ("SMTP_LOGIN", f":{SECRET}"),
    ("SMTP_LOGIN", f"{SECRET}:"),
    ("SMTP_FROM", f"Triad <{SECRET}@b.example>"),
    ("ALLOW_EXTERNAL_LLM", "maybe"),
]


@pytest.mark.parametrize(("name", "value"), WRONG, ids=[f"{name}-{number}" for number, (name, _) in enumerate(WRONG)])
def test_malformed_value_is_named_but_not_shown(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any value may be a secret in the wrong place."""
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigurationError) as caught:
        load_openai_settings(None)
    assert str(caught.value).startswith("Wrong setting: ")
    assert name in str(caught.value)
    assert SECRET not in str(caught.value)


def test_all_malformed_values_are_named_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """In one message."""
    monkeypatch.setenv("MAX_RETRIES", "0")
    monkeypatch.setenv("OPENAI_TEMP", "9")
    with pytest.raises(ConfigurationError, match=r"(?s)OPENAI_TEMP.*MAX_RETRIES"):
        load_openai_settings(None)


def test_settings_are_frozen() -> None:
    """Nothing changes them during a job."""
    with pytest.raises(ValidationError):
        load_openai_settings(None).model = "other"


def test_repr_shows_no_secret() -> None:
    """Settings appear in tracebacks."""
    secrets = {
        "api_key": SECRET,
        "webhook_url": f"https://h.example/{SECRET}",
        "webhook_secret": SECRET,
        "smtp_login": f"u:{SECRET}",
    }
    settings = load_openai_settings(None, **secrets)
    config = AppConfig.from_env(settings=load_settings(None), openai_settings=settings)
    for thing in (settings, config):
        assert SECRET not in f"{thing!r} {thing}"
    assert SECRET not in f"{settings.model_dump()} {settings.model_dump_json()} {config.model_dump()}"
    assert config.openai.api_key is not None
    assert config.openai.api_key.get_secret_value() == SECRET


def test_job_fills_unset_fields_from_the_environment() -> None:
    """A schema file sets the length of answers; the key and the mail server are the operator's."""
    given = {field: expected for field, (_, expected) in VALUES.items()}
    config = AppConfig.from_env(
        settings=load_settings(None, db_name="clinic"),
        openai_settings=load_openai_settings(None, **given),
        openai=OpenAIConfig(max_tokens=77),
        batch=BatchConfig(max_lines=11),
        notifications=NotificationConfig(email="other@example.com"),
    )
    assert (config.openai.max_tokens, config.openai.model, config.openai.base_url) == (
        77,
        "gpt-4.1-mini",
        "http://127.0.0.1:8600/v1",
    )
    assert config.openai.api_key is not None
    assert (config.batch.max_lines, config.batch.poll_interval, config.batch.max_retries) == (11, 12.5, 5)
    assert (config.notifications.email, config.notifications.smtp_server) == (
        "other@example.com",
        "mail.example.com:587",
    )
    assert config.prompts.user_prompt_template == "Say {{ text }}"
    assert config.database.name == "clinic"
    assert config.allow_external is True

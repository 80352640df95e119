"""Settings of document jobs on the OpenAI Batch API; those shared with the batch worker are in config/settings.py."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, SecretStr, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from config.loading import HeaderSecret, HttpAddress, env, load_part, variables_of

_MAIL_SERVER = re.compile(r"[A-Za-z0-9.-]{1,253}:\d{1,5}")
_ADDRESS = re.compile(r"[^@\s<>]{1,64}@[^@\s<>]{1,253}")


class OpenAISettings(BaseSettings):
    """The settings of document jobs. Times are in seconds, lengths in tokens."""

    # load_settings refuses unknown names in .env; it knows those of all settings classes.
    model_config = SettingsConfigDict(frozen=True, extra="ignore", env_ignore_empty=True)

    api_key: HeaderSecret | None = Field(None, validation_alias=env("OPENAI_API_KEY"), description="API key")
    base_url: HttpAddress = Field(
        "https://api.openai.com/v1", validation_alias=env("OPENAI_BASE_URL"), description="address of the API"
    )
    model: str = Field("gpt-4o-mini", min_length=1, validation_alias=env("OPENAI_MODEL"), description="model")
    temperature: float = Field(
        0.1,
        ge=0,
        le=2,
        validation_alias=env("OPENAI_TEMP"),
        description="sampling temperature; 0 for the most likely answer",
    )
    max_tokens: int = Field(
        500, ge=1, le=128_000, validation_alias=env("OPENAI_MAX_TOKENS"), description="maximum tokens of one answer"
    )
    batch_size: int = Field(
        100, ge=1, le=50_000, validation_alias=env("BATCH_SIZE"), description="documents read and claimed at a time"
    )
    completion_window: Literal["24h"] = Field(
        "24h", validation_alias=env("COMPLETION_WINDOW"), description="time limit of a batch"
    )
    poll_interval_s: float = Field(
        300.0,
        gt=0,
        le=86_400,
        validation_alias=env("POLL_INTERVAL"),
        description="seconds between two checks of the batches",
    )
    max_retries: int = Field(3, ge=1, le=20, validation_alias=env("MAX_RETRIES"), description="attempts per document")
    system_prompt: str | None = Field(
        None, validation_alias=env("SYSTEM_PROMPT"), description="system prompt for schemas without one"
    )
    user_prompt_template: str | None = Field(
        None, validation_alias=env("USER_PROMPT_TEMPLATE"), description="prompt template for schemas without one"
    )
    webhook_url: SecretStr | None = Field(
        None, validation_alias=env("NOTIFICATION_WEBHOOK"), description="URL that gets a POST for each batch that ends"
    )
    webhook_secret: HeaderSecret | None = Field(
        None, validation_alias=env("NOTIFICATION_WEBHOOK_SECRET"), description="key of its signature (HMAC-SHA256)"
    )
    email: str | None = Field(
        None,
        validation_alias=env("NOTIFICATION_EMAIL"),
        description="address that gets a mail for each batch that ends",
    )
    smtp_server: str | None = Field(None, validation_alias=env("SMTP_SERVER"), description="mail server as host:port")
    smtp_login: SecretStr | None = Field(
        None, validation_alias=env("SMTP_LOGIN"), description="user:password of the mail server"
    )
    smtp_from: str | None = Field(None, validation_alias=env("SMTP_FROM"), description="sender of the mails")
    allow_external: bool = Field(
        False, validation_alias=env("ALLOW_EXTERNAL_LLM"), description="allow sending customer text to an external API"
    )

    @field_validator("email", "smtp_from")
    @classmethod
    def _address(cls, value: str | None) -> str | None:
        if value is not None and not _ADDRESS.fullmatch(value):
            raise ValueError("must be one mail address, name@host")
        return value

    @field_validator("smtp_server")
    @classmethod
    def _host_and_port(cls, value: str | None) -> str | None:
        if value is not None and not _MAIL_SERVER.fullmatch(value):
            raise ValueError("must be host:port, such as mail.example.com:587")
        return value

    @field_validator("smtp_login")
    @classmethod
    def _user_and_password(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None and not all(value.get_secret_value().partition(":")):
            raise ValueError("must be user:password")
        return value


def openai_environment_names(field: str) -> tuple[str, ...]:
    """Return the environment variables that set *field* of OpenAISettings."""
    return variables_of(OpenAISettings, field)


def load_openai_settings(dotenv: Path | None = Path(".env"), **arguments: Any) -> OpenAISettings:
    """Return the settings; see ``load_part``.

    Raises:
        ConfigurationError: A value is malformed.
    """
    return load_part(OpenAISettings, dotenv, arguments)

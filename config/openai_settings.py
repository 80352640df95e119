"""Settings of document jobs on the OpenAI Batch API; those shared with the batch worker are in config/settings.py."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Literal

from pydantic import Field, SecretStr
from pydantic_settings import BaseSettings

from config.loading import SETTINGS_CONFIG, HeaderSecret, HttpAddress, load_part, shaped

MailAddress = Annotated[str, shaped(r"[^@\s<>]{1,64}@[^@\s<>]{1,253}", "must be one mail address, name@host")]
MailServer = Annotated[str, shaped(r"[A-Za-z0-9.-]{1,253}:\d{1,5}", "must be host:port, such as mail.example.com:587")]
Login = Annotated[SecretStr, shaped("(?s)[^:]+:.+", "must be user:password")]


class OpenAISettings(BaseSettings):
    """The settings of document jobs. Times are in seconds, lengths in tokens."""

    model_config = SETTINGS_CONFIG

    api_key: HeaderSecret | None = Field(None, validation_alias="OPENAI_API_KEY", description="API key")
    base_url: HttpAddress = Field(
        "https://api.openai.com/v1", validation_alias="OPENAI_BASE_URL", description="address of the API"
    )
    model: str = Field("gpt-4o-mini", min_length=1, validation_alias="OPENAI_MODEL", description="model")
    temperature: float = Field(
        0.1,
        ge=0,
        le=2,
        validation_alias="OPENAI_TEMP",
        description="sampling temperature; 0 for the most likely answer",
    )
    max_tokens: int = Field(
        500, ge=1, le=128_000, validation_alias="OPENAI_MAX_TOKENS", description="maximum tokens of one answer"
    )
    batch_size: int = Field(100, ge=1, le=50_000, description="documents read and claimed at a time")
    completion_window: Literal["24h"] = Field("24h", description="time limit of a batch")
    poll_interval_s: float = Field(
        300.0,
        gt=0,
        le=86_400,
        validation_alias="POLL_INTERVAL",
        description="seconds between two checks of the batches",
    )
    max_retries: int = Field(3, ge=1, le=20, description="attempts per document")
    system_prompt: str | None = Field(None, description="system prompt for schemas without one")
    user_prompt_template: str | None = Field(None, description="prompt template for schemas without one")
    webhook_url: SecretStr | None = Field(
        None, validation_alias="NOTIFICATION_WEBHOOK", description="URL that gets a POST for each batch that ends"
    )
    webhook_secret: HeaderSecret | None = Field(
        None, validation_alias="NOTIFICATION_WEBHOOK_SECRET", description="key of its signature (HMAC-SHA256)"
    )
    email: MailAddress | None = Field(
        None, validation_alias="NOTIFICATION_EMAIL", description="address that gets a mail for each batch that ends"
    )
    smtp_server: MailServer | None = Field(None, description="mail server as host:port")
    smtp_login: Login | None = Field(None, description="user:password of the mail server")
    smtp_from: MailAddress | None = Field(None, description="sender of the mails")
    allow_external: bool = Field(
        False, validation_alias="ALLOW_EXTERNAL_LLM", description="allow sending customer text to an external API"
    )


load_openai_settings = partial(load_part, OpenAISettings)

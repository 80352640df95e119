"""Settings of document jobs on the OpenAI Batch API; those shared with the batch worker are in config/settings.py."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Literal

from pydantic import Field, SecretStr

from config.loading import HeaderSecret, HttpAddress, PartSettings, load_part, shaped

MailAddress = Annotated[str, shaped(r"[^@\s<>]{1,64}@[^@\s<>]{1,253}", "must be one mail address, name@host")]
MailServer = Annotated[str, shaped(r"[A-Za-z0-9.-]{1,253}:\d{1,5}", "must be host:port, such as mail.example.com:587")]
Login = Annotated[SecretStr, shaped("(?s)[^:]+:.+", "must be user:password")]


class OpenAISettings(PartSettings):
    """The settings of document jobs; ``.env.example`` explains each. Times are in seconds, lengths in tokens."""

    api_key: HeaderSecret | None = Field(None, validation_alias="OPENAI_API_KEY")
    base_url: HttpAddress = Field("https://api.openai.com/v1", validation_alias="OPENAI_BASE_URL")
    model: str = Field("gpt-4o-mini", min_length=1, validation_alias="OPENAI_MODEL")
    temperature: float = Field(0.1, ge=0, le=2, validation_alias="OPENAI_TEMP")
    max_tokens: int = Field(500, ge=1, le=128_000, validation_alias="OPENAI_MAX_TOKENS")
    batch_size: int = Field(100, ge=1, le=50_000)
    completion_window: Literal["24h"] = "24h"
    poll_interval_s: float = Field(300.0, gt=0, le=86_400, validation_alias="POLL_INTERVAL")
    max_retries: int = Field(3, ge=1, le=20)
    system_prompt: str | None = None
    user_prompt_template: str | None = None
    webhook_url: SecretStr | None = Field(None, validation_alias="NOTIFICATION_WEBHOOK")
    webhook_secret: HeaderSecret | None = Field(None, validation_alias="NOTIFICATION_WEBHOOK_SECRET")
    email: MailAddress | None = Field(None, validation_alias="NOTIFICATION_EMAIL")
    smtp_server: MailServer | None = None
    smtp_login: Login | None = None
    smtp_from: MailAddress | None = None
    allow_external: bool = Field(False, validation_alias="ALLOW_EXTERNAL_LLM")


load_openai_settings = partial(load_part, OpenAISettings)

"""Settings of the REST service. Those it shares with the batch worker are in config/settings.py."""

from __future__ import annotations

import base64
import binascii
import re
from functools import partial
from typing import Literal

from pydantic import Field, SecretStr, ValidationInfo, field_validator

from config.loading import HomePath, PartSettings, load_part

Exposure = Literal["public", "key", "off"]

_ORIGIN = re.compile(r"https?://([a-z0-9._-]{1,253}|\[[0-9a-f:.]{2,45}\])(:[1-9]\d{0,4})?")
_KEY_ENTRY = re.compile(r"[A-Za-z0-9._-]{1,64}:[!-+\--~]{16,512}")


class ServiceSettings(PartSettings):
    """All settings of the service; ``.env.example`` explains each. Durations are in seconds."""

    model_config = PartSettings.model_config | {"env_prefix": "API_"}

    host: str = "127.0.0.1"
    port: int = Field(8000, ge=0, le=65_535)
    keys: SecretStr | None = None
    allow_unauthenticated: bool = False
    max_concurrent: int = Field(5, ge=1, le=1024)
    queue_size: int = Field(100, ge=0, le=10_000)
    request_timeout_s: float = Field(60.0, gt=0, le=3600)
    header_timeout_s: float = Field(10.0, gt=0, le=300)
    body_timeout_s: float = Field(10.0, gt=0, le=300)
    rate_limit_per_minute: int = Field(0, ge=0, le=1_000_000)
    max_body_bytes: int = Field(262_144, ge=1024, le=16_777_216)
    max_batch_bytes: int = Field(2_097_152, ge=1024, le=16_777_216)
    job_max_conversations: int = Field(1000, ge=1, le=10_000)
    max_open_jobs: int = Field(100, ge=1, le=10_000)
    job_retention_s: float = Field(604_800.0, ge=60, le=7_776_000)
    webhook_secret: SecretStr | None = None
    webhook_origins: str | None = None
    max_messages: int = Field(500, ge=1, le=100_000)
    max_text_characters: int = Field(50_000, ge=1, le=4_194_304)
    idempotency_retention_s: float = Field(86_400.0, ge=0, le=604_800)
    idempotency_max_keys: int = Field(10_000, ge=1, le=1_000_000)
    expose_docs: Exposure = "key"
    expose_metrics: Exposure = "key"
    expose_jobs: Literal["key", "off"] = "key"
    expose_review: Literal["key", "off"] = "off"
    expose_dashboard: Literal["key", "off"] = "off"
    dashboard_show_text: bool = Field(False, validation_alias="DASHBOARD_SHOW_TEXT")
    dashboard_batch_files_dir: HomePath | None = Field(None, validation_alias="DASHBOARD_BATCH_FILES_DIR")
    embedded: bool = False

    @field_validator("keys")
    @classmethod
    def _well_formed(cls, value: SecretStr | None) -> SecretStr | None:
        entries = [entry.strip() for entry in value.get_secret_value().split(",")] if value else []
        if not all(_KEY_ENTRY.fullmatch(entry) for entry in entries):
            raise ValueError(
                "must be name:key,name:key with names of letters, digits and ._- and keys of 16 to 512 printable "
                "ASCII characters without comma (make one: python -c 'import secrets; print(secrets.token_hex(32))')"
            )
        keys = [entry.partition(":")[2] for entry in entries]
        if len(set(keys)) != len(keys):
            raise ValueError("contains a key twice; give each caller its own")
        return value

    @field_validator("webhook_origins")
    @classmethod
    def _origins(cls, value: str | None, info: ValidationInfo) -> str | None:
        if not all(_ORIGIN.fullmatch(entry) for entry in _entries(value)):
            raise ValueError("must be https://host,http://host:port in lower case, without path, user and password")
        if value and "webhook_secret" in info.data and info.data["webhook_secret"] is None:
            raise ValueError("needs API_WEBHOOK_SECRET, because webhooks are signed")
        return value

    @field_validator("webhook_secret")
    @classmethod
    def _signing_key(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None and not 24 <= len(_decoded(value)) <= 64:
            raise ValueError(
                "must be whsec_ and 24 to 64 bytes in base64 (make one: "
                "python -c 'import base64, secrets; print(\"whsec_\" + base64.b64encode(secrets.token_bytes(32)).decode())')"
            )
        return value

    @property
    def allowed_origins(self) -> tuple[str, ...]:
        """The origins to which webhooks may be sent."""
        return tuple(_entries(self.webhook_origins))

    @property
    def signing_key(self) -> bytes:
        """The key of webhook signatures; empty if none is set."""
        return _decoded(self.webhook_secret) if self.webhook_secret else b""

    @field_validator("expose_review", "expose_dashboard")
    @classmethod
    def _pages_need_a_key(cls, value: str, info: ValidationInfo) -> str:
        if value != "off" and info.data.get("allow_unauthenticated") and not info.data.get("keys"):
            does = "shows conversations" if info.field_name == "expose_review" else "stops workers"
            raise ValueError(f"{does}, so set API_KEYS or remove API_ALLOW_UNAUTHENTICATED")
        return value

    @property
    def named_keys(self) -> list[tuple[str, str]]:
        """The API keys as (name, key) pairs; empty if none is set."""
        entries = self.keys.get_secret_value().split(",") if self.keys else []
        return [(name, key) for name, _, key in (entry.strip().partition(":") for entry in entries)]


def _entries(value: str | None) -> list[str]:
    return [entry.strip() for entry in value.split(",")] if value else []


def _decoded(secret: SecretStr) -> bytes:
    """Return the bytes of a secret of Standard Webhooks; empty if it is none."""
    head, _, text = secret.get_secret_value().partition("_")
    try:
        return base64.b64decode(text, validate=True) if head == "whsec" else b""
    except binascii.Error:
        return b""


load_service_settings = partial(load_part, ServiceSettings)

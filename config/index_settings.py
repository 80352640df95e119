"""Settings of the embedding index. Keys and addresses of its providers are in the other settings modules."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, SecretStr
from pydantic_settings import BaseSettings, SettingsConfigDict

from config.loading import env, load_part, variables_of

ProviderName = Literal["openai", "ollama", "local"]

# The local package contains only this model; the others are the usual models of their servers.
DEFAULT_MODELS: dict[ProviderName, str] = {
    "openai": "text-embedding-3-small",
    "ollama": "nomic-embed-text",
    "local": "all-MiniLM-L6-v2",
}


class IndexSettings(BaseSettings):
    """All settings of the embedding index. Times are in seconds, lengths in tokens."""

    # load_settings refuses unknown names in .env; it knows those of all settings classes.
    model_config = SettingsConfigDict(frozen=True, extra="ignore", env_ignore_empty=True)

    provider: ProviderName = Field(
        "ollama", validation_alias=env("EMBEDDING_PROVIDER"), description="embedding provider: openai, ollama or local"
    )
    embedding_model: str | None = Field(
        None, min_length=1, validation_alias=env("EMBEDDING_MODEL"), description="unset: the default of the provider"
    )
    dimensions: int | None = Field(
        None,
        ge=1,
        le=8192,
        validation_alias=env("EMBEDDING_DIMENSIONS"),
        description="length of the vectors, for OpenAI models that can shorten them; unset: the model's own",
    )
    batch_size: int = Field(
        100, ge=1, le=2048, validation_alias=env("EMBEDDING_BATCH_SIZE"), description="maximum inputs per call"
    )
    max_retries: int = Field(
        3, ge=0, le=20, validation_alias=env("EMBEDDING_MAX_RETRIES"), description="retries of a failed call"
    )
    max_concurrent: int = Field(
        4,
        ge=1,
        le=64,
        validation_alias=env("EMBEDDING_CONCURRENCY"),
        description="concurrent calls",
    )
    timeout_s: float = Field(
        120.0, gt=0, le=3600, validation_alias=env("EMBEDDING_TIMEOUT_S"), description="timeout of a call"
    )
    database_url: SecretStr | None = Field(
        None, validation_alias=env("DATABASE_URL"), description="SQLAlchemy URL of the database to document"
    )
    index_dir: Path = Field(
        Path("data/index"), validation_alias=env("INDEX_DIR"), description="directory of the index and its state"
    )
    log_file: Path | None = Field(
        None, validation_alias=env("LOG_FILE"), description="file for a copy of the log lines, rotated at 10 MB"
    )

    @property
    def model(self) -> str:
        """The embedding model to use."""
        return self.embedding_model or DEFAULT_MODELS[self.provider]


def index_environment_names(field: str) -> tuple[str, ...]:
    """Return the environment variables that set *field* of IndexSettings."""
    return variables_of(IndexSettings, field)


def load_index_settings(dotenv: Path | None = Path(".env"), **arguments: Any) -> IndexSettings:
    """Return the settings; see ``load_part``.

    Raises:
        ConfigurationError: A value is malformed.
    """
    return load_part(IndexSettings, dotenv, arguments)

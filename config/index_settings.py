"""Settings of the embedding index. Keys and addresses of its providers are in the other settings modules."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Literal

from pydantic import Field, SecretStr
from pydantic_settings import BaseSettings

from config.loading import SETTINGS_CONFIG, load_part

ProviderName = Literal["openai", "ollama", "local"]

# The local package contains only this model; the others are the usual models of their servers.
DEFAULT_MODELS: dict[ProviderName, str] = {
    "openai": "text-embedding-3-small",
    "ollama": "nomic-embed-text",
    "local": "all-MiniLM-L6-v2",
}


class IndexSettings(BaseSettings):
    """All settings of the embedding index. Times are in seconds, lengths in tokens."""

    model_config = SETTINGS_CONFIG | {"env_prefix": "EMBEDDING_"}

    provider: ProviderName = Field("ollama", description="embedding provider: openai, ollama or local")
    embedding_model: str | None = Field(
        None, min_length=1, validation_alias="EMBEDDING_MODEL", description="unset: the default of the provider"
    )
    dimensions: int | None = Field(
        None,
        ge=1,
        le=8192,
        description="length of the vectors, for OpenAI models that can shorten them; unset: the model's own",
    )
    batch_size: int = Field(100, ge=1, le=2048, description="maximum inputs per call")
    max_retries: int = Field(3, ge=0, le=20, description="retries of a failed call")
    max_concurrent: int = Field(
        4, ge=1, le=64, validation_alias="EMBEDDING_CONCURRENCY", description="concurrent calls"
    )
    timeout_s: float = Field(120.0, gt=0, le=3600, description="timeout of a call")
    database_url: SecretStr | None = Field(
        None, validation_alias="DATABASE_URL", description="SQLAlchemy URL of the database to document"
    )
    index_dir: Path = Field(
        Path("data/index"), validation_alias="INDEX_DIR", description="directory of the index and its state"
    )
    log_file: Path | None = Field(
        None, validation_alias="LOG_FILE", description="file for a copy of the log lines, rotated at 10 MB"
    )

    @property
    def model(self) -> str:
        """The embedding model to use."""
        return self.embedding_model or DEFAULT_MODELS[self.provider]


load_index_settings = partial(load_part, IndexSettings)

"""Settings of the embedding index. Keys and addresses of its providers are in the other settings modules."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Literal

from pydantic import Field, SecretStr

from config.loading import HomePath, PartSettings, load_part

ProviderName = Literal["openai", "ollama", "local"]

# The local package contains only this model; the others are the usual models of their servers.
DEFAULT_MODELS: dict[ProviderName, str] = {
    "openai": "text-embedding-3-small",
    "ollama": "nomic-embed-text",
    "local": "all-MiniLM-L6-v2",
}


class IndexSettings(PartSettings):
    """All settings of the embedding index; ``.env.example`` explains each. Times are in seconds, lengths in tokens."""

    model_config = PartSettings.model_config | {"env_prefix": "EMBEDDING_"}

    provider: ProviderName = "ollama"
    embedding_model: str | None = Field(None, min_length=1, validation_alias="EMBEDDING_MODEL")
    dimensions: int | None = Field(None, ge=1, le=8192)
    batch_size: int = Field(100, ge=1, le=2048)
    max_retries: int = Field(3, ge=0, le=20)
    max_concurrent: int = Field(4, ge=1, le=64, validation_alias="EMBEDDING_CONCURRENCY")
    timeout_s: float = Field(120.0, gt=0, le=3600)
    database_url: SecretStr | None = Field(None, validation_alias="DATABASE_URL")
    index_dir: HomePath = Field(Path("data/index"), validation_alias="INDEX_DIR")
    log_file: HomePath | None = Field(None, validation_alias="LOG_FILE")

    @property
    def model(self) -> str:
        """The embedding model to use."""
        return self.embedding_model or DEFAULT_MODELS[self.provider]


load_index_settings = partial(load_part, IndexSettings)

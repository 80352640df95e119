"""The embedding providers: OpenAI, Ollama, and one inside this process. Only the packages of the chosen one are loaded."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from config.index_settings import IndexSettings
from config.loading import DOTENV
from config.openai_settings import load_openai_settings
from config.settings import load_settings
from error_handler import ConfigurationError

if TYPE_CHECKING:  # it needs numpy, which may be missing
    from embedding_index.providers.contract import Provider


def open_provider(index: IndexSettings, dotenv: Path | None = DOTENV) -> Provider:
    """Return the provider of *index*, which the caller closes. Keys and addresses are read from the environment and *dotenv*.

    Raises:
        ConfigurationError: A package, a key or the model is missing, or a setting is wrong.
        ProviderUnavailableError: Ollama does not answer.
    """
    try:
        if index.provider == "openai":
            from embedding_index.providers.openai_embeddings import OpenAIProvider  # noqa: PLC0415

            return OpenAIProvider(index, load_openai_settings(dotenv))
        if index.provider == "ollama":
            from embedding_index.providers.ollama_embeddings import OllamaProvider  # noqa: PLC0415

            return OllamaProvider(index, load_settings(dotenv))
        from embedding_index.providers.local_embeddings import LocalProvider  # noqa: PLC0415

        return LocalProvider(index)
    except ImportError as exc:
        raise ConfigurationError(
            f"EMBEDDING_PROVIDER={index.provider} needs the package {exc.name}; run: "
            "pip install --requirement requirements-index.txt"
        ) from exc

"""Logging of ``cli.py index``: where lines go, and which secrets are masked in them."""

from __future__ import annotations

from urllib.parse import unquote

from config import Settings
from config.index_settings import IndexSettings
from config.openai_settings import load_openai_settings
from error_handler import ConfigurationError
from logger import configure_logging

SHORTEST_SECRET = 4  # characters; masking shorter ones would also mask parts of words


def log_to(chosen: IndexSettings, settings: Settings, *, verbose: bool) -> None:
    """Log lines of LOG_LEVEL to LOG_FILE, and warnings to stderr; with *verbose*, all lines to stderr as well.

    Raises:
        ConfigurationError: LOG_FILE cannot be written.
    """
    level = settings.log_level if verbose or chosen.log_file is not None else "WARNING"
    try:
        configure_logging(
            level,
            file=chosen.log_file,
            secrets=_secrets(chosen, settings),
            stderr_level=None if verbose else "WARNING",
        )
    except OSError as exc:
        raise ConfigurationError(
            f"LOG_FILE {chosen.log_file} cannot be written ({exc.strerror}); name another."
        ) from exc


def _secrets(chosen: IndexSettings, settings: Settings) -> list[str]:
    given = [chosen.database_url, load_openai_settings().api_key, settings.llm_api_key]
    secrets = [secret.get_secret_value() for secret in given if secret is not None]
    if chosen.database_url is not None:
        address = chosen.database_url.get_secret_value().partition("://")[2]
        user, found, _ = address.rpartition("@")
        password = user.partition(":")[2] if found else ""
        secrets += [password, unquote(password)]
    return [secret for secret in secrets if len(secret) >= SHORTEST_SECRET]

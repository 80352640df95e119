"""The log of ``cli.py index`` masks the secrets of its settings."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from config import load_settings
from config.index_settings import load_index_settings
from embedding_index.actions import log_to

KEY, MODEL_KEY, PASSWORD = "sk-canary-0123456789", "model-canary-0123456789", "database canary"
ESCAPED = "database%20canary"


@pytest.fixture
def root() -> Iterator[logging.Logger]:
    """Give the root logger back as it was: pytest listens to it."""
    logger = logging.getLogger()
    handlers = list(logger.handlers)
    logger.handlers[:] = []
    yield logger
    for handler in logger.handlers:
        handler.close()
    logger.handlers[:] = handlers


def test_secrets_of_the_settings_are_masked(
    root: logging.Logger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Keys and the password of DATABASE_URL, escaped or not: in the file and on stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    log = tmp_path / "index.log"
    chosen = load_index_settings(None, database_url=f"postgresql://me:{ESCAPED}@127.0.0.1/db", log_file=log)
    log_to(chosen, load_settings(None, llm_api_key=MODEL_KEY), verbose=True)
    for secret in (KEY, MODEL_KEY, PASSWORD, ESCAPED):
        root.warning("a library says %s", secret)
    for lines in (log.read_text(), capsys.readouterr().err):
        assert lines.count("a library says ***") == 4
        assert not any(secret in lines for secret in (KEY, MODEL_KEY, PASSWORD, ESCAPED))

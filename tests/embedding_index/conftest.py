"""Fixtures of the index tests: the fake OpenAI without leftovers, and a place for ``cli.py index``."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from config.index_settings import IndexSettings, load_index_settings
from tests.embedding_index.index_commands import IndexSite

if TYPE_CHECKING:
    from tests.fakes.fake_openai import FakeOpenAI


@pytest.fixture
def fake(running: FakeOpenAI) -> Iterator[FakeOpenAI]:
    """Return the fake OpenAI after the calls of the previous test have ended; the fake itself must not have failed."""
    running.renew()
    yield running
    assert running.stats()["internal_errors"] == 0


@pytest.fixture
def site(fake: FakeOpenAI, tmp_path: Path) -> IndexSite:
    """Return a database, an empty index and an environment for ``cli.py index``."""
    return IndexSite(tmp_path, fake)


_loaded_once = functools.cache(functools.cache)


@pytest.fixture
def loaded_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the local providers of this process share one model: loading it takes a quarter of a second."""
    minilm = pytest.importorskip("embedded.minilm", reason="requirements-index.txt is not installed")
    monkeypatch.setattr(minilm, "Encoder", _loaded_once(minilm.Encoder))


@pytest.fixture
def settings(tmp_path: Path) -> IndexSettings:
    """Return the default settings with a folder that does not exist yet."""
    return load_index_settings(None, index_dir=tmp_path / "index")

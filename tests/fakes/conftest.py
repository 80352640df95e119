"""One fake Ollama and one fake OpenAI for the tests of a module."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from tests.fakes.fake_ollama import FakeOllama
from tests.fakes.fake_openai import FakeOpenAI
from tests.fakes.fake_openai_client import client_of

if TYPE_CHECKING:
    import openai


@pytest.fixture(scope="module")
def running_ollama() -> Iterator[FakeOllama]:
    """Return a fake Ollama for every test of a module; tests ask for ``ollama``."""
    with FakeOllama() as server:
        yield server
        assert server.stats()["internal_errors"] == 0


@pytest.fixture
def ollama(running_ollama: FakeOllama) -> FakeOllama:
    """Return the fake Ollama as if it had just started."""
    running_ollama.reset()
    return running_ollama


@pytest.fixture
def fake(running: FakeOpenAI) -> Iterator[FakeOpenAI]:
    """Return the fake OpenAI as if it had just started."""
    running.reset()
    yield running
    assert running.stats()["internal_errors"] == 0


@pytest.fixture
def client(fake: FakeOpenAI) -> Iterator[openai.OpenAI]:
    """Return the official client of ``fake``."""
    with client_of(fake) as opened:
        yield opened

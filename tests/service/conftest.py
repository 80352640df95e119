"""The model server of the service tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.fakes.fake_ollama import FakeOllama


@pytest.fixture(scope="module")
def fake() -> Iterator[FakeOllama]:
    """Return a fake Ollama with eight slots for every test of a module."""
    with FakeOllama(slots=8, latency_s=0.01, user_message=0) as server:
        yield server

"""Shared parts: one real mongod per test process, one database per test."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator

import pytest
from pymongo import MongoClient

from utils.embedded_mongod import EmbeddedMongod


def pytest_report_header() -> str:
    """Say aloud what is not run here."""
    endpoint = os.environ.get("OLLAMA_TEST_ENDPOINT")
    if endpoint:
        return f"ollama: one more test against {endpoint}"
    return "ollama: OLLAMA_TEST_ENDPOINT is not set, so the test against a running Ollama is left out"


@pytest.fixture(scope="session")
def mongod(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedMongod]:
    """Return a standalone mongod that serves every test of this process."""
    with EmbeddedMongod(tmp_path_factory.mktemp("mongod")) as server:
        yield server


@pytest.fixture
def mongodb_uri(mongod: EmbeddedMongod) -> str:
    """Return the address of the shared mongod."""
    return mongod.uri


@pytest.fixture
def db_name(mongod: EmbeddedMongod) -> Iterator[str]:
    """Return the name of a database of this test alone; it is dropped afterwards."""
    name = f"test_{uuid.uuid4().hex[:16]}"
    yield name
    with MongoClient[dict[str, object]](mongod.uri) as client:
        client.drop_database(name)

"""Shared parts: one real mongod per test process, one database per test."""

from __future__ import annotations

import gc
import logging
import os
import shutil
import subprocess
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, settings
from pymongo import MongoClient
from pymongo.database import Database

from config.settings import known_environment_names
from embedded.mongod import EmbeddedMongod
from tests.fakes.fake_ollama import FakeOllama
from tests.forked_process import fork_script
from tests.server_process import ServerProcess

if TYPE_CHECKING:
    from tests.fakes.fake_openai import FakeOpenAI
    from tests.fakes.postgres_server import Postgres
    from tests.fakes.scripted_server import ScriptedServer
    from tests.fakes.tiny_engine import TinyEngine
    from tests.openai_batch.openai_job import Job

# What is made while the tests are collected stays; to look through it for garbage takes a third of that time.
gc.disable()
pytest.register_assert_rewrite(
    *("tests.worker.site", "tests.worker.long_conversations", "tests.worker.engine_run"),
    "tests.embedding_index.index_site",
)
# Before numpy is loaded: on busy cores the threads of its matrix products wait for each other by spinning.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

from tests.worker.site import Site  # noqa: E402 - imported after its assertions are made to explain themselves

ServerProcess.start_script = staticmethod(fork_script)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options of the crash loop."""
    parser.addoption("--kills", type=int, default=4, help="how often the crash loop kills the worker (4)")
    parser.addoption("--seed", type=int, default=None, help="seed of the crash loop; printed, so that it can be given")


def pytest_configure(config: pytest.Config) -> None:
    """Let slow machines be slow, and have more random examples in ``make torture``, which selects by no mark."""
    settings.register_profile(
        "suite",
        deadline=None,
        max_examples=25 if config.option.markexpr else 1000,
        suppress_health_check=[HealthCheck.too_slow],
    )
    settings.load_profile("suite")


def pytest_collection_finish() -> None:
    """Collect garbage again, but not among what was collected for all tests."""
    gc.freeze()
    gc.enable()


def pytest_report_header() -> str:
    """Say aloud what is not run here."""
    endpoint = os.environ.get("OLLAMA_TEST_ENDPOINT")
    if endpoint:
        return f"ollama: one more test against {endpoint}"
    return "ollama: OLLAMA_TEST_ENDPOINT is not set, so the test against a running Ollama is left out"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Give the crash loop the time that its number of kills takes."""
    for item in items:
        if item.name.startswith("test_random_kills"):
            item.add_marker(pytest.mark.timeout(60 + 5 * config.getoption("--kills")))


@pytest.fixture(autouse=True)
def log_level() -> Iterator[None]:
    """Restore the log level, so that no test hides the log lines of another."""
    root = logging.getLogger()
    before = root.level
    yield
    root.setLevel(before)


@pytest.fixture
def nothing_is_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No setting in the environment or in a .env file."""
    for name in known_environment_names():
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate for this machine that nobody signed, its key in the same file."""
    if shutil.which("openssl") is None:
        pytest.skip("no openssl to make a certificate with")
    folder = tmp_path_factory.mktemp("tls")
    key, made = folder / "key.pem", folder / "certificate.pem"
    request = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:P-256",
        "-nodes",
        "-days",
        "2",
    ]
    names = ["-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"]
    subprocess.run([*request, *names, "-keyout", str(key), "-out", str(made)], check=True, capture_output=True)
    made.write_text(made.read_text() + key.read_text())
    return made


@pytest.fixture(scope="session")
def mongod(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedMongod]:
    """Return a standalone mongod that serves every test of this process."""
    # This check of an upgrade is made for each new table, too, and takes a fifth of its time; tests make thousands.
    quick = ("--setParameter", "wiredTigerSkipTableLoggingChecksOnStartup=true")
    with EmbeddedMongod(tmp_path_factory.mktemp("mongod"), extra_arguments=quick) as server:
        yield server


@pytest.fixture
def mongodb_uri(mongod: EmbeddedMongod) -> str:
    """Return the address of the shared mongod."""
    return mongod.uri


@pytest.fixture(scope="session")
def mongodb(mongod: EmbeddedMongod) -> Iterator[MongoClient[dict[str, Any]]]:
    """Return a client of the shared mongod; connecting takes longer than most tests."""
    with MongoClient[dict[str, Any]](mongod.uri, tz_aware=True, serverSelectionTimeoutMS=20_000) as client:
        yield client


@pytest.fixture
def db_name(mongodb: MongoClient[dict[str, Any]]) -> Iterator[str]:
    """Return the name of a database of this test alone; it is dropped afterwards."""
    name = f"test_{uuid.uuid4().hex[:16]}"
    yield name
    mongodb.drop_database(name)


@pytest.fixture
def database(mongodb: MongoClient[dict[str, Any]], db_name: str) -> Database[dict[str, Any]]:
    """Return the database of this test through a synchronous client, to prepare it and to look into it."""
    return mongodb[db_name]


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    """Return a model server whose answers the test scripts."""
    from tests.fakes.scripted_server import scripted_server

    with scripted_server() as running:
        yield running


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """Return a PostgreSQL server that serves every test of this process; skips where Debian's packages are not there."""
    from tests.fakes.postgres_server import PostgresServer

    with PostgresServer() as server:
        yield server.postgres


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the file of a language model that llama.cpp runs; it serves every test of this process."""
    from tests.fakes.tiny_engine import build_tiny_model

    return build_tiny_model(tmp_path_factory.mktemp("model") / "tiny.gguf")


@pytest.fixture(scope="session")
def engine(tiny_model: Path) -> Iterator[TinyEngine]:
    """Return llama.cpp with one slot and *tiny_model*; it serves every test of this process."""
    from tests.fakes.tiny_engine import TinyEngine

    with TinyEngine(tiny_model, slots=1) as running:
        yield running


@pytest.fixture(scope="session")
def trained() -> Iterator[TinyEngine]:
    """Return llama.cpp with SmolLM2, one slot and a small window; it serves every test of this process.

    The first prompt takes four seconds of processor time. Later ones with the same system prompt come from the prefix
    cache, so tests in the default suite use one taxonomy.
    """
    from tests.fakes.trained_model import MISSING, model_path, trained_engine

    found = model_path()
    if found is None:
        pytest.skip(MISSING)
    with trained_engine(found, context_tokens=1536) as running:
        yield running


@pytest.fixture(scope="session")
def shared_model() -> Iterator[FakeOllama]:
    """Return the server of ``model``; it serves every test of this process."""
    with FakeOllama(slots=8, latency_s=0.02, user_message=0) as server:
        yield server


@pytest.fixture
def model(shared_model: FakeOllama) -> FakeOllama:
    """Return a model server that answers after 20 ms, labels by the conversation, and fails in no way yet."""
    shared_model.renew()
    return shared_model


@pytest.fixture
def site(mongodb_uri: str, database: Database[dict[str, Any]], model: FakeOllama, tmp_path: Path) -> Site:
    """Return the place where a worker runs: an empty database, *model*, and an empty folder."""
    return Site(mongodb_uri, database, model, tmp_path)


@pytest.fixture
def built_in_classifier(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the runs and review queues of this process share one built-in classifier, which labels each text once.

    Opening it takes 0.4 s of processor time, and an answer 30 ms.
    """
    from tests.review.review_site import shared_classifier

    for place in ("review.queue.open_classifier", "embedded.choice.open_classifier"):
        monkeypatch.setattr(place, shared_classifier)


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Count every kind of index entries as large: searches use the graph."""
    from embedding_index import search_graph

    monkeypatch.setattr(search_graph, "EXACT_UP_TO_BYTES", 0)


@pytest.fixture(scope="module")
def running() -> Iterator[FakeOpenAI]:
    """Return a fake OpenAI for every test of a module; tests ask for ``openai`` or ``fake``."""
    from tests.fakes.fake_openai import FakeOpenAI

    with FakeOpenAI() as started:
        yield started


@pytest.fixture(name="openai")
def openai_of_jobs(running: FakeOpenAI) -> FakeOpenAI:
    """Return the fake OpenAI as document jobs use it: the second look at a batch shows its end."""
    running.reset()
    running.configure(polls_until_done=2)
    return running


@pytest.fixture
def job(mongodb_uri: str, db_name: str, tmp_path: Path, openai: FakeOpenAI) -> Iterator[Job]:
    """Return a document job on an empty collection and the fake OpenAI."""
    from tests.openai_batch.openai_job import Job

    with Job(mongodb_uri, db_name, openai.url, tmp_path) as opened:
        yield opened

"""``--embedded`` and ``make run``: a model replaces the results of the built-in baseline as soon as there is one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pymongo.database import Database

import cli
from embedded.baseline import BASELINE_MODEL
from tests.fakes.fake_ollama import FakeOllama
from tests.worker.site import conversation

Run = Callable[..., int]


@pytest.fixture
def run(mongodb_uri: str, db_name: str, nothing_is_set: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Return a function that runs ``cli.py --embedded`` on the database of this test."""

    @contextmanager
    def shared_mongod(_folder: Path) -> Iterator[Any]:
        yield SimpleNamespace(uri=mongodb_uri)

    monkeypatch.setattr("embedded.mongod.EmbeddedMongod", shared_mongod)
    monkeypatch.setattr(cli, "EMBEDDED_DATA", tmp_path)
    monkeypatch.setenv("MONGODB_DB", db_name)
    monkeypatch.setenv("OLLAMA_ENDPOINT", "http://127.0.0.1:1")

    def run(*flags: str, server: FakeOllama | None = None) -> int:
        if server is not None:
            monkeypatch.setenv("OLLAMA_ENDPOINT", server.url)
        return cli.main(["--embedded", *flags])

    return run


def models(database: Database[dict[str, Any]]) -> dict[str, int]:
    rows = database.sentimental_analysis.aggregate([{"$sortByCount": "$processing_metadata.model_used"}])
    return {row["_id"]: row["count"] for row in rows}


def test_model_replaces_the_results_of_the_baseline(
    run: Run, database: Database[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    """The documents that are pending follow in the same run; a later run finds nothing to do and loads no model."""
    database.conversation_set.insert_many([conversation(number) for number in range(4)])
    with FakeOllama(models=["nomic-embed-text:latest"]) as fake:
        assert run("--limit", "3", server=fake) == 0
        assert "No Ollama with a model that can chat" in capsys.readouterr().err
        assert models(database) == {BASELINE_MODEL: 3}
        fake.configure(models=["nomic-embed-text:latest", "llama3.2:latest"])
        assert run(server=fake) == 0
        assert "3 results of the built-in baseline" in capsys.readouterr().err
        assert models(database) == {"llama3.2:latest": 4}
        asked = fake.stats()
        fake.configure(faults=[{"kind": "unload", "times": 1}])
        assert run(server=fake) == 0
        assert "Nothing to do" in capsys.readouterr().out
        assert fake.stats()["load_requests"] == asked["load_requests"] == 1


@pytest.mark.parametrize("flags", [("--only", "new"), ("--dry-run",)])
def test_results_of_the_baseline_can_stay(run: Run, database: Database[dict[str, Any]], flags: tuple[str, ...]) -> None:
    database.conversation_set.insert_many([conversation(number) for number in range(2)])
    assert run() == 0
    with FakeOllama() as fake:
        assert run(*flags, server=fake) == 0
        assert fake.stats()["load_requests"] == 0
    assert models(database) == {BASELINE_MODEL: 2}


def test_baseline_replaces_no_result_of_a_model(run: Run, database: Database[dict[str, Any]]) -> None:
    database.conversation_set.insert_one(conversation(1))
    with FakeOllama() as fake:
        assert run(server=fake) == 0
    assert run("--only", "stale") == 0  # nobody answers there any more
    assert models(database) == {"llama3.2:latest": 1}

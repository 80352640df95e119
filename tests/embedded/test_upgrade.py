"""``--embedded`` and ``make run``: a model replaces the results of the built-in classifiers as soon as there is one."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pymongo.database import Database

import cli
from domain.conversation import BASELINE_MODEL, EMBEDDING_MODEL
from embedded.choice import missing_packages
from tests.fakes.fake_ollama import FakeOllama
from tests.worker.site import conversation

Run = Callable[..., int]
BUILT_IN = BASELINE_MODEL if missing_packages() else EMBEDDING_MODEL


@pytest.fixture
def run(mongodb_uri: str, db_name: str, nothing_is_set: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Return a function that runs ``cli.py --embedded`` on the database of this test."""

    @contextmanager
    def shared_mongod(_folder: Path) -> Iterator[Any]:
        yield SimpleNamespace(uri=mongodb_uri)

    monkeypatch.setattr("embedded.replica_set.ReplicaSetMongod", shared_mongod)
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


@pytest.mark.parametrize("built_in", sorted({BASELINE_MODEL, BUILT_IN}))
def test_model_replaces_the_results_of_a_built_in_classifier(
    run: Run,
    database: Database[dict[str, Any]],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
    built_in: str,
) -> None:
    """The documents that are pending follow in the same run; a later run finds nothing to do and loads no model."""
    if built_in == BASELINE_MODEL:
        monkeypatch.setattr("embedded.choice.missing_packages", lambda: ["numpy"])
    else:
        request.getfixturevalue("built_in_classifier")
    database.conversation_set.insert_many([conversation(number) for number in range(4)])
    with FakeOllama(models=["nomic-embed-text:latest"]) as fake:
        assert run("--limit", "3", server=fake) == 0
        assert "No Ollama with a model that can chat" in capsys.readouterr().err
        assert models(database) == {built_in: 3}
        fake.configure(models=["nomic-embed-text:latest", "llama3.2:latest"])
        assert run(server=fake) == 0
        assert "3 results of the built-in classifier" in capsys.readouterr().err
        assert models(database) == {"llama3.2:latest": 4}
        asked = fake.stats()
        fake.configure(faults=[{"kind": "unload", "times": 1}])
        assert run(server=fake) == 0
        assert "Nothing to do" in capsys.readouterr().out
        assert fake.stats()["load_requests"] == asked["load_requests"] == 1


@pytest.mark.usefixtures("built_in_classifier")
@pytest.mark.parametrize("flags", [("--only", "new"), ("--dry-run",)])
def test_results_of_a_built_in_classifier_can_stay(
    run: Run, database: Database[dict[str, Any]], flags: tuple[str, ...]
) -> None:
    database.conversation_set.insert_many([conversation(number) for number in range(2)])
    assert run() == 0
    with FakeOllama() as fake:
        assert run(*flags, server=fake) == 0
        assert fake.stats()["load_requests"] == 0
    assert models(database) == {BUILT_IN: 2}


@pytest.mark.usefixtures("built_in_classifier")
def test_built_in_classifier_replaces_no_result_of_a_model(run: Run, database: Database[dict[str, Any]]) -> None:
    database.conversation_set.insert_one(conversation(1))
    with FakeOllama() as fake:
        assert run(server=fake) == 0
    assert run("--only", "stale") == 0  # nobody answers there any more
    assert models(database) == {"llama3.2:latest": 1}


@pytest.mark.usefixtures("built_in_classifier")
@pytest.mark.parametrize("value", [None, "Complaint", ["Complaint"]])
def test_result_whose_classification_is_no_object_stays(
    run: Run, database: Database[dict[str, Any]], capsys: pytest.CaptureFixture[str], value: Any
) -> None:
    """Another program has changed it. MongoDB ends the whole query for a value that it cannot take apart."""
    database.conversation_set.insert_many([conversation(number) for number in range(2)])
    assert run() == 0
    database.sentimental_analysis.update_one({"source_conversation_id": 1}, {"$set": {"classification": value}})
    capsys.readouterr()
    assert run() == 0
    shown, told = capsys.readouterr()
    assert "of the built-in classifier:" not in told
    assert "Examples" in shown


@pytest.mark.thorough
def test_fields_of_the_taxonomy_are_labelled_and_printed(
    run: Run,
    database: Database[dict[str, Any]],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """Also if there are results with other fields; other labels of the same fields are stale."""
    database.conversation_set.insert_many([conversation(number) for number in range(3)])
    assert run("--limit", "2") == 0
    own = tmp_path / "labels.yaml"
    fields = "categorization: false\nfields:\n  urgency: [High, Normal]\n  sentiment_of: [{0}, Other]\n"
    own.write_text(fields.format("Agent"), encoding="utf-8")
    monkeypatch.setenv("TAXONOMY_FILE", str(own))
    capsys.readouterr()
    assert run() == 0
    shown, told = capsys.readouterr()
    assert "2 results of the built-in classifier: with the fields of this taxonomy" in told
    assert [list(row["classification"]) for row in database.sentimental_analysis.find()] == [
        ["urgency", "sentiment_of"]
    ] * 3
    last = shown[shown.rindex("processed in run") :]
    assert re.search(r"^Urgency\s+(High|Normal)\s+█", last, re.MULTILINE)
    assert re.search(r"^\s*conversation\s+urgency\s+sentiment_of\s*$", last, re.MULTILINE)
    assert "Intent" not in last
    assert run() == 0
    assert "Nothing to do" in capsys.readouterr().out
    own.write_text(fields.format("Customer"), encoding="utf-8")
    assert run("--only", "stale", "--dry-run") == 0
    assert json.loads(capsys.readouterr().out)["selected"] == 3


@pytest.mark.skipif(bool(missing_packages()), reason="requirements-embedding.txt is not installed")
@pytest.mark.usefixtures("built_in_classifier")
def test_results_have_confidence_and_name_the_classifier_of_their_language(
    run: Run, database: Database[dict[str, Any]]
) -> None:
    """Phrases and VADER have no probabilities."""
    german = "Guten Tag, meine Bestellung ist noch nicht angekommen. Wann wird sie endlich geliefert?"
    for number, text in enumerate(("Where is my parcel? It was due on Monday.", german)):
        database.conversation_set.insert_one(
            {"conversation_number": str(number), "messages": [{"sender": "customer", "text": text}]}
        )
    assert run("--review-below", "1") == 0
    english, other = (
        row["processing_metadata"] for row in database.sentimental_analysis.find(sort=[("conversation_number", 1)])
    )
    assert (english["model_used"], other["model_used"]) == (EMBEDDING_MODEL, BASELINE_MODEL)
    assert set(english["confidence"]) == {"intent", "topic", "sentiment"}
    assert all(0 < value <= 1 for value in english["confidence"].values())
    assert english["needs_review"] is True
    assert "confidence" not in other

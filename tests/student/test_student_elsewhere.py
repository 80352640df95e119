"""What a student learns from, and its other uses: the embedded classifier and the review queue."""

from __future__ import annotations

import shutil
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from pymongo.database import Database

import cli
from aggregator import aggregate_conversation
from config import load_settings, load_taxonomy
from embedded.baseline import BaselineClassifier
from mongo_client import DocumentStore
from review.labels import Correction
from review.queue import Options, ReviewQueue
from student.choice import open_built_in
from student.model import load_student
from student.training import PROMISES
from tests.student.student_site import KINDS, ConsistentModel, conversation, fill
from tests.worker.site import Site

School = tuple[Site, ConsistentModel]
LEARNED = 44


@pytest.mark.thorough
def test_training_leaves_out_what_it_must_not_learn(place: School) -> None:
    """Copies, changed conversations, labels of others and of students, and vectors are not computed twice."""
    site, _ = place
    fill(site, 0, LEARNED)
    copy = conversation(0) | {"_id": 900, "conversation_number": "900"}
    site.source.insert_one(copy)
    assert site.run().code == 0
    site.source.update_one({"_id": 1}, {"$set": {"messages": conversation(901)["messages"]}})
    made = "processing_metadata"
    site.results.update_one({"source_conversation_id": 2}, {"$set": {f"{made}.model_used": "student-0123456789ab"}})
    site.results.update_one({"source_conversation_id": 3}, {"$set": {f"{made}.fingerprint": "0" * 64}})
    correction = Correction(4, "4", "intent", KINDS[1][1][0], "Complaint", "anna", datetime.now(UTC), "random")
    decided = [
        Correction(number, None, "intent", "x", "Complaint", "anna", datetime.now(UTC), "random")
        for number in range(5, 30)
    ]
    stored = site.database["sentimental_analysis_corrections"]
    stored.insert_many([one.as_document() for one in (correction, *decided)])
    ended = site.run("student", "train")
    assert ended.code == 0, ended.err
    assert f"embed {LEARNED - 3} conversations" in ended.err
    for reason in ("an identical conversation", "it has changed", "by a student", "of another model"):
        assert "1 result left out: " in ended.out
        assert reason in ended.out
    student = load_student(site.directory)
    assert student is not None
    assert student.provenance.corrected > 0
    again = site.run("student", "train")
    assert "embed 0 conversations" in again.err


@pytest.mark.thorough
def test_embedded_classifier_uses_the_student_where_it_is_sure(trained_directory: Path) -> None:
    """Its results name it; a conversation of another kind gets the labels of the built-in classifier."""
    taxonomy = load_taxonomy()
    classifier = open_built_in(trained_directory / "batch_files", taxonomy, BaselineClassifier(taxonomy))
    own = classifier.answer(aggregate_conversation(conversation(1000)))
    assert tuple(own.classification.labels.values()) == KINDS[1000 % 3][1]
    assert own.model.startswith("student-")
    assert own.plan
    other = conversation(1001) | {"messages": [{"sender": "customer", "text": "Hello! Quokkas, opera, seven."}]}
    assert classifier.answer(aggregate_conversation(other)).model == "baseline-vader-1"


@pytest.mark.thorough  # it starts a second mongod
def test_embedded_run_with_the_student(
    trained_directory: Path, tmp_path: Path, place: School, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``--embedded --embedded-student`` labels the samples; the flag alone is refused, and so is a missing student."""
    site, _ = place
    site.settings |= {"OLLAMA_ENDPOINT": "http://127.0.0.1:9"}
    assert "requires --embedded" in site.run("--embedded-student").err
    monkeypatch.setattr(cli, "EMBEDDED_DATA", tmp_path / "embedded")
    refused = site.run("--embedded", "--embedded-student", "--limit", "2")
    assert refused.code == 2
    assert "no trained student" in refused.err
    shutil.copytree(trained_directory / "batch_files" / "student", site.directory / "student", dirs_exist_ok=True)
    ended = site.run("--embedded", "--embedded-student", "--limit", "2")
    assert ended.code == 0, ended.err
    assert "using the built-in classifier student-" in ended.err


@pytest.mark.slow
async def test_disagreement_of_the_student_orders_the_review_queue(
    mongodb_uri: str, db_name: str, database: Database[dict[str, Any]], trained_directory: Path
) -> None:
    """Results with the labels that the student expects come after one that has another."""
    documents = [conversation(number) for number in range(1000, 1012)]
    database["conversation_set"].insert_many(documents)
    for document in documents:
        number = document["_id"]
        labels = dict(zip(("intent", "topic", "sentiment"), KINDS[number % 3][1], strict=True))
        if number == 1006:
            labels["intent"] = KINDS[(number + 1) % 3][1][0]  # as frequent as the right one
        database["sentimental_analysis"].insert_one({"source_conversation_id": number, "classification": labels})
    directory = trained_directory / "batch_files"
    settings = load_settings(None, mongodb_uri=mongodb_uri, db_name=db_name, batch_files_dir=directory)
    store = DocumentStore(settings)
    try:
        queue = ReviewQueue(store, settings, load_taxonomy(), Options(control=0.0, double=0.0, lease_s=60))
        first = await queue.next("anna")
    finally:
        await store.close()
    assert first is not None
    assert first.source_id == 1006
    assert PROMISES

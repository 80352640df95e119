"""The model server is away, slow, wrong, or somebody else: no document is lost to it, and none pays for an outage."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.worker.site import (
    Document,
    Site,
    calls,
    check_directory,
    check_exactly_once,
    check_results,
    check_statuses,
    documents_of_all_shapes,
    filled,
    key,
    model_of,
)


def statistics(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text()))


def check_untouched(site: Site, documents: list[Document]) -> None:
    """Assert that neither MongoDB nor the local queue has anything of a run."""
    assert site.database.list_collection_names() == ["conversation_set"]
    assert list(site.source.find().sort("_id", 1)) == documents
    assert list(site.source.index_information()) == ["_id_"]
    assert site.files("pending/*") == []


def test_a_server_that_is_down_at_the_start(site: Site) -> None:
    """One sentence, exit code 3, and nothing has been touched."""
    documents = filled(site, 10)
    model_of(site).stop()
    ended = site.run()
    assert ended.code == 3
    assert len(ended.err.splitlines()) == 1, ended.err
    assert model_of(site).url in ended.err
    check_untouched(site, documents)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("llama9", "has no model llama9"),
        ("gpt-oss:120b-cloud", "customer text would leave your network"),
        ("", "No model is set"),
    ],
    ids=["missing", "cloud", "none"],
)
def test_a_model_that_cannot_be_used(site: Site, name: str, sentence: str) -> None:
    """Exit code 2, with the models that can; none of the text has left."""
    documents = filled(site, 10)
    ended = site.run(OLLAMA_MODEL=name)
    assert ended.code == 2
    assert sentence in ended.err
    if name != "gpt-oss:120b-cloud":
        assert "llama3.2" in ended.err
    assert model_of(site).stats()["chat_requests"] == model_of(site).stats()["cloud_requests"] == 0
    check_untouched(site, documents)


def test_an_outage_costs_no_document_an_attempt(site: Site, tmp_path: Path) -> None:
    """The breaker pauses the run; after the restart it goes on, and nothing went through the retry queue."""
    documents = filled(site, 60)
    with site.start("--output", str(tmp_path / "run.json"), LLM_MAX_ATTEMPTS="1") as worker:
        model_of(site).wait_for("answered", at_least=20)
        model_of(site).kill()
        worker.await_text("circuit breaker: open")
        model_of(site).start()
        ended = worker.ended()
    assert ended.code == 0, ended.err
    check_exactly_once(site, documents)
    run = statistics(tmp_path / "run.json")
    assert run["successful"] == len(documents)
    assert run["retried"] == run["failed"] == 0
    assert site.results.count_documents({"processing_metadata.attempts": {"$ne": 1}}) == 0
    assert "queued for retry" not in ended.err


@pytest.mark.slow
def test_an_outage_beyond_the_limit(site: Site) -> None:
    """The run ends with exit code 3; the documents wait, and the next run finishes them."""
    documents = filled(site, 60)
    with site.start(OUTAGE_LIMIT_S="1") as worker:
        model_of(site).wait_for("answered", at_least=20)
        model_of(site).kill()
        ended = worker.ended()
    assert ended.code == 3, ended.err
    assert "same command" in ended.err
    assert site.entries("retry") == site.entries("quarantine") == []
    model_of(site).start()
    ended = site.run()
    assert ended.code == 0, ended.err
    check_exactly_once(site, documents)


@dataclass(frozen=True)
class Blow:
    """One fault that strikes the first call for one document, and how many calls the document then takes."""

    kind: str
    calls: int = 2
    params: dict[str, Any] = field(default_factory=dict)


BLOWS = (
    *(Blow(kind) for kind in ("close", "reset", "garbage", "hang", "busy_503", "html_200", "html_502")),
    *(Blow(kind) for kind in ("runner_stopped_500", "runner_eof_500", "load_failed_500", "token_repeat_500")),
    *(Blow("status", params={"status": status}) for status in (408, 429, 499, 500, 502, 504)),
    *(Blow(kind) for kind in ("reset_after", "slow_headers", "slow_body", "truncated_body", "half_json")),
    *(Blow(kind) for kind in ("done_false", "missing_done", "empty_content", "thinking_only", "length")),
    *(Blow(kind) for kind in ("done_reason_load", "invalid_json", "wrong_label", "missing_field", "duplicate_keys")),
    *(Blow(kind) for kind in ("nan", "number_label", "huge", "deep_json", "message_null", "unconstrained")),
    *(Blow(kind) for kind in ("raw_control_chars",)),
    Blow("deep_json", params={"where": "outer"}),
    Blow("lone_surrogate", params={"where": "outer"}),
    *(Blow(kind, calls=1) for kind in ("prose", "code_fence", "extra_field", "padded_json", "bom", "no_counters")),
    *(Blow(kind, calls=1) for kind in ("lone_surrogate", "nul", "control_chars", "clock_jump", "unload")),
)


def test_every_kind_of_bad_answer_is_survived(site: Site) -> None:
    """Each strikes one document once: it is asked again or repaired, and all have their own labels in the end."""
    documents = filled(site, len(BLOWS) + 8)
    faults = [
        {"kind": blow.kind, "when": {"text": f"Case {place:05d}"}, "times": 1, **blow.params}
        for place, blow in enumerate(BLOWS)
    ]
    model_of(site).configure(faults=faults)
    ended = site.run("--logs", LLM_TIMEOUT_S="1")
    assert ended.code == 0, ended.err
    assert sum(model_of(site).stats()["faults_served"].values()) == len(BLOWS)
    taken = {f"{blow.kind} {blow.params}": calls(site, documents[place]) for place, blow in enumerate(BLOWS)}
    assert taken == {f"{blow.kind} {blow.params}": blow.calls for blow in BLOWS}
    for result in site.results.find():
        assert result["classification"]["categorization"].isprintable()
    changed = {key(documents[place]["_id"]) for place, blow in enumerate(BLOWS) if blow.kind == "control_chars"}
    site.results.delete_many(
        {"source_conversation_id": {"$in": [d["_id"] for d in documents if key(d["_id"]) in changed]}}
    )
    check_results(site, [document for document in documents if key(document["_id"]) not in changed])
    check_statuses(site, documents)
    check_directory(site)
    assert "queued for retry" not in ended.err


@pytest.mark.parametrize(
    "kind",
    [
        *("reset", "busy_503", "runner_crash", "model_not_found_404"),
        *(pytest.param(kind, marks=pytest.mark.thorough) for kind in ("runner_stopped_500", "html_200")),
    ],
)
@pytest.mark.thorough
def test_a_burst_of_failures(site: Site, kind: str) -> None:
    """Whatever does not get through in its attempts gets through in a retry round of the same run."""
    documents = filled(site, 100)
    times = 4 if kind == "model_not_found_404" else 15  # five of these in a row mean that the model is gone
    model_of(site).configure(faults=[{"kind": kind, "when": {"from": 20}, "times": times}])
    ended = site.run()
    assert ended.code == 0, ended.err
    check_exactly_once(site, documents)
    assert model_of(site).stats()["faults_served"] == {kind: times}


@pytest.mark.thorough
def test_a_model_that_is_removed_in_the_middle(site: Site) -> None:
    """The run stops with exit code 3 instead of failing every document; once it is back, the next run finishes."""
    documents = filled(site, 150)
    with site.start() as worker:
        model_of(site).wait_for("answered", at_least=20)
        model_of(site).configure(models=["qwen3:8b"])
        ended = worker.ended()
    assert ended.code == 3, ended.err
    assert "llama3.2" in ended.err.splitlines()[-1]
    model_of(site).configure(models=None)
    ended = site.run()
    assert ended.code == 0, ended.err
    check_exactly_once(site, documents)


def test_hopeless_documents_end_in_quarantine(site: Site) -> None:
    """Three rounds after the first, each with a repair turn; then quarantine and source have the reason."""
    documents = documents_of_all_shapes(30)
    site.source.insert_many(documents)
    hopeless = [documents[0], documents[1], documents[2]]
    faults = [{"kind": "wrong_label", "when": {"text": f"Case {document['_id']:05d}"}} for document in hopeless]
    model_of(site).configure(faults=faults)
    ended = site.run()
    assert ended.code == 1, ended.err
    failed = [document["_id"] for document in hopeless]
    entries = sorted(site.entries("quarantine"), key=lambda entry: int(entry["conversation_id"]))
    assert [entry["conversation_id"] for entry in entries] == failed
    assert {(entry["status"], entry["reason"], entry["retry_count"]) for entry in entries} == {
        ("llm_failed", "label_outside", 3)
    }
    assert [calls(site, document) for document in hopeless] == [8, 8, 8]
    skipped = [document["_id"] for document in documents if document["_id"] % 13 == 7]
    check_results(site, [document for document in documents if document["_id"] not in failed + skipped])
    check_statuses(site, documents, failed)
    check_directory(site)
    reasons = {after["status_reason"].split(":")[0] for after in site.source.find({"_id": {"$in": failed}})}
    assert reasons == {"label_outside"}


@pytest.mark.slow
def test_too_many_failures_stop_the_run(site: Site) -> None:
    """More than a tenth: exit code 4. What failed then does not stop the next run, where a single one fails."""
    documents = filled(site, 200)
    hopeless = [number for number in range(0, 200, 4)]
    faults = [{"kind": "wrong_label", "when": {"text": f"Case {number:05d}"}} for number in hopeless]
    model_of(site).configure(faults=faults)
    ended = site.run("--batch-size", "100")
    assert ended.code == 4, ended.err
    assert "label_outside" in ended.err.splitlines()[-1]
    assert model_of(site).stats()["answered"] < 150
    model_of(site).configure(faults=[faults[hopeless.index(88)]])  # of the same batch, and not asked for yet
    ended = site.run("--batch-size", "100")
    assert ended.code == 1, ended.err
    assert [entry["conversation_id"] for entry in site.entries("quarantine")] == [88]
    check_results(site, [document for document in documents if document["_id"] != 88])
    check_statuses(site, documents, [88])
    model_of(site).configure(faults=[])
    assert site.run("--retry-failed").code == 0
    check_exactly_once(site, documents)

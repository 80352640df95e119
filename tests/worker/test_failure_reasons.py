"""Every reason of the closed list, provoked in real runs: all places that tell it tell the same one."""

from __future__ import annotations

import csv
import json
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from embedded.mongod import EmbeddedMongod
from error_handler import Reason
from tests.fakes.fake_ollama import FakeOllama
from tests.fakes.scripted_server import Handler, answer, reset, scripted_server
from tests.service.service_process import conversation as request_body
from tests.service.service_process import serve
from tests.worker.site import (
    BROKEN,
    Document,
    Site,
    check_results,
    conversation,
    model_of,
    open_site,
    store_raw,
    until,
    user_message,
)

BAD = 3
TEXT = f"Case {BAD:05d}"


def metrics(site: Site) -> dict[tuple[str, str], float]:
    """Return the numbers of metrics.prom by name and the value of the label that is not the worker."""
    numbers = {}
    for family in text_string_to_metric_families((site.directory / "progress/metrics.prom").read_text()):
        for sample in family.samples:
            assert sample.labels.pop("worker") == "batch_files"
            numbers[(sample.name, "".join(sample.labels.values()))] = sample.value
    return numbers


def refuse_to_store(site: Site) -> None:
    site.database.create_collection("sentimental_analysis", validator={"conversation_number": {"$ne": str(BAD)}})


def die_twice(site: Site) -> None:
    for _ in range(2):
        assert site.run(plan={"poison": str(BAD)}).code == -signal.SIGABRT


def break_bson(site: Site) -> None:
    site.source.delete_one({"_id": BAD})
    store_raw(site.source, {**conversation(BAD), "text": BROKEN})


@dataclass(frozen=True)
class Way:
    """A way to provoke one reason for document BAD; *rounds* is their number when it is given up."""

    reason: Reason
    kind: str | None = None
    rounds: int = 3
    params: dict[str, Any] = field(default_factory=dict)
    changes: dict[str, Any] = field(default_factory=dict)  # of the document
    settings: dict[str, str] = field(default_factory=dict)
    before: Callable[[Site], None] | None = None
    plan: dict[str, Any] | None = None
    status: str = "failed"


AGENT = [{"sender": "agent", "text": f"{TEXT}: anything else?"}]
WAYS = (
    Way(Reason.TRANSPORT, "status", params={"status": 500}),
    Way(Reason.BUSY, "busy_503"),
    Way(Reason.TIMEOUT, "hang", settings={"LLM_TIMEOUT_S": "1"}),
    Way(Reason.CONTEXT_OVERFLOW, "overflow_400", rounds=0),
    Way(Reason.CUT_OFF, "length"),
    Way(Reason.EMPTY, "empty_content"),
    Way(Reason.NOT_JSON, "invalid_json"),
    Way(Reason.WRONG_SHAPE, "missing_field"),
    Way(Reason.LABEL_OUTSIDE, "wrong_label"),
    Way(Reason.REFUSED, "status", rounds=0, params={"status": 422}),
    Way(Reason.STORE_FAILED, rounds=0, before=refuse_to_store),
    Way(Reason.SKIPPED_NO_TEXT, changes={"messages": []}, status="skipped"),
    Way(Reason.SKIPPED_NO_CUSTOMER, changes={"messages": AGENT}, status="skipped"),
    Way(Reason.POISON, rounds=0, before=die_twice, plan={"poison": str(BAD)}),
    Way(Reason.UNREADABLE, rounds=0, before=break_bson),
)


def test_all_reasons_are_covered() -> None:
    """A new reason needs a row."""
    assert [way.reason for way in WAYS] == list(Reason)


USUAL = {
    Reason.TRANSPORT,
    Reason.CONTEXT_OVERFLOW,
    Reason.LABEL_OUTSIDE,
    Reason.STORE_FAILED,
    Reason.SKIPPED_NO_TEXT,
}


@pytest.mark.parametrize(
    "way",
    [pytest.param(way, id=str(way.reason), marks=() if way.reason in USUAL else pytest.mark.thorough) for way in WAYS],
)
def test_reason_is_the_same_in_all_places(site: Site, way: Way, tmp_path: Path) -> None:
    """Summary, --output, progress JSON and CSV, metrics, the source, quarantine, and the command that lists it."""
    documents = [conversation(number) for number in range(9)]
    documents[BAD] |= way.changes
    site.source.insert_many(documents)
    if way.kind:
        model_of(site).configure(faults=[{"kind": way.kind, "when": {"text": TEXT}, **way.params}])
    if way.before:
        way.before(site)
    settings = {"LLM_MAX_ATTEMPTS": "1", **way.settings}
    ended = site.run("--progress-files", "--output", str(tmp_path / "run.json"), plan=way.plan, **settings)
    is_skipped = way.status == "skipped"
    assert ended.code == (0 if is_skipped else 1), ended.err
    check_results(site, [document for document in documents if document["_id"] != BAD])

    assert json.loads((tmp_path / "run.json").read_text())["reasons"] == {way.reason: 1}
    assert [line.strip() for line in ended.out.splitlines() if " x " in line] == [f"1 x {way.reason}"]
    progress = json.loads(site.files("progress/*.json")[-1].read_text())
    assert (progress["reasons"], progress[way.status]) == ({way.reason: 1}, 1)
    last = list(csv.DictReader(site.files("progress/*.csv")[-1].read_text().splitlines()))[-1]
    assert {reason: last[reason] for reason in Reason} == {**dict.fromkeys(Reason, "0"), way.reason: "1"}
    check_metrics(site, way.reason, way.status)
    source = site.source.find_one({"_id": BAD}, {"status": 1, "status_reason": 1})
    assert (source["status"], source["status_reason"].split(": ")[0]) == (way.status, way.reason)
    assert site.entries("retry") == []
    entries = [
        (entry["conversation_id"], entry["reason"], entry["retry_count"]) for entry in site.entries("quarantine")
    ]
    assert entries == ([] if is_skipped else [(BAD, way.reason, way.rounds)])
    listed = json.loads(site.run("quarantine", "list", "--json").out)
    assert listed["counts"] == ({} if is_skipped else {way.reason: 1})


def test_words_of_the_server_are_in_log_source_and_quarantine(site: Site) -> None:
    """An echo of the document in them is not."""
    site.source.insert_many(conversation(number) for number in range(2))
    says, echoes = f"{0:05d}", f"{1:05d}"
    model_of(site).configure(
        faults=[
            {
                "kind": "status",
                "status": 422,
                "body": '{"error": "grammar too deep at 7"}',
                "when": {"text": f"Case {says}"},
            },
            {
                "kind": "status",
                "status": 422,
                "body": f'{{"error": "bad Case {echoes}"}}',
                "when": {"text": f"Case {echoes}"},
            },
        ]
    )
    ended = site.run()
    assert ended.code == 1
    reason = "refused the request (HTTP 422); the server says: grammar too deep at 7"
    lines = [line for line in ended.err.splitlines() if "WARNING" in line]
    assert any(reason in line for line in lines), ended.err
    assert reason in site.source.find_one({"_id": 0})["status_reason"]
    assert reason in site.run("quarantine", "show", "0").out
    entry = json.loads(site.run("quarantine", "list", "--json").out)["documents"]
    assert {document["error"].partition("; ")[2] for document in entry} == {
        "the server says: grammar too deep at 7",
        "the server's reason quotes the request, so only its own log shows it",
    }
    assert f"Case {echoes}" not in ended.err


def check_metrics(site: Site, reason: Reason, status: str) -> None:
    """Assert what metrics.prom says after a run in which one document ended as *status* for *reason*."""
    numbers = metrics(site)
    assert {name: numbers[("triad_run_failures", name)] for name in Reason} == {**dict.fromkeys(Reason, 0.0), reason: 1}
    outcomes = {name: numbers[("triad_run_documents", name)] for name in ("failed", "skipped")}
    assert outcomes == {"failed": 0.0, "skipped": 0.0} | {status: 1.0}
    assert numbers[("triad_run_documents", "successful")] + numbers[("triad_run_documents", "already_done")] == 8
    assert numbers[("triad_quarantine_documents", "")] == (status == "failed")
    assert numbers[("triad_retry_queue_documents", "")] == numbers[("triad_run_calls_in_flight", "")] == 0
    assert numbers[("triad_run_status", "completed")] == 1
    assert sum(numbers[("triad_run_status", name)] for name in ("running", "interrupted", "failed")) == 0
    assert numbers[("triad_last_completed_timestamp_seconds", "")] > 1e9


@pytest.mark.thorough
def test_retry_queue_has_the_reason(site: Site) -> None:
    """A run that dies before its rounds leaves the file; list --retry shows it, metrics.prom the size of the queue."""
    documents = [conversation(number) for number in range(20)]
    site.source.insert_many(documents)
    model_of(site).configure(faults=[{"kind": "wrong_label", "when": {"text": TEXT}, "times": 2}])
    assert site.run(plan={"seam": "retry_saved"}).code == -signal.SIGKILL
    assert [(entry["conversation_id"], entry["reason"]) for entry in site.entries("retry")] == [(BAD, "label_outside")]
    listed = site.run("quarantine", "list", "--retry").out.splitlines()
    assert listed[0].split()[:2] == [str(BAD), "label_outside"]
    assert listed[-1] == "1 document in the retry queue: 1 x label_outside"
    assert site.run("quarantine", "list").out == "No documents in quarantine.\n"
    assert site.run("--progress-files").code == 0
    check_results(site, documents)
    assert metrics(site)[("triad_run_failures", "label_outside")] == 0  # it has a result after all
    assert site.run("quarantine", "list", "--retry").out == "No documents in the retry queue.\n"


def test_metrics_of_a_stopped_run(site: Site) -> None:
    """Interrupted, and not completed; the times outlive the restart; no text."""
    documents: list[Document] = [conversation(number) for number in range(12)]
    site.source.insert_many(documents)
    assert site.run("--progress-files", "--limit", "6").code == 0
    before = metrics(site)
    model_of(site).configure(latency_s=1.0)
    with site.start("--progress-files", MAX_CONCURRENT="2") as worker:
        model_of(site).wait_for("in_flight", equals=2)
        site_metrics = site.directory / "progress/metrics.prom"
        worker.send(signal.SIGTERM)
        assert worker.ended().code == 130
    after = metrics(site)
    assert after[("triad_run_status", "interrupted")] == 1
    assert after[("triad_last_success_timestamp_seconds", "")] > before[("triad_last_success_timestamp_seconds", "")]
    assert (
        after[("triad_last_completed_timestamp_seconds", "")] == before[("triad_last_completed_timestamp_seconds", "")]
    )
    assert site_metrics.stat().st_mode & 0o777 == 0o600
    assert user_message(documents[0]) not in site_metrics.read_text()


@pytest.mark.thorough
def test_metrics_of_a_run_ended_by_a_mongodb_outage(model: FakeOllama, tmp_path: Path) -> None:
    """Status failed, and the same reason for each answer that was not stored; after the next run there is none."""
    documents = [conversation(number) for number in range(60)]
    with EmbeddedMongod(tmp_path / "mongod") as mongod, open_site(mongod.uri, "support", model, tmp_path) as site:
        site.source.insert_many(documents)
        with site.start("--progress-files", MONGODB_TIMEOUT_MS="300", MONGODB_BACKOFF_S="0.05") as worker:
            until(lambda: site.results.count_documents({}) > 10)
            mongod.kill()
            assert worker.ended().code == 3
        numbers = metrics(site)
        assert numbers[("triad_run_status", "failed")] == 1
        lost = numbers[("triad_run_failures", "store_failed")]
        assert sum(numbers[("triad_run_failures", name)] for name in Reason) == lost > 0
        assert numbers[("triad_run_documents", "failed")] == lost
        progress = json.loads(site.files("progress/*.json")[-1].read_text())
        assert progress["reasons"] == {"store_failed": lost}
        mongod.start()
        assert site.run("--progress-files").code == 0
        check_results(site, documents)
        assert sum(metrics(site)[("triad_run_failures", name)] for name in Reason) == 0


SERVICE_WAYS = [way for way in WAYS if way.kind]


@pytest.mark.thorough
def test_service_counts_failures_by_reason(model: FakeOllama, tmp_path: Path) -> None:
    """From 0 for each reason of the list; one failure is one more of one reason."""
    settings = {"OLLAMA_ENDPOINT": model.url, "OLLAMA_MODEL": "llama3.2", "LLM_TIMEOUT_S": "1"}
    with serve(tmp_path, **settings) as service:
        expected = dict.fromkeys(map(str, Reason), 0.0)
        for way in SERVICE_WAYS:
            model.configure(faults=[{"kind": way.kind, **way.params}])
            assert service.classify(request_body()).status >= 400
            expected[way.reason] += 1
            counted = {name: service.metric(f'triad_model_failures_total{{reason="{name}"}}') for name in expected}
            assert counted == expected, way.reason
        model.configure(faults=[])
        assert service.classify(request_body()).status == 200
        assert sum(service.metric(f'triad_model_failures_total{{reason="{name}"}}') for name in expected) == len(
            SERVICE_WAYS
        )
        text = service.get("/metrics").body.decode()
        assert all(f'triad_model_failures_total{{reason="{reason}"}}' in text for reason in Reason)


@pytest.mark.thorough
def test_request_deadline_counts_as_timeout(model: FakeOllama, tmp_path: Path) -> None:
    """Once, where the model had the request: the second of two waits for its place until little time is left."""
    model.configure(latency_s=2.0)
    settings = {"OLLAMA_ENDPOINT": model.url, "OLLAMA_MODEL": "llama3.2", "API_MAX_CONCURRENT": "1"}
    with serve(tmp_path, **settings, API_REQUEST_TIMEOUT_S="3") as service, ThreadPoolExecutor(2) as threads:
        answers = list(threads.map(lambda _: service.classify(request_body()), range(2)))
        assert sorted(answer.status for answer in answers) == [200, 504]
        assert model.stats()["chat_requests"] == 2
        assert service.metric('triad_model_failures_total{reason="timeout"}') == 1


def test_path_of_the_server_is_neither_logged_nor_stored(mongodb_uri: str, db_name: str, tmp_path: Path) -> None:
    """The path of a gateway may be a key."""

    def lose_chats(handler: Handler) -> None:
        (reset if json.loads(handler.body).get("messages") else answer())(handler)

    with scripted_server() as server, open_site(mongodb_uri, db_name, None, tmp_path) as site:
        server.otherwise = lose_chats
        site.source.insert_one(conversation(1))
        ended = site.run("--logs", OLLAMA_ENDPOINT=f"{server.url}/team-key", LLM_MAX_ATTEMPTS="1")
        assert ended.code == 1, ended.said
        document = site.source.find_one()
        assert document is not None
        assert server.url in document["status_reason"]
        said = [document["status_reason"], ended.said, *(path.read_text() for path in site.files("quarantine/*"))]
        assert not [text for text in said if "team-key" in text]

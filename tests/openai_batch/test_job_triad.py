"""Conversations through the Batch API: the results are those of the worker, and no work is done twice."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from aggregator import aggregate_conversation
from config import load_settings, load_taxonomy
from openai_batch.job_context import JobResult
from openai_batch.masking import MAX_CHARACTERS
from openai_batch.processor import DocumentBatchProcessor
from openai_batch.schema_file import load_schema_file
from tests.cases import mostly_thorough
from tests.fakes.fake_openai import FakeOpenAI
from tests.openai_batch.openai_job import MAX_ATTEMPTS, TIMES
from tests.worker.site import Site, check_statuses, conversation, documents_of_all_shapes, user_message

SCHEMA = Path(__file__).parents[2] / "schema_examples/customer_service_schema.py"


@pytest.fixture(scope="module")
def running() -> Iterator[FakeOpenAI]:
    with FakeOpenAI(polls_until_done=2) as fake:
        yield fake


@pytest.fixture
def openai(running: FakeOpenAI) -> FakeOpenAI:
    running.reset()
    taxonomy = load_taxonomy(None)
    labels = {
        "categorization": "a parcel that is late",
        **{field: taxonomy.names(field)[0] for field in ("intent", "topic", "sentiment")},
    }
    running.configure(reply=json.dumps(labels))
    return running


@dataclass
class Lane:
    """The conversations of *site*, sent to *openai*."""

    site: Site
    openai: FakeOpenAI

    def processor(
        self, monkeypatch: pytest.MonkeyPatch, taxonomy_file: Path | None = None, **parts: Any
    ) -> DocumentBatchProcessor:
        """Return the job as the command line makes it."""
        monkeypatch.setenv("OPENAI_API_KEY", "sk-test")
        monkeypatch.setenv("OPENAI_BASE_URL", self.openai.url)
        settings = load_settings(
            None,
            mongodb_uri=self.site.uri,
            db_name=self.site.database.name,
            mongodb_backoff_s=0.05,
            taxonomy_file=taxonomy_file,
        )
        parts = {"schema_file": load_schema_file(SCHEMA), "state_dir": self.site.folder / "job", **parts}
        return DocumentBatchProcessor(settings=settings, times=TIMES, **parts)


@pytest.fixture
def lane(site: Site, openai: FakeOpenAI) -> Lane:
    return Lane(site, openai)


def keys(value: Any, path: str = "") -> set[str]:
    """Return the paths of all fields and the types of their values."""
    if isinstance(value, dict):
        return {inner for name, item in value.items() for inner in keys(item, f"{path}.{name}")}
    return {path if path.endswith("model_digest") else f"{path}: {type(value).__name__}"}  # OpenAI has no digests


def test_results_match_those_of_the_worker(lane: Lane, monkeypatch: pytest.MonkeyPatch) -> None:
    """Same fields, types, input hashes and statuses for the same documents."""
    documents = documents_of_all_shapes(40)
    lane.site.source.insert_many(documents)
    lane.processor(monkeypatch).process_pending_documents()
    sent = {json.dumps(result["source_conversation_id"], default=str): result for result in lane.site.results.find()}
    check_lane_statuses(lane.site, documents)
    lane.site.results.delete_many({})
    lane.site.source.delete_many({})
    lane.site.source.insert_many(documents)
    assert lane.site.run().code == 0
    own = {json.dumps(result["source_conversation_id"], default=str): result for result in lane.site.results.find()}
    assert own.keys() == sent.keys()
    for name, result in own.items():
        assert keys(result) == keys(sent[name])
        for field in ("input_sha256", "turns_used", "turns_total", "input_complete", "processor_version"):
            assert result["processing_metadata"][field] == sent[name]["processing_metadata"][field]


def test_a_status_of_another_program_is_left_alone(lane: Lane, monkeypatch: pytest.MonkeyPatch) -> None:
    """With STATUS_FIELD, the job keeps its state where the worker does; the worker then has nothing to do."""
    monkeypatch.setenv("STATUS_FIELD", "triad_status")
    documents = [conversation(1, status="closed"), {"_id": 2, "text": "where is it", "status": "open", "processed": 5}]
    lane.site.source.insert_many(documents)
    lane.processor(monkeypatch).process_pending_documents()
    assert lane.site.results.count_documents({"conversation.turns": 1}) >= 1
    for before, after in zip(documents, lane.site.source.find().sort("_id", 1), strict=True):
        assert after["triad_status"] == "processed"
        assert {name: after[name] for name in before} == before
        assert after.keys() - before.keys() <= {"triad_status", "triad_status_processed_at", "processing_info"}
    report = json.loads(lane.site.run("--dry-run", STATUS_FIELD="triad_status").out)
    assert (report["selected"], report["not_selected"]["foreign"]) == (0, 0)


def test_fields_of_the_taxonomy_are_labelled(lane: Lane, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With masking: a taxonomy without categorization has no text in which personal data is put back."""
    own = tmp_path / "own.yaml"
    own.write_text(
        "categorization: false\nfields: {escalate: [Yes, No], channels: {multiple: true, labels: [Phone, Chat]}}"
    )
    lane.openai.configure(reply='{"escalate": "No", "channels": ["chat", "Phone", "Chat"]}')
    lane.site.source.insert_one(conversation(1, text="mail me at jane@example.com"))
    lane.processor(monkeypatch, taxonomy_file=own, mask_pii=True).process_pending_documents()
    [result] = lane.site.results.find()
    assert result["classification"] == {"escalate": "No", "channels": ["Phone", "Chat"]}
    assert "classification.channels_1" in lane.site.results.index_information()


def test_document_with_result_is_completed_without_request(lane: Lane, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its lease is released."""
    lane.site.source.insert_many([conversation(number) for number in range(6)])
    lane.site.results.insert_many([{"source_conversation_id": id_} for id_ in lane.site.source.distinct("_id")[:4]])
    lane.processor(monkeypatch).process_pending_documents()
    assert lane.openai.stats()["lines_billed"] == 2
    assert lane.site.source.count_documents({"status": "processed"}) == 6
    assert lane.site.database["conversation_set_leases"].count_documents({}) == 0


@pytest.mark.parametrize("answer", mostly_thorough(['{"intent": "nonsense"}', "not json at all"], 2))
def test_answer_without_labels_is_retried_then_failed(answer: str, lane: Lane, monkeypatch: pytest.MonkeyPatch) -> None:
    """As often as max_retries says; the document has the reason."""
    lane.site.source.insert_many([conversation(number) for number in range(4)])
    bad = lane.site.source.find_one({"_id": 2})
    lane.openai.configure(faults=[{"kind": "content", "when": {"text": text_of(bad)}, "content": answer}])
    lane.processor(monkeypatch).process_pending_documents()
    failed = list(lane.site.source.find({"status": "failed"}))
    assert [document["_id"] for document in failed] == [2]
    assert failed[0]["processing_info"]["attempts"] == MAX_ATTEMPTS
    assert failed[0]["processing_info"]["error"]
    assert failed[0]["status_reason"] in ("not_json", "wrong_shape")
    assert failed[0]["last_processed_at"]
    assert lane.site.results.count_documents({}) == 3


def check_lane_statuses(site: Site, documents: list[dict[str, Any]]) -> None:
    """As the worker leaves them, but for ``processing_info``, and a status beside ``processed`` in single queries."""
    site.source.update_many({}, {"$unset": {"processing_info": ""}})
    site.source.update_many({"processed": True}, {"$unset": {"status": ""}})
    check_statuses(site, documents)


def text_of(document: dict[str, Any]) -> str:
    """Return what no other conversation has in its request."""
    return f"Case {document['_id']:05d}"


def test_single_query_is_marked_processed(lane: Lane, monkeypatch: pytest.MonkeyPatch) -> None:
    """Completed and failed ones are left alone."""
    lane.site.source.insert_many(
        [
            {"_id": 1, "text": "where is my parcel?"},
            {"_id": 2, "text": "where is my refund?", "processed": True},
            {"_id": 3, "text": "where is my order?", "status_reason": "label_invalid"},
        ]
    )
    lane.processor(monkeypatch).process_pending_documents()
    assert lane.openai.stats()["lines_billed"] == 1
    assert lane.site.results.distinct("source_conversation_id") == [1]
    done = lane.site.source.find_one({"_id": 1})
    assert (done["processed"], done["processing_attempts"]) == (True, 1)
    assert lane.site.run().code == 0
    assert lane.site.results.distinct("source_conversation_id") == [1]


def test_worker_skips_sent_conversations(lane: Lane, monkeypatch: pytest.MonkeyPatch) -> None:
    """It processes the other conversations of the collection while the batches run."""
    lane.site.source.insert_many([conversation(number) for number in range(30)])
    processor = lane.processor(monkeypatch)

    async def submit() -> None:
        async with processor.opened() as job:
            await job.submit(20)

    asyncio.run(submit())
    assert lane.site.source.count_documents({"status": "processing"}) == 20
    worker = lane.site.run()
    assert worker.code == 0, worker.err
    assert lane.site.results.count_documents({}) == 10
    assert lane.site.source.count_documents({"status": "processing"}) == 20
    processor.process_pending_documents()
    assert lane.site.results.count_documents({}) == 30
    assert lane.site.source.count_documents({"status": "processed"}) == 30
    assert lane.openai.stats()["lines_billed"] == 20
    assert lane.site.database["conversation_set_leases"].count_documents({}) == 0


def test_conversation_that_has_grown_too_long_for_masking_fails_alone(
    lane: Lane, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It grows while its batch runs; the other answer of the batch is stored."""
    lane.site.source.insert_many([conversation(number) for number in range(2)])
    processor = lane.processor(monkeypatch, mask_pii=True)

    async def submit() -> None:
        async with processor.opened() as job:
            await job.submit()

    asyncio.run(submit())
    grown = {"sender": "customer", "text": "x" * (MAX_CHARACTERS + 1)}
    lane.site.source.update_one({"_id": 0}, {"$push": {"messages": grown}})
    result = processor.process_pending_documents()
    assert (result.succeeded, result.failed) == (1, 1)
    assert lane.site.source.distinct("_id", {"status": "processed"}) == [1]
    assert lane.site.source.distinct("_id", {"status": "failed"}) == [0]


def test_answer_to_an_earlier_text_is_never_that_of_the_new_one(
    lane: Lane, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Both conversations get a turn while their batch runs; the program sets one of them to pending at once."""
    lane.site.source.insert_many([conversation(number) for number in range(2)])
    before = {document["_id"]: text_hash(document) for document in lane.site.source.find()}
    processor = lane.processor(monkeypatch)

    async def submit() -> None:
        async with processor.opened() as job:
            await job.submit()

    async def poll() -> JobResult:
        async with processor.opened() as job:
            for _ in range(2):
                await job.poll()
            return job.context.result

    def hashes() -> dict[int, str]:
        found = lane.site.results.find()
        return {one["source_conversation_id"]: one["processing_metadata"]["input_sha256"] for one in found}

    asyncio.run(submit())
    turn = {"$push": {"messages": {"sender": "customer", "text": "It is broken, too."}}}
    lane.site.source.update_one({"_id": 0}, turn)
    lane.site.source.update_one({"_id": 1}, turn | {"$set": {"status": "pending"}})
    result = asyncio.run(poll())
    assert (result.succeeded, result.retried) == (1, 1)
    assert "document 1: the answer is not stored" in caplog.text
    assert hashes() == {0: before[0]}
    assert lane.site.database["conversation_set_leases"].count_documents({}) == 0, "the worker may take document 1"
    assert [document["status"] for document in lane.site.source.find().sort("_id")] == ["processed", "pending"]
    lane.site.source.update_one({"_id": 0}, {"$set": {"status": "pending"}})
    processor.process_pending_documents()
    assert hashes() == {document["_id"]: text_hash(document) for document in lane.site.source.find()}
    assert lane.site.source.count_documents({"status": "processed"}) == 2
    assert lane.openai.stats()["lines_billed"] == 4


def text_hash(document: dict[str, Any]) -> str:
    return aggregate_conversation(document).transcript_sha256


@pytest.mark.slow
def test_worker_and_job_race_without_double_work(lane: Lane, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each conversation is labelled by one of them."""
    documents = [document for document in documents_of_all_shapes(120) if user_message(document) is not None]
    lane.site.source.insert_many(documents)
    processor = lane.processor(monkeypatch)
    assert lane.site.model is not None
    lane.site.model.configure(latency_s=0.2)  # so slow that it has much left when the job begins
    with lane.site.start() as worker:
        lane.site.model.wait_for("chat_requests", at_least=20)
        processor.process_pending_documents()
        assert worker.ended().code == 0
    assert lane.site.run().code == 0
    check_lane_statuses(lane.site, documents)
    assert lane.site.results.count_documents({}) == len(documents)
    billed = lane.openai.stats()["lines_billed"]
    asked = sum(lane.site.model.stats()["calls_by_sha"].values())
    assert billed > 0, "the worker did everything: this proves nothing"
    assert billed + asked == len(documents)


def test_done_document_that_cannot_be_marked_is_named(
    lane: Lane, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It has a result, so it is not sent; its status stays, with a warning."""
    lane.site.source.insert_many([conversation(number) for number in range(2)])
    lane.site.results.insert_one({"source_conversation_id": 1})
    validator = {"$or": [{"_id": 0}, {"status": "pending"}]}
    lane.site.database.command("collMod", lane.site.source.name, validator=validator)
    lane.processor(monkeypatch).process_pending_documents()
    assert "document 1: MongoDB refuses the operation (complete a document, code 121" in caplog.text
    assert [document["status"] for document in lane.site.source.find().sort("_id")] == ["processed", "pending"]
    assert lane.openai.stats()["lines_billed"] == 1

"""AT-4: what customers and models write is a value, wherever it goes; a real MongoDB holds the outcome."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from openai_batch import (
    DocumentBatchProcessor,
    DocumentFields,
    OpenAIConfig,
    PromptConfig,
    SchemaConfig,
)
from tests.cases import mostly_thorough
from tests.openai_batch.job_replies import HOSTILE_ANSWERS
from tests.openai_batch.openai_job import Job, replying_job

JSON_ANSWERS = OpenAIConfig(response_format={"type": "json_object"})
VALUES: list[Any] = [
    {"$gt": ""},
    {"$ne": None},
    {"$where": "sleep(5000)"},
    {"$set": {"admin": True}},
    {"a.b": {"$inc": 1}},
    {"$oid": "no id"},
    {"$numberLong": "x"},
    ["$where", {"$function": {"body": "x"}}],
    "{{ 7 * 7 }} {% raw %} {{response_content}} {{current_date}}",
    "$where",
    "x\x00y",
    None,
]
IDS: list[Any] = [{"x": {"y": 1}}, "$where", "{{ x }}", "a.b"]
OWN = {"_id", "ai_status", "text", "event_response", "processing_info"}


@pytest.fixture
def site(mongodb_uri: str, db_name: str, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Job]:
    with replying_job(mongodb_uri, db_name, tmp_path, request.param) as (job, _):
        yield job


def processor_of(site: Job, monkeypatch: pytest.MonkeyPatch, **parts: Any) -> DocumentBatchProcessor:
    site.enter(monkeypatch, MAX_RETRIES="1")
    fields = DocumentFields(field_map={"text": "text"})
    prompts = PromptConfig(user_prompt_template="{{ text }}")
    return DocumentBatchProcessor(**({"fields": fields, "prompts": prompts} | parts))


@pytest.mark.parametrize("site", ["echo"], indirect=True)
def test_hostile_values_stay_values(site: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    """One document each, no new field, and the value unchanged through prompt, answer and processor."""
    documents = [{"_id": number, "ai_status": "pending", "text": value} for number, value in enumerate(VALUES)]
    documents += [{"_id": own, "ai_status": "pending", "text": f"id {own}"} for own in IDS]
    other = {"_id": "other", "ai_status": "someone else's", "text": "stays"}
    site.documents.insert_many([*documents, other])
    site.documents.database.command("profile", 1, slowms=1000, filter={"millis": {"$gt": 1000}})
    processor = processor_of(site, monkeypatch)
    processor.set_response_processor(lambda response, _: {"text": response})
    result = processor.process_pending_documents()
    site.documents.database.command("profile", 0)
    assert (result.succeeded, result.failed) == (len(documents), 0)
    for before in documents:
        after = site.documents.find_one({"_id": {"$eq": before["_id"]}})
        assert after is not None
        assert set(after) == OWN
        assert after["text"] == before["text"]
        assert isinstance(after["event_response"]["talking_points"]["text"], str)
    assert site.documents.find_one({"_id": "other"}) == other
    assert site.documents.count_documents({}) == len(documents) + 1
    assert list(site.documents.database["system.profile"].find()) == []


@pytest.mark.parametrize("site", ["hostile"], indirect=True)
@pytest.mark.parametrize("with_processor", [pytest.param(False, marks=pytest.mark.thorough), True])
@pytest.mark.parametrize(
    "template",
    mostly_thorough(
        [None, {"$set": {"answer": "{{response_content}}"}}, {"$push": {"answers": "{{response_content}}"}}], 3, first=1
    ),
)
def test_hostile_key_of_answer_fails_document(
    site: Job, monkeypatch: pytest.MonkeyPatch, template: dict[str, Any] | None, with_processor: bool
) -> None:
    """No key becomes an operator, a path or a field; the document has the reason."""
    site.documents.insert_many(
        [{"_id": n, "ai_status": "pending", "text": f"answer {n}"} for n in range(len(HOSTILE_ANSWERS))]
    )
    processor = processor_of(
        site, monkeypatch, schema_config=SchemaConfig(response_template=template), openai=JSON_ANSWERS
    )
    if with_processor:
        processor.set_response_processor(lambda response, _: response)
    result = processor.process_pending_documents()
    assert (result.succeeded, result.failed) == (0, len(HOSTILE_ANSWERS))
    for document in site.documents.find():
        assert set(document) == OWN - {"event_response"}
        assert document["processing_info"]["error"].startswith(
            ("the answer has a key that", "the answer holds a number")
        )


@pytest.mark.thorough
@pytest.mark.parametrize("site", ["talking_points"], indirect=True)
def test_plain_keys_are_stored_below_the_response_field(site: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parsed JSON keeps its shape."""
    site.documents.insert_one({"_id": 1, "ai_status": "pending", "text": "ai_status"})
    assert processor_of(site, monkeypatch, openai=JSON_ANSWERS).process_pending_documents().succeeded == 1
    document = site.documents.find_one()
    assert document is not None
    assert document["event_response"]["talking_points"] == {"points": ["ai_status"], "urgency": "soon"}


@pytest.mark.thorough
@pytest.mark.parametrize("site", ["echo"], indirect=True)
def test_endless_processor_fails_its_document_only(site: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    """AT-20: the other documents are completed in the same run."""
    site.documents.insert_many([{"_id": n, "ai_status": "pending", "text": f"text {n}"} for n in range(5)])

    def process(response: str, document: dict[str, Any]) -> dict[str, Any]:
        while document["_id"] == 1:
            pass
        return {"text": "x" * 10**10 if document["_id"] == 3 else response}

    processor = processor_of(site, monkeypatch)
    processor.set_response_processor(process)
    result = processor.process_pending_documents()
    assert (result.succeeded, result.failed) == (3, 2)
    errors = {d["_id"]: d["processing_info"]["error"] for d in site.documents.find({"ai_status": "failed"})}
    assert errors == {
        1: "the response processor takes longer than 2 s or too much memory",
        3: "the response processor takes more than 100 MB of memory",
    }


@pytest.mark.parametrize("site", ["echo"], indirect=True)
def test_changed_document_counts_old_placeholders(site: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are never restored to a new value."""
    site.documents.insert_one({"_id": 1, "ai_status": "pending", "text": "from bob@example.org"})
    processor = processor_of(site, monkeypatch, mask_pii=True)
    first: list[str] = []

    def change(progress: str) -> None:
        if not first and "prepared" in progress:
            first.append(progress)
            site.documents.update_one({"_id": 1}, {"$set": {"text": "from eve@example.org"}})

    assert processor.process_pending_documents(on_progress=change).succeeded == 1
    document = site.documents.find_one()
    assert document is not None
    assert document["event_response"]["talking_points"].startswith("from <EMAIL_")
    assert document["processing_info"]["placeholders_left"] == 1

"""The shipped schemas and examples run as users run them, against a real MongoDB and the fake OpenAI."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from openai_batch import DocumentBatchProcessor, SchemaConfig
from openai_batch.job_config import AppConfig
from openai_batch.schema_file import load_schema_file
from tests.openai_batch.openai_job import ROOT, Job, replying_job

MEDICAL = ROOT / "schema_examples/medical_schema.py"
SERVICE = ROOT / "schema_examples/customer_service_schema.py"


def patient(number: int, **fields: Any) -> dict[str, Any]:
    return {
        "_id": number,
        "ai_status": "pending",
        "event_type": "visit",
        "needs_preparation": True,
        "patient_details": {"first_name": "Anna Schmidt", "date_of_birth": "1961-03-07"},
        "notes": [{"text": f"Anna Schmidt complains, mail anna{number}@example.org"}],
        **fields,
    }


@pytest.fixture
def site(mongodb_uri: str, db_name: str, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Job]:
    with replying_job(mongodb_uri, db_name, tmp_path, getattr(request, "param", "talking_points")) as (job, _):
        yield job


@pytest.mark.parametrize("path", [MEDICAL, SERVICE], ids=lambda path: path.stem)
def test_schema_example_makes_a_config(path: Path, site: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the environment."""
    site.enter(monkeypatch)
    assert isinstance(AppConfig.from_env(**load_schema_file(path).parts), AppConfig)


@pytest.mark.parametrize("site", ["echo"], indirect=True)
def test_three_lines_of_python_run_a_job(site: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything else comes from the environment."""
    site.enter(
        monkeypatch,
        SYSTEM_PROMPT="You are brief.",
        USER_PROMPT_TEMPLATE="{{ patient_details.first_name }}: {{ notes[0].text }}",
    )
    site.documents.insert_many([patient(number) for number in range(3)])
    medical_schema_config: SchemaConfig = load_schema_file(MEDICAL).parts["schema_config"]

    def custom_response_processor(response: Any, document: dict[str, Any]) -> dict[str, Any]:
        return {"text": response.upper(), "of": document["_id"]}

    processor = DocumentBatchProcessor(schema_config=medical_schema_config)
    processor.set_response_processor(custom_response_processor)
    result = processor.process_pending_documents()

    assert (result.total_processed, result.succeeded, result.failed) == (3, 3, 0)
    for document in site.documents.find():
        text = f"Anna Schmidt: Anna Schmidt complains, mail anna{document['_id']}@example.org".upper()
        assert document["event_response"]["talking_points"] == {"text": text, "of": document["_id"]}
        assert document["ai_status"] == "completed"
    assert {body["messages"][0]["content"] for body in site.bodies()} == {"You are brief."}


def test_medical_schema_masks_and_restores(site: Job) -> None:
    """Documents outside the query stay pending."""
    site.documents.insert_many([patient(1), patient(2), patient(3, event_type="birthday")])
    ended = site.cli("run", "--schema", str(MEDICAL), "--mask-pii")
    assert ended.code == 0, ended.err
    assert len(site.bodies()) == 2
    for body in site.bodies():
        assert "Anna" not in str(body)
        assert "@" not in str(body)
        assert "born in 1961," in body["messages"][-1]["content"]
    for document in site.documents.find({"ai_status": "completed"}):
        answer = document["event_response"]["talking_points"]
        assert answer["event"] == "visit"
        assert f"Note: Anna Schmidt complains, mail anna{document['_id']}@example.org" in answer["points"][0]
        assert "needs_preparation" not in document
        assert "placeholders_left" not in document["processing_info"]
    assert site.documents.count_documents({"ai_status": "pending", "needs_preparation": True}) == 1


@pytest.mark.slow
def test_mask_flag_of_another_start_neither_leaks_nor_leaves_placeholders(
    mongodb_uri: str, db_name: str, tmp_path: Path
) -> None:
    """Files that were made without it are not sent with it; answers to masked requests are not stored without it."""
    schema = ("--schema", str(MEDICAL))
    with replying_job(mongodb_uri, db_name, tmp_path, "talking_points") as (site, fake):
        site.documents.insert_one(patient(1))
        fake.configure(faults=[{"kind": "bad_request_400", "when": {"route": "files.create"}}])
        assert site.cli("submit", *schema).code == 2
        fake.configure(faults=[])
        given_up = site.cli("run", *schema, "--mask-pii", "--max-cost", "1")
        assert (given_up.code, site.statuses()) == (0, {"pending": 1}), given_up.err
        assert fake.stats()["bytes_uploaded"] == 0
        assert site.cli("submit", *schema, "--mask-pii").code == 0
        refused = site.cli("poll", *schema)
        assert (refused.code, site.statuses()) == (2, {"in_progress": 1})
        assert "run the same command with --mask-pii" in refused.err
        assert site.cli("run", *schema, "--mask-pii").code == 0
        (body,) = site.bodies()
        assert "Anna" not in str(body)
        (document,) = site.documents.find()
        assert "Anna Schmidt complains" in document["event_response"]["talking_points"]["points"][0]


@pytest.mark.parametrize("site", ["labels"], indirect=True)
def test_conversation_labels_are_restored_in_results(site: Job) -> None:
    """The categorization has the customer's own words."""
    text = "Call me on (415) 555-2671 or mail bob@example.org about order 1234567"
    site.documents.insert_one({"_id": 1, "messages": [{"sender": "customer", "text": text}]})
    ended = site.cli("run", "--schema", str(SERVICE), "--mask-pii")
    assert ended.code == 0, ended.err
    (body,) = site.bodies()
    assert "555-2671" not in str(body)
    assert "bob@" not in str(body)
    assert "1234567" in str(body)
    (result,) = site.documents.database["sentimental_analysis"].find()
    assert text in result["classification"]["categorization"]


def test_dry_run_shows_masked_text(site: Job) -> None:
    """As it would be sent."""
    site.documents.insert_one(patient(1))
    ended = site.cli("run", "--schema", str(MEDICAL), "--mask-pii", "--dry-run")
    assert ended.code == 0, ended.err
    assert "<NAME_" in ended.out
    assert "Anna" not in ended.out
    assert site.bodies() == []


@pytest.mark.parametrize("site", ["echo"], indirect=True)
def test_ticket_and_results_examples_run(site: Job) -> None:
    """As they are shipped."""
    site.documents.insert_many([{"_id": n, "ai_status": "pending", "text": f"ticket {n}"} for n in range(2)])
    site.documents.insert_one({"_id": 9, "ai_status": "pending"})
    ended = site.script(str(ROOT / "examples/summarise_tickets.py"))
    assert ended.returncode == 0, ended.stderr
    assert "2 documents prepared" in ended.stdout.splitlines()
    assert ended.stdout.splitlines()[-1] == "3 documents: 2 completed, 1 failed"
    summary = site.documents.find_one({"_id": 1})["summary"]  # type: ignore[index]
    assert summary["text"]["sentence"] == "Subject: no subject\n\nticket 1"
    read = site.script(
        str(ROOT / "examples/read_results.py"), site.settings["MONGODB_URI"], site.documents.database.name, "items"
    )
    assert read.returncode == 0, read.stderr
    assert read.stdout.splitlines() == [
        "       2 completed",
        "       1 failed",
        "       1 failed: document 9 has no field text (variable text); give a default",
    ]


@pytest.mark.thorough
def test_schema_file_example_runs_masked(site: Job) -> None:
    """As it is shipped."""
    site.documents.insert_one(patient(1))
    ended = site.script(str(ROOT / "examples/run_schema_file.py"))
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.splitlines()[-1] == "1 of 1 patients have talking points"
    assert "Anna" not in str(site.bodies())

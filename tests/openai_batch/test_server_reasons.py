"""The reasons of the Batch API, without the texts of the request file."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from error_handler import ConfigurationError, JobValidationError
from openai_batch import openai_client
from openai_batch.openai_client import reason_given
from tests.cases import mostly_thorough
from tests.fakes.fake_openai import FakeOpenAI
from tests.openai_batch.openai_job import Job

REFUSED = "No endpoint for this model, ask your administrator"
QUOTED = "Line 1 is bad: I am Xaver Quabeck of Hill Road"


@pytest.mark.parametrize("route", mostly_thorough(["files.create", "batches.create"], 2))
@pytest.mark.parametrize(("message", "words"), [(REFUSED, REFUSED), (QUOTED, "quotes the request")])
def test_refusal_has_the_reason(job: Job, openai: FakeOpenAI, route: str, message: str, words: str) -> None:
    job.fill(3, text="I am Xaver Quabeck of Hill Road. Where is it?")
    openai.configure(faults=[{"kind": "bad_request_400", "message": message, "when": {"route": route}}])
    with pytest.raises(JobValidationError, match=words) as caught:
        job.run()
    assert "Quabeck" not in str(caught.value)


def test_refused_key_has_the_reason_without_the_key(job: Job, openai: FakeOpenAI) -> None:
    job.fill(1)
    key = job.config().openai.api_key
    assert key is not None
    message = f"Incorrect API key provided: {key.get_secret_value()}. Use another"
    openai.configure(faults=[{"kind": "unauthorized_401", "message": message}])
    with pytest.raises(ConfigurationError, match=r"the server says: Incorrect API key provided: \*\*\*") as caught:
        job.run()
    assert key.get_secret_value() not in str(caught.value)


@pytest.mark.parametrize(
    ("message", "words"), [(REFUSED, f"c; the server says: {REFUSED}"), (QUOTED, "quotes the req")]
)
def test_batch_that_fails_as_a_whole_has_the_reason(
    job: Job, openai: FakeOpenAI, caplog: pytest.LogCaptureFixture, message: str, words: str
) -> None:
    """In the log at WARNING, in the documents and in the ledger."""
    job.fill(2, text="I am Xaver Quabeck of Hill Road. Where is it?")
    openai.configure(faults=[{"kind": "fail", "errors": [{"code": "c", "message": message}]}])
    with caplog.at_level(logging.WARNING):
        job.run()
    assert any(words in record.getMessage() and record.levelname == "WARNING" for record in caplog.records)
    errors = [document["processing_info"]["error"] for document in job.documents.find({"ai_status": "failed"})]
    assert len(errors) == 2
    assert all(words in error for error in errors)
    assert job.rows("SELECT DISTINCT code FROM items") == [("c",)]
    assert "Quabeck" not in f"{errors} {caplog.text} {job.rows('SELECT problem FROM shards')}"


@pytest.mark.parametrize(("message", "words"), [(REFUSED, f"; the server says: {REFUSED}"), (QUOTED, "quotes the req")])
def test_line_that_fails_has_the_reason(
    job: Job, openai: FakeOpenAI, caplog: pytest.LogCaptureFixture, message: str, words: str
) -> None:
    """In the log and in its document, which it is compared with."""
    job.fill(1, text="I am Xaver Quabeck of Hill Road. Where is it?")
    openai.configure(faults=[{"kind": "line_status", "status": 400, "message": message}])
    with caplog.at_level(logging.WARNING):
        job.run()
    (document,) = job.documents.find({"ai_status": "failed"})
    error = document["processing_info"]["error"]
    assert words in error
    assert words in caplog.text
    assert "Quabeck" not in f"{error} {caplog.text}"


def test_reason_that_cannot_be_compared_is_not_shown(tmp_path: Path, monkeypatch: Any) -> None:
    """The request file is gone, or too large to be read for that."""
    answer, path = b'{"error": "no"}', tmp_path / "requests.jsonl"
    assert reason_given(answer, path) == ""
    path.write_text('{"body": {"messages": [{"content": "Where is it?"}]}}\n')
    assert reason_given(answer, path) == "; the server says: no"
    monkeypatch.setattr(openai_client, "COMPARED_BYTES", 10)
    assert reason_given(answer, path) == ""

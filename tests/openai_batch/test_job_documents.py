"""Documents, keys, clocks and ledgers that a job must survive; each is one that ended or confused a run before."""

from __future__ import annotations

import dataclasses
import datetime as dt
import re
import time
from typing import Any

import pytest
from bson import Binary, Decimal128, Int64, ObjectId, Timestamp

from error_handler import JobValidationError, StateDirectoryError
from openai_batch.batch_protocol import parse_line
from openai_batch.ledger import ItemState, Shard, ShardState
from openai_batch.sending import wait_left_s
from tests.fakes.fake_openai import FakeOpenAI
from tests.openai_batch.openai_job import Job, times_with

ODD_IDS: list[Any] = [
    None,
    {"b": 1, "a": {"$oid": 5}},
    {"a": 1},
    "1",
    1,
    Int64(2**60),
    2.5,
    float("nan"),
    ObjectId(),
    dt.datetime(2020, 1, 1, tzinfo=dt.UTC),
    Decimal128("1.50"),
    Binary(b"x" * 16, 4),
    b"raw",
    True,
    Timestamp(5, 6),
    "näme\nwith lines",
]


def test_ids_of_every_type(job: Job, openai: FakeOpenAI) -> None:
    """1 and "1" are two documents, and null is one."""
    ids = [value for value in ODD_IDS if value != {"b": 1, "a": {"$oid": 5}}]
    job.documents.insert_many([{"_id": id_, "ai_status": "pending", "text": f"t {n}"} for n, id_ in enumerate(ids)])
    job.run()
    job.check(openai)
    assert job.statuses() == {"completed": len(ids)}
    assert openai.stats()["lines_billed"] == len(ids)


@pytest.mark.parametrize("present", [None, "text", [], 5])
def test_another_value_in_the_place_of_processing_info(present: Any, job: Job, openai: FakeOpenAI) -> None:
    """It is replaced; it neither ends the run nor keeps the document pending for ever."""
    job.fill(3)
    job.documents.update_one({"_id": 1}, {"$set": {"processing_info": present}})
    job.run()
    job.check(openai)
    assert job.statuses() == {"completed": 3}


def test_a_document_that_nobody_can_mark_ends_no_run(job: Job) -> None:
    """Its place for processing_info lies in a text: it fails, the others are completed."""
    job.schema = {"processing_info_field": "meta.info"}
    job.fill(3)
    job.documents.update_one({"_id": 1}, {"$set": {"meta": "text"}})
    job.run()
    assert job.statuses() == {"completed": 2, "failed": 1}


def test_a_request_that_no_batch_may_hold_fails_alone(job: Job, openai: FakeOpenAI) -> None:
    """It used to end each run at the same place."""
    job.batch = {"max_file_bytes": 10_000}
    job.fill(6)
    job.documents.update_one({"_id": 2}, {"$set": {"text": "long " * 3000}})
    job.run()
    job.check(openai)
    assert job.statuses() == {"completed": 5, "failed": 1}


def test_an_answer_that_mongodb_does_not_take(job: Job, openai: FakeOpenAI) -> None:
    """The path of the response lies in a text: the document fails, and the ledger and the result say so, too."""
    job.schema = {"response_field": "out.answer"}
    job.fill(3)
    job.documents.update_one({"_id": 1}, {"$set": {"out": "text"}})
    result = job.run()
    assert (result.succeeded, result.failed) == (2, 1)
    assert job.rows("SELECT code FROM items WHERE state = 'failed'") == [("not_stored",)]
    assert job.statuses() == {"completed": 2, "failed": 1}


def test_documents_that_are_deleted_meanwhile(job: Job, openai: FakeOpenAI, monkeypatch: pytest.MonkeyPatch) -> None:
    """They end in the ledger; nothing is made of their answers."""
    from openai_batch.openai_client import OpenAIFiles

    job.fill(5)
    original = OpenAIFiles.create

    async def deleting(*arguments: Any) -> Any:
        job.documents.delete_many({"_id": {"$lt": 2}})
        return await original(*arguments)

    monkeypatch.setattr(OpenAIFiles, "create", deleting)
    job.run()
    assert job.total() == {"submitted": 5, "ok": 3, "failed": 2}
    assert job.statuses() == {"completed": 3}


def test_another_key_does_not_pay_for_everything_again(job: Job, openai: FakeOpenAI) -> None:
    """A server that knows neither batch nor file is another account: one sentence, and nothing is sent."""
    job.fill(5)
    job.times = times_with(files_late_s=0.2)
    openai.configure(
        faults=[{"kind": "not_found_404", "when": {"route": ["batches.retrieve", "files.retrieve"]}, "times": 10_000}]
    )
    with pytest.raises(JobValidationError, match="OPENAI_API_KEY"):
        job.run()
    assert job.statuses() == {"in_progress": 5}
    openai.configure(faults=[])
    job.run()
    job.check(openai)
    assert openai.stats()["lines_billed"] == 5


def test_a_file_that_was_lost_before_it_was_sent(job: Job, openai: FakeOpenAI) -> None:
    """Its documents are pending again, without an attempt more."""
    job.fill(5)
    openai.configure(faults=[{"kind": "insufficient_quota_429", "when": {"route": "files.create"}, "times": 1}])
    with pytest.raises(JobValidationError, match="quota"):
        job.run()
    for path in (job.folder / "state").glob("*.jsonl"):
        path.unlink()
    job.run()
    job.check(openai)
    assert job.documents.count_documents({"ai_status": "completed", "processing_info.attempts": 1}) == 5


def test_one_shard_over_the_token_limit_is_split(job: Job, openai: FakeOpenAI) -> None:
    """The limit is learnt from the message, and nothing is paid for meanwhile."""
    openai.configure(enqueued_token_limit=1200)
    job.documents.insert_many(
        [{"_id": number, "ai_status": "pending", "text": f"{number} " + "word " * 200} for number in range(10)]
    )
    job.run()
    job.check(openai)
    assert job.statuses() == {"completed": 10}
    assert job.documents.count_documents({"processing_info.attempts": 1}) == 10
    assert openai.stats()["lines_billed"] == 10
    assert len(job.shards()) > 2


def test_a_ledger_that_is_damaged(job: Job) -> None:
    """One sentence, and nothing is sent."""
    job.fill(2)
    (job.folder / "state").mkdir()
    (job.folder / "state/ledger.sqlite").write_bytes(b"this is no database" * 500)
    with pytest.raises(StateDirectoryError, match="damaged"):
        job.run()
    assert job.statuses() == {"pending": 2}


def test_a_clock_that_was_set_holds_nothing_back() -> None:
    """A shard that waits longer than is ever waited was written by a clock in the future."""
    shard = Shard(1, "job", ShardState.UPLOADED, "0", 1, 1, 1, "m", not_before=time.time() + 90_000)
    assert wait_left_s(shard) == 0
    assert wait_left_s(dataclasses.replace(shard, not_before=time.time() + 90)) > 60


def test_half_an_emoji_is_an_answer() -> None:
    """Paid for and usable, but no text for a strict parser; a stored text has none of it."""
    body = rb'{"choices": [{"message": {"content": "good \ud83d day"}, "finish_reason": "stop"}]}'
    line = parse_line(b'{"custom_id": "a", "response": {"status_code": 200, "body": ' + body + b'}, "error": null}')
    assert line is not None
    assert (line.state, line.content) == (ItemState.OK, "good ? day")
    assert re.fullmatch(r"[\x20-\x7e]+", line.content or "")

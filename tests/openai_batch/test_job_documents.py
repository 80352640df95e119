"""Documents, keys, clocks and ledgers that once ended or confused a run."""

from __future__ import annotations

import asyncio
import dataclasses
import datetime as dt
import hashlib
import json
import os
import re
import sqlite3
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, closing, suppress
from pathlib import Path
from typing import Any

import pytest
from bson import Binary, Decimal128, Int64, ObjectId, Timestamp

from config import load_settings
from error_handler import ExitCode, JobValidationError, StateDirectoryError
from openai_batch.batch_protocol import parse_line
from openai_batch.documents import TemplateHandling
from openai_batch.job_config import AppConfig, BatchConfig
from openai_batch.job_store import Ending, JobStore
from openai_batch.ledger import Item, ItemState, Ledger, Shard, ShardState
from openai_batch.planning import ShardWriter, wait_left_s
from storage.extended_json import canonical
from storage.files import DirectoryLock
from tests.cases import mostly_thorough
from tests.fakes.fake_openai import FakeOpenAI
from tests.openai_batch.openai_job import Job, times_with
from tests.worker.site import BROKEN, store_raw

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


def test_ids_of_every_type_are_processed_once(job: Job, openai: FakeOpenAI) -> None:
    """1 and "1" are two documents, and null is one."""
    ids = [value for value in ODD_IDS if value != {"b": 1, "a": {"$oid": 5}}]
    job.documents.insert_many([{"_id": id_, "ai_status": "pending", "text": f"t {n}"} for n, id_ in enumerate(ids)])
    job.run()
    job.check(openai)
    assert job.statuses() == {"completed": len(ids)}
    assert openai.stats()["lines_billed"] == len(ids)


@pytest.mark.parametrize("present", mostly_thorough([None, "text", [], 5], 4, first=1))
def test_other_value_of_processing_info_is_replaced(present: Any, job: Job, openai: FakeOpenAI) -> None:
    """It neither ends the run nor keeps the document pending."""
    job.fill(3)
    job.documents.update_one({"_id": 1}, {"$set": {"processing_info": present}})
    job.run()
    job.check(openai)
    assert job.statuses() == {"completed": 3}


@pytest.mark.thorough
def test_document_that_cannot_be_claimed_fails_alone(job: Job) -> None:
    """Its processing_info would lie inside a text."""
    job.schema = {"processing_info_field": "meta.info"}
    job.fill(3)
    job.documents.update_one({"_id": 1}, {"$set": {"meta": "text"}})
    job.run()
    assert job.statuses() == {"completed": 2, "failed": 1}


@pytest.mark.thorough
def test_oversized_request_fails_alone(job: Job, openai: FakeOpenAI) -> None:
    """The other documents are completed."""
    job.batch = {"max_file_bytes": 10_000}
    job.fill(6)
    job.documents.update_one({"_id": 2}, {"$set": {"text": "long " * 3000}})
    job.run()
    job.check(openai)
    assert job.statuses() == {"completed": 5, "failed": 1}


def test_answer_rejected_by_mongodb_fails_document_and_item(job: Job, openai: FakeOpenAI) -> None:
    """The response field would lie inside a text."""
    job.schema = {"response_field": "out.answer"}
    job.fill(3)
    job.documents.update_one({"_id": 1}, {"$set": {"out": "text"}})
    result = job.run()
    assert (result.succeeded, result.failed) == (2, 1)
    assert job.rows("SELECT code FROM items WHERE state = 'failed'") == [("not_stored",)]
    assert job.statuses() == {"completed": 2, "failed": 1}


@pytest.mark.parametrize("batch_size", mostly_thorough([1, 7], 2, first=1))
def test_document_that_is_not_valid_bson_fails_alone(job: Job, openai: FakeOpenAI, batch_size: int) -> None:
    """Binary data of an old driver, with a wrong length inside; the other documents are completed."""
    job.batch = {"batch_size": batch_size}
    job.fill(6)
    store_raw(job.documents, {"_id": 2.5, "ai_status": "pending", "text": "text", "scan": BROKEN})
    store_raw(job.documents, {"_id": BROKEN, "ai_status": "pending", "text": "text"})
    result = job.run()
    assert (result.succeeded, result.failed) == (6, 1)
    assert job.documents.count_documents({"ai_status": "completed"}) == 6
    failed = job.documents.find_one({"ai_status": "failed"}, {"processing_info": 1})
    assert failed is not None
    assert "invalid BSON" in failed["processing_info"]["error"]


async def test_document_that_cannot_be_given_back_is_named(job: Job, caplog: pytest.LogCaptureFixture) -> None:
    """It stays claimed; without a warning nobody would know why."""
    job.fill(2)
    info = {"custom_id": "job:lost:1", "job_id": "job"}
    job.documents.update_many({}, {"$set": {"ai_status": "in_progress", "processing_info": info}})
    job.client[job.database].command("collMod", job.collection, validator={"$or": [{"_id": 0}, {"ai_status": "done"}]})
    async with open_store(job) as store:
        await store.give_back([(canonical(0), "job:lost:1"), (canonical(1), "job:lost:1")])
    assert job.statuses() == {"pending": 1, "in_progress": 1}
    assert [record.getMessage() for record in caplog.records] == [
        "document 1: MongoDB refuses the operation (give a document back, code 121)"
    ]


@asynccontextmanager
async def open_store(job: Job) -> AsyncIterator[JobStore]:
    config, settings = job.config(), load_settings(None, mongodb_uri=job.uri, db_name=job.database)
    with TemplateHandling(config) as handling:
        async with JobStore(config, settings, handling) as store:
            yield store


class Leasing(TemplateHandling):
    """Notes which leases are ended."""

    def __init__(self, config: AppConfig) -> None:
        super().__init__(config)
        self.released: list[str] = []
        self._process.close()

    async def release(self, document_ids: Sequence[str]) -> None:
        self.released += document_ids


async def test_answer_is_written_only_while_its_claim_stands(job: Job) -> None:
    """A document that was claimed again meanwhile is left unchanged, and keeps its lease."""
    job.fill(1)
    info = {"custom_id": "job:new:2", "attempts": 2}
    job.documents.update_one({"_id": 0}, {"$set": {"ai_status": "in_progress", "processing_info": info}})
    before = job.documents.find_one({"_id": 0})
    async with open_store(job) as store:
        late = Ending(Item("job:old:1", canonical(0), 1, ItemState.OK), {"$set": {"answer": "late"}}, info={})
        store.handling = handling = Leasing(job.config())
        assert await store.end([late]) == set()
        assert handling.released == []
        assert job.documents.find_one({"_id": 0}) == before
        job.documents.update_one({"_id": 0}, {"$set": {"ai_status": "pending"}})
        await store.end([late])
        assert handling.released == [canonical(0)]


async def test_call_whose_library_swallows_a_cancellation_still_ends(job: Job) -> None:
    """As in ``test_signals``: Python 3.11 swallows one inside PyMongo."""

    async def swallows() -> None:
        with suppress(asyncio.CancelledError):
            await asyncio.Event().wait()

    async with open_store(job) as store:
        task = asyncio.create_task(store._call("wait", swallows))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task


def test_deleted_documents_end_in_the_ledger(job: Job, openai: FakeOpenAI, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their answers are dropped."""
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


def test_other_account_resends_nothing(job: Job, openai: FakeOpenAI) -> None:
    """A server that knows neither batch nor file is another account."""
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


@pytest.mark.parametrize(
    "left", [pytest.param(None, id="lost", marks=pytest.mark.thorough), pytest.param(0.5, id="cut")]
)
def test_unusable_unsent_file_costs_no_attempt(job: Job, openai: FakeOpenAI, left: float | None) -> None:
    """Neither a missing file nor the rest of a cut one is sent; its documents become pending again."""
    job.fill(5)
    openai.configure(faults=[{"kind": "insufficient_quota_429", "when": {"route": "files.create"}, "times": 1}])
    with pytest.raises(JobValidationError, match="quota"):
        job.run()
    for path in (job.folder / "state").glob("*.jsonl"):
        if left is None:
            path.unlink()
        else:
            path.write_bytes(path.read_bytes()[: int(left * path.stat().st_size)])
    job.run()
    job.check(openai)
    assert job.documents.count_documents({"ai_status": "completed", "processing_info.attempts": 1}) == 5
    assert openai.stats()["lines_billed"] == 5


def test_files_with_customer_text_are_deleted_at_openai(job: Job, openai: FakeOpenAI) -> None:
    """The request file and both result files, as soon as the answers are applied."""
    openai.configure(faults=[{"kind": "line_status", "when": {"indexes": [2], "batches": [0]}, "status": 400}])
    job.fill(5)
    job.run()
    files = openai.files()
    assert {row["purpose"] for row in files} == {"batch", "batch_output"}
    assert len(files) == 3, "request, answers and errors"
    assert [row["id"] for row in files if not row.get("deleted")] == []


def test_shard_over_token_limit_is_split(job: Job, openai: FakeOpenAI) -> None:
    """The limit is learned from the refusal; nothing is paid for meanwhile."""
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


def test_second_run_with_the_same_state_is_refused(job: Job, openai: FakeOpenAI) -> None:
    """Both would send the same files."""
    job.fill(2)
    state = job.folder / "state"
    state.mkdir()
    first = DirectoryLock(state)
    first.acquire("")
    ended = job.cli("run")
    assert (ended.code, ended.err.count("\n")) == (ExitCode.LOCKED, 1)
    assert "another worker is using state" in ended.err
    assert job.statuses() == {"pending": 2}
    assert openai.stats()["batches_created"] == 0
    first.release()
    assert job.cli("run").code == 0
    job.check_complete(openai, 2)


def test_damaged_ledger_sends_nothing(job: Job) -> None:
    """One sentence."""
    job.fill(2)
    (job.folder / "state").mkdir()
    (job.folder / "state/ledger.sqlite").write_bytes(b"this is no database" * 500)
    with pytest.raises(StateDirectoryError, match="damaged"):
        job.run()
    assert job.statuses() == {"pending": 2}


def test_ledger_is_written_durably(tmp_path: Path) -> None:
    """A test cannot cut the power, but it can read the setting for which SQLite promises durability."""
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        assert ledger._db.execute("PRAGMA synchronous").fetchone()[0] == 2
        assert ledger._db.execute("PRAGMA journal_mode").fetchone()[0] == "wal"


def test_first_end_of_a_line_counts(tmp_path: Path) -> None:
    """A line that comes twice, or again after a crash, is counted once."""
    item = Item("a:1", "1", 1)
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        ledger.plan(Shard(1, "job", ShardState.PLANNED, "0", 1, 1, 1, "m"), [item])
        ledger.settle([dataclasses.replace(item, state=ItemState.OK)])
        ledger.settle([dataclasses.replace(item, state=ItemState.FAILED, code="500", retryable=True)])
        assert (ledger.counts(1)[ItemState.OK], ledger.counts(1)[ItemState.FAILED]) == (1, 0)
        assert ledger.retried(1) == 0


def test_request_file_is_durable_before_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the ledger could name a file that a power cut has emptied."""
    steps: list[str] = []
    fsync, rename = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: (steps.append("fsync"), fsync(handle)))
    monkeypatch.setattr(os, "replace", lambda *paths: (steps.append("rename"), rename(*paths)))
    writer = ShardWriter(tmp_path, BatchConfig(), None)
    writer.add(Item("a:1", "1", 1), b"{}\n", 1)
    shard, _ = writer.finish(1, "job", "model")
    assert steps == ["fsync", "rename", "fsync"], "the file, its name, the folder"
    assert (tmp_path / shard.file_name).read_bytes() == b"{}\n"


def test_uploaded_file_without_an_answer_is_not_uploaded_again(job: Job, openai: FakeOpenAI) -> None:
    """It holds customer text, and is found by its name."""
    openai.configure(faults=[{"kind": "answer_lost", "when": {"route": "files.create"}, "times": 1}])
    job.fill(5)
    job.run()
    job.check_complete(openai, 5)
    assert [row["purpose"] for row in openai.files()].count("batch") == 1


def test_ledger_of_another_collection_is_refused(tmp_path: Path) -> None:
    """Else answers would be applied to documents of another collection with the same ids."""
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        job_id = ledger.job_id("db.items by ai_status")
        assert ledger.job_id("db.items by ai_status") == job_id
        with pytest.raises(JobValidationError, match="--state-dir"):
            ledger.job_id("db.others by ai_status")


def test_wait_longer_than_the_maximum_is_ignored() -> None:
    """It was written by a clock that was wrong."""
    shard = Shard(1, "job", ShardState.UPLOADED, "0", 1, 1, 1, "m", not_before=time.time() + 90_000)
    assert wait_left_s(shard) == 0
    assert wait_left_s(dataclasses.replace(shard, not_before=time.time() + 90)) > 60


# The ledger as the version before the packages wrote it.
OLD_LEDGER = """
CREATE TABLE job (job_id TEXT NOT NULL, source TEXT NOT NULL) STRICT;
CREATE TABLE shards (
    number INTEGER PRIMARY KEY, job_id TEXT NOT NULL, state TEXT NOT NULL, sha256 TEXT NOT NULL, lines INTEGER NOT NULL,
    bytes INTEGER NOT NULL, tokens INTEGER NOT NULL, model TEXT NOT NULL, file_id TEXT, batch_id TEXT, status TEXT,
    output_file_id TEXT, error_file_id TEXT, problem TEXT, bad_lines TEXT NOT NULL DEFAULT '',
    tries INTEGER NOT NULL DEFAULT 1, not_before REAL NOT NULL DEFAULT 0, created_at REAL NOT NULL,
    create_asked_at REAL, ended_at REAL
) STRICT;
CREATE TABLE items (
    custom_id TEXT PRIMARY KEY, shard INTEGER NOT NULL, document_id TEXT NOT NULL, attempt INTEGER NOT NULL,
    state TEXT NOT NULL, code TEXT, retryable INTEGER NOT NULL DEFAULT 0
) STRICT;
INSERT INTO job VALUES ('job6e25eaad402c', '{source}');
INSERT INTO shards (number, job_id, state, sha256, lines, bytes, tokens, model, created_at)
VALUES (1, 'job6e25eaad402c', 'planned', '{sha256}', 2, {bytes}, 30, 'gpt-4o-mini', 1795000000.5);
INSERT INTO items (custom_id, shard, document_id, attempt, state)
VALUES ('{first}', 1, '{{"$numberInt": "0"}}', 1, 'submitted'), ('{second}', 1, '{{"$numberInt": "1"}}', 1, 'submitted');
"""


def test_state_directory_of_the_version_before_is_resumed(job: Job, openai: FakeOpenAI) -> None:
    """Its planned file is sent under its own name, and its claims are honoured."""
    job.fill(2)
    custom_ids = [f"job6e25eaad402c:{'A' * 21}{number}:1" for number in range(2)]
    lines = []
    for number, custom_id in enumerate(custom_ids):
        info = {
            "job_id": "job6e25eaad402c",
            "custom_id": custom_id,
            "attempts": 1,
            "claimed_at": dt.datetime.now(dt.UTC),
        }
        change = {"$set": {"ai_status": "in_progress", "processing_info": info}}
        job.documents.update_one({"_id": number}, change)
        body = {"model": "gpt-4o-mini", "messages": [{"role": "user", "content": f"Summarise: text {number}"}]}
        line = {"custom_id": custom_id, "method": "POST", "url": "/v1/chat/completions", "body": body}
        lines.append(json.dumps(line) + "\n")
    content = "".join(lines).encode()
    sha256 = hashlib.sha256(content).hexdigest()
    state = job.folder / "state"
    state.mkdir()
    (state / f"job6e25eaad402c_00001_{sha256[:16]}.jsonl").write_bytes(content)
    values = {"source": f"{job.database}.items by ai_status", "sha256": sha256, "bytes": len(content)}
    with closing(sqlite3.connect(state / "ledger.sqlite")) as ledger:
        ledger.executescript(OLD_LEDGER.format(**values, first=custom_ids[0], second=custom_ids[1]))
    job.run()
    job.check_complete(openai, 2)
    assert sorted(job.documents.distinct("processing_info.custom_id")) == custom_ids
    assert [batch["metadata"]["job"] for batch in openai.batches()] == ["job6e25eaad402c"]


def test_lone_surrogate_in_answer_is_replaced() -> None:
    """The answer was paid for and is usable."""
    body = rb'{"choices": [{"message": {"content": "good \ud83d day"}, "finish_reason": "stop"}]}'
    line = parse_line(b'{"custom_id": "a", "response": {"status_code": 200, "body": ' + body + b'}, "error": null}')
    assert line is not None
    assert (line.state, line.content) == (ItemState.OK, "good ? day")
    assert re.fullmatch(r"[\x20-\x7e]+", line.content or "")


@pytest.mark.slow
def test_document_that_has_ended_gets_a_full_set_of_attempts(job: Job, openai: FakeOpenAI) -> None:
    """One that is asked again after each change, and one that an operator makes pending again after its failure."""
    job.batch = {"max_retries": 2}
    job.fill(2)
    for _ in range(2):
        job.run()
        job.documents.update_many({}, {"$set": {"ai_status": "pending"}})
    openai.configure(faults=[{"kind": "line_status", "status": 500, "when": {"text": 'text 1"'}, "times": 3}])
    assert job.run().failed == 1
    assert job.documents.find_one({"_id": 1})["processing_info"]["attempts"] == 2  # type: ignore[index]
    job.documents.update_one({"_id": 1}, {"$set": {"ai_status": "pending"}})
    job.run()
    job.check(openai)
    assert job.statuses() == {"completed": 2}
    assert job.documents.find_one({"_id": 1})["processing_info"]["attempts"] == 2  # type: ignore[index]


@pytest.mark.slow
def test_unsent_file_whose_documents_are_pending_again_is_not_sent(job: Job, openai: FakeOpenAI) -> None:
    """Another program, or the operator, has set their status: they are sent once, in another file."""
    job.fill(12)
    openai.configure(faults=[{"kind": "bad_request_400", "when": {"route": "files.create"}}])
    assert job.cli("submit").code == 2
    openai.configure(faults=[])
    job.documents.update_many({"_id": {"$lt": 5}}, {"$set": {"ai_status": "pending"}})
    assert job.cli("run").code == 0
    job.check(openai)
    assert job.statuses() == {"completed": 12}
    assert openai.stats()["lines_billed"] == 12


@pytest.mark.slow
def test_job_of_another_server_is_refused_and_loses_no_answer(job: Job, openai: FakeOpenAI) -> None:
    """The same database and collection names, and even the same documents, but none of them was sent from there."""
    job.fill(5)
    assert job.cli("submit").code == 0
    own = job.documents.rename("own")
    assert own["ok"]
    job.fill(5)
    for action in ("poll", "run", "cancel"):
        refused = job.cli(action)
        assert refused.code == 2
        assert "MONGODB_URI" in refused.err
    assert job.statuses() == {"pending": 5}
    job.client[job.database]["own"].rename(job.collection, dropTarget=True)
    assert job.cli("run").code == 0
    job.check_complete(openai, 5)

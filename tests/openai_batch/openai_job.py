"""A document job on a real MongoDB and the fake OpenAI: the processor and the command line, in this process or its own."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import io
import json
import logging
import os
import sqlite3
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from pydantic import SecretStr
from pymongo import MongoClient
from pymongo.collection import Collection

import cli
from config import load_settings
from config.settings import known_environment_names
from openai_batch import (
    AppConfig,
    BatchConfig,
    DatabaseConfig,
    DocumentBatchProcessor,
    DocumentFields,
    JobResult,
    OpenAIConfig,
    PromptConfig,
    SchemaConfig,
)
from openai_batch.job_context import Times
from tests.fakes.fake_openai import FakeOpenAI
from tests.forked_process import Ended, ForkedProcess, run_forked

ROOT = Path(__file__).parents[2]
SCHEMA = """
from openai_batch import BatchConfig, DocumentFields, PromptConfig, SchemaConfig

schema_config = SchemaConfig()
fields = DocumentFields(field_map={"text": "text"})
prompts = PromptConfig(user_prompt_template="Summarise: {{ text }}")
batch = BatchConfig(batch_size=7, max_lines=10)
"""
SENT = "sent.jsonl"
LINES_PER_SHARD = 10
MAX_ATTEMPTS = 3
END_S = 90.0
# Short waits; those for files and batches that do come are long, so that no test depends on the speed of the machine.
TIMES = Times(
    poll_s=0.02, adopt_wait_s=1.5, token_wait_s=0.1, files_late_s=60.0, unreachable_limit_s=20.0, rate_wait_s=0.3
)

Document = dict[str, Any]


@dataclass
class Place:
    """The place where a job works; picklable, so that it can be passed to another process."""

    uri: str
    database: str
    url: str
    folder: Path
    batch: dict[str, Any] = field(default_factory=dict)
    schema: dict[str, Any] = field(default_factory=dict)
    times: Times = TIMES
    collection: str = "items"

    def config(self) -> AppConfig:
        """Return the job: a template over ``text``, shards of LINES_PER_SHARD."""
        batch = {"batch_size": 7, "max_lines": LINES_PER_SHARD, "max_retries": MAX_ATTEMPTS, "poll_interval": 1.0}
        return AppConfig(
            schema_config=SchemaConfig(**self.schema),
            fields=DocumentFields(field_map={"text": "text"}),
            prompts=PromptConfig(user_prompt_template="Summarise: {{ text }}"),
            database=DatabaseConfig(uri=SecretStr(self.uri), name=self.database, collection=self.collection),
            openai=OpenAIConfig(base_url=self.url, api_key=SecretStr("sk-test")),
            batch=BatchConfig(**{**batch, **self.batch}),
        )

    def processor(self) -> DocumentBatchProcessor:
        """Return the job, with its state in the folder ``state``."""
        settings = load_settings(None, mongodb_uri=self.uri, db_name=self.database, mongodb_backoff_s=0.05)
        return DocumentBatchProcessor(
            config=self.config(), settings=settings, state_dir=self.folder / "state", times=self.times
        )


class Job(Place):
    """A collection, and the job on it. Use in ``with``."""

    def __enter__(self) -> Job:
        self.client = MongoClient[Document](self.uri, tz_aware=True)
        self.documents: Collection[Document] = self.client[self.database][self.collection]
        self.schema_file = self.folder / "schema.py"
        self.schema_file.write_text(SCHEMA, encoding="utf-8")
        self.settings = {
            "OPENAI_API_KEY": "sk-canary-0123456789",
            "OPENAI_BASE_URL": self.url,
            "MONGODB_URI": self.uri,
            "MONGODB_DB": self.database,
            "MONGODB_SOURCE_COLLECTION": self.collection,
            "BATCH_FILES_DIR": str(self.folder / "batch_files"),
            "POLL_INTERVAL": "0.05",
        }
        return self

    def __exit__(self, *_: object) -> None:
        self.client.close()

    def place(self) -> Place:
        """Return what another process needs to know."""
        return Place(self.uri, self.database, self.url, self.folder, self.batch, self.schema, self.times)

    def fill(self, count: int = 25, **fields: Any) -> None:
        """Insert *count* more pending documents."""
        start = self.documents.count_documents({})
        self.documents.insert_many(
            {"_id": number, "ai_status": "pending", "text": f"text {number}"} | fields
            for number in range(start, start + count)
        )

    # The processor, in this process

    def run(self, limit: int | None = None) -> JobResult:
        """Work until nothing is pending."""
        return asyncio.run(asyncio.wait_for(self.processor().process_pending_documents_async(limit), END_S))

    # The command line

    def environment(self, **settings: str) -> dict[str, str]:
        """Return the environment of a command; *settings* take precedence."""
        own = {name: value for name, value in os.environ.items() if name not in known_environment_names()}
        return own | {"PYTHONPATH": str(ROOT)} | self.settings | settings

    def enter(self, monkeypatch: pytest.MonkeyPatch, **settings: str) -> None:
        """Give this process the environment and the folder of the job."""
        for name in known_environment_names():
            monkeypatch.delenv(name, raising=False)
        for name, value in (self.settings | settings).items():
            monkeypatch.setenv(name, value)
        monkeypatch.chdir(self.folder)

    def command(self, action: str, *flags: str) -> list[str]:
        """Return the command line of *action*."""
        given = () if "--schema" in flags else ("--schema", str(self.schema_file))
        state = () if "--state-dir" in flags else ("--state-dir", "state")
        return [str(ROOT / "cli.py"), "openai-batch", action, *given, *state, *flags]

    def cli(self, action: str, *flags: str, **settings: str) -> Ended:
        """Run one action to its end, in this process."""
        with in_process(self.environment(**settings), self.folder) as (out, err):
            try:
                code = cli.main(self.command(action, *flags)[1:])
            except SystemExit as exc:  # argparse
                code = int(exc.code or 0)
        return Ended(code, out.getvalue(), err.getvalue())

    @contextmanager
    def started(self, action: str, *flags: str, **settings: str) -> Iterator[ForkedProcess]:
        """Start one action in a separate process; it is killed at the end."""
        files = (self.folder / f"{time.monotonic_ns()}.out", self.folder / f"{time.monotonic_ns()}.err")
        command = self.command(action, *flags)
        with ForkedProcess(command, self.environment(**settings), self.folder, files) as process:
            yield process

    def script(self, *command: str, **settings: str) -> subprocess.CompletedProcess[str]:
        """Run a Python program in a separate process, to its end."""
        return run_forked(command, self.environment(**settings), self.folder, END_S)

    # What is left behind

    def statuses(self) -> dict[str, int]:
        """Return how many documents have each status."""
        return dict(Counter(document["ai_status"] for document in self.documents.find({}, {"ai_status": 1})))

    def bodies(self) -> list[Document]:
        """Return the body of each line that reached a fake with a ``reply`` of job_replies."""
        path = self.folder / SENT
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def rows(self, query: str) -> list[Any]:
        """Query the ledger without the product."""
        with closing(sqlite3.connect(self.folder / "state/ledger.sqlite")) as ledger:
            return ledger.execute(query).fetchall()

    def shards(self) -> list[dict[str, int]]:
        """Return, for each shard, its lines and how its items ended."""
        return [
            {
                "submitted": lines,
                **dict(self.rows(f"SELECT state, COUNT(*) FROM items WHERE shard = {number} GROUP BY state")),
            }
            for number, lines in self.rows("SELECT number, lines FROM shards ORDER BY number")
        ]

    def total(self) -> Counter[str]:
        """Return the sum of ``shards``."""
        return sum((Counter(shard) for shard in self.shards()), Counter())

    def check(self, fake: FakeOpenAI) -> None:
        """Check that everything ended, each shard adds up, no line was paid for twice and no file is left."""
        for shard in self.shards():
            submitted = shard.pop("submitted")
            assert set(shard) <= {"ok", "failed", "expired", "cancelled", "missing"}
            assert submitted == sum(shard.values()), shard
        assert [state for (state,) in self.rows("SELECT DISTINCT state FROM shards")] in ([], ["cleaned"])
        for document in self.documents.find():
            check_document(document)
        made = [tuple(sorted(batch["metadata"].items())) for batch in fake.batches()]
        assert len(made) == len(set(made)), "a batch was created twice"
        stats = fake.stats()
        assert stats["internal_errors"] == 0
        assert stats["max_billed_per_line"] <= 1
        assert [path.name for path in (self.folder / "state").glob("*.jsonl*")] == []
        assert [path.name for path in (self.folder / "state").glob("*.part")] == []
        assert [row["id"] for row in fake.files() if row["purpose"] == "batch" and not row.get("deleted")] == []

    def check_complete(self, fake: FakeOpenAI, documents: int = 25) -> None:
        """Check that everything was completed at the first attempt and paid for once."""
        self.check(fake)
        assert self.statuses() == {"completed": documents}
        assert self.documents.count_documents({"processing_info.attempts": 1}) == documents
        stats, shards = fake.stats(), self.shards()
        assert stats["batches_created"] == len(shards)
        assert stats["max_billed_per_body"] == 1
        assert stats["lines_billed"] == documents
        assert sum(shard["submitted"] for shard in shards) == documents


@contextmanager
def in_process(environment: dict[str, str], folder: Path) -> Iterator[tuple[io.StringIO, io.StringIO]]:
    """Lend this process *environment* and *folder*; yield what is written to stdout and stderr meanwhile."""
    root, thresholds = logging.getLogger(), gc.get_threshold()
    handlers, level = list(root.handlers), root.level
    out, err = io.StringIO(), io.StringIO()
    try:
        with (
            mock.patch.dict(os.environ, environment, clear=True),
            contextlib.chdir(folder),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
        ):
            yield out, err
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
        gc.set_threshold(*thresholds)


@contextmanager
def replying_job(uri: str, database: str, folder: Path, reply: str) -> Iterator[tuple[Job, FakeOpenAI]]:
    """Yield a job with a separate fake whose answers are those of the function *reply* of job_replies."""
    with mock.patch.dict(os.environ, {"TEST_SENT_FILE": str(folder / SENT)}):
        fake = FakeOpenAI(polls_until_done=1, reply=f"@tests.openai_batch.job_replies:{reply}")
        with fake, Job(uri, database, fake.url, folder) as job:
            yield job, fake


def times_with(**changes: float) -> Times:
    """Return TIMES with *changes*."""
    return replace(TIMES, **changes)


def check_document(document: Document) -> None:
    """Check that a document has ended and says how."""
    info = document["processing_info"]
    assert document["ai_status"] in ("completed", "failed")
    if "custom_id" not in info:  # it got no request
        assert document["ai_status"] == "failed"
        return
    assert 1 <= info["attempts"] <= MAX_ATTEMPTS
    assert info["claimed_at"]
    if document["ai_status"] == "completed":
        assert document["event_response"]["talking_points"]
        assert info["batch_id"]
        assert info["completed_at"] >= info["claimed_at"]
        assert "error" not in info
    else:
        assert info["error"]
        assert info["failed_at"] >= info["claimed_at"]

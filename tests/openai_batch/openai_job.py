"""A document job on a real MongoDB and the fake OpenAI, in this process, and a judge of what it left behind."""

from __future__ import annotations

import asyncio
import sqlite3
from collections import Counter
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import SecretStr
from pymongo import MongoClient
from pymongo.collection import Collection

from config import load_settings
from openai_batch import (
    AppConfig,
    BatchConfig,
    DatabaseConfig,
    DocumentBatchProcessor,
    DocumentFields,
    OpenAIConfig,
    PromptConfig,
    SchemaConfig,
)
from openai_batch.processor import JobResult
from openai_batch.shard_sending import Times
from tests.fakes.fake_openai import FakeOpenAI

LINES_PER_SHARD = 10
MAX_ATTEMPTS = 3
# Waits of a test, not of production.
TIMES = Times(
    poll_s=0.02, adopt_wait_s=1.5, token_wait_s=0.1, files_late_s=0.4, unreachable_limit_s=20.0, rate_wait_s=0.3
)

Document = dict[str, Any]


@dataclass
class Place:
    """What a job is pointed to; picklable, so that a process of its own can be given it."""

    uri: str
    database: str
    url: str
    folder: Path
    batch: dict[str, Any] = field(default_factory=dict)
    schema: dict[str, Any] = field(default_factory=dict)
    times: Times = TIMES

    def config(self) -> AppConfig:
        """Return the job: a template over ``text``, shards of LINES_PER_SHARD."""
        batch = {"batch_size": 7, "max_lines": LINES_PER_SHARD, "max_retries": MAX_ATTEMPTS, "poll_interval": 1.0}
        return AppConfig(
            schema_config=SchemaConfig(**self.schema),
            fields=DocumentFields(field_map={"text": "text"}),
            prompts=PromptConfig(user_prompt_template="Summarise: {{ text }}"),
            database=DatabaseConfig(uri=SecretStr(self.uri), name=self.database, collection="items"),
            openai=OpenAIConfig(base_url=self.url, api_key=SecretStr("sk-test")),
            batch=BatchConfig(**{**batch, **self.batch}),
        )

    def processor(self, state: str = "state") -> DocumentBatchProcessor:
        """Return the job at work in the folder *state*."""
        settings = load_settings(None, mongodb_uri=self.uri, db_name=self.database, mongodb_backoff_s=0.05)
        processor = DocumentBatchProcessor(config=self.config(), settings=settings, state_dir=self.folder / state)
        processor.times = self.times
        return processor


class Job(Place):
    """A collection with pending documents, and the job on it."""

    def open(self) -> Job:
        """Connect; ``close`` ends it."""
        self.client = MongoClient[Document](self.uri)
        self.documents: Collection[Document] = self.client[self.database]["items"]
        return self

    def close(self) -> None:
        """Close the client of the test."""
        self.client.close()

    def place(self) -> Place:
        """Return what another process needs to know."""
        return Place(self.uri, self.database, self.url, self.folder, self.batch, self.schema, self.times)

    def fill(self, count: int = 25) -> None:
        """Insert *count* pending documents."""
        self.documents.insert_many(
            [{"_id": number, "ai_status": "pending", "text": f"text {number}"} for number in range(count)]
        )

    def run(self, limit: int | None = None) -> JobResult:
        """Work until nothing is pending."""
        return asyncio.run(asyncio.wait_for(self.processor().process_pending_documents_async(limit), 60))

    def statuses(self) -> dict[str, int]:
        """Return how many documents have each status."""
        return dict(Counter(document["ai_status"] for document in self.documents.find({}, {"ai_status": 1})))

    def rows(self, query: str) -> list[Any]:
        """Ask the ledger by other means than the product."""
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
        """Everything ended; each shard adds up; no line was paid for twice; nothing is left in files here or there."""
        for shard in self.shards():
            submitted = shard.pop("submitted")
            assert set(shard) <= {"ok", "failed", "expired", "cancelled", "missing"}
            assert submitted == sum(shard.values()), shard
        assert [state for (state,) in self.rows("SELECT DISTINCT state FROM shards")] in ([], ["cleaned"])
        for document in self.documents.find():
            check_document(document)
        made = [tuple(sorted(batch["metadata"].items())) for batch in fake.batches()]
        assert len(made) == len(set(made)), "a batch was made a second time"
        stats = fake.stats()
        assert stats["internal_errors"] == 0
        assert stats["max_billed_per_line"] <= 1
        assert [path.name for path in (self.folder / "state").glob("*.jsonl*")] == []
        assert [path.name for path in (self.folder / "state").glob("*.part")] == []
        assert [row["id"] for row in fake.files() if row["purpose"] == "batch" and not row.get("deleted")] == []


def check_document(document: Document) -> None:
    """A document has ended and says how."""
    info = document["processing_info"]
    assert document["ai_status"] in ("completed", "failed")
    if "custom_id" not in info:  # no request was made of it
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

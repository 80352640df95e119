"""A collection with documents, a schema file, and real ``cli.py openai-batch`` processes that work on it."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pymongo import MongoClient

from config.settings import known_environment_names
from tests.fakes.fake_openai import FakeOpenAI
from tests.forked_process import ForkedProcess

ROOT = Path(__file__).parents[2]
SCHEMA = """
from openai_batch import BatchConfig, DocumentFields, PromptConfig, SchemaConfig

schema_config = SchemaConfig()
fields = DocumentFields(field_map={"text": "text"})
prompts = PromptConfig(system_prompt="Be short.", user_prompt_template="Summarise: {{ text }}")
batch = BatchConfig(batch_size=7, max_lines=10)
"""
END_S = 90.0


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """What it printed with ``--json``."""
        return json.loads(self.out)


class JobSite:
    """What a command is pointed to; *environment* may be changed between two of them."""

    def __init__(self, uri: str, name: str, folder: Path, url: str) -> None:
        self.client = MongoClient[dict[str, Any]](uri)
        self.documents = self.client[name]["items"]
        self.folder = folder
        self.schema = folder / "schema.py"
        self.schema.write_text(SCHEMA, encoding="utf-8")
        own = {key: value for key, value in os.environ.items() if key not in known_environment_names()}
        self.environment = own | {
            "PYTHONPATH": str(ROOT),
            "OPENAI_API_KEY": "sk-test",
            "OPENAI_BASE_URL": url,
            "MONGODB_URI": uri,
            "MONGODB_DB": name,
            "MONGODB_SOURCE_COLLECTION": "items",
            "POLL_INTERVAL": "0.05",
        }

    def fill(self, count: int, **fields: Any) -> None:
        """Insert *count* pending documents more."""
        start = self.documents.count_documents({})
        self.documents.insert_many(
            {"_id": number, "ai_status": "pending", "text": f"text {number}"} | fields
            for number in range(start, start + count)
        )

    def command(self, action: str, *flags: str) -> list[str]:
        """Return the command line."""
        return [
            *(str(ROOT / "cli.py"), "openai-batch", action),
            *("--schema", str(self.schema), "--state-dir", "state", *flags),
        ]

    def run(self, action: str, *flags: str, **changes: str) -> Ended:
        """Run one action to its end; *changes* are variables of its own."""
        with self.started(action, *flags, **changes) as process:
            out, err = process.communicate(timeout=END_S)
        return Ended(process.wait(), out, err)

    @contextmanager
    def started(self, action: str, *flags: str, **changes: str) -> Iterator[ForkedProcess]:
        """Start one action; what is left of it is killed at the end."""
        files = tuple(self.folder / f"{time.monotonic_ns()}.{name}" for name in ("out", "err"))
        with ForkedProcess(self.command(action, *flags), self.environment | changes, self.folder, files) as process:
            yield process

    def counted(self) -> Mapping[str, int]:
        """Return how many documents have each status."""
        return {row["_id"]: row["n"] for row in self.documents.aggregate([{"$sortByCount": "$ai_status"}, _AS_N])}


_AS_N = {"$project": {"n": "$count"}}


def stopped(process: ForkedProcess, number: int = signal.SIGTERM) -> Ended:
    """Send *process* a signal and wait for its end."""
    process.send_signal(number)
    out, err = process.communicate(timeout=END_S)
    return Ended(process.wait(), out, err)


def until(met: Any, what: str) -> None:
    """Wait until *met* holds; the state of another process has no event here."""
    end = time.monotonic() + END_S
    while not met():
        assert time.monotonic() < end, what
        time.sleep(0.02)


@contextmanager
def open_job_site(uri: str, name: str, folder: Path, fake: FakeOpenAI) -> Iterator[JobSite]:
    """Open a site whose commands ask *fake*."""
    site = JobSite(uri, name, folder, fake.url)
    with site.client:
        yield site

"""What document jobs are pointed to in tests: a real MongoDB, the fake OpenAI, settings by the environment alone."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from pymongo import MongoClient

from config.settings import known_environment_names
from tests.fakes.fake_openai import FakeOpenAI
from tests.forked_process import run_forked

SENT = "sent.jsonl"
ROOT = Path(__file__).parents[2]


class JobSite:
    """A collection, and the environment that names it."""

    def __init__(
        self, client: MongoClient[dict[str, Any]], uri: str, name: str, folder: Path, fake: FakeOpenAI
    ) -> None:
        self.client, self.fake, self.folder = client, fake, folder
        self.documents = client[name]["items"]
        self.settings = {
            "OPENAI_API_KEY": "sk-canary-0123456789",
            "OPENAI_BASE_URL": fake.url,
            "MONGODB_URI": uri,
            "MONGODB_DB": name,
            "MONGODB_SOURCE_COLLECTION": "items",
            "BATCH_FILES_DIR": str(folder / "batch_files"),
            "POLL_INTERVAL": "0.05",
        }

    def enter(self, monkeypatch: pytest.MonkeyPatch, **settings: str) -> None:
        """Make the environment and the folder those of the site."""
        for name in known_environment_names():
            monkeypatch.delenv(name, raising=False)
        for name, value in (self.settings | settings).items():
            monkeypatch.setenv(name, value)
        monkeypatch.chdir(self.folder)

    def run(self, *command: str, **settings: str) -> subprocess.CompletedProcess[str]:
        """Run a Python program of the project with the site's environment, to its end."""
        own = {name: value for name, value in os.environ.items() if name not in known_environment_names()}
        environment = own | self.settings | settings | {"PYTHONPATH": str(ROOT)}
        return run_forked(command, environment, self.folder, 100.0)

    def bodies(self) -> list[dict[str, Any]]:
        """Return the body of each line that reached the model; the fake was started with ``reply`` of job_replies."""
        path = self.folder / SENT
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@contextmanager
def open_job_site(uri: str, name: str, folder: Path, **knobs: Any) -> Iterator[JobSite]:
    """Yield a site; *knobs* are those of the fake."""
    with (
        pytest.MonkeyPatch.context() as environment,
        MongoClient[dict[str, Any]](uri, tz_aware=True) as client,
    ):
        environment.setenv("TEST_SENT_FILE", str(folder / SENT))
        with FakeOpenAI(polls_until_done=1, **knobs) as fake:
            yield JobSite(client, uri, name, folder, fake)

"""The environment of a comparison: one mongod, one fake model server, and the same documents for both sides."""

from __future__ import annotations

import contextlib
import json
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from pymongo import MongoClient

from benchmarks.worker_process import WorkerFailedError, WorkerProcess
from classifier import Classifier
from config import load_settings, load_taxonomy
from embedded.mongod import EmbeddedMongod
from model_server.models import chat_target
from model_server.protocol import build_chat_body
from tests.fakes.fake_ollama import FakeOllama, FakeOllamaError

ROOT = Path(__file__).resolve().parent.parent
MODEL = "llama3.2:latest"
DATABASE, SOURCE, RESULTS = "benchmark", "conversation_set", "sentimental_analysis"
START_LIMIT_S = 120.0
POLL_S = 0.002

Side = Literal["product", "floor", "floor on asyncio"]


@dataclass(frozen=True)
class Run:
    """One run of one side over *documents*; all times in seconds, memory in MB of 2**20 bytes.

    ``window_s`` is from the first chat request, as the model server saw it, to the moment the last
    result can be read in MongoDB; ``cpu_from_first_s`` from that request to the end of the process;
    ``cpu_s`` and ``wall_s`` cover the process from its start to its end.
    """

    documents: int
    first_call_s: float
    window_s: float
    wall_s: float
    cpu_s: float
    cpu_from_first_s: float
    peak_mb: float
    prompts: dict[str, int]  # SHA-256 of a prompt -> number of calls
    simulated_s: float
    longest_s: float


class Stage:
    """Runs either side. Use ``open_stage``."""

    def __init__(self, folder: Path, mongod: EmbeddedMongod, fake: FakeOllama, client: MongoClient[Any]) -> None:
        self.fake = fake
        self._folder = folder
        self._mongod = mongod
        self._client = client
        self._runs = 0

    @property
    def mongodb_uri(self) -> str:
        """The address of MongoDB."""
        return self._mongod.uri

    @property
    def results_count(self) -> int:
        """The number of stored results."""
        return int(self._client[DATABASE][RESULTS].estimated_document_count())

    def fill(self, documents: Iterable[dict[str, Any]]) -> int:
        """Replace the database by *documents*; return their number."""
        self._client.drop_database(DATABASE)
        left, count = iter(documents), 0
        while page := list(islice(left, 2000)):
            self._client[DATABASE][SOURCE].insert_many(page, ordered=False)
            count += len(page)
        self._client.admin.command("fsync")
        return count

    def new_folder(self) -> Path:
        """Return an empty folder for a process; a reused folder resumes the last run."""
        self._runs += 1
        folder = self._folder / f"run_{self._runs:03d}"
        folder.mkdir()
        return folder

    def start(self, side: Side, folder: Path, concurrency: int | str) -> WorkerProcess:
        """Start *side* in *folder* on the current documents."""
        if side == "product":
            arguments = ["--mongodb-uri", self._mongod.uri, "--db-name", DATABASE, "--model", MODEL]
            arguments += ["--ollama-endpoint", self.fake.url, "--max-concurrent", str(concurrency)]
            return WorkerProcess([ROOT / "cli.py", *arguments], folder)
        job = {
            "mongodb_uri": self._mongod.uri,
            "db_name": DATABASE,
            "source_collection": SOURCE,
            "results_collection": RESULTS,
            "url": f"{self.fake.url}/api/chat",
            "concurrency": concurrency,
            "loop": "uvloop" if side == "floor" else "asyncio",
            **_constant_part(),
        }
        (folder / "job.json").write_text(json.dumps(job), encoding="utf-8")
        return WorkerProcess([ROOT / "benchmarks" / "floor.py", folder / "job.json"], folder)

    def measure(self, side: Side, count: int, concurrency: int, limit_s: float) -> Run:
        """Run *side* on the *count* current documents to its end.

        Raises:
            WorkerFailedError: It failed, or some document was not asked and stored exactly once.
        """
        self.fake.reset()
        with self.start(side, self.new_folder(), concurrency) as worker:
            self.await_gauge(worker, "chat_requests", 1, START_LIMIT_S)
            cpu_at_first_s = worker.cpu_s
            self.await_gauge(worker, "answered", count, limit_s)
            while self.results_count < count and not worker.has_ended:
                time.sleep(POLL_S)
            last_write_s = time.monotonic()
            usage = worker.wait(limit_s)
        stats, first_s = self.fake.stats(), min(record["start_s"] for record in self.fake.requests())
        run = Run(
            documents=count,
            first_call_s=first_s - worker.start_s,
            window_s=last_write_s - first_s,
            wall_s=usage.wall_s,
            cpu_s=usage.cpu_s,
            cpu_from_first_s=usage.cpu_s - cpu_at_first_s,
            peak_mb=worker.peak_mb,
            prompts=stats["calls_by_sha"],
            simulated_s=stats["simulated_s_sum"],
            longest_s=stats["simulated_s_max"],
        )
        if self.results_count != count or len(run.prompts) != count or set(run.prompts.values()) != {1}:
            raise WorkerFailedError(f"{side}: {self.results_count} results and {len(run.prompts)} prompts for {count}")
        return run

    def await_gauge(self, worker: WorkerProcess, gauge: str, at_least: int, limit_s: float) -> float:
        """Wait until *gauge* of the fake is *at_least*; return the ``time.monotonic`` of that moment.

        Raises:
            WorkerFailedError: *worker* ended before, or it took longer than *limit_s*.
        """
        deadline = time.monotonic() + limit_s
        while time.monotonic() < deadline:
            with contextlib.suppress(FakeOllamaError):
                self.fake.wait_for(gauge, at_least, timeout_s=2.0)
                return time.monotonic()
            if worker.has_ended:
                raise WorkerFailedError(f"it ended before {gauge} was {at_least}: {worker.last_words()}")
        raise WorkerFailedError(f"{gauge} was not {at_least} within {limit_s:.0f} s: {worker.last_words()}")


@contextlib.contextmanager
def open_stage(**knobs: Any) -> Iterator[Stage]:
    """Open a stage whose model server has *knobs*; clean up afterwards, even after an error."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="benchmark-")))
        mongod = stack.enter_context(EmbeddedMongod(folder / "mongod"))
        fake = stack.enter_context(FakeOllama(**knobs))
        client: MongoClient[Any] = stack.enter_context(MongoClient(mongod.uri))
        yield Stage(folder, mongod, fake, client)


def require_same_prompts(one: Run, other: Run) -> None:
    """Raise WorkerFailedError if the two sides sent different prompts."""
    if one.prompts != other.prompts:
        raise WorkerFailedError("the two sides sent different prompts, so their figures cannot be compared")


def _constant_part() -> dict[str, Any]:
    """Return the constant part of the product's requests, built by its own code."""
    classifier = Classifier(load_taxonomy(None))
    target = chat_target(load_settings(None, ollama_model=MODEL), MODEL)
    body = json.loads(build_chat_body(target, [], classifier.schema_json))
    del body["messages"]
    return {"system_prompt": classifier.system_prompt, "body": body}

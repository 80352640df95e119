"""A job that is killed at every step of its protocol, and started again: one batch per shard, every document ended."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from config.settings import known_environment_names
from openai_batch import answers
from openai_batch.job_store import JobStore
from tests.crash.faulty_job import run_killed
from tests.fakes.fake_openai import FakeOpenAI
from tests.forked_process import ForkedProcess
from tests.openai_batch.openai_job import Job

ROOT = Path(__file__).parents[2]
DOCUMENTS = 25
SHARDS = 3

POINTS = [
    *(
        ("job_store.JobStore.claim:before", 1),
        ("job_store.JobStore.claim:after", 1),
        ("job_store.JobStore.claim:after", 2),
    ),
    *(
        ("shards.ShardWriter.add:after", 3),
        ("shards.ShardWriter.finish:before", 1),
        ("shards.ShardWriter.finish:after", 2),
    ),
    *(("ledger.Ledger.plan:before", 1), ("ledger.Ledger.plan:after", 1), ("ledger.Ledger.plan:after", 2)),
    *(("openai_client.OpenAIFiles.upload:before", 1), ("openai_client.OpenAIFiles.upload:after", 1)),
    *(("ledger.Ledger.advance[uploaded]:before", 2), ("ledger.Ledger.advance[uploaded]:after", 2)),
    *(("ledger.Ledger.advance[creating]:before", 1), ("ledger.Ledger.advance[creating]:after", 2)),
    *(("openai_client.OpenAIFiles.create:before", 1), ("openai_client.OpenAIFiles.create:after", 1)),
    ("openai_client.OpenAIFiles.create:after", 3),
    *(("ledger.Ledger.advance[created]:before", 2), ("ledger.Ledger.advance[created]:after", 1)),
    *(("ledger.Ledger.advance[terminal]:before", 1), ("ledger.Ledger.advance[terminal]:after", 1)),
    *(("openai_client.OpenAIFiles.download:before", 1), ("openai_client.OpenAIFiles.download:after", 1)),
    *(("ledger.Ledger.advance[downloaded]:before", 1), ("ledger.Ledger.advance[downloaded]:after", 2)),
    *(("openai_client.OpenAIFiles.download:after", 2), ("answers.Answers.apply:before", 1)),
    *(("job_store.JobStore.end:before", 1), ("job_store.JobStore.end:after", 1), ("job_store.JobStore.end:after", 2)),
    *(("ledger.Ledger.settle:before", 1), ("ledger.Ledger.settle:after", 1)),
    *(("ledger.Ledger.advance[applied]:before", 1), ("ledger.Ledger.advance[applied]:after", 1)),
    *(("openai_client.OpenAIFiles.delete_file:before", 1), ("openai_client.OpenAIFiles.delete_file:after", 2)),
    *(("ledger.Ledger.advance[cleaned]:before", 1), ("ledger.Ledger.advance[cleaned]:after", 2)),
]

# What goes wrong beside the kill.
LOST = {"kind": "answer_lost", "when": {"route": "batches.create"}, "times": 1}
COMBINED = {
    "create lost, killed when it is known": (
        [LOST],
        [("ledger.Ledger.advance[created]:before", 1), ("ledger.Ledger.advance[created]:after", 1)],
    ),
    "create killed twice": (
        [],
        [("openai_client.OpenAIFiles.create:after", 1), ("openai_client.OpenAIFiles.find_batch:before", 1)],
    ),
    "adopted, killed, adopted": (
        [],
        [("openai_client.OpenAIFiles.create:after", 2), ("openai_client.OpenAIFiles.find_batch:after", 1)],
    ),
    "upload lost and killed": (
        [{"kind": "answer_lost", "when": {"route": "files.create"}, "times": 1}],
        [("openai_client.OpenAIFiles.find_file:after", 2), ("openai_client.OpenAIFiles.upload:after", 1)],
    ),
    "killed while it downloads": (
        [{"kind": "slow", "when": {"route": "files.content"}, "times": 1, "bytes_per_s": 20_000}],
        [("openai_client.OpenAIFiles.download:before", 1), ("openai_client.OpenAIFiles.download:after", 1)],
    ),
    "killed in three steps of one end": (
        [],
        [("job_store.JobStore.end:after", 1), ("ledger.Ledger.settle:before", 1), ("ledger.Ledger.settle:after", 1)],
    ),
    "killed in the middle of recovery": (
        [],
        [("job_store.JobStore.claim:after", 2), ("job_store.JobStore.give_back:before", 1)],
    ),
}


@pytest.fixture(scope="module")
def running() -> Iterator[FakeOpenAI]:
    with FakeOpenAI(polls_until_done=2) as fake:
        yield fake


@pytest.fixture
def openai(running: FakeOpenAI) -> FakeOpenAI:
    running.reset()
    return running


@pytest.fixture
def job(mongodb_uri: str, db_name: str, tmp_path: Path, openai: FakeOpenAI) -> Iterator[Job]:
    job = Job(mongodb_uri, db_name, openai.url, tmp_path).open()
    job.fill(DOCUMENTS)
    yield job
    job.close()


def assert_complete(job: Job, fake: FakeOpenAI) -> None:
    """Everything was completed at the first attempt and paid for once."""
    job.check(fake)
    assert job.statuses() == {"completed": DOCUMENTS}
    assert job.documents.count_documents({"processing_info.attempts": 1}) == DOCUMENTS
    stats, shards = fake.stats(), job.shards()
    assert stats["batches_created"] == len(shards)
    assert stats["max_billed_per_body"] == 1
    assert stats["lines_billed"] == DOCUMENTS
    assert sum(shard["submitted"] for shard in shards) == DOCUMENTS


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Each third point in the suite; all of them with ``--kills 100`` and more, as ``make torture`` does."""
    if "nth" in metafunc.fixturenames:
        points = POINTS if metafunc.config.getoption("--kills") >= 100 else POINTS[::3]
        metafunc.parametrize(("point", "nth"), points, ids=[f"{point}-{nth}" for point, nth in points])


def test_killed_at_a_step_and_started_again(point: str, nth: int, job: Job, openai: FakeOpenAI) -> None:
    """Batches made = shards, each body billed once, every document completed."""
    assert run_killed(job.place(), point, nth) == -signal.SIGKILL
    job.run()
    assert_complete(job, openai)


@pytest.mark.parametrize(("faults", "points"), COMBINED.values(), ids=COMBINED)
def test_killed_again_and_again_among_faults(
    faults: list[dict[str, Any]], points: list[tuple[str, int]], job: Job, openai: FakeOpenAI
) -> None:
    """The start after a crash may crash, too."""
    openai.configure(faults=faults, list_lag=1)
    for point, nth in points:
        assert run_killed(job.place(), point, nth) == -signal.SIGKILL, point
    job.run()
    assert_complete(job, openai)


def test_killed_in_the_middle_of_a_page_of_answers(job: Job, openai: FakeOpenAI) -> None:
    """Half of the lines of a shard are in their documents, and the ledger knows of none."""
    assert run_killed(job.place(), "job_store.JobStore._update:after", DOCUMENTS + 5) == -signal.SIGKILL
    states = dict(job.rows("SELECT state, COUNT(*) FROM items GROUP BY state"))
    assert 0 < job.documents.count_documents({"ai_status": "completed"}) <= 10
    assert "ok" not in states
    job.run()
    assert_complete(job, openai)


class CommandLine:
    """``cli.py openai-batch`` on the same documents."""

    def __init__(self, job: Job) -> None:
        self.folder = job.folder
        schema = job.folder / "schema.py"
        schema.write_text(SCHEMA, encoding="utf-8")
        own = {name: value for name, value in os.environ.items() if name not in known_environment_names()}
        self.environment = own | {
            "OPENAI_API_KEY": "sk-test",
            "OPENAI_BASE_URL": job.url,
            "MONGODB_URI": job.uri,
            "MONGODB_DB": job.database,
            "MONGODB_SOURCE_COLLECTION": "items",
            "POLL_INTERVAL": "0.05",
        }

    def start(self, action: str = "run", *flags: str) -> ForkedProcess:
        """Start one action."""
        command = [str(ROOT / "cli.py"), "openai-batch", action, "--schema", "schema.py"]
        given = () if "--state-dir" in flags else ("--state-dir", "state")
        files = (self.folder / f"{time.monotonic_ns()}.out", self.folder / f"{time.monotonic_ns()}.err")
        return ForkedProcess([*command, *given, *flags], self.environment, self.folder, files)

    def run(self, action: str = "run", *flags: str) -> subprocess.CompletedProcess[str]:
        """Run one action to its end."""
        with self.start(action, *flags) as process:
            out, err = process.communicate(timeout=100)
            return subprocess.CompletedProcess([], process.wait(), out, err)


SCHEMA = """
from openai_batch import BatchConfig, DocumentFields, PromptConfig, SchemaConfig

schema_config = SchemaConfig()
fields = DocumentFields(field_map={"text": "text"})
prompts = PromptConfig(user_prompt_template="Summarise: {{ text }}")
batch = BatchConfig(batch_size=7, max_lines=10)
"""


def test_the_steps_apart_in_processes_of_their_own(job: Job, openai: FakeOpenAI) -> None:
    """submit, poll, status: each finds what the others left."""
    line = CommandLine(job)
    submitted = line.run("submit")
    assert submitted.returncode == 0, submitted.stderr
    assert job.statuses() == {"in_progress": DOCUMENTS}
    status = line.run("status", "--json")
    assert [batch["state"] for batch in json.loads(status.stdout)["batches"]] == ["created"] * SHARDS
    for _ in range(2):
        polled = line.run("poll")
        assert polled.returncode == 0, polled.stderr
    assert_complete(job, openai)


def test_two_runs_with_state_of_their_own_share_the_documents(job: Job, openai: FakeOpenAI) -> None:
    """No document is sent by both, and none by nobody."""
    job.documents.insert_many(
        [{"_id": number, "ai_status": "pending", "text": f"text {number}"} for number in range(DOCUMENTS, 600)]
    )
    line = CommandLine(job)
    with line.start("run", "--state-dir", "state") as one, line.start("run", "--state-dir", "other") as two:
        for process in (one, two):
            _, err = process.communicate(timeout=100)
            assert process.returncode == 0, err
    assert job.statuses() == {"completed": 600}
    assert len(job.documents.distinct("processing_info.job_id")) == 2, "one run did everything: this proves nothing"
    stats = openai.stats()
    assert (stats["lines_billed"], stats["max_billed_per_body"]) == (600, 1)


def test_a_second_run_with_the_same_state_is_turned_away(job: Job, openai: FakeOpenAI) -> None:
    """Exit code 5, and one sentence."""
    openai.configure(faults=[{"kind": "hold"}])
    line = CommandLine(job)
    with line.start() as first:
        openai.wait_for("requests:batches.retrieve", at_least=1, timeout_s=60)
        second = line.run()
        assert second.returncode == 5
        assert second.stderr.count("\n") <= 2
        assert "another" in second.stderr
        openai.configure(faults=[])
        first.terminate()
        first.communicate(timeout=60)


# What is under way -> the count of the fake that tells so, and what keeps it there.
PHASES: dict[str, tuple[str, list[dict[str, Any]]]] = {
    "uploading": ("requests:files.create", [{"kind": "hang", "when": {"route": "files.create"}}]),
    "creating": (
        "requests:batches.create",
        [{"kind": "answer_lost", "how": "hang", "when": {"route": "batches.create"}}],
    ),
    "waiting": ("requests:batches.retrieve", [{"kind": "hold", "polls": 40}]),
    "downloading": (
        "requests:files.content",
        [{"kind": "slow", "when": {"route": "files.content"}, "bytes_per_s": 100}],
    ),
    "deleting": ("requests:files.delete", [{"kind": "hang", "when": {"route": "files.delete"}}]),
}


@pytest.mark.parametrize("phase", PHASES)
def test_stopped_in_a_phase_and_started_again(phase: str, job: Job, openai: FakeOpenAI) -> None:
    """SIGTERM ends it soon, with 130; the same command goes on."""
    gauge, faults = PHASES[phase]
    openai.configure(faults=faults)
    number = signal.SIGINT if phase == "waiting" else signal.SIGTERM
    with CommandLine(job).start() as process:
        openai.wait_for(gauge, at_least=1, timeout_s=60)
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
        assert process.returncode == 130, err
    openai.configure(faults=[])
    job.run()
    assert_complete(job, openai)


@pytest.mark.parametrize(("owner", "method"), [(JobStore, "claim"), (JobStore, "end")], ids=["planning", "applying"])
def test_stopped_among_the_documents(
    owner: type, method: str, job: Job, openai: FakeOpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``stop`` in the middle of planning or applying: nothing more is begun, and the next run goes on."""
    original = getattr(owner, method)

    async def interrupted() -> None:
        processor = job.processor()
        async with processor.opened() as opened:

            async def stopping(*arguments: Any) -> Any:
                opened.run.stop.set()
                return await original(*arguments)

            monkeypatch.setattr(owner, method, stopping)
            monkeypatch.setattr(answers, "LINES_AT_ONCE", 3)
            await asyncio.wait_for(opened.run.run(opened.files), 20)

    asyncio.run(interrupted())
    monkeypatch.undo()
    assert job.documents.count_documents({"ai_status": "completed"}) <= 3, "a page of answers more was begun"
    job.run()
    assert_complete(job, openai)

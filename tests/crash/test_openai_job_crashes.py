"""A job that is killed at every step and started again: one batch per shard, every document ended."""

from __future__ import annotations

import asyncio
import signal
from typing import Any

import pytest

from openai_batch import answers
from openai_batch.job_store import JobStore
from tests.crash.faulty_job import run_killed
from tests.fakes.fake_openai import FakeOpenAI
from tests.openai_batch.openai_job import Job, times_with

DOCUMENTS = 25

POINTS = [
    *(
        ("job_store.JobStore.claim:before", 1),
        ("job_store.JobStore.claim:after", 1),
        ("job_store.JobStore.claim:after", 2),
    ),
    *(
        ("planning.ShardWriter.add:after", 3),
        ("planning.ShardWriter.finish:before", 1),
        ("planning.ShardWriter.finish:after", 2),
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

# Claims that nobody has any more, and a batch that the ledger does not know: what would be lost, or paid for twice.
USUAL_POINTS = {("job_store.JobStore.claim:after", 2), ("openai_client.OpenAIFiles.create:after", 1)}

# Faults beside the kills.
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
# Of the combinations, those in which a batch could be paid for twice.
USUAL_COMBINED = {"create lost, killed when it is known"}


@pytest.fixture(autouse=True)
def documents(job: Job) -> None:
    job.fill(DOCUMENTS)


@pytest.mark.parametrize(
    ("point", "nth"),
    [
        pytest.param(*kill, id="-".join(map(str, kill)), marks=() if kill in USUAL_POINTS else pytest.mark.thorough)
        for kill in POINTS
    ],
)
def test_run_resumes_after_kill_at_any_step(point: str, nth: int, job: Job, openai: FakeOpenAI) -> None:
    """One batch per shard, each body billed once, every document completed."""
    assert run_killed(job.place(), point, nth) == -signal.SIGKILL
    job.run()
    job.check_complete(openai)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("faults", "points"),
    [
        pytest.param(*case, id=name, marks=() if name in USUAL_COMBINED else pytest.mark.thorough)
        for name, case in COMBINED.items()
    ],
)
def test_run_resumes_after_repeated_kills_and_faults(
    faults: list[dict[str, Any]], points: list[tuple[str, int]], job: Job, openai: FakeOpenAI
) -> None:
    """A start after a crash may crash as well."""
    openai.configure(faults=faults, list_lag=1)
    job.times = times_with(adopt_wait_s=20.0)  # each batch exists and is found earlier
    for point, nth in points:
        assert run_killed(job.place(), point, nth) == -signal.SIGKILL, point
    job.run()
    job.check_complete(openai)


def test_run_resumes_after_kill_inside_a_page_of_answers(job: Job, openai: FakeOpenAI) -> None:
    """Half of a shard is in the documents, and nothing of it in the ledger."""
    assert run_killed(job.place(), "job_store.JobStore._update:after", DOCUMENTS + 5) == -signal.SIGKILL
    states = dict(job.rows("SELECT state, COUNT(*) FROM items GROUP BY state"))
    assert 0 < job.documents.count_documents({"ai_status": "completed"}) <= 10
    assert "ok" not in states
    job.run()
    job.check_complete(openai)


@pytest.mark.thorough
def test_two_runs_share_the_documents(job: Job, openai: FakeOpenAI) -> None:
    """Each document is sent by exactly one of them."""
    job.documents.insert_many(
        [{"_id": number, "ai_status": "pending", "text": f"text {number}"} for number in range(DOCUMENTS, 600)]
    )
    with job.started("run", "--state-dir", "state") as one, job.started("run", "--state-dir", "other") as two:
        for process in (one, two):
            _, err = process.communicate(timeout=100)
            assert process.returncode == 0, err
    assert job.statuses() == {"completed": 600}
    assert len(job.documents.distinct("processing_info.job_id")) == 2, "one run did everything: this proves nothing"
    stats = openai.stats()
    assert (stats["lines_billed"], stats["max_billed_per_body"]) == (600, 1)


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
USUAL_PHASES = {"creating"}


@pytest.mark.parametrize(
    "phase",
    [pytest.param(phase, marks=() if phase in USUAL_PHASES else pytest.mark.thorough) for phase in PHASES],
)
def test_run_resumes_after_a_signal_in_any_phase(phase: str, job: Job, openai: FakeOpenAI) -> None:
    """SIGTERM exits soon, with 130."""
    gauge, faults = PHASES[phase]
    openai.configure(faults=faults)
    number = signal.SIGINT if phase == "waiting" else signal.SIGTERM
    with job.started("run") as process:
        openai.wait_for(gauge, at_least=1, timeout_s=60)
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
        assert process.returncode == 130, err
    openai.configure(faults=[])
    job.run()
    job.check_complete(openai)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("owner", "method"),
    [
        pytest.param(JobStore, "claim", id="planning", marks=pytest.mark.thorough),
        pytest.param(JobStore, "end", id="applying"),
    ],
)
def test_stop_begins_nothing_new(
    owner: type, method: str, job: Job, openai: FakeOpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle of planning or applying; the next run resumes."""
    original = getattr(owner, method)

    async def interrupted() -> None:
        stop = asyncio.Event()

        async def stopping(*arguments: Any) -> Any:
            stop.set()
            return await original(*arguments)

        async with job.processor().opened(stop) as run:
            monkeypatch.setattr(owner, method, stopping)
            monkeypatch.setattr(answers, "LINES_AT_ONCE", 3)
            await asyncio.wait_for(run.run(), 20)

    asyncio.run(interrupted())
    monkeypatch.undo()
    assert job.documents.count_documents({"ai_status": "completed"}) <= 3, "a page of answers more was begun"
    job.run()
    job.check_complete(openai)

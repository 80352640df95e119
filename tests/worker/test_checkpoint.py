"""The checkpoint moves over the documents that are settled without a gap, and over nothing else."""

from __future__ import annotations

import re
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage import extended_json
from utils.batch_file_manager import BatchFiles
from worker.checkpoint import Checkpoint, LowWaterMark, RunStats
from worker.settlement import Settlement

SOURCE, WORKER = "db/source/results", "worker-1"


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 40)), max_size=120))
def test_mark_is_the_end_of_the_settled_prefix(steps: list[tuple[bool, int]]) -> None:
    """Whatever the order in which documents are read, settled and flushed."""
    mark, checkpoint = LowWaterMark(), Checkpoint(SOURCE, "job")
    tickets: list[int] = []
    settled: set[int] = set()
    for is_read, number in steps:
        if is_read or not tickets:
            tickets.append(mark.read(f"id-{len(tickets)}"))
        else:
            ticket = tickets[number % len(tickets)]
            if ticket not in settled:
                mark.settle(ticket)
                settled.add(ticket)
        if number % 3 == 0:
            mark.advance(checkpoint)
    mark.advance(checkpoint)
    prefix = next((place for place, ticket in enumerate(tickets) if ticket not in settled), len(tickets))
    assert checkpoint.has_mark == (prefix > 0)
    assert checkpoint.low_water_mark == (f"id-{prefix - 1}" if prefix else None)


def test_unsettled_document_holds_the_mark() -> None:
    """Until it is closed; then it jumps over all that was waiting."""
    mark, checkpoint = LowWaterMark(), Checkpoint(SOURCE, "job")
    tickets = [mark.read(value) for value in "abcd"]
    for place in (0, 2, 3):
        mark.settle(tickets[place])
    mark.advance(checkpoint)
    assert checkpoint.low_water_mark == "a"
    mark.settle(tickets[1])
    mark.advance(checkpoint)
    assert checkpoint.low_water_mark == "d"


def test_null_is_a_valid_mark() -> None:
    """So a mark at null is not the same as no mark."""
    mark, checkpoint = LowWaterMark(), Checkpoint(SOURCE, "job")
    assert checkpoint.has_mark is False
    mark.settle(mark.read(None))
    mark.advance(checkpoint)
    assert (checkpoint.low_water_mark, checkpoint.has_mark) == (None, True)


class NoStore:
    """A store that nothing is sent to."""

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"{name} was called")


def saved(**changes: Any) -> dict[str, Any]:
    checkpoint = Checkpoint(SOURCE, "job_1", low_water_mark="m", has_mark=True, counts={"processed": 50})
    content = extended_json.loads(extended_json.dumps(asdict(checkpoint)))
    assert isinstance(content, dict)
    return {**content, **changes}


def test_interrupted_run_is_resumed() -> None:
    """It keeps its job id and its mark; the counts restart at 0."""
    resumed = Checkpoint.resume_or_new(saved(), SOURCE, WORKER, reprocess=False)
    assert (resumed.job_id, resumed.low_water_mark, resumed.has_mark) == ("job_1", "m", True)
    assert (resumed.finished, resumed.counts, resumed.worker_id) == (False, {}, WORKER)


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(None, id="none"),
        pytest.param({}, id="empty"),
        pytest.param(saved(finished=True), id="finished"),
        pytest.param(saved(finished=None), id="finished-unknown"),
        pytest.param(saved(source="db/other/results"), id="other-source"),
        pytest.param(saved(reprocess=True), id="other-mode"),
        pytest.param(saved(job_id=5), id="odd-job-id"),
    ],
)
def test_unusable_checkpoint_starts_a_new_run(content: dict[str, Any] | None) -> None:
    """It starts from the beginning, with a new job id."""
    first, second = (Checkpoint.resume_or_new(content, SOURCE, WORKER, reprocess=False) for _ in range(2))
    assert re.fullmatch(r"job_\d{8}_\d{6}_[0-9a-f]{6}", first.job_id)
    assert first.job_id != second.job_id
    assert (first.source, first.has_mark, first.finished) == (SOURCE, False, False)


async def test_checkpoint_is_written_only_when_it_changed(tmp_path: Path) -> None:
    """A flush without progress does not touch the file; each change of counts, mark or end does."""
    files = BatchFiles(tmp_path / "batch_files")
    checkpoint = Checkpoint(SOURCE, "job_1")
    settlement = Settlement(NoStore(), files, checkpoint, replaces=False, on_rejected=lambda _result: None)
    path = files.directory / "checkpoint.json"

    async def flushed() -> int:
        await settlement.flush()
        return path.stat().st_ino  # the file is replaced, so each write makes a new one

    first = await flushed()
    assert await flushed() == first
    settlement.stats.processed += 1
    second = await flushed()
    assert second != first
    assert await flushed() == second
    settlement.mark.settle(settlement.mark.read("id-0"))
    third = await flushed()
    assert third != second
    checkpoint.finished = True
    assert await flushed() != third
    content = files.read_state("checkpoint.json")
    assert content is not None
    assert (content["low_water_mark"], content["counts"]["processed"], content["finished"]) == ("id-0", 1, True)
    assert isinstance(content["updated_at"], datetime)


def test_labels_and_reasons_are_counted() -> None:
    """By field and label; by reason."""
    stats = RunStats()
    for intent in ("Complaint", "Other", "Complaint"):
        stats.count_labels({"intent": intent, "topic": "Other", "sentiment": "Neutral", "categorization": "x"})
    stats.count_reason("empty")
    stats.count_reason("empty")
    assert stats.labels == {"intent": {"Complaint": 2, "Other": 1}, "topic": {"Other": 3}, "sentiment": {"Neutral": 3}}
    assert stats.reasons == {"empty": 2}

"""Files about a run: state as JSON, history as CSV, metrics with every series and times that survive a restart."""

from __future__ import annotations

import csv
import json
import os
import stat
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from error_handler import Reason, StateDirectoryError
from tests.utils.worker_files import failed
from tests.worker.test_progress import Clock, stats
from utils.batch_file_manager import BatchFiles
from worker import progress
from worker.checkpoint import RunStats
from worker.progress import LAST_COMPLETED, LAST_SUCCESS, FileProgress
from worker.quarantine import failed_keys


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


@pytest.fixture
def files(tmp_path: Path) -> BatchFiles:
    return BatchFiles(tmp_path / "batch_files")


def numbers(files: BatchFiles) -> dict[str, float]:
    """Return the series by name and labels, the worker's left out."""
    found = {}
    path = files.directory / "progress/metrics.prom"
    for family in text_string_to_metric_families(path.read_text()):
        assert family.type == "gauge"
        assert family.documentation
        for sample in family.samples:
            assert sample.labels.pop("worker") == "batch_files"
            found[" ".join([sample.name, *sample.labels.values()])] = sample.value
    return found


def test_all_series_exist_from_the_start(files: BatchFiles, clock: Clock) -> None:
    """All reasons with 0, so that an alert has something to compare; private like its neighbours."""
    metrics = FileProgress(files.directory)
    metrics.update("job_1", "running", RunStats(total=9, processed=3, successful=2, failed=1, reasons={"busy": 1}), 4)
    found = numbers(files)
    assert {name: found[f"triad_run_failures {name}"] for name in Reason} == {**dict.fromkeys(Reason, 0), "busy": 1}
    assert found["triad_run_documents successful"] == 2
    assert found["triad_run_documents failed"] == 1
    assert found["triad_run_documents skipped"] == 0
    assert found["triad_run_documents_expected"] == 9
    assert found["triad_run_calls_in_flight"] == 4
    states = {name: found[f"triad_run_status {name}"] for name in ("running", "completed", "interrupted", "failed")}
    assert states == {"running": 1, "completed": 0, "interrupted": 0, "failed": 0}
    assert found[LAST_SUCCESS] == clock.time()
    assert found[LAST_COMPLETED] == 0
    assert {stat.S_IMODE(path.stat().st_mode) for path in (files.directory / "progress").iterdir()} == {0o600}


def test_written_every_five_seconds_and_at_the_end(files: BatchFiles, clock: Clock) -> None:
    """Replaced and never rewritten: who reads one gets the whole of it."""
    metrics = FileProgress(files.directory)
    written = []
    for second in range(7):
        metrics.update("job_1", "running", RunStats(processed=second), second)
        written.append(numbers(files)["triad_run_calls_in_flight"])
        clock.now_s += 1
    assert written == [0, 0, 0, 0, 0, 5, 5]
    with (files.directory / "progress/metrics.prom").open() as reader:
        metrics.update("job_1", "failed", RunStats(processed=7), 0)
        assert 'triad_run_status{status="running",worker="batch_files"} 1.0' in reader.read()
    assert numbers(files)["triad_run_status failed"] == 1


def test_last_success_and_last_completion_survive_a_restart(files: BatchFiles, clock: Clock) -> None:
    """They do not change while nothing succeeds, in the next process as well."""
    start = clock.time()
    metrics = FileProgress(files.directory)
    metrics.update("job_1", "running", RunStats(successful=1), 0)
    clock.now_s += 10
    metrics.update("job_1", "completed", RunStats(successful=1), 0)
    clock.now_s += 10
    for again in (metrics, FileProgress(files.directory)):
        again.update("job_2", "running", RunStats(failed=1), 0)
        again.update("job_2", "failed", RunStats(failed=1), 0)
        assert (numbers(files)[LAST_SUCCESS], numbers(files)[LAST_COMPLETED]) == (start, start + 10)
    metrics.update("job_3", "running", RunStats(successful=1), 0)
    assert numbers(files)[LAST_SUCCESS] == start + 20


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"# TYPE {", b"triad_last_success_timestamp_seconds x\n"])
def test_foreign_metrics_file_is_replaced(files: BatchFiles, clock: Clock, content: bytes) -> None:
    """Nothing in it stops a run."""
    (files.directory / "progress/metrics.prom").write_bytes(content)
    FileProgress(files.directory).update("job_1", "completed", RunStats(), 0)
    assert numbers(files)[LAST_SUCCESS] == 0


def test_failed_keys_counts_documents_as_files_change(files: BatchFiles) -> None:
    """Documents, not entries or files; followed as files change, come, go and break."""
    assert len(failed_keys(files.directory, "quarantine")) == 0
    files.save_failed("quarantine", 1, [failed("a"), failed(1), failed("1")])
    files.save_failed("quarantine", 2, [failed("a"), failed("b")])
    assert len(failed_keys(files.directory, "quarantine")) == len(files.failed_keys("quarantine")) == 4
    files.save_failed("quarantine", 2, [failed("c")])
    assert len(failed_keys(files.directory, "quarantine")) == 5
    path = files.directory / "quarantine/batch_001_quarantine.json"
    path.write_bytes(b"[{")
    assert len(failed_keys(files.directory, "quarantine")) == 3
    path.unlink()
    assert len(failed_keys(files.directory, "quarantine")) == 3


def test_failed_keys_reads_only_changed_files(files: BatchFiles) -> None:
    """A quarantine of many files costs a look at their dates."""
    files.save_failed("quarantine", 1, [failed("a")])
    assert len(failed_keys(files.directory, "quarantine")) == 1
    path = files.directory / "quarantine/batch_001_quarantine.json"
    before = path.stat()
    path.write_bytes(b"")  # the same file with the same date: had it been read, it would count for nothing
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert len(failed_keys(files.directory, "quarantine")) == 1


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_unreadable_failure_file_raises(files: BatchFiles) -> None:
    """One sentence."""
    files.save_failed("quarantine", 1, [failed("a")])
    (files.directory / "quarantine/batch_001_quarantine.json").chmod(0)
    with pytest.raises(StateDirectoryError, match="cannot be read"):
        failed_keys(files.directory, "quarantine")


JSON_FIELDS = {
    "job_id",
    "status",
    "start_time",
    "total_conversations",
    "processed",
    "successful",
    "failed",
    "skipped",
    "current_rate",
    "estimated_completion",
    "percentage_complete",
}


# Files


def progress_in(folder: Path) -> FileProgress:
    (folder / "progress").mkdir()
    return FileProgress(folder)


def state_of(folder: Path, job: str = "job_1") -> dict[str, Any]:
    content = json.loads((folder / f"{job}.json").read_text())
    assert isinstance(content, dict)
    return content


def test_json_file_has_the_documented_fields(clock: Clock, tmp_path: Path) -> None:
    """Times are ISO 8601 with a time zone."""
    files = progress_in(tmp_path)
    files.update("job_1", "running", stats(processed=0), 0)
    clock.now_s += 5
    files.update("job_1", "running", stats(processed=50), 3, 8)
    state = state_of(tmp_path / "progress")
    assert set(state) >= JSON_FIELDS
    start, end = (datetime.fromisoformat(state.pop(name)) for name in ("start_time", "estimated_completion"))
    assert start.tzinfo is not None
    assert 10 <= (end - start).total_seconds() <= 20  # 150 documents at 10/s, from now
    assert state == {
        "job_id": "job_1",
        "status": "running",
        "total_conversations": 200,
        "processed": 50,
        "successful": 47,
        "failed": 2,
        "skipped": 1,
        "by_student": 0,
        "in_flight": 3,
        "concurrency_limit": 8,
        "reasons": {"empty": 2},
        "current_rate": 10.0,
        "percentage_complete": 25.0,
    }


def test_unknown_values_are_null(clock: Clock, tmp_path: Path) -> None:
    """There is no estimated completion without a rate; an empty run is complete."""
    progress_in(tmp_path).update("job_1", "completed", RunStats(), 0)
    state = state_of(tmp_path / "progress")
    assert (state["estimated_completion"], state["percentage_complete"], state["current_rate"]) == (None, 100.0, 0.0)


def test_csv_has_one_row_per_write(clock: Clock, tmp_path: Path) -> None:
    files = progress_in(tmp_path)
    for processed in (0, 50, 100):
        files.update("job_1", "running", stats(processed=processed), 1)
        clock.now_s += 5
    files.update("job_1", "completed", stats(processed=200), 0)
    rows = list(csv.DictReader((tmp_path / "progress/job_1.csv").read_text().splitlines()))
    assert list(rows[0]) == [
        "time",
        "status",
        "total_conversations",
        "processed",
        "successful",
        "failed",
        "skipped",
        "current_rate",
        *Reason,
    ]
    assert {rows[0][reason] for reason in Reason if reason != "empty"} == {"0"}
    assert rows[0]["empty"] == "2"
    assert [row["processed"] for row in rows] == ["0", "50", "100", "200"]
    assert [row["status"] for row in rows] == ["running", "running", "running", "completed"]
    assert all(datetime.fromisoformat(row["time"]).tzinfo for row in rows)


def test_files_are_written_every_five_seconds_and_at_the_end(clock: Clock, tmp_path: Path) -> None:
    files = progress_in(tmp_path)
    written = []
    for second in range(11):
        files.update("job_1", "running", stats(processed=second), 1)
        written.append(state_of(tmp_path / "progress")["processed"])
        clock.now_s += 1
    assert written == [0, 0, 0, 0, 0, 5, 5, 5, 5, 5, 10]
    files.update("job_1", "interrupted", stats(processed=11), 0)
    assert (state_of(tmp_path / "progress")["processed"], state_of(tmp_path / "progress")["status"]) == (
        11,
        "interrupted",
    )


def test_files_are_replaced_atomically(clock: Clock, tmp_path: Path) -> None:
    """A concurrent reader sees the whole old file; only the owner can read the files."""
    files = progress_in(tmp_path)
    files.update("job_1", "running", stats(), 1)
    with (tmp_path / "progress/job_1.json").open() as reader:
        clock.now_s += 5
        files.update("job_1", "running", stats(processed=60), 1)
        assert json.load(reader)["processed"] == 50
    assert state_of(tmp_path / "progress")["processed"] == 60
    assert sorted(path.name for path in (tmp_path / "progress").iterdir()) == [
        "job_1.csv",
        "job_1.json",
        "metrics.prom",
    ]
    assert {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "progress").iterdir()} == {0o600}


def test_history_of_a_long_run_is_bounded(clock: Clock, tmp_path: Path) -> None:
    """Half of the rows remain, from the first to the last."""
    files = progress_in(tmp_path)
    files._history = [{"time": "", "processed": number} for number in range(2000)]
    files.update("job_1", "completed", stats(), 0)
    rows = list(csv.DictReader((tmp_path / "progress/job_1.csv").read_text().splitlines()))
    assert [row["processed"] for row in rows] == [str(number) for number in range(0, 2000, 2)] + ["50"]

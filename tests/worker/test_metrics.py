"""progress/metrics.prom: every series from the start, sizes of the queues, times that outlive a restart."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from error_handler import Reason, StateDirectoryError
from tests.utils.worker_files import failed
from tests.worker.test_progress import Clock
from utils.batch_file_manager import BatchFiles
from worker import metrics as worker_metrics
from worker import progress
from worker.checkpoint import RunStats
from worker.metrics import LAST_COMPLETED, LAST_SUCCESS, MetricsFile, queue_size


class BothClocks(Clock):
    """Seconds of the clock on the wall, too."""

    def time(self) -> float:
        return 1_800_000_000.0 + self.now_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> BothClocks:
    clock = BothClocks()
    monkeypatch.setattr(worker_metrics, "time", clock)
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


def test_all_series_exist_from_the_start(files: BatchFiles, clock: BothClocks) -> None:
    """All reasons with 0, so that an alert has something to compare; private like its neighbours."""
    metrics = MetricsFile(files.directory)
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
    (path,) = (files.directory / "progress").iterdir()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_written_every_five_seconds_and_at_the_end(files: BatchFiles, clock: BothClocks) -> None:
    """Replaced and never rewritten: who reads one gets the whole of it."""
    metrics = MetricsFile(files.directory)
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


def test_last_success_and_last_completion_survive_a_restart(files: BatchFiles, clock: BothClocks) -> None:
    """They stand still while nothing succeeds, in the next process as well."""
    start = clock.time()
    metrics = MetricsFile(files.directory)
    metrics.update("job_1", "running", RunStats(successful=1), 0)
    clock.now_s += 10
    metrics.update("job_1", "completed", RunStats(successful=1), 0)
    clock.now_s += 10
    for again in (metrics, MetricsFile(files.directory)):
        again.update("job_2", "running", RunStats(failed=1), 0)
        again.update("job_2", "failed", RunStats(failed=1), 0)
        assert (numbers(files)[LAST_SUCCESS], numbers(files)[LAST_COMPLETED]) == (start, start + 10)
    metrics.update("job_3", "running", RunStats(successful=1), 0)
    assert numbers(files)[LAST_SUCCESS] == start + 20


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"# TYPE {", b"triad_last_success_timestamp_seconds x\n"])
def test_foreign_metrics_file_is_replaced(files: BatchFiles, clock: BothClocks, content: bytes) -> None:
    """Nothing in it stops a run."""
    (files.directory / "progress/metrics.prom").write_bytes(content)
    MetricsFile(files.directory).update("job_1", "completed", RunStats(), 0)
    assert numbers(files)[LAST_SUCCESS] == 0


def test_queue_size_counts_documents_as_files_change(files: BatchFiles) -> None:
    """Documents, not entries or files; followed as files change, come, go and break."""
    folder = files.directory / "quarantine"
    assert queue_size(folder) == 0
    files.save_failed("quarantine", 1, [failed("a"), failed(1), failed("1")])
    files.save_failed("quarantine", 2, [failed("a"), failed("b")])
    assert queue_size(folder) == files.count_failed("quarantine") == 4
    files.save_failed("quarantine", 2, [failed("c")])
    assert queue_size(folder) == 5
    path = files.directory / "quarantine/batch_001_quarantine.json"
    path.write_bytes(b"[{")
    assert queue_size(folder) == 3
    path.unlink()
    assert queue_size(folder) == 3


def test_queue_size_reads_only_changed_files(files: BatchFiles) -> None:
    """A quarantine of many files costs a look at their dates."""
    folder = files.directory / "quarantine"
    files.save_failed("quarantine", 1, [failed("a")])
    assert queue_size(folder) == 1
    path = files.directory / "quarantine/batch_001_quarantine.json"
    before = path.stat()
    path.write_bytes(b"")  # the same file with the same date: had it been read, it would count for nothing
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert queue_size(folder) == 1


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_unreadable_failure_file_raises(files: BatchFiles) -> None:
    """One sentence."""
    files.save_failed("quarantine", 1, [failed("a")])
    (files.directory / "quarantine/batch_001_quarantine.json").chmod(0)
    with pytest.raises(StateDirectoryError, match="cannot be read"):
        queue_size(files.directory / "quarantine")

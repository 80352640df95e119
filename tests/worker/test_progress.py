"""How a run is shown: plain lines or a bar for people, JSON and CSV for programs."""

from __future__ import annotations

import csv
import io
import json
import re
import stat
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from error_handler import Reason
from worker import progress
from worker.checkpoint import RunStats
from worker.progress import ConsoleProgress, FileProgress, Rate

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


class Clock:
    """A clock that a test advances."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def monotonic(self) -> float:
        return self.now_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


class Terminal(io.StringIO):
    """A stream that claims to be a terminal."""

    def isatty(self) -> bool:
        return True


def stats(processed: int = 50, total: int = 200) -> RunStats:
    return RunStats(
        total=total, processed=processed, successful=processed - 3, failed=2, skipped=1, reasons={"empty": 2}
    )


# The rate


def test_rate_covers_the_last_half_minute(clock: Clock) -> None:
    """Older points do not count; the rate is 0 before two points."""
    rate = Rate()
    assert rate.per_second == 0.0
    rate.add(0)
    assert rate.per_second == 0.0
    for second in range(1, 101):
        clock.now_s += 1
        rate.add(second if second <= 60 else 60 + (second - 60) * 10)
    assert rate.per_second == pytest.approx(10.0)


def test_rate_of_two_points_at_the_same_time_is_zero(clock: Clock) -> None:
    rate = Rate()
    rate.add(0)
    rate.add(5)
    assert rate.per_second == 0.0


# Plain lines


def test_plain_lines_without_a_terminal(clock: Clock) -> None:
    """One every ten seconds and one at the end, without escape sequences."""
    stream = io.StringIO()
    console = ConsoleProgress(stream)
    for second in range(25):
        console.update("job_1", "running", stats(processed=second * 2), in_flight=5)
        clock.now_s += 1
    console.update("job_1", "completed", stats(processed=200), in_flight=0)
    lines = stream.getvalue().splitlines()
    assert len(lines) == 4
    assert lines[0] == "job_1 running: 0/200 done, -3 ok, 2 failed, 1 skipped, 0.0/s, 5 in flight"
    assert lines[1] == "job_1 running: 20/200 done, 17 ok, 2 failed, 1 skipped, 2.0/s, 5 in flight, about 0:01:30 left"
    assert lines[-1].startswith("job_1 completed: 200/200 done, 197 ok, 2 failed, 1 skipped, ")
    assert "\x1b" not in stream.getvalue()


def test_total_grows_with_more_documents_than_counted(clock: Clock) -> None:
    """Never 105 of 100."""
    stream = io.StringIO()
    ConsoleProgress(stream).update("job_1", "completed", stats(processed=105, total=100), 0)
    assert "105/105 done" in stream.getvalue()


def test_next_run_resets_the_rate(clock: Clock, tmp_path: Path) -> None:
    """In continuous mode the counts restart at 0; the rate must not become negative."""
    stream = io.StringIO()
    console, files = ConsoleProgress(stream), FileProgress(tmp_path)
    for processed, job, status in (
        (100, "a", "running"),
        (200, "a", "completed"),
        (0, "b", "running"),
        (0, "b", "completed"),
    ):
        clock.now_s += 10
        for reporter in (console, files):
            reporter.update(job, status, stats(processed=processed), 0)
    assert "-" not in stream.getvalue().splitlines()[-1].split("skipped, ")[1]
    assert json.loads((tmp_path / "b.json").read_text())["current_rate"] == 0.0


# The bar


def test_progress_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """The final status ends the bar, and the next run gets a new one."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    terminal = Terminal()
    console = ConsoleProgress(terminal)
    for _ in range(2):
        console.update("job_1", "running", stats(), in_flight=5)
        console.update("job_1", "completed", stats(processed=200), in_flight=0)
        assert console._bar is None
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", terminal.getvalue())
    assert "Classifying" in shown
    assert "50/200" in shown
    assert "200/200" in shown
    assert "197 ok 2 failed 1 skipped" in shown
    assert "5 in flight" in shown


# Files


def state_of(folder: Path, job: str = "job_1") -> dict[str, Any]:
    content = json.loads((folder / f"{job}.json").read_text())
    assert isinstance(content, dict)
    return content


def test_json_file_has_the_documented_fields(clock: Clock, tmp_path: Path) -> None:
    """Times are ISO 8601 with a time zone."""
    files = FileProgress(tmp_path)
    files.update("job_1", "running", stats(processed=0), 0)
    clock.now_s += 5
    files.update("job_1", "running", stats(processed=50), 3, 8)
    state = state_of(tmp_path)
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
        "in_flight": 3,
        "concurrency_limit": 8,
        "reasons": {"empty": 2},
        "current_rate": 10.0,
        "percentage_complete": 25.0,
    }


def test_unknown_values_are_null(clock: Clock, tmp_path: Path) -> None:
    """There is no estimated completion without a rate; an empty run is complete."""
    FileProgress(tmp_path).update("job_1", "completed", RunStats(), 0)
    state = state_of(tmp_path)
    assert (state["estimated_completion"], state["percentage_complete"], state["current_rate"]) == (None, 100.0, 0.0)


def test_csv_has_one_row_per_write(clock: Clock, tmp_path: Path) -> None:
    files = FileProgress(tmp_path)
    for processed in (0, 50, 100):
        files.update("job_1", "running", stats(processed=processed), 1)
        clock.now_s += 5
    files.update("job_1", "completed", stats(processed=200), 0)
    rows = list(csv.DictReader((tmp_path / "job_1.csv").read_text().splitlines()))
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
    files = FileProgress(tmp_path)
    written = []
    for second in range(11):
        files.update("job_1", "running", stats(processed=second), 1)
        written.append(state_of(tmp_path)["processed"])
        clock.now_s += 1
    assert written == [0, 0, 0, 0, 0, 5, 5, 5, 5, 5, 10]
    files.update("job_1", "interrupted", stats(processed=11), 0)
    assert (state_of(tmp_path)["processed"], state_of(tmp_path)["status"]) == (11, "interrupted")


def test_files_are_replaced_atomically(clock: Clock, tmp_path: Path) -> None:
    """A concurrent reader sees the whole old file; only the owner can read the files."""
    files = FileProgress(tmp_path)
    files.update("job_1", "running", stats(), 1)
    with (tmp_path / "job_1.json").open() as reader:
        clock.now_s += 5
        files.update("job_1", "running", stats(processed=60), 1)
        assert json.load(reader)["processed"] == 50
    assert state_of(tmp_path)["processed"] == 60
    assert sorted(path.name for path in tmp_path.iterdir()) == ["job_1.csv", "job_1.json"]
    assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()} == {0o600}


def test_history_of_a_long_run_is_bounded(clock: Clock, tmp_path: Path) -> None:
    """Half of the rows remain, from the first to the last."""
    files = FileProgress(tmp_path)
    files._history = [{"time": "", "processed": number} for number in range(2000)]
    files.update("job_1", "completed", stats(), 0)
    rows = list(csv.DictReader((tmp_path / "job_1.csv").read_text().splitlines()))
    assert [row["processed"] for row in rows] == [str(number) for number in range(0, 2000, 2)] + ["50"]

"""The progress of a run on the console: plain lines, or a bar."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import pytest

from worker import progress
from worker.checkpoint import RunStats
from worker.progress import ConsoleProgress, FileProgress, Rate


class Clock:
    """A clock that a test advances."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def monotonic(self) -> float:
        return self.now_s

    def time(self) -> float:
        return 1_800_000_000.0 + self.now_s


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
    (tmp_path / "progress").mkdir()
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
    assert json.loads((tmp_path / "progress/b.json").read_text())["current_rate"] == 0.0


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

"""Progress of a run: a progress bar or plain lines, and files for other programs."""

from __future__ import annotations

import csv
import io
import json
import time
from collections import deque
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TextIO

from rich.console import Console

from error_handler import Reason
from storage.files import replace_file
from worker.checkpoint import RunStats

if TYPE_CHECKING:
    from rich.progress import Progress

RATE_WINDOW_S = 30.0
PLAIN_LINE_EVERY_S = 10.0
FILE_EVERY_S = 5.0
CSV_FIELDS = (
    *("time", "status", "total_conversations", "processed", "successful", "failed", "skipped", "current_rate"),
    *map(str, Reason),
)


class Reporter(Protocol):
    """Receives the state of the run at least once a second, and at the end with the final status."""

    def update(self, job_id: str, status: str, stats: RunStats, in_flight: int, limit: int | None = None) -> None:
        """*status* is running, completed, interrupted or failed; *limit* is None if concurrency is a fixed setting."""


class Rate:
    """Documents per second over the last RATE_WINDOW_S."""

    def __init__(self) -> None:
        self._points: deque[tuple[float, int]] = deque()

    def add(self, count: int) -> None:
        """Record that *count* documents have been processed so far."""
        now = time.monotonic()
        self._points.append((now, count))
        while len(self._points) > 2 and now - self._points[0][0] > RATE_WINDOW_S:
            self._points.popleft()

    @property
    def per_second(self) -> float:
        """The rate; 0.0 with fewer than two points."""
        if len(self._points) < 2:
            return 0.0
        (start, first), (end, last) = self._points[0], self._points[-1]
        return (last - first) / (end - start) if end > start else 0.0


class ConsoleProgress:
    """A progress bar if *stream* is a terminal, else a plain line every PLAIN_LINE_EVERY_S."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._rate = Rate()
        self._bar: Progress | None = None
        self._last_line = 0.0
        self._console = Console(file=stream) if stream.isatty() else None

    def update(self, job_id: str, status: str, stats: RunStats, in_flight: int, limit: int | None = None) -> None:
        """Draw the state; the final status ends the bar."""
        self._rate.add(stats.processed)
        calls = f"{in_flight} in flight" if limit is None else f"{in_flight} in flight, limit {limit}"
        if self._console is not None:
            self._draw(status, stats, calls)
        elif status != "running" or time.monotonic() - self._last_line >= PLAIN_LINE_EVERY_S:
            self._last_line = time.monotonic()
            self._stream.write(f"{job_id} {status}: {self._line(stats, calls)}\n")
            self._stream.flush()
            if status != "running":
                self._rate = Rate()  # the next run counts from 0 again

    def _line(self, stats: RunStats, calls: str) -> str:
        total = max(stats.total, stats.processed)
        rate = self._rate.per_second
        left = f", about {timedelta(seconds=round((total - stats.processed) / rate))} left" if rate > 0 else ""
        return (
            f"{stats.processed}/{total} done, {stats.successful} ok, {stats.failed} failed, {stats.skipped} skipped, "
            f"{rate:.1f}/s, {calls}{left}"
        )

    def _draw(self, status: str, stats: RunStats, calls: str) -> None:
        if self._bar is None:
            from rich import progress  # noqa: PLC0415 - only for terminals; other runs start faster without it

            self._bar = progress.Progress(
                progress.TextColumn("{task.description}"),
                progress.BarColumn(),
                progress.MofNCompleteColumn(),
                progress.TextColumn("{task.fields[counts]}"),
                progress.TimeRemainingColumn(),
                console=self._console,
            )
            self._bar.add_task("Classifying", counts="")
        counts = (
            f"[green]{stats.successful} ok[/] [red]{stats.failed} failed[/] {stats.skipped} skipped "
            f"{self._rate.per_second:.1f}/s {calls}"
        )
        total = max(stats.total, stats.processed)
        self._bar.update(self._bar.task_ids[0], completed=stats.processed, total=total, counts=counts)
        self._bar.start()  # not earlier, or an empty bar flashes up; later calls do nothing
        if status != "running":
            self._bar.stop()
            self._bar = None
            self._rate = Rate()


class FileProgress:
    """``<job>.json`` with the state and ``<job>.csv`` with its history in *directory*, replaced atomically."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._rate = Rate()
        self._start: datetime | None = None
        self._last_write = 0.0
        self._history: list[dict[str, Any]] = []

    def update(self, job_id: str, status: str, stats: RunStats, in_flight: int, limit: int | None = None) -> None:
        """Write at most every FILE_EVERY_S while running, and always at the end."""
        self._rate.add(stats.processed)
        if status == "running" and time.monotonic() - self._last_write < FILE_EVERY_S:
            return
        self._last_write = time.monotonic()
        self._start = self._start or datetime.now(UTC)
        state = self._state(job_id, status, stats, in_flight, limit)
        replace_file(self._directory / f"{job_id}.json", json.dumps(state, indent=2).encode())
        self._history.append({"time": datetime.now(UTC).isoformat(timespec="seconds"), **state, **stats.reasons})
        if len(self._history) > 2000:  # for runs of several days: keep every second point
            self._history = self._history[::2]
        table = io.StringIO()
        writer = csv.DictWriter(table, CSV_FIELDS, restval=0, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(self._history)
        replace_file(self._directory / f"{job_id}.csv", table.getvalue().encode())
        if status != "running":
            self._start, self._history, self._last_write, self._rate = None, [], 0.0, Rate()

    def _state(self, job_id: str, status: str, stats: RunStats, in_flight: int, limit: int | None) -> dict[str, Any]:
        total = max(stats.total, stats.processed)
        rate = self._rate.per_second
        left_s = (total - stats.processed) / rate if rate > 0 else None
        end = datetime.now(UTC) + timedelta(seconds=left_s) if left_s is not None else None
        return {
            "job_id": job_id,
            "status": status,
            "start_time": self._start.isoformat(timespec="seconds") if self._start else None,
            "total_conversations": total,
            "processed": stats.processed,
            "successful": stats.successful,
            "failed": stats.failed,
            "skipped": stats.skipped,
            "in_flight": in_flight,
            "concurrency_limit": limit,
            "reasons": dict(stats.reasons),
            "current_rate": round(rate, 2),
            "estimated_completion": end.isoformat(timespec="seconds") if end else None,
            "percentage_complete": round(100 * stats.processed / total, 1) if total else 100.0,
        }


class Reporters:
    """Passes each update to several reporters."""

    def __init__(self, reporters: Sequence[Reporter]) -> None:
        self._reporters = reporters

    def update(self, job_id: str, status: str, stats: RunStats, in_flight: int, limit: int | None = None) -> None:
        """Pass the state on."""
        for reporter in self._reporters:
            reporter.update(job_id, status, stats, in_flight, limit)

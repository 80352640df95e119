"""Progress of a run: a bar or lines on the console, and files for other programs (state, history, Prometheus metrics)."""

from __future__ import annotations

import csv
import io
import json
import re
import time
from collections import deque
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TextIO

from rich.console import Console

from domain.text import counted
from error_handler import Reason
from storage.files import replace_file
from worker.checkpoint import RunStats
from worker.metrics import RunMetrics
from worker.model_use import ModelUse
from worker.quarantine import failed_keys

if TYPE_CHECKING:
    from rich.progress import Progress

RATE_WINDOW_S = 30.0
PLAIN_LINE_EVERY_S = 10.0
FILE_EVERY_S = 5.0
CSV_FIELDS = (
    *("time", "status", "total_conversations", "processed", "successful", "failed", "skipped", "current_rate"),
    *map(str, Reason),
)
METRICS = "metrics.prom"
LAST_SUCCESS = "triad_last_success_timestamp_seconds"
LAST_COMPLETED = "triad_last_completed_timestamp_seconds"


class Reporter(Protocol):
    """Receives the state of the run at least once a second, and once more with the final status."""

    def update(self, job_id: str, status: str, stats: RunStats, in_flight: int, limit: int | None = None) -> None:
        """*status* is running, completed, interrupted or failed; *limit* of calls in flight is None if it does not change."""


class Throttle:
    """Limits how often the state of a run is written: each *every_s* seconds while it runs, and always at its end."""

    def __init__(self, every_s: float) -> None:
        self._every_s = every_s
        self._next_s = 0.0

    def is_due(self, status: str) -> bool:
        """Return whether to write a state with *status* now; the first one of a run always is."""
        now = time.monotonic()
        if status == "running" and now < self._next_s:
            return False
        self._next_s = now + self._every_s if status == "running" else 0.0
        return True


class Rate:
    """Documents per second over the last RATE_WINDOW_S; a smaller count starts a new run."""

    def __init__(self) -> None:
        self._points: deque[tuple[float, int]] = deque()

    def add(self, count: int) -> None:
        """Record that *count* documents have been processed."""
        now = time.monotonic()
        if self._points and count < self._points[-1][1]:
            self._points.clear()
        self._points.append((now, count))
        while len(self._points) > 2 and now - self._points[0][0] > RATE_WINDOW_S:
            self._points.popleft()

    @property
    def per_second(self) -> float:
        """The rate; 0.0 until there are two points."""
        if len(self._points) < 2:
            return 0.0
        (start, first), (end, last) = self._points[0], self._points[-1]
        return (last - first) / (end - start) if end > start else 0.0

    def time_left(self, stats: RunStats) -> timedelta | None:
        """Return how long the rest of the run takes at this rate; None if the rate is 0."""
        rate = self.per_second
        return timedelta(seconds=(stats.expected - stats.processed) / rate) if rate > 0 else None


class ConsoleProgress:
    """A progress bar if *stream* is a terminal, otherwise a plain line every PLAIN_LINE_EVERY_S."""

    def __init__(self, stream: TextIO, model: ModelUse | None = None) -> None:
        self._stream = stream
        self._model = model or ModelUse()
        self._rate = Rate()
        self._bar: Progress | None = None
        self._throttle = Throttle(PLAIN_LINE_EVERY_S)
        self._console = Console(file=stream) if stream.isatty() else None

    def update(self, job_id: str, status: str, stats: RunStats, in_flight: int, limit: int | None = None) -> None:
        """Draw the state; the final status ends the bar."""
        self._rate.add(stats.processed)
        calls = f"{in_flight} in flight" if limit is None else f"{in_flight} in flight, limit {limit}"
        if servers := self._model.servers:
            calls += f" ({', '.join(map(_server, servers))})"
        if self._console is not None:
            self._draw(status, stats, calls)
        elif self._throttle.is_due(status):
            self._stream.write(f"{job_id} {status}: {self._line(stats, calls)}\n")
            self._stream.flush()

    def _line(self, stats: RunStats, calls: str) -> str:
        left = self._rate.time_left(stats)
        about = "" if left is None else f", about {timedelta(seconds=round(left.total_seconds()))} left"
        return (
            f"{stats.processed}/{stats.expected} done, {stats.successful} ok, {_by_student(stats)}{stats.failed} failed, "
            f"{stats.skipped} skipped, {self._rate.per_second:.1f}/s, {calls}{about}"
        )

    def _draw(self, status: str, stats: RunStats, calls: str) -> None:
        if self._bar is None:
            from rich import progress  # noqa: PLC0415 - a run without a terminal starts sooner without it

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
            f"[green]{stats.successful} ok[/] {_by_student(stats)}[red]{stats.failed} failed[/] {stats.skipped} skipped "
            f"{self._rate.per_second:.1f}/s {calls}"
        )
        task = self._bar.task_ids[0]
        self._bar.update(task, completed=stats.processed, total=stats.expected, counts=counts)
        self._bar.start()  # after the first update, so that no empty bar flashes; later calls do nothing
        if status != "running":
            self._bar.stop()
            self._bar = None


class GroupLines:
    """Writes a line to *stream* when the documents that came are done, each PLAIN_LINE_EVERY_S while they are not, else none."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._written = 0  # processed documents in the last line
        self._throttle = Throttle(PLAIN_LINE_EVERY_S)

    def update(self, _job: str, status: str, stats: RunStats, in_flight: int, _limit: int | None = None) -> None:
        """Write a line if it is time."""
        self._written = min(self._written, stats.processed)  # smaller in a new run
        new = stats.processed - self._written
        if not new or (in_flight and not self._throttle.is_due(status)):
            return
        self._written = stats.processed
        self._stream.write(
            f"{datetime.now().astimezone():%H:%M:%S} {counted(new, 'conversation')} done; since the start {stats.successful} ok, "
            f"{_by_student(stats)}{stats.failed} failed, {stats.skipped} skipped\n"
        )
        self._stream.flush()


class FileProgress:
    """Writes ``<job>.json``, ``<job>.csv`` and ``metrics.prom`` in ``progress/`` of *directory*, each atomically.

    ``metrics.prom`` is for the textfile collector of node_exporter; its label ``worker`` is the name of *directory*, and
    its two times survive a restart, because they are read from the existing file.
    """

    def __init__(self, directory: Path, model: ModelUse | None = None) -> None:
        self._directory = directory
        self._model = model or ModelUse()
        self.metrics = RunMetrics(directory.resolve().name, self._model)
        self._folder = directory / "progress"
        self._rate = Rate()
        self._throttle = Throttle(FILE_EVERY_S)
        self._history: list[dict[str, Any]] = []
        self._successful = 0
        self._times: dict[str, float] = {}
        self._started: tuple[str, float] = ("", 0.0)  # the run, and when it did

    def update(self, job_id: str, status: str, stats: RunStats, in_flight: int, limit: int | None = None) -> None:
        """Write at most every FILE_EVERY_S while running, and always at the end."""
        self._rate.add(stats.processed)
        self._times = self._times or _saved_times(self._folder / METRICS)
        if stats.successful > self._successful:
            self._times[LAST_SUCCESS] = time.time()
        self._successful = stats.successful if status == "running" else 0
        if self._started[0] != job_id:
            self._started = job_id, time.time()
        if not self._throttle.is_due(status):
            return
        if status == "completed":
            self._times[LAST_COMPLETED] = time.time()
        self._write_state(job_id, status, stats, in_flight, limit)
        self._set_metrics(status, stats, in_flight, limit)
        replace_file(self._folder / METRICS, self.metrics.render())

    def _write_state(self, job_id: str, status: str, stats: RunStats, in_flight: int, limit: int | None) -> None:
        now = datetime.now(UTC)
        time_text = now.isoformat(timespec="seconds")
        total, left = stats.expected, self._rate.time_left(stats)
        state = {
            "job_id": job_id,
            "status": status,
            "start_time": self._history[0]["time"] if self._history else time_text,
            "total_conversations": total,
            "processed": stats.processed,
            "successful": stats.successful,
            "failed": stats.failed,
            "skipped": stats.skipped,
            "by_student": stats.by_student,
            "in_flight": in_flight,
            "concurrency_limit": limit,
            **({"servers": servers} if (servers := self._model.servers) else {}),
            "reasons": dict(stats.reasons),
            "current_rate": round(self._rate.per_second, 2),
            "estimated_completion": (now + left).isoformat(timespec="seconds") if left is not None else None,
            "percentage_complete": round(100 * stats.processed / total, 1) if total else 100.0,
        }
        replace_file(self._folder / f"{job_id}.json", json.dumps(state, indent=2).encode())
        self._history.append({"time": time_text, **state, **stats.reasons})
        if len(self._history) > 2000:  # halves the detail of a very long run
            self._history = self._history[::2]
        table = io.StringIO()
        writer = csv.DictWriter(table, CSV_FIELDS, restval=0, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(self._history)
        replace_file(self._folder / f"{job_id}.csv", table.getvalue().encode())
        if status != "running":
            self._history = []

    def _set_metrics(self, status: str, stats: RunStats, in_flight: int, limit: int | None) -> None:
        queued, quarantined = (len(failed_keys(self._directory, kind)) for kind in ("retry", "quarantine"))
        others = {
            "triad_retry_queue_documents": ("Documents in the retry queue", queued),
            "triad_quarantine_documents": ("Documents in quarantine", quarantined),
            "triad_run_started_timestamp_seconds": ("Time of the start of the run", self._started[1]),
            LAST_SUCCESS: ("Time of the last classified document; 0: never", self._times[LAST_SUCCESS]),
            LAST_COMPLETED: ("Time of the last completed run; 0: never", self._times[LAST_COMPLETED]),
        }
        self.metrics.set(status, stats, in_flight, limit, others)


def _by_student(stats: RunStats) -> str:
    return f"{stats.by_student} of them by the student, " if stats.by_student else ""


def _server(state: dict[str, Any]) -> str:
    """Return the server and its calls in flight, or why it has none."""
    shown = state["in_flight"] if state["state"] == "ready" else state["state"].replace("_", " ")
    return f"{state['server']} {shown}"


def _saved_times(path: Path) -> dict[str, float]:
    times = {LAST_SUCCESS: 0.0, LAST_COMPLETED: 0.0}
    with suppress(OSError, ValueError):  # missing, or not ours
        found = re.findall(rf"^({'|'.join(times)}){{.*}} ([\d.e+]+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
        times |= {name: float(value) for name, value in found}
    return times

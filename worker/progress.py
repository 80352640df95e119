"""Progress of a run: a bar or plain lines on the console."""

from __future__ import annotations

import time
from collections import deque
from datetime import timedelta
from typing import TYPE_CHECKING, Protocol, TextIO

from rich.console import Console

from worker.checkpoint import RunStats

if TYPE_CHECKING:
    from rich.progress import Progress

RATE_WINDOW_S = 30.0
PLAIN_LINE_EVERY_S = 10.0


class Reporter(Protocol):
    """Receives the state of the run at least once a second, and once more with the final status."""

    def update(self, job_id: str, status: str, stats: RunStats, in_flight: int, limit: int | None = None) -> None:
        """*status* is running, completed, interrupted or failed; *limit* is None if the concurrency is fixed."""


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

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._rate = Rate()
        self._bar: Progress | None = None
        self._throttle = Throttle(PLAIN_LINE_EVERY_S)
        self._console = Console(file=stream) if stream.isatty() else None

    def update(self, job_id: str, status: str, stats: RunStats, in_flight: int, limit: int | None = None) -> None:
        """Draw the state; the final status ends the bar."""
        self._rate.add(stats.processed)
        calls = f"{in_flight} in flight" if limit is None else f"{in_flight} in flight, limit {limit}"
        if self._console is not None:
            self._draw(status, stats, calls)
        elif self._throttle.is_due(status):
            self._stream.write(f"{job_id} {status}: {self._line(stats, calls)}\n")
            self._stream.flush()

    def _line(self, stats: RunStats, calls: str) -> str:
        left = self._rate.time_left(stats)
        about = "" if left is None else f", about {timedelta(seconds=round(left.total_seconds()))} left"
        return (
            f"{stats.processed}/{stats.expected} done, {stats.successful} ok, {stats.failed} failed, "
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
            f"[green]{stats.successful} ok[/] [red]{stats.failed} failed[/] {stats.skipped} skipped "
            f"{self._rate.per_second:.1f}/s {calls}"
        )
        task = self._bar.task_ids[0]
        self._bar.update(task, completed=stats.processed, total=stats.expected, counts=counts)
        self._bar.start()  # after the first update, so that no empty bar flashes; later calls do nothing
        if status != "running":
            self._bar.stop()
            self._bar = None

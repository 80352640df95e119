"""The state of a run as Prometheus text, for the textfile collector of node_exporter. Label values are closed lists."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

from prometheus_client import CollectorRegistry, Gauge, generate_latest

from error_handler import Reason
from storage.extended_json import id_key
from storage.files import replace_file
from utils.batch_file_manager import batch_paths, read_failures
from worker.checkpoint import RunStats
from worker.progress import FILE_EVERY_S, Throttle, expected

NAME = "metrics.prom"
STATUSES = ("running", "completed", "interrupted", "failed")
OUTCOMES = ("successful", "failed", "skipped", "already_done", "leased_elsewhere")
LAST_SUCCESS = "triad_last_success_timestamp_seconds"
LAST_COMPLETED = "triad_last_completed_timestamp_seconds"


class MetricsFile:
    """Writes ``progress/metrics.prom`` in *directory* atomically; the label ``worker`` is the directory's name.

    The two times survive a restart: they are read from the existing file.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._path = directory / "progress" / NAME
        self._throttle = Throttle(FILE_EVERY_S)
        self._successful = 0
        self._worker = directory.resolve().name
        self._times: dict[str, float] = {}

    def update(
        self,
        job_id: str,  # noqa: ARG002 - job ids are not a closed list
        status: str,
        stats: RunStats,
        in_flight: int,
        limit: int | None = None,
    ) -> None:
        """Write at most every FILE_EVERY_S while running, and always at the end."""
        self._times = self._times or _saved_times(self._path)
        if stats.successful > self._successful:
            self._times[LAST_SUCCESS] = time.time()
        self._successful = stats.successful if status == "running" else 0
        if not self._throttle.is_due(status):
            return
        if status == "completed":
            self._times[LAST_COMPLETED] = time.time()
        replace_file(self._path, self._render(status, stats, in_flight, limit))

    def _render(self, status: str, stats: RunStats, in_flight: int, limit: int | None) -> bytes:
        registry = CollectorRegistry()

        def gauge(name: str, documentation: str, values: Iterable[tuple[str, float]], label: str | None = None) -> None:
            made = Gauge(name, documentation, ["worker", *([label] if label else [])], registry=registry)
            for value, number in values:
                made.labels(self._worker, *([value] if label else [])).set(number)

        outcomes = [(name, float(getattr(stats, name))) for name in OUTCOMES]
        reasons = [(str(reason), float(stats.reasons.get(reason, 0))) for reason in Reason]
        states = [(name, float(name == status)) for name in STATUSES]
        gauge("triad_run_documents", "Documents of this run by outcome", outcomes, "outcome")
        gauge("triad_run_documents_expected", "Documents that this run has to process", [("", expected(stats))])
        gauge("triad_run_failures", "Documents of this run without a result, by reason", reasons, "reason")
        gauge("triad_run_status", "1 for the current status of the run", states, "status")
        gauge("triad_run_calls_in_flight", "Documents that wait for the model", [("", in_flight)])
        if limit is not None:
            gauge("triad_run_concurrency_limit", "Limit of concurrent calls, set by auto", [("", limit)])
        retry, quarantine = (queue_size(self._directory / kind) for kind in ("retry", "quarantine"))
        gauge("triad_retry_queue_documents", "Documents in the retry queue", [("", retry)])
        gauge("triad_quarantine_documents", "Documents in quarantine", [("", quarantine)])
        gauge(LAST_SUCCESS, "Time of the last classified document; 0: never", [("", self._times[LAST_SUCCESS])])
        gauge(LAST_COMPLETED, "Time of the last completed run; 0: never", [("", self._times[LAST_COMPLETED])])
        return generate_latest(registry)


def queue_size(folder: Path) -> int:
    """Return the number of documents in the failure files of *folder*; a corrupt file counts as empty."""
    keys: set[bytes] = set()
    for path in batch_paths(folder):
        with suppress(FileNotFoundError):  # the worker has finished it
            state = path.stat()
            keys |= _failed_keys(path, state.st_ino, state.st_mtime_ns)
    return len(keys)


@lru_cache(maxsize=10_000)  # a quarantine of many files is not read again every few seconds
def _failed_keys(path: Path, _inode: int, _changed_ns: int) -> frozenset[bytes]:
    try:
        return frozenset(id_key(entry.conversation_id) for entry in read_failures(path))
    except ValueError:
        return frozenset()


def _saved_times(path: Path) -> dict[str, float]:
    times = {LAST_SUCCESS: 0.0, LAST_COMPLETED: 0.0}
    with suppress(OSError, ValueError):  # missing, or not ours
        found = re.findall(rf"^({'|'.join(times)}){{.*}} ([\d.e+]+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
        times |= {name: float(value) for name, value in found}
    return times

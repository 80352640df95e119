"""The state of a run in Prometheus text, for the textfile collector of node_exporter. Labels are closed lists."""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path

from prometheus_client import CollectorRegistry, Gauge, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from error_handler import Reason, StateDirectoryError
from storage.extended_json import list_keys
from storage.files import replace_file
from utils.batch_file_manager import FailureKind, batch_paths
from worker.checkpoint import RunStats
from worker.progress import FILE_EVERY_S

NAME = "metrics.prom"
STATUSES = ("running", "completed", "interrupted", "failed")
OUTCOMES = ("successful", "failed", "skipped", "already_done", "leased_elsewhere")
LAST_SUCCESS = "triad_last_success_timestamp_seconds"
LAST_COMPLETED = "triad_last_completed_timestamp_seconds"


class MetricsFile:
    """Writes ``progress/metrics.prom`` in *directory*, replaced atomically; the label ``worker`` is the directory's name.

    The two times outlive a restart: they are read back from the file that is there.
    """

    def __init__(self, directory: Path) -> None:
        self._path = directory / "progress" / NAME
        self._queues: dict[FailureKind, QueueSize] = {
            kind: QueueSize(directory / kind) for kind in ("retry", "quarantine")
        }
        self._last_write = 0.0
        self._successful = 0
        self._worker = directory.resolve().name
        self._times: dict[str, float] = {}

    def update(
        self,
        job_id: str,  # noqa: ARG002 - jobs have no end, labels must
        status: str,
        stats: RunStats,
        in_flight: int,
        limit: int | None = None,
    ) -> None:
        """Write at most every FILE_EVERY_S while running, and always at the end."""
        self._times = self._times or _saved_times(self._path)
        if stats.successful > self._successful:
            self._times[LAST_SUCCESS] = time.time()
        self._successful = stats.successful
        if status == "running" and time.monotonic() - self._last_write < FILE_EVERY_S:
            return
        if status == "completed":
            self._times[LAST_COMPLETED] = time.time()
        self._last_write = time.monotonic()
        replace_file(self._path, self._render(status, stats, in_flight, limit))
        if status != "running":
            self._last_write, self._successful = 0.0, 0

    def _render(self, status: str, stats: RunStats, in_flight: int, limit: int | None) -> bytes:
        registry = CollectorRegistry()

        def gauge(name: str, documentation: str, values: Iterable[tuple[str, float]], label: str | None = None) -> None:
            made = Gauge(name, documentation, ["worker", *([label] if label else [])], registry=registry)
            for value, number in values:
                made.labels(self._worker, *([value] if label else [])).set(number)

        outcomes = [(name, float(getattr(stats, name))) for name in OUTCOMES]
        reasons = [(str(reason), float(stats.reasons.get(reason, 0))) for reason in Reason]
        states = [(name, float(name == status)) for name in STATUSES]
        gauge("triad_run_documents", "Documents of this run by how they ended", outcomes, "outcome")
        gauge(
            "triad_run_documents_expected",
            "Documents that this run has to do",
            [("", max(stats.total, stats.processed))],
        )
        gauge("triad_run_failures", "Documents of this run without a result, by reason", reasons, "reason")
        gauge("triad_run_status", "1 for the status that the run has", states, "status")
        gauge("triad_run_calls_in_flight", "Documents that wait for the model now", [("", in_flight)])
        if limit is not None:
            gauge("triad_run_concurrency_limit", "Calls that may be in flight now, found by auto", [("", limit)])
        gauge("triad_retry_queue_documents", "Documents that get another round", [("", self._queues["retry"].count())])
        gauge("triad_quarantine_documents", "Documents in quarantine", [("", self._queues["quarantine"].count())])
        gauge(LAST_SUCCESS, "When a document was last classified; 0: never", [("", self._times[LAST_SUCCESS])])
        gauge(LAST_COMPLETED, "When a run last came to its end; 0: never", [("", self._times[LAST_COMPLETED])])
        return generate_latest(registry)


class QueueSize:
    """Counts the documents in the files of *folder*; reads again only what has changed since it last looked."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._known: dict[tuple[str, int, int], frozenset[bytes]] = {}

    def count(self) -> int:
        """Return how many documents there are; a file that cannot be read counts as empty.

        Raises:
            StateDirectoryError: A file may not be read.
        """
        known: dict[tuple[str, int, int], frozenset[bytes]] = {}
        for path in batch_paths(self._folder):
            try:
                state = path.stat()
                version = (path.name, state.st_ino, state.st_mtime_ns)
                known[version] = self._known.get(version) or frozenset(list_keys(path.read_bytes(), "conversation_id"))
            except FileNotFoundError:
                continue
            except ValueError:
                known[version] = frozenset()
            except OSError as exc:
                raise StateDirectoryError(f"{path} cannot be read ({exc.strerror}); fix its rights.") from exc
        self._known = known
        return len(frozenset().union(*known.values()))


def _saved_times(path: Path) -> dict[str, float]:
    times = {LAST_SUCCESS: 0.0, LAST_COMPLETED: 0.0}
    try:
        for family in text_string_to_metric_families(path.read_text(encoding="utf-8")):
            if family.name in times:
                times[family.name] = max((sample.value for sample in family.samples), default=0.0)
    except (OSError, ValueError, IndexError):  # missing, or somebody else's
        return {LAST_SUCCESS: 0.0, LAST_COMPLETED: 0.0}
    return times

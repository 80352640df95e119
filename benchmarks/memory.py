"""Memory and start time with a large collection, and the restart time of a killed run."""

from __future__ import annotations

from benchmarks.documents import short_conversations
from benchmarks.stage import START_LIMIT_S, Stage, open_stage
from benchmarks.table import Row
from benchmarks.worker_process import WorkerFailedError

CONCURRENCY = 32
KILL_SHARE = 0.9
MAX_GROWTH, MAX_MB, MAX_START_S = 1.25, 150.0, 2.0
RUN_LIMIT_S = 1500.0


def measure(*, quick: bool) -> list[Row]:
    """Process a small collection, then a large one whose run is killed at 90 % and restarted.

    The killed process has finished *large* documents by then.
    """
    small, large = (400, 4000) if quick else (2000, 200_000)
    with open_stage(slots=2 * CONCURRENCY, record_limit=1) as stage:
        stage.fill(short_conversations(small))
        small_mb = stage.measure("product", small, CONCURRENCY, RUN_LIMIT_S).peak_mb
        collection = stage.fill(short_conversations(round(large / KILL_SHARE)))
        return _killed_run(stage, large, collection, small_mb)


def _killed_run(stage: Stage, large: int, collection: int, small_mb: float) -> list[Row]:
    stage.fake.reset()
    folder = stage.new_folder()
    with stage.start("product", folder, CONCURRENCY) as worker:
        first_s = stage.await_gauge(worker, "chat_requests", 1, START_LIMIT_S) - worker.start_s
        killed_s = stage.await_gauge(worker, "answered", large, RUN_LIMIT_S)
        large_mb = worker.sample_peak()
        worker.kill()
        rate = large / (killed_s - worker.start_s - first_s)
    stage.fake.wait_for("in_flight", equals=0)
    asked = stage.fake.stats()["chat_requests"]
    with stage.start("product", folder, CONCURRENCY) as worker:
        resumed_s = stage.await_gauge(worker, "chat_requests", asked + 1, START_LIMIT_S) - worker.start_s
        worker.wait(RUN_LIMIT_S)
    _require_complete(stage, collection)
    return [
        Row(
            f"peak memory with {large} documents, compared with the small collection, MB",
            f"{large_mb:.1f}",
            f"{small_mb:.1f}",
            f"{large_mb / small_mb:.2f}",
            f"<= {MAX_GROWTH:.2f}",
            large_mb <= MAX_GROWTH * small_mb,
        ),
        _limit("  peak memory, MB", large_mb, MAX_MB),
        _limit(f"  start to first call, collection of {collection}, s", first_s, MAX_START_S),
        _limit("  start to first call after SIGKILL at 90 %, s", resumed_s, MAX_START_S),
        Row("  documents/s up to the SIGKILL", f"{rate:.0f}"),
    ]


def _require_complete(stage: Stage, collection: int) -> None:
    """Reject the figures of a run that lost documents or repeated too many calls."""
    calls = stage.fake.stats()["calls_by_sha"]
    repeated = sum(calls.values()) - len(calls)
    if stage.results_count != collection or len(calls) != collection or repeated > CONCURRENCY:
        raise WorkerFailedError(f"{stage.results_count} results of {collection}, {repeated} calls repeated")


def _limit(name: str, figure: float, most: float) -> Row:
    return Row(name, f"{figure:.2f}", target=f"<= {most:g}", met=figure <= most)

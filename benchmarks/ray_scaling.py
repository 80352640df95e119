"""``--engine ray`` with 1, 2 and 4 workers on this machine, each with a fixed number of slots of a model server."""

from __future__ import annotations

import time
from pathlib import Path
from typing import NamedTuple

from benchmarks.documents import short_conversations
from benchmarks.stage import DATABASE, MODEL, ROOT, START_LIMIT_S, Stage, open_stage
from benchmarks.table import Row, figure
from benchmarks.worker_process import WorkerFailedError, WorkerProcess
from domain.text import counted

WORKERS = (1, 2, 4)
SLOTS = 4  # of each worker
ANSWER_S = 1.0
DURATION_S = 90.0  # of each run, if no slot is ever free
BATCH_SIZE = 8  # small, so that no worker has much left when the others have nothing
MIN_SHARE = 0.9
POLL_S = 0.05


class Measured(NamedTuple):
    """One run: documents per second from the first call to the last write, and the seconds from the start to the first call."""

    documents_per_s: float
    first_call_s: float


def measure(*, quick: bool) -> list[Row]:
    """Run each number of workers on documents that take DURATION_S."""
    duration_s = 10.0 if quick else DURATION_S
    with open_stage(latency_s=ANSWER_S, user_message=0) as stage:
        runs = {workers: _run(stage, workers, duration_s) for workers in WORKERS}
    one = runs[1].documents_per_s
    return [
        Row(
            f"{counted(workers, 'worker')} on Ray, {SLOTS} slots each, {ANSWER_S:g} s an answer: documents/s (first call after "
            f"{run.first_call_s:.0f} s)",
            figure(run.documents_per_s),
            figure(workers * one),
            f"{run.documents_per_s / (workers * one):.2f}",
            f">= {MIN_SHARE}",
            run.documents_per_s >= MIN_SHARE * workers * one,
        )
        for workers, run in runs.items()
    ]


def _run(stage: Stage, workers: int, duration_s: float) -> Measured:
    count = round(workers * SLOTS * duration_s / ANSWER_S)
    stage.fake.reset()
    stage.fake.configure(slots=workers * SLOTS)
    stage.fill(short_conversations(count))
    place = ["--mongodb-uri", stage.mongodb_uri, "--db-name", DATABASE, "--model", MODEL]
    work = ["--ollama-endpoint", stage.fake.url, "--max-concurrent", str(SLOTS), "--batch-size", str(BATCH_SIZE)]
    command: list[str | Path] = [ROOT / "cli.py", "--engine", "ray", "--workers", str(workers), *place, *work]
    with WorkerProcess(command, stage.new_folder()) as worker:
        stage.await_gauge(worker, "answered", count, START_LIMIT_S + 3 * duration_s)
        while stage.results_count < count and not worker.has_ended:
            time.sleep(POLL_S)
        last_write_s = time.monotonic()
        worker.wait(START_LIMIT_S)
    first_s = min(record["start_s"] for record in stage.fake.requests())
    if stage.results_count != count or stage.fake.stats()["chat_requests"] != count:
        raise WorkerFailedError(
            f"{stage.results_count} results and {stage.fake.stats()['chat_requests']} calls for {count}"
        )
    return Measured(count / (last_write_s - first_s), first_s - worker.start_s)

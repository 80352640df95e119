"""Three model servers of one, two and four times the speed, four slots each, compared with the sum of their slots."""

from __future__ import annotations

import contextlib
import time

from benchmarks.documents import short_conversations
from benchmarks.stage import DATABASE, MODEL, ROOT, START_LIMIT_S, Stage, open_stage
from benchmarks.table import Row
from benchmarks.worker_process import WorkerProcess
from tests.fakes.fake_ollama import FakeOllama

SLOTS = 4
ANSWER_S = (1.6, 0.8, 0.4)
SETTLED_S, MEASURED_S = 20.0, 40.0
MIN_SHARE = 0.95


def measure(*, quick: bool) -> list[Row]:
    """Run with a fixed number of calls for each server, then with auto."""
    settled_s, measured_s = (3.0, 4.0) if quick else (SETTLED_S, MEASURED_S)
    rows = []
    with contextlib.ExitStack() as stack:
        first, *others = ({"slots": SLOTS, "latency_s": answer_s, "record_limit": 1_000_000} for answer_s in ANSWER_S)
        stage = stack.enter_context(open_stage(**first))
        fakes = [stage.fake, *(stack.enter_context(FakeOllama(**knobs)) for knobs in others)]
        for concurrency in (str(SLOTS + 1), "auto"):
            rows += _rows(concurrency, _rates(stage, fakes, concurrency, settled_s, measured_s))
    return rows


def _rows(concurrency: str, rates: list[float]) -> list[Row]:
    possible = [SLOTS / answer_s for answer_s in ANSWER_S]
    share = sum(rates) / sum(possible)
    title = f"servers with {', '.join(f'{rate:g}' for rate in possible)} answers/s, --max-concurrent {concurrency}: answers/s"
    sums = (f"{sum(rates):.1f}", f"{sum(possible):.1f}", f"{share:.3f}", f">= {MIN_SHARE}")
    return [
        Row(title, *sums, share >= MIN_SHARE),
        Row("  of each server", ", ".join(f"{rate:.1f}" for rate in rates)),
    ]


def _rates(stage: Stage, fakes: list[FakeOllama], concurrency: str, settled_s: float, measured_s: float) -> list[float]:
    """Return the answers/s of each server from *settled_s* after the first call, with more documents than can be done."""
    for fake in fakes:
        fake.reset()
    possible = sum(SLOTS / answer_s for answer_s in ANSWER_S)
    stage.fill(short_conversations(round(possible * (settled_s + measured_s) * 1.3)))
    arguments = ["--mongodb-uri", stage.mongodb_uri, "--db-name", DATABASE, "--model", MODEL]
    for fake in fakes:
        arguments += ["--ollama-endpoint", fake.url]
    with WorkerProcess([ROOT / "cli.py", *arguments, "--max-concurrent", concurrency], stage.new_folder()) as worker:
        stage.await_gauge(worker, "chat_requests", 1, START_LIMIT_S)
        from_s = time.monotonic() + settled_s
        time.sleep(settled_s + measured_s)
    records = [[one for one in fake.requests() if one["outcome"] == "200"] for fake in fakes]
    return [sum(from_s <= one["end_s"] < from_s + measured_s for one in each) / measured_s for each in records]

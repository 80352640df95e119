"""``--max-concurrent auto`` on servers with 4, 8 and 16 slots, compared with fixed settings."""

from __future__ import annotations

import time
from math import ceil
from typing import Any, NamedTuple

from benchmarks.documents import short_conversations
from benchmarks.stage import START_LIMIT_S, Stage, open_stage
from benchmarks.table import Row
from tests.fakes.fake_ollama import lognormal_latency

SLOTS = (4, 8, 16)
MEAN_S, SIGMA, SEED = 0.2, 0.8, 1
SETTLED_S = 30.0  # the limit must be right this long after the first call
UNDER_WAY_S = 5.0  # a fixed setting does not need to settle
MEASURED_S = 30.0
LAST_ANSWERS_S = 2.0  # calls in flight at the end count in part
MIN_THROUGHPUT, MAX_P95 = 0.95, 1.25
AS_GOOD = 0.99  # share of the best throughput; among such settings the shortest latency wins


class Measured(NamedTuple):
    """One run; *busy* is the mean number of busy slots, *in_flight* the mean number of requests in flight."""

    answers_per_s: float
    busy: float
    p95_s: float
    in_flight: float


def measure(*, quick: bool) -> list[Row]:
    """Run each fixed setting, then auto. Answer times are log-normal: mean 0.2 s, 95th percentile 0.54 s."""
    settled_s, measured_s = (4.0, 3.0) if quick else (SETTLED_S, MEASURED_S)
    knobs = {"latency": "lognormal", "mean_s": MEAN_S, "sigma": SIGMA, "seed": SEED, "record_limit": 1_000_000}
    rows = []
    with open_stage(**knobs) as stage:
        for slots in SLOTS[:1] if quick else SLOTS:
            settings = (slots // 2, slots, slots + 1, 2 * slots)
            fixed = {
                number: _run(stage, slots, str(number), min(UNDER_WAY_S, settled_s), measured_s) for number in settings
            }
            auto = _run(stage, slots, "auto", settled_s, measured_s)
            rows += _rows(slots, fixed, auto)
    return rows


def _rows(slots: int, fixed: dict[int, Measured], auto: Measured) -> list[Row]:
    most = max(run.busy for run in fixed.values())
    best = min((run.p95_s, number) for number, run in fixed.items() if run.busy >= AS_GOOD * most)[1]
    rows = [
        Row(
            f"{slots} slots, {number} concurrent calls: answers/s; slots in use; 95th percentile of latency, s",
            "",
            f"{run.answers_per_s:.1f}; {run.busy:.2f}; {run.p95_s:.2f}",
        )
        for number, run in fixed.items()
    ]
    shown = f"{auto.answers_per_s:.1f}; {auto.busy:.2f}; {auto.p95_s:.2f}"
    throughput, p95 = auto.busy / most, auto.p95_s / fixed[best].p95_s
    return [
        *rows,
        Row(f"{slots} slots, auto ({auto.in_flight:.1f} calls in flight on average)", shown),
        Row(
            "  slots in use, compared with the best fixed setting",
            *_ratio(auto.busy, most, f">= {MIN_THROUGHPUT}"),
            throughput >= MIN_THROUGHPUT,
        ),
        Row(
            f"  95th percentile of latency, s, compared with {best} concurrent calls",
            *_ratio(auto.p95_s, fixed[best].p95_s, f"<= {MAX_P95}"),
            p95 <= MAX_P95,
        ),
    ]


def _ratio(product: float, reference: float, target: str) -> tuple[str, str, str, str]:
    return f"{product:.2f}", f"{reference:.2f}", f"{product / reference:.3f}", target


def _run(stage: Stage, slots: int, concurrency: str, settled_s: float, measured_s: float) -> Measured:
    """Give the worker more documents than it can finish, measure from *settled_s* after its first call, and kill it."""
    stage.fake.reset()
    stage.fake.configure(slots=slots)
    stage.fill(short_conversations(round(slots / MEAN_S * (settled_s + measured_s + LAST_ANSWERS_S) * 1.3)))
    with stage.start("product", stage.new_folder(), concurrency) as worker:
        stage.await_gauge(worker, "chat_requests", 1, START_LIMIT_S)
        time.sleep(settled_s + measured_s + LAST_ANSWERS_S)
    records = [record for record in stage.fake.requests() if record["outcome"] == "200"]
    from_s = min(record["start_s"] for record in records) + settled_s
    return _measured(records, from_s, from_s + measured_s)


def _measured(records: list[dict[str, Any]], from_s: float, to_s: float) -> Measured:
    ended = [record for record in records if from_s <= record["end_s"] < to_s]
    latencies = sorted(record["end_s"] - record["start_s"] for record in ended)
    slots_s = 0.0
    for record in records:
        service_s = lognormal_latency(SEED, record["index"], MEAN_S, SIGMA)
        slots_s += max(0.0, min(record["end_s"], to_s) - max(record["end_s"] - service_s, from_s))
    duration_s = to_s - from_s
    p95_s = latencies[ceil(0.95 * len(latencies)) - 1]
    return Measured(len(ended) / duration_s, slots_s / duration_s, p95_s, sum(latencies) / duration_s)

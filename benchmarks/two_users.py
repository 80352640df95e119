"""POST /classify beside a batch on one model server: without a batch, with one that gives way, and with one that does not."""

from __future__ import annotations

import asyncio
import random
import time
from contextlib import ExitStack
from math import ceil
from typing import NamedTuple

import aiohttp
import orjson

from benchmarks.documents import short_conversations
from benchmarks.stage import DATABASE, START_LIMIT_S, Stage, open_stage
from benchmarks.table import Row
from benchmarks.worker_process import WorkerFailedError, WorkerProcess
from tests.service.service_process import conversation, serve

SLOTS = 4
MEAN_S, SIGMA, SEED = 0.4, 0.4, 1
CALLERS, PAUSE_S = 3, 0.5  # the mean pause between an answer and the caller's next request
REQUESTS = 60  # of each caller
CONCURRENT = (5, 8)  # calls of the worker: its default, and twice the slots
BATCH_ALONE_S = 20.0
MAX_P95 = 1.5
DEFAULT = ""
WAYS = ("SERVICE_LEASE=false", "WORKER_FLOOR=2", DEFAULT)  # the variable that is set


class Measured(NamedTuple):
    """The 95th percentile of the callers' latency in seconds, and the results that the worker stored per second."""

    p95_s: float
    results_per_s: float


def measure(*, quick: bool) -> list[Row]:
    """Send the same requests with the same answer times in each run; answer times are log-normal, by text."""
    requests, alone_s = (5, 3.0) if quick else (REQUESTS, BATCH_ALONE_S)
    knobs = {"latency": "lognormal", "latency_key": "text", "mean_s": MEAN_S, "sigma": SIGMA, "seed": SEED}
    rows = []
    with open_stage(slots=SLOTS, user_message=0, record=False, **knobs) as stage:
        place = {"MONGODB_URI": stage.mongodb_uri, "MONGODB_DB": DATABASE, "OLLAMA_MODEL": "llama3.2"}
        with serve(stage.new_folder(), OLLAMA_ENDPOINT=stage.fake.url, **place) as service:
            url = f"{service.url}/classify"
            without_s = asyncio.run(_p95_s(url, requests))
            rows.append(
                Row(f"{SLOTS} slots, {CALLERS} callers, no batch: 95th percentile of latency, s", f"{without_s:.2f}")
            )
            for concurrency in CONCURRENT[:1] if quick else CONCURRENT:
                alone = _batch_alone(stage, concurrency, alone_s)
                rows.append(Row(f"batch of {concurrency} concurrent calls, without callers: results/s", f"{alone:.1f}"))
                for variable in WAYS:
                    beside = _beside_a_batch(stage, url, requests, concurrency, variable)
                    rows += _rows(variable, without_s, alone, beside)
    return rows


def _rows(variable: str, without_s: float, alone: float, beside: Measured) -> list[Row]:
    p95_s, results_per_s = beside
    ratio = p95_s / without_s
    target = ("", None) if variable else (f"<= {MAX_P95}", ratio <= MAX_P95)
    name = variable or "the default, WORKER_FLOOR=1"
    return [
        Row(
            f"  {name}: 95th percentile, s, beside and without the batch",
            f"{p95_s:.2f}",
            f"{without_s:.2f}",
            f"{ratio:.2f}",
            *target,
        ),
        Row(
            "    results/s, beside and without callers",
            f"{results_per_s:.1f}",
            f"{alone:.1f}",
            f"{results_per_s / alone:.2f}",
        ),
    ]


def _batch_alone(stage: Stage, concurrency: int, duration_s: float) -> float:
    """Return the results per second of a batch on a server without other callers."""
    with ExitStack() as stack:
        _start_batch(stack, stage, concurrency, DEFAULT)
        before, start_s = stage.results_count, time.monotonic()
        time.sleep(duration_s)
        return (stage.results_count - before) / (time.monotonic() - start_s)


def _beside_a_batch(stage: Stage, url: str, requests: int, concurrency: int, variable: str) -> Measured:
    with ExitStack() as stack:
        worker = _start_batch(stack, stage, concurrency, variable)
        before, start_s = stage.results_count, time.monotonic()
        p95_s = asyncio.run(_p95_s(url, requests))
        stored, duration_s = stage.results_count - before, time.monotonic() - start_s
        if worker.has_ended:
            raise WorkerFailedError(f"the batch ended before the callers: {worker.last_words()}")
        return Measured(p95_s, stored / duration_s)


def _start_batch(stack: ExitStack, stage: Stage, concurrency: int, variable: str) -> WorkerProcess:
    """Start a worker on more documents than it can finish, and wait until its calls fill the server."""
    stage.fill(short_conversations(ceil(SLOTS / MEAN_S * REQUESTS * 4 * (MEAN_S + PAUSE_S))))
    folder = stage.new_folder()
    (folder / ".env").write_text(f"{variable}\n", encoding="utf-8")
    worker = stack.enter_context(stage.start("product", folder, concurrency))
    stage.await_gauge(worker, "in_flight", concurrency, START_LIMIT_S)
    return worker


async def _p95_s(url: str, requests: int) -> float:
    """Return the 95th percentile of the latencies of CALLERS callers, each of whom sends *requests* requests in turn."""
    latencies_s: list[float] = []
    async with aiohttp.ClientSession() as session:

        async def caller(number: int) -> None:
            chance = random.Random(number)
            for each in range(requests):
                await asyncio.sleep(chance.expovariate(1 / PAUSE_S))
                body = orjson.dumps(conversation(f"Where is parcel {number}-{each}? It is late."))
                start = time.perf_counter()
                async with session.post(url, data=body, headers={"Content-Type": "application/json"}) as response:
                    await response.read()
                    if response.status != 200:
                        raise WorkerFailedError(f"{url} answered {response.status}")
                latencies_s.append(time.perf_counter() - start)

        await asyncio.gather(*map(caller, range(CALLERS)))
    return sorted(latencies_s)[ceil(0.95 * len(latencies_s)) - 1]

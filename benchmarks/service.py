"""What the service adds to the model's time, beside a bare route that only forwards."""

from __future__ import annotations

import asyncio
import tempfile
import time
from pathlib import Path
from statistics import median, quantiles

import aiohttp
import orjson

from benchmarks.table import Row
from benchmarks.worker_process import WorkerFailedError
from tests.fake_ollama import FakeOllama
from tests.service_process import CONVERSATION, serve

CONCURRENCY = 32
MODEL_S = 0.2
ROUNDS = 3  # of each side, in turn
MOST_MEDIAN_MS, MOST_P99_MS = 5.0, 15.0
BODY = orjson.dumps(CONVERSATION)


def measure(*, quick: bool) -> list[Row]:
    """Keep CONCURRENCY requests in flight, the model's slots always free, and take the model's time off each."""
    requests = CONCURRENCY * (10 if quick else 40)
    apps = ("main:app", "benchmarks.forward:app")
    added: dict[tuple[str, bool], list[tuple[float, float]]] = {
        (app, spread): [] for spread in (True, False) for app in apps
    }
    with FakeOllama(slots=2 * CONCURRENCY, latency_s=MODEL_S, user_message=0, record=False) as fake:
        settings = {"OLLAMA_ENDPOINT": fake.url, "OLLAMA_MODEL": "llama3.2", "API_MAX_CONCURRENT": str(CONCURRENCY)}
        for _ in range(1 if quick else ROUNDS):
            for (app, spread), figures in added.items():
                with (
                    tempfile.TemporaryDirectory(prefix="benchmark-") as folder,
                    serve(Path(folder), app=app, **settings) as service,
                ):
                    latencies_ms = asyncio.run(_latencies_ms(f"{service.url}/classify", requests, spread=spread))
                above = [latency - 1000 * MODEL_S for latency in latencies_ms]
                figures.append((median(above), quantiles(above, n=100)[98]))
    rows = []
    for spread, how in ((True, "spread over its time"), (False, "all in one moment")):
        product, bare = ([median(f[at] for f in added[app, spread]) for at in (0, 1)] for app in apps)
        name = f"POST /classify, {CONCURRENCY} at once, model {MODEL_S:.1f} s, callers {how}: ms added, median"
        for at, (text, most) in enumerate(((name, MOST_MEDIAN_MS), ("  99th percentile", MOST_P99_MS))):
            rows.append(Row(text, f"{product[at]:.1f}", f"{bare[at]:.1f}", "", f"<= {most:.0f}", product[at] <= most))
    return rows


async def _latencies_ms(url: str, requests: int, *, spread: bool) -> list[float]:
    """Return the latencies of *requests*, after one round that opens the connections."""
    latencies: list[float] = []
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:

        async def caller(count: int, *, counted: bool, after_s: float = 0.0) -> None:
            await asyncio.sleep(after_s)
            for _ in range(count):
                start = time.perf_counter()
                async with session.post(url, data=BODY, headers={"Content-Type": "application/json"}) as response:
                    await response.read()
                    if response.status != 200:
                        raise WorkerFailedError(f"{url} answered {response.status}")
                if counted:
                    latencies.append(1000 * (time.perf_counter() - start))

        await asyncio.gather(*(caller(1, counted=False) for _ in range(CONCURRENCY)))
        # Callers who start together stay in step, as the model takes the same time for all: 32 requests in one moment
        # and none for the rest of it. Both are measured; help desks are nearer to the one that is spread.
        step_s = MODEL_S / CONCURRENCY if spread else 0.0
        await asyncio.gather(
            *(caller(requests // CONCURRENCY, counted=True, after_s=step_s * number) for number in range(CONCURRENCY))
        )
    return latencies

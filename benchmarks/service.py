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
    added: dict[str, list[tuple[float, float]]] = {"main:app": [], "benchmarks.forward:app": []}
    with FakeOllama(slots=2 * CONCURRENCY, latency_s=MODEL_S, user_message=0, record=False) as fake:
        settings = {"OLLAMA_ENDPOINT": fake.url, "OLLAMA_MODEL": "llama3.2", "API_MAX_CONCURRENT": str(CONCURRENCY)}
        for _ in range(1 if quick else ROUNDS):
            for app, figures in added.items():
                with (
                    tempfile.TemporaryDirectory(prefix="benchmark-") as folder,
                    serve(Path(folder), app=app, **settings) as service,
                ):
                    latencies_ms = asyncio.run(_latencies_ms(f"{service.url}/classify", requests))
                above = [latency - 1000 * MODEL_S for latency in latencies_ms]
                figures.append((median(above), quantiles(above, n=100)[98]))
    product, bare = (([median(f[at] for f in figures) for at in (0, 1)]) for figures in added.values())
    name = f"POST /classify, {CONCURRENCY} at once, model {MODEL_S:.1f} s: ms added"
    return [
        Row(
            f"{name}, median",
            f"{product[0]:.1f}",
            f"{bare[0]:.1f}",
            "",
            f"<= {MOST_MEDIAN_MS:.0f}",
            product[0] <= MOST_MEDIAN_MS,
        ),
        Row(
            "  99th percentile",
            f"{product[1]:.1f}",
            f"{bare[1]:.1f}",
            "",
            f"<= {MOST_P99_MS:.0f}",
            product[1] <= MOST_P99_MS,
        ),
    ]


async def _latencies_ms(url: str, requests: int) -> list[float]:
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
        # Callers who start together would stay in step, as the model takes the same time for all: 32 requests in one
        # moment and none for the rest of it. These are spread evenly over one answer's time.
        await asyncio.gather(
            *(
                caller(requests // CONCURRENCY, counted=True, after_s=MODEL_S * number / CONCURRENCY)
                for number in range(CONCURRENCY)
            )
        )
    return latencies

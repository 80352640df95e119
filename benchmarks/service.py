"""Latency that the service adds to the model, compared with a bare forwarding route."""

from __future__ import annotations

import asyncio
import tempfile
import time
from pathlib import Path
from statistics import median, quantiles
from typing import NamedTuple

import aiohttp
import orjson

from benchmarks.table import Row
from benchmarks.worker_process import WorkerFailedError
from tests.fakes.fake_ollama import FakeOllama
from tests.service.service_process import CONVERSATION, serve

CONCURRENCY = 32
MODEL_S = 0.2
ROUNDS = 3  # of each side, alternating
MAX_MEDIAN_MS, MAX_P99_MS = 5.0, 15.0
DIRECT, PRODUCT, BARE = "the model", "main:app", "benchmarks.forward:app"  # the last two run under uvicorn
BODY = orjson.dumps(CONVERSATION)
CHAT = orjson.dumps(  # as long as the product's prompt with the conversation
    {"model": "llama3.2", "messages": [{"role": "user", "content": "x" * 4000}], "stream": False}
)


class Beyond(NamedTuple):
    """Latency beyond the model's own time, in ms."""

    median_ms: float
    p99_ms: float


def measure(*, quick: bool) -> list[Row]:
    """Keep CONCURRENCY requests in flight with free slots; "added" is the latency above that of a direct call."""
    requests = CONCURRENCY * (10 if quick else 40)
    figures: dict[tuple[str, bool], list[Beyond]] = {
        (asked, spread): [] for spread in (True, False) for asked in (DIRECT, PRODUCT, BARE)
    }
    with FakeOllama(slots=2 * CONCURRENCY, latency_s=MODEL_S, user_message=0, record=False) as fake:
        for _ in range(1 if quick else ROUNDS):
            for (asked, spread), rounds in figures.items():
                rounds.append(_beyond_model(fake, asked, requests, spread=spread))
    rows = []
    for spread, how in ((True, "spread"), (False, "simultaneous")):
        direct, product, bare = (
            Beyond(*(median(each) for each in zip(*figures[asked, spread], strict=True)))
            for asked in (DIRECT, PRODUCT, BARE)
        )
        name = f"{CONCURRENCY} concurrent callers, {how}; model {MODEL_S:.1f} s: extra latency, ms, median"
        for at, (text, most) in enumerate(((name, MAX_MEDIAN_MS), ("  99th percentile", MAX_P99_MS))):
            added = product[at] - direct[at]
            rows.append(Row(f"{text}, model server called directly", f"{direct[at]:.1f}", "", "", "", None))
            rows.append(Row("    POST /classify", f"{product[at]:.1f}", f"{bare[at]:.1f}", "", "", None))
            rows.append(
                Row("    added", f"{added:.1f}", f"{bare[at] - direct[at]:.1f}", "", f"<= {most:.0f}", added <= most)
            )
    return rows


def _beyond_model(fake: FakeOllama, asked: str, requests: int, *, spread: bool) -> Beyond:
    """Return the latency of *asked* beyond the model's own time."""
    if asked == DIRECT:
        latencies_ms = asyncio.run(_latencies_ms(f"{fake.url}/api/chat", CHAT, requests, spread=spread))
    else:
        settings = {"OLLAMA_ENDPOINT": fake.url, "OLLAMA_MODEL": "llama3.2", "API_MAX_CONCURRENT": str(CONCURRENCY)}
        with (
            tempfile.TemporaryDirectory(prefix="benchmark-") as folder,
            serve(Path(folder), app=asked, **settings) as service,
        ):
            latencies_ms = asyncio.run(_latencies_ms(f"{service.url}/classify", BODY, requests, spread=spread))
    above = [latency - 1000 * MODEL_S for latency in latencies_ms]
    return Beyond(median(above), quantiles(above, n=100)[98])


async def _latencies_ms(url: str, body: bytes, requests: int, *, spread: bool) -> list[float]:
    """Return the latencies of *requests* after a warm-up that opens the connections."""
    latencies: list[float] = []
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:

        async def caller(count: int, *, counted: bool, after_s: float = 0.0) -> None:
            await asyncio.sleep(after_s)
            for _ in range(count):
                start = time.perf_counter()
                async with session.post(url, data=body, headers={"Content-Type": "application/json"}) as response:
                    await response.read()
                    if response.status != 200:
                        raise WorkerFailedError(f"{url} answered {response.status}")
                if counted:
                    latencies.append(1000 * (time.perf_counter() - start))

        await asyncio.gather(*(caller(1, counted=False) for _ in range(CONCURRENCY)))
        # Callers that start together stay in step, because every answer takes the same time: 32 requests arrive at
        # once, then none. Both patterns are measured; the spread one is closer to a help desk.
        step_s = MODEL_S / CONCURRENCY if spread else 0.0
        await asyncio.gather(
            *(caller(requests // CONCURRENCY, counted=True, after_s=step_s * number) for number in range(CONCURRENCY))
        )
    return latencies

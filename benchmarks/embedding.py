"""Checks that 10,000 texts are embedded in the fewest calls, and in little more time than those calls take."""

from __future__ import annotations

import contextlib
import http.client
import json
import tempfile
import threading
import time
from collections import deque
from pathlib import Path

from pydantic import SecretStr

from benchmarks.steady_server import SteadyServer
from benchmarks.table import Row, figure
from benchmarks.worker_process import WorkerFailedError
from config.index_settings import IndexSettings
from config.openai_settings import OpenAISettings
from embedding_index.embedding_run import EmbeddingRun, RunOptions
from embedding_index.providers.openai_embeddings import OpenAIProvider
from embedding_index.vector_ledger import VectorLedger
from tests.embedding_index.embedding_site import keyed, short_texts

LATENCY_S = 0.05
CONCURRENCY = 4
BATCH_SIZE = 100
DIMENSIONS = (8, 1536)  # the first shows the run's own time; the second is the length that OpenAI sends
MAX_OF_IDEAL = 1.1
ROUNDS = 5


def measure(*, quick: bool) -> list[Row]:
    """Embed with a server that answers each call after 50 ms; the best of several rounds, because others use the machine."""
    count = 1000 if quick else 10_000
    rows = []
    for dimensions in DIMENSIONS:
        rounds = [_round(count, dimensions) for _ in range(1 if quick else ROUNDS)]
        calls, window_s, cpu_s = min(each[:3] for each in rounds)
        bare_s = min(each[3] for each in rounds)
        ideal_s = calls * LATENCY_S / CONCURRENCY
        fewest = -(-count // BATCH_SIZE)
        target, met = f"<= {MAX_OF_IDEAL:g}", window_s <= MAX_OF_IDEAL * ideal_s
        name = f"embedding {count} texts, {dimensions} dimensions"
        rows += [
            Row(f"{name}: calls", str(calls), str(fewest), "", f"= {fewest}", calls == fewest),
            Row(
                f"  seconds from first to last call, {CONCURRENCY} concurrent calls of 50 ms",
                figure(window_s),
                figure(ideal_s),
                f"{window_s / ideal_s:.2f}",
                target,
                met,
            ),
            Row(
                "  the same, compared with threads that only send",
                figure(window_s),
                figure(bare_s),
                f"{window_s / bare_s:.2f}",
            ),
            Row("  processor time of a call, ms", figure(1000 * cpu_s / calls)),
        ]
    return rows


def _round(count: int, dimensions: int) -> tuple[int, float, float, float]:
    """Return the calls, their seconds as the server saw them, CPU seconds, and the seconds of the bare calls.

    The seconds are from the start of the first call to the end of the last. The bare calls are as many, by threads that
    send finished bodies and discard the answers.

    Raises:
        WorkerFailedError: Some text was not embedded.
    """
    texts = keyed(short_texts(count))
    with (
        tempfile.TemporaryDirectory(prefix="benchmark-") as folder,
        SteadyServer(LATENCY_S, BATCH_SIZE, dimensions) as server,
        VectorLedger(Path(folder) / "vectors.sqlite3") as ledger,
    ):
        index = IndexSettings.model_construct(
            provider="openai", max_concurrent=CONCURRENCY, batch_size=BATCH_SIZE, timeout_s=60.0, dimensions=None
        )
        access = OpenAISettings.model_construct(api_key=SecretStr("sk-any"), base_url=server.url)
        provider = OpenAIProvider(index, access)
        provider.count_tokens(next(iter(texts.values())))  # loads the tokenizer
        cpu_s = time.process_time()
        run = EmbeddingRun(provider, ledger, RunOptions(batch_size=BATCH_SIZE))
        embedded = sum(end.problem is None for end in run.run(texts))
        cpu_s = time.process_time() - cpu_s
        provider.close()
        calls, window_s = _window(server)
        _post_only(server, list(texts.values()))
        bare_s = _window(server)[1]
    if embedded != count:
        raise WorkerFailedError(f"{embedded} of {count} texts were embedded")
    return calls, window_s, cpu_s, bare_s


def _window(server: SteadyServer) -> tuple[int, float]:
    """Return how many calls there were, and the seconds from the start of the first to the end of the last."""
    calls = server.calls()
    return len(calls), max(end_s for _, end_s in calls) - min(start_s for start_s, _ in calls)


def _post_only(server: SteadyServer, texts: list[str]) -> None:
    headers = {"Authorization": "Bearer sk-any", "Content-Type": "application/json"}
    bodies = deque(
        json.dumps({"model": "m", "input": texts[start : start + BATCH_SIZE], "encoding_format": "base64"})
        for start in range(0, len(texts), BATCH_SIZE)
    )

    def post() -> None:
        connection = http.client.HTTPConnection("127.0.0.1", server.port)
        with contextlib.suppress(IndexError):
            while True:
                connection.request("POST", "/v1/embeddings", bodies.popleft(), headers)
                connection.getresponse().read()
        connection.close()

    threads = [threading.Thread(target=post) for _ in range(CONCURRENCY)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

"""Figures over many results: the page *Labels* and ``cli.py report``, from the counts of each day."""

from __future__ import annotations

import gzip
import random
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from itertools import islice
from pathlib import Path
from typing import Any

from pymongo import MongoClient

from benchmarks.stage import DATABASE, RESULTS, ROOT
from benchmarks.table import Row
from benchmarks.worker_process import WorkerFailedError, WorkerProcess
from config import Taxonomy, load_taxonomy
from embedded.mongod import EmbeddedMongod
from storage.mongo_indexes import result_indexes
from tests.service.service_process import NO_MODEL, ServiceProcess, serve

MAX_FIRST_MS, MAX_KB = 100.0, 50.0
LIMIT_S = 3600.0
CORRECTED_EVERY = 200
DAYS = 91
START = datetime(2026, 8, 31, tzinfo=UTC)
CHANNELS = ("email", "chat", "phone", "web form", None)
MODELS = (("qwen3:8b", "a1" * 32), ("llama3.1:8b", "b2" * 32))


def measure(*, quick: bool) -> list[Row]:
    """Open the page and make the report: with no counts, with all of them, and after the results of a day changed."""
    count = 20_000 if quick else 1_000_000
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="benchmark-")))
        mongod = stack.enter_context(EmbeddedMongod(folder / "mongod"))
        client: MongoClient[Any] = stack.enter_context(MongoClient(mongod.uri))
        fill(client, count)
        return rows(folder, mongod.uri, client, count)


def rows(folder: Path, uri: str, client: MongoClient[Any], count: int) -> list[Row]:
    """Return the figures for *count* results in the database of *client*."""
    settings = NO_MODEL | {"MONGODB_URI": uri, "MONGODB_DB": DATABASE, "API_EXPOSE_DASHBOARD": "key"}
    found: list[Row] = []
    results = client[DATABASE][RESULTS]
    for state in ("no counts yet", "all counts up to date", "one result of a day replaced"):
        place = folder / state.replace(" ", "-")
        place.mkdir()
        if state.startswith("one"):
            results.update_one({}, {"$set": {"processing_metadata.processed_at": datetime.now(UTC)}})
        with serve(place, **settings) as service:
            found += _page(service, f"{count:,} results, {state}")
    found += _report(folder, uri, count)
    size = client[DATABASE].command("collStats", f"{RESULTS}_counts")
    found.append(Row("days in the collection of counts", f"{size['count']:,}"))
    found.append(Row("  MB of BSON, on disk", f"{size['size'] / 2**20:.1f}, {size['storageSize'] / 2**20:.1f}"))
    return found


def fill(client: MongoClient[Any], count: int) -> None:
    """Store *count* results of DAYS days, in no order of time, and corrections of some."""
    database, taxonomy = client[DATABASE], load_taxonomy()
    left = _results(count, taxonomy)
    while page := list(islice(left, 5000)):
        database[RESULTS].insert_many(page, ordered=False)
    database[RESULTS].create_indexes(result_indexes(taxonomy.field_names))
    database[f"{RESULTS}_corrections"].insert_many(
        {
            "source_conversation_id": number,
            "field": "intent",
            "from": "Complaint",
            "to": "Other",
            "reviewer": "anna",
            "at": START,
            "source": "confidence",
        }
        for number in range(0, count, CORRECTED_EVERY)
    )


def _results(count: int, taxonomy: Taxonomy) -> Iterator[dict[str, Any]]:
    drawn = random.Random(1)
    names = {field: taxonomy.names(field) for field in taxonomy.field_names}
    weights = {field: [1 / (place + 2) for place, _ in enumerate(labels)] for field, labels in names.items()}
    for number in range(count):
        at = START + timedelta(days=DAYS * drawn.random())
        model, digest = MODELS[at < START + timedelta(days=50)]
        yield {
            "conversation_number": str(number),
            "source_conversation_id": number,
            "conversation": {
                "started_at": at - timedelta(minutes=30),
                "last_message_at": at,
                "turns": 4,
                "channel": drawn.choices(CHANNELS, (5, 4, 2, 2, 1))[0],
            },
            "classification": {
                **{field: drawn.choices(labels, weights[field])[0] for field, labels in names.items()},
                "categorization": f"The customer of case {number} asks where the parcel is and gets a date.",
            },
            "processing_metadata": {
                "processed_at": at + timedelta(hours=1),
                "model_used": model,
                "model_digest": digest,
                "processing_duration_ms": 1200,
                "batch_job_id": "job_20261130_003350_9c62a5",
                "input_sha256": f"{number:064x}",
                "fingerprint": f"{number + count:064x}",
                "plan": "c0ffee" * 10,
                "confidence": {field: round(drawn.random() ** 0.25, 4) for field in names},
            },
            "created_at": at + timedelta(hours=1),
        }


def _page(service: ServiceProcess, name: str) -> list[Row]:
    """Return the time until the page and its charts appear, and their sizes."""
    start = time.perf_counter()
    first = service.get("/dashboard/labels")
    first_ms, slowest_ms = 1000 * (time.perf_counter() - start), 0.0
    while True:
        asked = time.perf_counter()
        answer = service.get("/dashboard/charts")
        slowest_ms = max(slowest_ms, 1000 * (time.perf_counter() - asked))
        if answer.status != 202:
            break
        time.sleep(0.2)
    charts_s = time.perf_counter() - start
    if (first.status, answer.status) != (200, 200):
        raise WorkerFailedError(f"{name}: {first.status}, {answer.status}: {answer.body[-300:]!r}")
    total = (len(first.body) + len(answer.body)) / 1024
    packed = (len(gzip.compress(first.body)) + len(gzip.compress(answer.body))) / 1024
    return [
        Row(
            f"{name}: first page, ms", f"{first_ms:.0f}", target=f"<= {MAX_FIRST_MS:.0f}", met=first_ms <= MAX_FIRST_MS
        ),
        Row("  charts appear after, s", f"{charts_s:.1f}"),
        Row("  longest request meanwhile, ms", f"{slowest_ms:.0f}"),
        Row("  page and charts, KB", f"{total:.1f}", target=f"<= {MAX_KB:.0f}", met=total <= MAX_KB),
        Row("  the same compressed by gzip, KB", f"{packed:.1f}"),
    ]


def _report(folder: Path, uri: str, count: int) -> list[Row]:
    place = folder / "report"
    place.mkdir()
    arguments = ["report", "--mongodb-uri", uri, "--db-name", DATABASE, "--output", str(place / "report.html")]
    with WorkerProcess([ROOT / "cli.py", *arguments], place) as process:
        usage = process.wait(LIMIT_S)
        if usage.exit_code:
            raise WorkerFailedError(f"report: {process.last_words()}")
    return [
        Row(f"{count:,} results, report, s", f"{usage.wall_s:.0f}"),
        Row("  CPU seconds of cli.py report", f"{usage.cpu_s:.1f}"),
        Row("  peak memory, MB", f"{process.peak_mb:.0f}"),
    ]

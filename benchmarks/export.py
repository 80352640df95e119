"""Memory and speed of ``cli.py export`` on many results, some of them corrected."""

from __future__ import annotations

import tempfile
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
from config import load_taxonomy
from embedded.mongod import EmbeddedMongod

MAX_MB = 200.0
RUN_LIMIT_S = 3600.0
CORRECTED_EVERY = 200
FORMATS = ("csv", "jsonl", "parquet", "xlsx")
START = datetime(2026, 1, 1, tzinfo=UTC)
CHANNELS = ("email", "chat", "phone", "web")


def measure(*, quick: bool) -> list[Row]:
    """Export the same results in each format; each process is measured from its start to its end."""
    count = 20_000 if quick else 1_000_000
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="benchmark-")))
        mongod = stack.enter_context(EmbeddedMongod(folder / "mongod"))
        client: MongoClient[Any] = stack.enter_context(MongoClient(mongod.uri))
        _fill(client, count)
        return [row for form in FORMATS for row in _export(folder, mongod.uri, form, count)]


def _fill(client: MongoClient[Any], count: int) -> None:
    database = client[DATABASE]
    left = _results(count)
    while page := list(islice(left, 5000)):
        database[RESULTS].insert_many(page, ordered=False)
    database[RESULTS].create_index("source_conversation_id", unique=True)
    corrections = database[f"{RESULTS}_corrections"]
    corrections.create_index(["source_conversation_id", "field", "reviewer"], unique=True)
    corrections.insert_many(
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


def _results(count: int) -> Iterator[dict[str, Any]]:
    taxonomy = load_taxonomy()
    names = {field: taxonomy.names(field) for field in taxonomy.field_names}
    for number in range(count):
        at = START + timedelta(minutes=number % 400_000)
        yield {
            "conversation_number": str(number),
            "source_conversation_id": number,
            "conversation": {
                "started_at": at,
                "last_message_at": at + timedelta(minutes=30),
                "turns": 4,
                "channel": CHANNELS[number % 4],
                "metadata": {"priority": "high"},
            },
            "classification": {
                **{field: labels[number % len(labels)] for field, labels in names.items()},
                "categorization": f"The customer of case {number} asks where the parcel is and gets a date.",
            },
            "processing_metadata": {
                "processed_at": at,
                "model_used": "llama3.2:latest",
                "model_digest": f"{7:064x}",
                "processing_duration_ms": 1200,
                "processor_version": "1.0.0",
                "batch_job_id": "job_20261130_003350_9c62a5",
                "attempts": 1,
                "prompt_tokens": 1900,
                "reply_tokens": 45,
                "input_complete": True,
                "turns_used": 4,
                "turns_total": 4,
                "input_sha256": f"{number:064x}",
                "fingerprint": f"{number + count:064x}",
                "confidence": {field: round(0.5 + number % 500 / 1000, 4) for field in names},
                "needs_review": number % 9 == 0,
            },
            "created_at": at,
        }


def _export(folder: Path, uri: str, form: str, count: int) -> list[Row]:
    output, place = folder / f"results.{form}", folder / form
    place.mkdir()
    arguments = ["export", "--mongodb-uri", uri, "--db-name", DATABASE, "--output", str(output), "--limit", str(count)]
    with WorkerProcess([ROOT / "cli.py", *arguments], place) as process:
        usage = process.wait(RUN_LIMIT_S)
        if f"export: {count:,} results written" not in process.last_words():
            raise WorkerFailedError(f"{form}: {process.last_words()}")
    size_mb = output.stat().st_size / 2**20
    output.unlink()
    return [
        Row(
            f"export of {count:,} results as {form}, peak memory, MB",
            f"{process.peak_mb:.0f}",
            target=f"<= {MAX_MB:.0f}",
            met=process.peak_mb <= MAX_MB,
        ),
        Row("  seconds", f"{usage.wall_s:.0f}"),
        Row("  CPU seconds", f"{usage.cpu_s:.0f}"),
        Row("  size of the file, MB", f"{size_mb:.0f}"),
    ]

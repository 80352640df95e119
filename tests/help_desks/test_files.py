"""Delimiter, quoting, encoding and compression of a file are detected."""

from __future__ import annotations

import gzip
import json
import zipfile
from datetime import UTC, datetime
from pathlib import Path

import pytest

from error_handler import ConfigurationError
from help_desks.columns import Options
from help_desks.files import table_rows, text_file
from help_desks.reader import Export, read_documents
from help_desks.times import DateOrder, date_order

SECRET = "my card is 4242"


def texts(path: Path, **options: str) -> list[str]:
    export = Export(path, Options(**options))  # type: ignore[arg-type]
    return [str(document["text"]) for document in export.documents()]


@pytest.mark.parametrize("sign", [",", ";", "\t", "|"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"], ids=["lf", "crlf", "cr"])
def test_delimiter_and_line_end_are_detected(tmp_path: Path, sign: str, end: str) -> None:
    rows = [f"id{sign}text{sign}tags", *(f'{n}{sign}"Hello, my; friend | you\t"{sign}"a,b;c"' for n in range(3))]
    path = tmp_path / "a.csv"
    path.write_bytes(end.join(rows).encode())
    assert texts(path) == ["Hello, my; friend | you\t"] * 3


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        pytest.param('"a, b";"text"\n"1, 2";"x, y"\n', ["x, y"], id="commas in the header"),
        pytest.param('id,text\n1,"say \\"hi\\", ok"\n2,b\n', ['say "hi", ok', "b"], id="backslash"),
        pytest.param('id,text\n1,"say ""hi"", ok"\n2,"C:\\"\n', ['say "hi", ok', "C:\\"], id="doubled quotes"),
        pytest.param("'id';'text'\n'1';'it''s; ok'\n", ["it's; ok"], id="single quotes"),
        pytest.param("sep=;\nid;text\n1;a,b\n", ["a,b"], id="Excel's first line"),
        pytest.param("text\nhello; you, there\n".replace(",", ""), ["hello; you there"], id="one column"),
        pytest.param("id8text,text\n8888,e\n", ["e"], id="letters are no delimiters"),
    ],
)
def test_quoting_is_detected(tmp_path: Path, content: str, expected: list[str]) -> None:
    path = tmp_path / "a.csv"
    path.write_text(content, newline="")
    assert texts(path) == expected


@pytest.mark.parametrize(
    ("encoding", "text"),
    [
        ("utf-8-sig", "Größe 50 €"),
        ("utf-16", "Größe 50 €"),
        ("utf-16-le", "Where is my parcel, please? Größe"),
        ("cp1252", "Das Paket ist beschädigt, die Rückerstattung wäre fällig: 50 €"),
        ("cp1252", "Où est mon colis? J'ai été débité deux fois"),
        ("cp1251", "Где моя посылка? Верните деньги, пожалуйста"),
        ("cp932", "荷物が届きません。返金してください。"),
        ("gb18030", "我的包裹在哪里？请退款。"),
    ],
)
def test_encoding_is_detected(tmp_path: Path, encoding: str, text: str) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(f"id;text\n1;plain\n2;{text}\n".encode(encoding))
    assert texts(path) == ["plain", text]


def test_guessed_encoding_is_named_and_can_be_changed(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes("text\nprice: 5 \xa4\n".encode("iso8859-15", "replace").replace(b"?", b"\xa4"))
    export = Export(path)
    list(export.documents())
    assert export.findings.note_lines() == ["1 file read as cp1252, which was guessed; --encoding NAME changes it"]
    assert texts(path, encoding="iso8859-15") == ["price: 5 €"]
    with pytest.raises(ConfigurationError, match="--encoding klingon is unknown"):
        texts(path, encoding="klingon")


@pytest.mark.parametrize("encoding", ["utf-16", "utf-8-sig"])
def test_json_with_a_byte_order_mark(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes("\n".join(json.dumps({"text": text}, ensure_ascii=False) for text in ("ä", "b")).encode(encoding))
    assert texts(path) == ["ä", "b"]
    path.write_bytes(json.dumps([{"text": "ä"}, {"text": "b"}], ensure_ascii=False).encode(encoding))
    assert texts(path) == ["ä", "b"]


def test_compressed_files_are_read_by_their_content(tmp_path: Path) -> None:
    for name in ("a.csv.gz", "b.csv", "c"):
        path = tmp_path / name
        path.write_bytes(gzip.compress(b"id,text\n1,hi\n"))
        assert texts(path) == ["hi"]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (gzip.compress(SECRET.encode() * 100_000, mtime=0)[:60], "damaged or cut off"),
        (b"PK\x03\x04" + SECRET.encode(), "a zip archive that is damaged or cut off; export or copy it again"),
    ],
    ids=["cut", "zip"],
)
def test_file_that_cannot_be_unpacked_is_named(tmp_path: Path, content: bytes, expected: str) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(content)
    with pytest.raises(ConfigurationError, match=expected):
        texts(path)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (
            ["Agents0.json", "Tickets0.json", "Tickets1.json"],
            r"unpack it, and import from it, each with --file: Tickets0.json, T",
        ),
        ([f"{number}.csv" for number in range(7)], r"--file: 0.csv, 1.csv, 2.csv, 3.csv, 4.csv, \.\.\.\."),
        (["[Content_Types].xml", "xl/workbook.xml"], "is an Excel workbook; save the sheet as CSV in UTF-8"),
        (["Tickets0.xml"], "without JSON, JSONL or CSV; export the tickets in one of these formats"),
    ],
    ids=["account", "many", "workbook", "xml"],
)
def test_zip_archive_is_refused_with_the_files_to_import(tmp_path: Path, names: list[str], expected: str) -> None:
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            archive.writestr(name, SECRET)
    with pytest.raises(ConfigurationError, match=expected):
        texts(path)


def test_columns_with_equal_or_missing_names_keep_their_values(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("id,text,tag,tag,\n1,hi,a,b,c\n")
    (document,) = read_documents(path)
    assert document["metadata"] == {"tag": "a", "tag_4": "b", "column_5": "c"}


def test_array_is_streamed(tmp_path: Path) -> None:
    """An element is yielded before the rest of the file is read, also if it is all on one line."""
    path = tmp_path / "a.json"
    path.write_text('[{"text": "first"}, ' + '{"text": "more"}, ' * 5_000 + '{"text": ')
    documents = iter(read_documents(path))
    assert next(documents)["text"] == "first"
    with pytest.raises(ConfigurationError, match="line 1: expected"):
        list(documents)


@pytest.mark.parametrize(
    "content", ["[", "[{}", '[{"text": "a"},]', '[{"text": "a"}] b', '[{"text": "a"} {"text": "b"}]', "[,]"]
)
def test_damaged_array_is_an_error(tmp_path: Path, content: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(content)
    with pytest.raises(ConfigurationError, match="line 1: expected"):
        list(read_documents(path))


def test_empty_array_has_no_documents(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(" [ ]\n")
    assert list(read_documents(path)) == []


def test_rows_are_read_only_as_far_as_needed(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("id,text\n" + "1,hi\n" * 5000 + '2,"broken" \n')
    rows = table_rows(text_file(path))
    assert [next(rows)[0] for _ in range(3)] == [1, 2, 3]


# Times

MARCH_4, APRIL_3 = datetime(2026, 3, 4, tzinfo=UTC), datetime(2026, 4, 3, tzinfo=UTC)


@pytest.mark.parametrize(
    ("others", "expected"),
    [(["13/04/2026"], APRIL_3), (["04/13/2026"], MARCH_4), ([], None), (["13/04/2026", "04/13/2026"], None)],
    ids=["day first", "month first", "undecided", "contradicting"],
)
def test_whole_column_decides_about_day_and_month(others: list[str], expected: datetime | None) -> None:
    assert date_order(["03/04/2026", *others]).read("03/04/2026") == expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("3/4/2026 1:05 PM", datetime(2026, 4, 3, 13, 5, tzinfo=UTC)),
        ("03/04/26 00:30", datetime(2026, 4, 3, 0, 30, tzinfo=UTC)),
        ("03.04.2026 10:00:59", datetime(2026, 4, 3, 10, 0, 59, tzinfo=UTC)),
        ("03-04-2026T10:00 +02:00", datetime(2026, 4, 3, 8, 0, tzinfo=UTC)),
        ("2026-04-03", APRIL_3),
        ("1775174400", APRIL_3),
        (1775174400000, APRIL_3),
        ("31/02/2026", None),
        ("soon", None),
    ],
)
def test_usual_dates_are_read(value: str | int, expected: datetime | None) -> None:
    assert DateOrder(True).read(value) == expected


def test_ambiguous_dates_are_kept_and_named(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("ticket_id,message,created_at\n1,hi,03/04/2026\n2,ho,05/06/2026 10:00\n")
    export = Export(path)
    documents = list(export.documents())
    assert documents[0]["messages"][0]["timestamp"] == documents[0]["created_at"] == "03/04/2026"
    assert export.findings.note_lines() == [
        "2 times in which day and month could be exchanged, kept as text; --dates day-first or month-first decides (line 2, line 3)"
    ]
    (document, _) = Export(path, Options(is_day_first=True)).documents()
    assert document["messages"][0]["timestamp"] == document["created_at"] == APRIL_3


def test_date_further_down_decides_about_the_first_ones(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    rows = "".join(f"{number},hi,03/04/2026\n" for number in range(300))
    path.write_text(f"ticket_id,message,created_at\n{rows}301,ho,31/12/2026\n")
    documents = list(Export(path).documents())
    assert {document["created_at"] for document in documents[:300]} == {APRIL_3}

"""Gold labels: forms of files, spelling, and problems that are listed by line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from bson import Int64, ObjectId

from config import load_taxonomy
from config.taxonomy import Field, Label, Taxonomy
from error_handler import ConfigurationError
from evaluation.gold import Gold, match, merge, possible_ids, read_gold_file
from evaluation.values import GoldEntry, Labelled, Labels, Spelling

SPELLING = Spelling(load_taxonomy())
OBJECT_ID = "67fab3c83bf051d4f16758b3"


def read(folder: Path, name: str, text: str) -> Gold:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return read_gold_file(path, SPELLING)


def kinds(gold: Gold) -> list[tuple[str, str]]:
    return [(problem.place, problem.kind) for problem in gold.problems]


@pytest.mark.parametrize(
    "line",
    [
        '{"_id": "a", "intent": "Complaint", "topic": "Other"}',
        '{"source_conversation_id": "a", "gold": {"intent": "complaint", "topic": " other "}}',
        '{"_id": "a", "expected": {"intent": "COMPLAINT", "topic": "Other", "sentiment": null}}',
        '{"_id": "a", "intent": ["Complaint"], "topic": "Other", "text": "never read", "sentiment": ""}',
    ],
)
def test_forms_of_a_json_line(line: str, tmp_path: Path) -> None:
    """Flat fields or an object; labels match without regard to case and spacing; further fields are ignored."""
    gold = read(tmp_path, "gold.jsonl", line)
    assert gold.entries == [GoldEntry("line 1", ("a",), None, {"intent": ("Complaint",), "topic": ("Other",)})]
    assert gold.problems == []


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_csv_with_some_of_the_fields(delimiter: str, tmp_path: Path) -> None:
    """Excel writes a byte order mark, and semicolons in some countries. A blank cell says nothing."""
    rows = [["_id", "conversation_number", "intent"], [" ", "7", "Order Status"], ["", "8", " "]]
    text = "\ufeff" + "\r\n".join(delimiter.join(row) for row in rows)
    gold = read(tmp_path, "gold.csv", text)
    assert gold.entries == [GoldEntry("line 2", (), "7", {"intent": ("Order Status",)})]
    assert kinds(gold) == [("line 3", "no_label")]


def test_several_labels_are_a_list_or_separated_by_bars() -> None:
    """For multi-valued fields."""
    expected: Labels = ("Complaint", "Refund Request")
    assert SPELLING.read("intent", ["Refund Request", "Complaint"]) == expected
    assert SPELLING.read("intent", "refund request | complaint") == expected
    assert SPELLING.read("intent", []) == ()


def test_several_labels_of_a_field_with_one_are_not_used(tmp_path: Path) -> None:
    """No answer could ever be right; the row is named. The same label in two spellings is one."""
    lines = [
        '{"_id": 1, "intent": ["Complaint", "Refund Request"], "topic": "Other"}',
        '{"_id": 2, "intent": "Complaint|Refund Request"}',
        '{"_id": 3, "intent": []}',
        '{"_id": 4, "intent": ["Complaint", "complaint"]}',
    ]
    gold = read(tmp_path, "gold.jsonl", "\n".join(lines))
    assert [(entry.place, entry.labels) for entry in gold.entries] == [
        ("line 1", {"topic": ("Other",)}),
        ("line 4", {"intent": ("Complaint",)}),
    ]
    assert kinds(gold) == [(f"line {number}", "not_one") for number in (1, 2, 3)]
    assert gold.problems[1].detail == "intent Complaint|Refund Request"
    assert read(tmp_path, "gold.jsonl", lines[1]).entries == []  # and the reason is not that the field is unknown


@pytest.mark.parametrize("names", [("Yes", "No"), ("true", "false")])
def test_truth_value_is_a_label_of_two(names: tuple[str, str]) -> None:
    """YAML reads neither pair as truth values in a taxonomy, but JSON has them."""
    spelling = Spelling(Taxonomy((Field("escalate", tuple(Label(name, "") for name in names)),)))
    assert [spelling.read("escalate", value) for value in (True, False)] == [(names[0],), (names[1],)]
    assert SPELLING.read("intent", True) is None


def test_unusable_lines_are_listed_and_the_others_are_kept(tmp_path: Path) -> None:
    """Each problem names its line, never the text of a conversation."""
    lines = [
        '{"_id": 1, "intent": "Complaint"}',
        '{"_id": 2, "intent": "Complaint", "topic": "Weather"}',
        "not JSON",
        '{"intent": "Complaint"}',
        '{"_id": 3, "text": "a question"}',
        "[1]",
        '{"_id": 4, "intent": 7}',
    ]
    gold = read(tmp_path, "gold.jsonl", "\n".join(lines))
    assert [entry.place for entry in gold.entries] == ["line 1", "line 2"]
    assert kinds(gold) == [
        ("line 2", "outside"),
        ("line 3", "unreadable"),
        ("line 4", "no_key"),
        ("line 5", "no_label"),
        ("line 6", "unreadable"),
        ("line 7", "outside"),
    ]
    assert gold.problems[0].detail == "topic Weather"


@pytest.mark.parametrize(
    ("name", "text"), [("gold.jsonl", '{"_id": 1, "intnet": "Complaint"}'), ("gold.csv", "a,b\n1,2")]
)
def test_file_without_any_field_of_the_taxonomy_is_an_error(name: str, text: str, tmp_path: Path) -> None:
    """A misspelt column is not silently ignored."""
    with pytest.raises(ConfigurationError, match="expected _id or conversation_number, and one or more of the fields"):
        read(tmp_path, name, text)


@pytest.mark.parametrize("name", ["gold.jsonl", "gold.csv"])
def test_empty_file_is_named_as_such(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="is empty; --gold requires a line of JSON, or a row of CSV"):
        read(tmp_path, name, "\n")


def test_missing_file_and_broken_csv_are_errors(tmp_path: Path) -> None:
    """The message names the file."""
    with pytest.raises(ConfigurationError, match=r"none\.jsonl cannot be read"):
        read_gold_file(tmp_path / "none.jsonl", SPELLING)
    with pytest.raises(ConfigurationError, match=r"gold\.csv, line"):
        read(tmp_path, "gold.csv", '_id,intent\n1,"Complaint" x\n')


def test_possible_ids_of_a_text() -> None:
    """CSV has no types: a text may be an ObjectId or a number, which MongoDB may hold as one of three types."""
    assert possible_ids(OBJECT_ID) == (OBJECT_ID, ObjectId(OBJECT_ID))
    for text in ("12", "12.0"):
        assert [type(one) for one in possible_ids(text)] == [str, int, Int64, float]
        assert possible_ids(text) == (text, 12, 12, 12)
    for number in (2**53 + 1, 2**63 - 1):  # no double has this value
        assert possible_ids(str(number)) == (str(number), number, number)
    assert possible_ids("-3")[1:] == (-3, -3, -3)
    assert possible_ids("doc0") == ("doc0",)
    assert [type(one) for one in possible_ids(12)] == [int, int, Int64, float]
    for value in (True, 1.5, float("nan"), float("inf"), 1e300, None):
        assert len(possible_ids(value)) == 1
    assert possible_ids("9" * 30) == ("9" * 30,)
    assert possible_ids(10**30) == ()  # MongoDB cannot hold it


async def test_match_reports_unknown_and_ambiguous_conversations() -> None:
    """A number that two conversations share names neither of them."""
    stored = [Labelled(1, "10", {}), Labelled(2, "20", {}), Labelled(3, "20", {})]

    async def find(ids: list[Any], numbers: list[str]) -> list[Labelled]:
        return [one for one in stored if one.document_id in ids or one.number in numbers]

    entries = [
        GoldEntry("line 1", ("1", 1), None, {}),
        GoldEntry("line 2", (), "10", {}),
        GoldEntry("line 3", (), "20", {}),
        GoldEntry("line 4", (9,), None, {}),
        GoldEntry("line 5", (), "90", {}),
    ]
    pairs, problems = await match(entries, find)
    assert [(entry.place, found.document_id) for entry, found in pairs] == [("line 1", 1), ("line 2", 1)]
    assert [(one.place, one.kind, one.detail) for one in problems] == [
        ("line 3", "ambiguous", "conversation 20"),
        ("line 4", "unknown", "9"),
        ("line 5", "unknown", "conversation 90"),
    ]


def test_of_repeated_gold_labels_the_first_one_is_used() -> None:
    """Fields of several lines are joined; a repetition is listed, and a contradiction as such."""
    found = Labelled(1, None, {"intent": ("Other",)})

    def entry(place: str, **labels: str) -> tuple[GoldEntry, Labelled]:
        return GoldEntry(place, (1,), None, {name: (label,) for name, label in labels.items()}), found

    rows, problems = merge(
        [
            entry("line 1", intent="Complaint"),
            entry("line 2", intent="Complaint", topic="Other"),
            entry("line 3", intent="Other"),
        ]
    )
    assert [row.gold for row in rows] == [{"intent": ("Complaint",), "topic": ("Other",)}]
    assert [(one.place, one.kind) for one in problems] == [
        ("line 2", "duplicate"),
        ("line 3", "conflict"),
        ("1", "no_field"),
    ]

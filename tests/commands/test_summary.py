"""What a person reads after a run."""

from __future__ import annotations

import io
from typing import Any

import bson
import pytest
from rich.console import Console

from commands.summary import BAR_WIDTH, print_examples, print_labels, print_next_steps, print_run
from config import load_settings

STATS: dict[str, Any] = {
    "job_id": "job_20250924_103000_ab12cd",
    "documents_processed": 50,
    "successful": 45,
    "failed": 3,
    "skipped": 2,
    "already_done": 0,
    "leased_elsewhere": 0,
    "copied": 0,
    "in_retry_queue": 0,
    "in_quarantine": 0,
    "reasons": {},
}


@pytest.fixture
def console() -> Console:
    return Console(file=io.StringIO(), width=160)


def shown(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def result(**changes: Any) -> dict[str, Any]:
    labels = {
        "intent": "Order Status",
        "topic": "Shipping/Delivery",
        "sentiment": "Negative",
        "categorization": "Late.",
    }
    return {"conversation_number": "42", "source_conversation_id": 1, "classification": {**labels, **changes}}


def test_the_counts_of_a_run(console: Console) -> None:
    """One line when all went well."""
    print_run(console, STATS)
    assert shown(console) == (
        "50 documents processed in run job_20250924_103000_ab12cd: 45 classified, 3 failed, 2 skipped\n"
    )


def test_what_else_there_is_to_say(console: Console) -> None:
    """Why documents failed, most frequent first, where they are, and what to do."""
    extras = {"already_done": 7, "leased_elsewhere": 8, "in_retry_queue": 2, "in_quarantine": 1}
    print_run(console, {**STATS, **extras, "reasons": {"skipped_no_text": 2, "empty": 3}})
    lines = shown(console).splitlines()
    assert lines[1] == "7 had a result already and were not asked again (--reprocess replaces results)"
    assert lines[2] == "8 are in the hands of another worker"
    assert lines[3:5] == ["  3 x empty", "  2 x skipped_no_text"]
    assert lines[5].startswith("2 documents wait in the retry queue and 1 are in quarantine; ")
    assert "--retry-failed" in lines[5]


@pytest.mark.parametrize(
    ("counts", "lines"),
    [
        ({}, []),
        ({"review_below": 0.6, "with_confidence": 45}, ["0 need review: a label with a confidence below 0.6"]),
        (
            {"review_below": 0.6, "with_confidence": 40, "needs_review": 7},
            [
                "7 need review: a label with a confidence below 0.6",
                "5 results have no confidence and are not marked: the server gave none for them",
            ],
        ),
        (
            {"review_below": 0.6},
            [
                "No result is marked for review: the model server gave no log probabilities, so no confidence is known "
                "(docs/local-inference.md)"
            ],
        ),
        ({"review_below": 0.6, "successful": 0}, []),
    ],
    ids=["not-asked-for", "none", "some-without", "no-log-probabilities", "no-results"],
)
def test_what_a_person_should_look_at(counts: dict[str, Any], lines: list[str]) -> None:
    """Said only where it was asked for, and never so that silence looks like certainty."""
    console = Console(file=io.StringIO(), width=160, soft_wrap=True)
    print_run(console, {**STATS, "review_below": None, "with_confidence": 0, "needs_review": 0, **counts})
    assert shown(console).splitlines()[1:] == lines


def test_shares_of_labels(console: Console) -> None:
    """A bar for each, the most frequent first, never of no length."""
    counts = {"intent": {"Other": 1, "Complaint": 199}, "topic": {}, "sentiment": {"Neutral": 200}}
    print_labels(console, counts)
    lines = [line.rstrip() for line in shown(console).splitlines()]
    assert lines[0] == "Intent"
    assert lines[1].split() == ["Complaint", "█" * BAR_WIDTH, "199", "100%"]
    assert lines[2].split() == ["Other", "█", "1", "0%"]
    assert lines[3] == "Sentiment"
    assert "Topic" not in lines


def test_examples(console: Console) -> None:
    """One row each; an id stands in for a number that is not there."""
    second = {**result(), "conversation_number": None, "source_conversation_id": bson.ObjectId("0" * 24)}
    print_examples(console, [result(), second])
    rows = shown(console).splitlines()[2:]
    assert rows[0].split() == ["42", "Order", "Status", "Shipping/Delivery", "Negative", "Late."]
    assert rows[1].split()[0] == "0" * 24


@pytest.mark.parametrize("text", ["[/b] is bold", "[red]", "[bold]x[/bold]", "[link=http://x]", "\\[a]", "[/]"])
def test_texts_are_no_markup(console: Console, text: str) -> None:
    """Brackets in what the model or a customer wrote neither end the program nor vanish."""
    print_examples(console, [{**result(categorization=text, intent=text), "conversation_number": text}])
    assert shown(console).count(text) == 3
    print_labels(console, {"intent": {text: 1}})
    assert shown(console).count(text) == 4


def test_ids_do_not_steer_the_terminal(console: Console) -> None:
    """Escape sequences in an id or number are not printed."""
    hostile = {**result(), "conversation_number": None, "source_conversation_id": "\x1b[31mred\x07\n"}
    print_examples(console, [hostile, {**result(), "conversation_number": "\x1b[31mred\x07"}])
    assert "\x1b" not in shown(console)
    assert "\x07" not in shown(console)


def test_what_to_do_next(console: Console) -> None:
    """Where the results are, and the three commands that lead on."""
    print_next_steps(console, load_settings(None, db_name="d", results_collection="r"))
    assert "collection r in database d" in shown(console)
    for command in ("utils.mongodb_import --file", "ollama pull", "cli.py --mongodb-uri"):
        assert command in shown(console)

"""The summary of a run."""

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


def test_summary_of_a_clean_run_is_one_line(console: Console) -> None:
    print_run(console, STATS, load_settings(None))
    assert shown(console) == (
        "50 documents processed in run job_20250924_103000_ab12cd: 45 classified, 3 failed, 2 skipped\n"
    )


def test_summary_lists_reasons_by_frequency_then_the_queues(console: Console) -> None:
    extras = {"copied": 4, "already_done": 7, "leased_elsewhere": 8, "in_retry_queue": 2, "in_quarantine": 1}
    extras |= {"held_back_s": 34}
    print_run(console, {**STATS, **extras, "reasons": {"skipped_no_text": 2, "empty": 3}}, load_settings(None))
    assert shown(console).splitlines()[1:] == [
        "4 reused the result of an identical conversation (--no-dedupe disables this)",
        "7 already had a result (--reprocess replaces results)",
        "8 documents are leased by another worker (leases expire after 300 s)",
        "Held back for 34 s while the service had requests (SERVICE_LEASE=false disables this)",
        "  3 x empty",
        "  2 x skipped_no_text",
        "Retry queue: 2 (retried by the next run). Quarantine: 1 (--retry-failed retries them)",
        "python cli.py quarantine list lists them with reasons",
    ]


def test_summary_of_one_document_uses_the_singular(console: Console) -> None:
    one = {"documents_processed": 1, "successful": 1, "failed": 0, "skipped": 0, "leased_elsewhere": 1}
    print_run(console, {**STATS, **one}, load_settings(None))
    lines = shown(console).splitlines()
    assert lines[0].startswith("1 document processed in run ")
    assert lines[1] == "1 document is leased by another worker (leases expire after 300 s)"


def test_summary_of_an_empty_run_says_what_to_do(console: Console) -> None:
    nothing = {"documents_processed": 0, "successful": 0, "failed": 0, "skipped": 0, "in_retry_queue": 1}
    print_run(console, {**STATS, **nothing}, load_settings(None))
    text = " ".join(shown(console).split())
    assert text.startswith("Nothing to do: no documents are pending. Documents with results are skipped;")
    assert text.endswith("Retry queue: 1 (retried by the next run). Quarantine: 0")


@pytest.mark.parametrize(
    ("counts", "has_documents"),
    [({}, False), ({"done": 3}, True), ({"filtered": 1}, True), ({"in_quarantine": 1}, True)],
)
def test_summary_of_an_empty_collection_names_the_flags(
    console: Console, counts: dict[str, int], has_documents: bool
) -> None:
    """A misspelt name is an empty collection; documents in quarantine are not among those left out."""
    nothing: dict[str, Any] = {"documents_processed": 0, "successful": 0, "failed": 0, "skipped": 0}
    queued = {"in_quarantine": counts.pop("in_quarantine", 0)}
    print_run(console, {**STATS, **nothing, **queued, "not_selected": counts}, load_settings(None))
    text = " ".join(shown(console).split())
    hint = "Nothing to do. No documents found in customer_support.conversation_set: correct --db-name, --source-collection or"
    assert text.startswith(hint) is not has_documents


@pytest.mark.parametrize(
    ("counts", "lines"),
    [
        ({}, []),
        (
            {"review_below": 0.6, "with_confidence": 45},
            ["0 results need review: the confidence of a label is below 0.6"],
        ),
        (
            {"review_below": 0.6, "with_confidence": 40, "needs_review": 7},
            [
                "7 results need review: the confidence of a label is below 0.6",
                "5 results have no confidence and no review mark: the server returned no log probabilities",
            ],
        ),
        (
            {"review_below": 0.6},
            [
                "No result is marked for review: the model server returned no log probabilities, so there is no "
                "confidence to compare (docs/local-inference.md)"
            ],
        ),
        ({"review_below": 0.6, "successful": 0}, []),
    ],
    ids=["not-asked-for", "none", "some-without", "no-log-probabilities", "no-results"],
)
def test_review_lines_appear_only_if_review_is_enabled(counts: dict[str, Any], lines: list[str]) -> None:
    """Results without a confidence are named, so that their silence does not look like certainty."""
    console = Console(file=io.StringIO(), width=160, soft_wrap=True)
    print_run(
        console, {**STATS, "review_below": None, "with_confidence": 0, "needs_review": 0, **counts}, load_settings(None)
    )
    assert shown(console).splitlines()[1:] == lines


def test_label_shares_are_sorted_bars(console: Console) -> None:
    """The shortest bar still has one character."""
    counts = {"intent": {"Other": 1, "Complaint": 199}, "topic": {}, "sentiment": {"Neutral": 200}}
    print_labels(console, counts)
    lines = [line.rstrip() for line in shown(console).splitlines()]
    assert lines[0] == "Intent"
    assert lines[1].split() == ["Complaint", "█" * BAR_WIDTH, "199", "100%"]
    assert lines[2].split() == ["Other", "█", "1", "0%"]
    assert lines[3] == "Sentiment"
    assert "Topic" not in lines


def test_examples_have_a_column_for_each_field(console: Console) -> None:
    """A field that a result lacks is empty; without categorization there is no such column."""
    one = {"conversation_number": "1", "classification": {"escalate": "Yes", "channels": ["Phone", "Chat"]}}
    print_examples(console, [one, {"conversation_number": "2", "classification": {"escalate": "No"}}])
    rows = [line.split() for line in shown(console).splitlines()[1:]]
    assert rows == [["conversation", "escalate", "channels"], ["1", "Yes", "Phone,", "Chat"], ["2", "No"]]


def test_examples_show_the_id_if_there_is_no_number(console: Console) -> None:
    second = {**result(), "conversation_number": None, "source_conversation_id": bson.ObjectId("0" * 24)}
    print_examples(console, [result(), second])
    rows = shown(console).splitlines()[2:]
    assert rows[0].split() == ["42", "Order", "Status", "Shipping/Delivery", "Negative", "Late."]
    assert rows[1].split()[0] == "0" * 24


@pytest.mark.parametrize("text", ["[/b] is bold", "[red]", "[bold]x[/bold]", "[link=http://x]", "\\[a]", "[/]"])
def test_texts_are_not_read_as_markup(console: Console, text: str) -> None:
    """Brackets in text of the model or a customer neither raise an error nor vanish."""
    print_examples(console, [{**result(categorization=text, intent=text), "conversation_number": text}])
    assert shown(console).count(text) == 3
    print_labels(console, {"intent": {text: 1}})
    assert shown(console).count(text) == 4


def test_escape_sequences_in_ids_are_not_printed(console: Console) -> None:
    hostile = {**result(), "conversation_number": None, "source_conversation_id": "\x1b[31mred\x07\n"}
    print_examples(console, [hostile, {**result(), "conversation_number": "\x1b[31mred\x07"}])
    assert "\x1b" not in shown(console)
    assert "\x07" not in shown(console)


def test_next_steps_name_the_results_and_three_commands(console: Console) -> None:
    print_next_steps(console, load_settings(None, db_name="d", results_collection="r"))
    assert "collection r in database d" in shown(console)
    for command in ("utils.mongodb_import --file", "ollama pull", "cli.py --mongodb-uri"):
        assert command in shown(console)

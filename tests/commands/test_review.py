"""``cli.py review``: keys on a pipe and on a terminal, the summary, and the agreement of reviewers."""

from __future__ import annotations

import os
import termios
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pymongo.database import Database

from tests.forked_process import OF_THE_BUILT_IN_CLASSIFIER, ForkedProcess
from tests.in_process import run_cli
from tests.review.review_site import AGREED, fill, result
from tests.terminal import STEERING, Terminal
from tests.worker.site import ROOT, Site

Data = Database[dict[str, Any]]
ALL = ("--reviewer", "anna", "--control", "0", "--double", "0")
pytestmark = pytest.mark.usefixtures("built_in_classifier")


@pytest.fixture
def place(mongodb_uri: str, database: Data, tmp_path: Path) -> Site:
    """Return a site without a model server and with three results; the most doubtful one has the number 1."""
    fill(database, [result(1, 0.2), result(2, 0.5), result(3, 0.8)])
    return Site(mongodb_uri, database, None, tmp_path)


@pytest.fixture
def typed(place: Site, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str, str]]:
    """Return a function that runs the command with keys on a pipe."""

    def run(keys: str, *flags: str) -> tuple[int, str, str]:
        read, write = os.pipe()
        os.write(write, keys.encode())
        os.close(write)
        with os.fdopen(read) as stdin:
            monkeypatch.setattr("sys.stdin", stdin)
            return run_cli(["review", *(flags or ALL)], place.environment(), place.folder)

    return run


def decided(place: Site) -> list[tuple[Any, ...]]:
    stored = place.database["sentimental_analysis_corrections"].find().sort("source_conversation_id", 1).sort("_id", 1)
    return [(one["source_conversation_id"], one["field"], one["to"], one["from"] == one["to"]) for one in stored]


def test_enter_accepts_and_a_key_corrects(typed: Callable[..., tuple[int, str, str]], place: Site) -> None:
    """One key accepts a conversation; the key of a label corrects one field and goes on to the next."""
    code, out, err = typed("\n2\nq")
    assert code == 0, err
    assert decided(place) == [
        *((1, field, label, True) for field, label in AGREED.items()),
        (2, "intent", "Technical Support", False),
        (2, "topic", "Shipping/Delivery", True),
        (2, "sentiment", "Negative", True),
    ]
    assert "Customer: Case 00001: my parcel" in out
    assert "Agent: We are sorry!" in out
    assert "(corrected)" in out
    assert "2 conversations reviewed by anna: 5 labels accepted, 1 corrected." in out
    assert "sentimental_analysis_corrections" in out
    assert "\x1b" not in out


def test_last_field_needs_no_enter(typed: Callable[..., tuple[int, str, str]], place: Site) -> None:
    """With the keys of all three labels the conversation is decided."""
    code, out, _ = typed("412")
    assert code == 0
    assert [label for _, _, label, _ in decided(place)] == ["Order Status", "Account/Billing", "Neutral"]
    assert "1 conversation reviewed" in out


def test_undo_goes_back_over_keys_and_conversations(typed: Callable[..., tuple[int, str, str]], place: Site) -> None:
    """Within a conversation to the field before, and from there to the last conversation."""
    _, out, _ = typed("2u\nu3\nq")
    assert decided(place)[0] == (1, "intent", "Information Request", False)
    assert {one[0] for one in decided(place)} == {1}
    assert "The last decision is removed" in out
    assert "1 conversation reviewed by anna: 2 labels accepted, 1 corrected." in out
    assert "Nothing to undo." in typed("uq", *ALL[2:], "--reviewer", "ben")[1]


def test_note_skip_and_tab(typed: Callable[..., tuple[int, str, str]], place: Site) -> None:
    """n takes a line, whose letters are no keys; Tab goes to the next field and leaves the label; arrows do nothing."""
    code, out, _ = typed("s\x1b[A\t2nquick note\x7f!\n\nq")
    assert code == 0
    stored = place.database["sentimental_analysis_corrections"].find_one({"field": "topic"})
    assert stored is not None
    assert (stored["source_conversation_id"], stored["note"]) == (2, "quick not!")
    assert [label for _, _, label, _ in decided(place)] == ["Complaint", "Account Access", "Negative"]
    assert "note: quick not!" in out


def test_keys_of_a_field_with_several_labels_add_and_remove(
    typed: Callable[..., tuple[int, str, str]], place: Site
) -> None:
    """The field stays marked until Tab."""
    place.database["sentimental_analysis"].update_one(
        {"source_conversation_id": 1}, {"$set": {"classification.topic": ["Other", "Banking/Cards"]}}
    )
    code, out, _ = typed("\td1\n")
    assert code == 0
    assert decided(place)[1] == (1, "topic", ["Banking/Cards", "Account/Billing"], False)
    assert "Banking/Cards, Account/Billing (corrected)" in out


def test_field_that_the_result_lacks_takes_several_labels_if_the_taxonomy_allows_it(
    typed: Callable[..., tuple[int, str, str]], place: Site
) -> None:
    """As after a field was added to the taxonomy. Undo takes the labels of the marked field back, not those of another."""
    taxonomy = place.folder / "taxonomy.yaml"
    taxonomy.write_text("sentiments: [Negative]\nfields: {tags: {labels: [Late, Lost, Damaged], multiple: true}}")
    place.settings["TAXONOMY_FILE"] = str(taxonomy)
    code, _, err = typed("12u13\nq")
    assert code == 0, err
    assert decided(place) == [(1, "sentiment", "Negative", True), (1, "tags", ["Late", "Damaged"], False)]


def test_end_of_the_input_and_limit_end_the_review(typed: Callable[..., tuple[int, str, str]], place: Site) -> None:
    """A conversation that was shown and not decided is free again at once."""
    assert typed("\n\n\n\n", *ALL, "--limit", "2")[0] == 0
    assert len(decided(place)) == 6
    assert typed("")[0] == 0
    assert not place.database["sentimental_analysis_review_leases"].count_documents({})
    assert "No conversation is left to review." in typed("\n")[1]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--reviewer", " "), "--reviewer needs 1 to 64 printable characters"),
        (("--control", "2"), "argument --control: must be a number, 0 to 1"),
    ],
    ids=["name", "share"],
)
def test_wrong_flags_are_named(
    typed: Callable[..., tuple[int, str, str]], flags: tuple[str, ...], message: str
) -> None:
    code, _, err = typed("", *flags)
    assert code == 2
    assert message in err


def test_agreement_of_two_reviewers(typed: Callable[..., tuple[int, str, str]], place: Site) -> None:
    """Field by field, with the number of conversations; without a second reviewer it says what to do."""
    double = ("--control", "0", "--double", "1")
    assert "--double sets the share" in typed("", "--agreement")[1]
    typed("\n\n4\n", "--reviewer", "anna", *double)
    typed("\n4\n\n", "--reviewer", "ben", *double)
    assert len(decided(place)) == 18
    code, out, _ = typed("", "--agreement")
    assert code == 0
    rows = [line.split() for line in out.splitlines()]
    assert rows[1][:5] == ["intent", "anna,", "ben", "3", "33%"]
    assert rows[2][:6] == ["sentiment", "anna,", "ben", "3", "100%", "undefined"]


@pytest.mark.slow
def test_review_on_a_terminal(place: Site) -> None:
    """Keys act without Enter and are not shown; afterwards the terminal is as before, also after Ctrl-C."""
    shown, code, flags = on_terminal(place, [("conversation 1", "2"), ("(corrected)", "\n"), ("conversation 2", "q")])
    assert code == 0
    assert "1 conversation reviewed by anna: 2 labels accepted, 1 corrected." in shown
    assert flags & termios.ECHO
    shown, code, flags = on_terminal(place, [("conversation 2", "\x03")])
    assert code == 130, shown
    assert flags & termios.ICANON
    assert not place.database["sentimental_analysis_review_leases"].count_documents({})
    assert len(decided(place)) == 3


def on_terminal(place: Site, answers: list[tuple[str, str]]) -> tuple[str, int, int]:
    """Press each key once its text is shown; return what was shown, the exit code, and the local flags at the end."""
    environment = place.environment() | {"TERM": "xterm"}
    command = [str(ROOT / "cli.py"), "review", *ALL]
    with (
        Terminal(100, 40) as terminal,
        ForkedProcess(
            command,
            environment,
            place.folder,
            None,
            streams=[terminal.inner] * 3,
            preload=OF_THE_BUILT_IN_CLASSIFIER,
        ) as process,
    ):
        shown = terminal.shown_until_end_of(process, answers)
        flags = termios.tcgetattr(terminal.inner)[3]
        assert os.get_blocking(terminal.inner), "the shell that has started it cannot read any more"
        return STEERING.sub("", shown), process.wait(10), flags

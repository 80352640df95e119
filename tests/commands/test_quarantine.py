"""``cli.py quarantine``: list, show, replay and drop, with crashes and a running worker."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import bson
import pytest

from commands.flags import create_command_parser
from commands.quarantine import COMMAND
from config import Settings
from error_handler import ConfigurationError, DirectoryLockedError, Reason, StateDirectoryError
from storage import extended_json
from storage.extended_json import id_key
from tests.crash.faulty_worker import QUARANTINE_SEAMS
from tests.forked_process import ForkedProcess
from tests.terminal import Terminal
from tests.worker.site import ROOT, Site, calls, check_results, check_statuses, conversation
from utils.batch_file_manager import BatchFiles
from utils.failed_documents import FailedDocument
from worker.quarantine import list_failed, requeue

CANARY = "canary-4711"
AT = datetime(2026, 5, 1, 10, 30, tzinfo=UTC)
LABELS = {
    "intent": "Complaint",
    "topic": "Other",
    "sentiment": "Negative",
    "channels": ["Phone", "Chat"],
    "categorization": "Late parcel.",
}


def failed(document_id: Any, minute: int = 0, **changes: Any) -> FailedDocument:
    fields: dict[str, Any] = {
        "conversation_id": document_id,
        "status": "llm_failed",
        "conversation_data": {"_id": document_id, "text": f"{CANARY} of {document_id}"},
        "retry_count": 3,
        "reason": Reason.LABEL_OUTSIDE,
        "error": "the label is not in the list",
        "failed_at": AT + timedelta(minutes=minute),
    }
    return FailedDocument(**{**fields, **changes})


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "batch_files"


@pytest.fixture
def files(directory: Path) -> BatchFiles:
    """Return a directory with four quarantined documents of two batches, and one in the retry queue."""
    files = BatchFiles(directory)
    files.save_failed("quarantine", 1, [failed("a", 1), failed("b", 3, reason=Reason.EMPTY)])
    written = {"status": "write_failed", "classification_result": {"classification": LABELS}, "retry_count": 0}
    files.save_failed("quarantine", 2, [failed("c", 2), failed("d", 0, reason=Reason.STORE_FAILED, **written)])
    files.save_failed("retry", 2, [failed("e", retry_count=1)])
    return files


@pytest.fixture
def said(directory: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Return a function that runs the command in this process and returns its stdout."""

    def run(*argv: str) -> str:
        arguments = create_command_parser(COMMAND).parse_intermixed_args(argv)
        assert asyncio.run(COMMAND.run(arguments, Settings(BATCH_FILES_DIR=directory))) == 0
        return capsys.readouterr().out

    return run


def places(directory: Path) -> dict[str, list[Any]]:
    """Return the ids in each folder as a worker reads them."""
    files = BatchFiles(directory)
    waiting = [document["_id"] for batch in files.load_pending() for document in batch.documents]
    kinds = {
        kind: [entry.conversation_id for entry in list_failed(directory, kind).entries]
        for kind in ("retry", "quarantine")
    }
    return {"pending": sorted(waiting), **{kind: sorted(ids) for kind, ids in kinds.items()}}


def test_list_is_sorted_and_ends_with_counts(files: BatchFiles, said: Callable[..., str]) -> None:
    """One line per document, the newest first, without text."""
    assert said("list") == (
        "b  empty                2026-05-01 10:33:00Z  3 rounds   the label is not in the list\n"
        "c  label_outside        2026-05-01 10:32:00Z  3 rounds   the label is not in the list\n"
        "a  label_outside        2026-05-01 10:31:00Z  3 rounds   the label is not in the list\n"
        "d  store_failed         2026-05-01 10:30:00Z  0 rounds   the label is not in the list\n"
        "4 documents in quarantine: 2 x label_outside, 1 x empty, 1 x store_failed\n"
    )
    assert said("list", "--reason", "empty").splitlines()[1:] == ["1 document in quarantine for empty: 1 x empty"]
    assert said("list", "--reason", "poison") == "No documents in quarantine for poison.\n"
    assert said("list", "--retry").splitlines()[-1] == "1 document in the retry queue: 1 x label_outside"


def test_list_as_json_keeps_id_types(files: BatchFiles, said: Callable[..., str]) -> None:
    files.save_failed("quarantine", 3, [failed(bson.Int64(7), 9)])
    report = json.loads(said("list", "--json", "--reason", "label_outside"))
    assert [document["id"] for document in report["documents"]] == ["7", "c", "a"]
    assert report["documents"][0] == {
        "id": "7",
        "_id": {"$numberLong": "7"},
        "reason": "label_outside",
        "status": "llm_failed",
        "failed_at": "2026-05-01T10:39:00+00:00",
        "rounds": 3,
        "error": "the label is not in the list",
    }
    assert report["counts"] == {"label_outside": 3}


def test_only_show_prints_text(files: BatchFiles, said: Callable[..., str]) -> None:
    quiet = said("list"), said("list", "--json"), said("replay", "a"), said("drop", "b", "--yes")
    assert not any(CANARY in text for text in quiet)
    shown = said("show", "d", "c")
    assert "  channels        Phone, Chat\n" in shown
    assert f"{CANARY} of d" in shown
    assert f"{CANARY} of c" in shown
    assert "store_failed" in shown
    assert "Late parcel." in shown
    report = json.loads(said("show", "d", "--json"))
    assert (report["classification"], report["document"]["text"]) == (LABELS, f"{CANARY} of d")
    assert f"{CANARY} of e" in said("show", "--retry", "e")


def test_control_characters_are_escaped(files: BatchFiles, said: Callable[..., str]) -> None:
    """Control characters, hidden and reversed text in every field; the JSON remains valid."""
    wild = "red \x1b[31m\x07 \x9b2J \u202edesrever\u2066 tag\U000e0041 zero\u200bwidth 📦 Grüße"
    labels = {**LABELS, "categorization": wild}
    entry = failed("w\x1b[2J", conversation_data={"_id": 1, wild: wild}, error=wild, status="write_failed")
    entry.classification_result = {"classification": labels}
    files.save_failed("quarantine", 5, [entry])
    (shown_id,) = (line.split("  ")[0] for line in said("list").splitlines() if line.startswith("w"))
    printed = said("list") + said("list", "--json") + said("show", shown_id) + said("show", shown_id, "--json")
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b\u202a-\u202e\u2066-\u2069\U000e0000-\U000e007f]", printed)
    assert "\\u001b[31m" in printed
    assert "📦 Grüße" in printed
    assert json.loads(said("show", shown_id, "--json"))["document"][wild] == wild


IDS = [
    bson.ObjectId("5f" * 12),
    "text",
    7,
    bson.Int64(7),
    "7",
    1.5,
    None,
    True,
    {"a": 1},
    b"\x01",
    AT,
    bson.MinKey(),
    "",
]


@pytest.mark.parametrize("document_id", IDS, ids=lambda value: type(value).__name__)
def test_id_of_any_type_can_be_given_as_extended_json(tmp_path: Path, document_id: Any) -> None:
    """The listed text works as well if it is unambiguous."""
    BatchFiles(tmp_path).save_failed("quarantine", 1, [failed(value) for value in IDS])
    found = list_failed(tmp_path, "quarantine")
    texts = [extended_json.dumps(document_id).decode()]
    if str(document_id) != "7":
        texts.append(extended_json.id_text(document_id))
        for text in texts:
            (entry,) = found.named([text, text])
            assert id_key(entry.conversation_id) == id_key(document_id)
    else:
        with pytest.raises(ConfigurationError, match=r"names 3 documents.*numberLong.*or \"7\""):
            found.named(["7"])
    if isinstance(document_id, bson.Int64 | str):
        (entry,) = found.named(texts[:1])
        assert id_key(entry.conversation_id) == id_key(document_id)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["show", "zz"], "no document 'zz' is there"),
        (["show", "e"], "no document 'e' is there"),
        (["show"], "show requires document ids"),
        (["show", "a", "--all"], "show requires document ids"),
        (["list", "a"], "list takes no ids"),
        (["replay"], "requires ids, --reason R or --all"),
        (["replay", "a", "--all"], "only one of these"),
        (["replay", "a", "zz"], "no document 'zz' is there"),
        (["replay", "--all", "--retry"], "does not accept --retry"),
        (["drop", "--reason", "empty", "a", "--yes"], "only one of these"),
        (["drop", "a"], "add --yes"),
        (["list", "--yes"], "--yes is only for drop"),
    ],
    ids=" ".join,
)
def test_invalid_arguments_change_nothing(
    files: BatchFiles, directory: Path, said: Callable[..., str], argv: list[str], words: str
) -> None:
    before = {path: path.read_bytes() for path in directory.rglob("*.json")}
    with pytest.raises(ConfigurationError, match=re.escape(words)):
        said(*argv)
    assert {path: path.read_bytes() for path in directory.rglob("*.json")} == before


def test_replay_moves_the_selected_documents_to_pending(
    files: BatchFiles, directory: Path, said: Callable[..., str]
) -> None:
    """With a full set of attempts; known answers are kept."""
    assert "2 documents moved from quarantine" in said("replay", "a", "d")
    assert places(directory) == {"pending": ["a", "d"], "quarantine": ["b", "c"], "retry": ["e"]}
    entries = {key: entry for batch in files.load_pending() for key, entry in batch.failures.items()}
    assert {entry.retry_count for entry in entries.values()} == {0}
    assert entries[id_key("d")].classification_result == {"classification": LABELS}
    assert "1 document moved from quarantine" in said("replay", "--reason", "empty")
    assert "1 document moved from quarantine" in said("replay", "--all")
    assert places(directory) == {"pending": ["a", "b", "c", "d"], "quarantine": [], "retry": ["e"]}
    assert said("replay", "--all") == "No documents in quarantine.\n"


def test_drop_removes_the_selected_documents(files: BatchFiles, directory: Path, said: Callable[..., str]) -> None:
    assert "1 document dropped" in said("drop", "--yes", "c")
    assert places(directory) == {"pending": [], "quarantine": ["a", "b", "d"], "retry": ["e"]}
    assert "1 document dropped" in said("drop", "--reason", "store_failed", "--yes")
    assert [path.name for path in (directory / "quarantine").iterdir()] == ["batch_001_quarantine.json"]
    assert "2 documents dropped" in said("drop", "--all", "--yes")
    assert places(directory) == {"pending": [], "quarantine": [], "retry": ["e"]}
    assert said("drop", "--all", "--yes") == "No documents in quarantine.\n"


def test_document_of_an_unfinished_batch_stays(files: BatchFiles, directory: Path, said: Callable[..., str]) -> None:
    """After a crash between two files the next run resumes the batch; a replay would process the document twice."""
    files.save_pending([{"_id": "a", "text": CANARY}])
    assert "1 document stayed" in said("replay", "--reason", "label_outside")
    assert "1 document stayed" in said("drop", "a", "--yes")
    assert places(directory) == {"pending": ["a", "c"], "quarantine": ["a", "b", "d"], "retry": ["e"]}


def test_document_quarantined_twice_is_listed_once(files: BatchFiles, directory: Path, said: Any) -> None:
    """Possible with --reprocess: the newest entry counts, and replay and drop remove all copies."""
    files.save_failed("quarantine", 9, [failed("a", 60, reason=Reason.BUSY), failed("b", 60)])
    assert said("list").splitlines()[-1] == "4 documents in quarantine: 2 x label_outside, 1 x busy, 1 x store_failed"
    assert len(files.failed_keys("quarantine")) == 4
    assert "1 document moved" in said("replay", "--reason", "busy")
    assert "1 document dropped" in said("drop", "b", "--yes")
    assert places(directory) == {"pending": ["a"], "quarantine": ["c", "d"], "retry": ["e"]}


def test_unreadable_file_is_reported_and_kept(files: BatchFiles, directory: Path, said: Any, capsys: Any) -> None:
    """The other files are listed; the next run renames the unreadable one."""
    path = directory / "quarantine/batch_001_quarantine.json"
    path.write_bytes(b"[{")
    arguments = create_command_parser(COMMAND).parse_intermixed_args(["list"])
    assert asyncio.run(COMMAND.run(arguments, Settings(BATCH_FILES_DIR=directory))) == 0
    out, err = capsys.readouterr()
    assert "quarantine/batch_001_quarantine.json cannot be read" in err
    assert out.splitlines()[-1].startswith("2 documents in quarantine")
    assert json.loads(said("list", "--json"))["unreadable"] == [path.name]
    assert path.read_bytes() == b"[{"


def test_missing_directory_is_an_error_and_is_not_created(directory: Path, said: Any) -> None:
    for argv in (["list"], ["replay", "--all"], ["drop", "--all", "--yes"]):
        with pytest.raises(StateDirectoryError, match="there is no directory"):
            said(*argv)
    assert not directory.exists()


def test_running_worker_prevents_replay_and_drop(files: BatchFiles, said: Callable[..., str]) -> None:
    """List and show still work."""
    files.acquire()
    try:
        assert "4 documents" in said("list")
        assert CANARY in said("show", "a")
        for argv in (["replay", "a"], ["drop", "a", "--yes"]):
            with pytest.raises(DirectoryLockedError):
                said(*argv)
    finally:
        files.release()
    assert "1 document moved" in said("replay", "a")


# In real processes


def quarantined(site: Site, numbers: tuple[int, ...] = (1, 2, 7, 8)) -> list[Any]:
    """Process 12 documents in batches of 6, quarantine *numbers* of them, and return all."""
    documents = [conversation(number) for number in range(12)]
    site.source.insert_many(documents)
    assert site.model is not None
    faults = [{"kind": "wrong_label", "when": {"text": f"Case {number:05d}"}} for number in numbers]
    site.model.configure(faults=faults)
    assert site.run("--batch-size", "6").code == 1
    assert places(site.directory)["quarantine"] == list(numbers)
    site.model.configure(faults=[])
    return documents


def test_replayed_documents_are_processed_and_dropped_ones_are_not(site: Site) -> None:
    """The status in MongoDB stays failed until the next run."""
    documents = quarantined(site)
    ended = site.run("quarantine", "replay", "1", "7")
    assert ended.code == 0, ended.err
    check_statuses(site, documents, [1, 2, 7, 8])
    ended = site.run("quarantine", "drop", "--yes", "8")
    assert ended.code == 0, ended.err
    ended = site.run()
    assert ended.code == 1, ended.err
    assert "2 documents processed" in ended.out
    check_statuses(site, documents, [2, 8])
    assert site.source.find_one({"_id": 8})["status_reason"].startswith("label_outside: ")
    check_results(site, [document for document in documents if document["_id"] not in (2, 8)])
    assert calls(site, documents[8]) == 8, "a dropped document is not asked again"
    assert places(site.directory) == {"pending": [], "quarantine": [2], "retry": []}
    nothing = site.run()
    assert (nothing.code, "Quarantine: 1" in nothing.out, "quarantine list" in nothing.out) == (1, True, True)


def test_exit_codes_during_a_run(site: Site) -> None:
    """0 for list and show, 5 for replay and drop, 2 for an unknown id; each error is one sentence."""
    quarantined(site)
    site.source.insert_many([conversation(number) for number in range(100, 112)])
    assert site.model is not None
    site.model.configure(latency_s=15.0)
    with site.start():
        site.model.wait_for("in_flight", at_least=1)
        assert site.run("quarantine", "list").code == 0
        assert site.run("quarantine", "show", "1").code == 0
        assert site.run("quarantine", "show", "99").code == 2
        for argv in (("replay", "1"), ("drop", "--all", "--yes")):
            ended = site.run("quarantine", *argv)
            assert ended.code == 5
            assert len(ended.err.splitlines()) == 1
    assert places(site.directory)["quarantine"] == [1, 2, 7, 8]


KILLS = [
    *(("replay", seam, passage) for seam in ("before_rename", "renamed", "before_move", "moved") for passage in (1, 2)),
    *(("replay", seam, passage) for seam in ("before_rename", "renamed") for passage in (3, 4)),
    *(("drop", seam, passage) for seam in ("before_rename", "renamed") for passage in (1, 2)),
    *(("drop", seam, 1) for seam in ("before_removal", "removed")),
]
USUAL = {
    ("replay", "moved", 1),
    ("replay", "renamed", 3),
    ("drop", "removed", 1),
}


@pytest.mark.parametrize(
    ("action", "seam", "passage"),
    [pytest.param(*kill, marks=() if kill in USUAL else pytest.mark.thorough) for kill in KILLS],
    ids=str,
)
def test_killed_command_leaves_each_document_in_one_place(site: Site, action: str, seam: str, passage: int) -> None:
    """The same command finishes the rest."""
    assert seam in QUARANTINE_SEAMS or seam in ("before_rename", "renamed")
    files = BatchFiles(site.directory)
    files.save_failed("quarantine", 1, [failed(1), failed(2)])
    files.save_failed("quarantine", 2, [failed(7), failed(8), failed(9)])
    # The drop empties the first file; the replay splits both.
    chosen = [1, 2, 7] if action == "drop" else [1, 7, 8]
    yes = ["--yes"] if action == "drop" else []
    killed = site.run("quarantine", action, *map(str, chosen), *yes, plan={"seam": seam, "passage": passage})
    assert killed.code == -signal.SIGKILL, killed.err
    found = places(site.directory)
    there = found["pending"] + found["quarantine"]
    assert len(there) == len(set(there)), f"twice: {found}"
    kept = {8, 9} if action == "drop" else {1, 2, 7, 8, 9}
    assert kept <= set(there) <= {1, 2, 7, 8, 9}
    left = [str(number) for number in chosen if number in found["quarantine"]]
    if left:
        ended = site.run("quarantine", action, *left, *yes)
        assert ended.code == 0, ended.err
    expected = {"pending": chosen if action == "replay" else [], "quarantine": sorted({1, 2, 7, 8, 9} - set(chosen))}
    assert places(site.directory) == {**expected, "retry": []}
    raw = [entry["conversation_id"] for entry in site.entries("quarantine")]
    assert sorted(raw) == expected["quarantine"], "no copy is left behind"


def test_retry_failed_after_a_killed_replay(site: Site) -> None:
    """No model call is repeated."""
    documents = quarantined(site)
    assert site.run("quarantine", "replay", "1", plan={"seam": "renamed", "passage": 1}).code == -signal.SIGKILL
    assert len(site.entries("quarantine")) == 5
    assert site.model is not None
    asked = site.model.stats()["chat_requests"]
    ended = site.run("--retry-failed")
    assert ended.code == 0, ended.err
    check_results(site, documents)
    assert site.model.stats()["chat_requests"] == asked + 4


@pytest.mark.parametrize(
    ("answer", "code", "left"),
    [("y\n", 0, 0), ("n\n", 2, 4), ("\n", 2, 4), ("\x04", 2, 4), ("\x03", 130, 4)],
    ids=repr,
)
def test_drop_asks_for_confirmation(files: BatchFiles, directory: Path, answer: str, code: int, left: int) -> None:
    """Only yes drops; Ctrl-C ends the command at once."""
    command = [str(ROOT / "cli.py"), "quarantine", "drop", "--all", "--batch-files-dir", str(directory)]
    with (
        Terminal() as terminal,
        ForkedProcess(command, os.environ, directory.parent, None, streams=[terminal.inner] * 3) as process,
    ):
        shown = terminal.shown_until_end_of(process, [("[y/N]", answer)])
        assert "Drop 4 documents from quarantine for good?" in shown
        assert process.wait(60) == code
        assert os.get_blocking(terminal.inner), "the shell that has started it cannot read any more"
    assert len(places(directory)["quarantine"]) == left


def test_requeue_without_keys_moves_all_documents(files: BatchFiles, directory: Path) -> None:
    """As --retry-failed does."""
    assert requeue(files) == 4
    assert places(directory)["pending"] == ["a", "b", "c", "d"]

"""The journal of a batch: what it says after a crash at any byte, and whose fault a crash was."""

from __future__ import annotations

import resource
import signal
import stat
from collections.abc import Iterator
from pathlib import Path

import bson
import pytest

from error_handler import Reason, StateDirectoryError
from storage.extended_json import id_key
from storage.files import MAX_DEATHS_PROCESSING, MAX_DEATHS_WAITING, BatchJournal, JournalEntry, Verdict, replay_journal

RESULT = {
    "_id": bson.ObjectId(),
    "source_conversation_id": "a",
    "classification": {"intent": "Other"},
    "n": bson.Int64(1),
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "batch_001_pending.journal"


@pytest.fixture
def journal(path: Path) -> Iterator[BatchJournal]:
    journal = BatchJournal(path)
    yield journal
    journal.close()


def entry(path: Path, document_id: object = "a") -> JournalEntry:
    return replay_journal(path).get(id_key(document_id), JournalEntry())


def test_missing_journal_is_empty(path: Path) -> None:
    """And a journal without events is not made."""
    assert replay_journal(path) == {}
    assert entry(path) == JournalEntry()
    BatchJournal(path).close()
    assert not path.exists()


def test_answer_keeps_its_types(journal: BatchJournal, path: Path) -> None:
    """From there a crash costs nothing: the result is written without asking again."""
    journal.add("started", "a")
    journal.add("asked", "a")
    journal.add("answered", "a", result=RESULT)
    found = entry(path)
    assert found.result == RESULT
    assert bson.encode(found.result or {}) == bson.encode(RESULT)
    assert not found.is_poison


def test_outcomes_are_replayed(journal: BatchJournal, path: Path) -> None:
    """Skipped and failed ones with reason and problem; whether another round can help."""
    journal.add("skipped", "a", reason=Reason.SKIPPED_NO_TEXT, problem="no turn with usable text")
    journal.add("failed", "b", reason=Reason.EMPTY, problem="the answer is empty", is_final=False)
    journal.add("failed", "c", reason=Reason.CONTEXT_OVERFLOW, problem="too long", is_final=True)
    skipped, failed, final = (entry(path, name) for name in "abc")
    assert skipped.verdict == Verdict(Reason.SKIPPED_NO_TEXT, "no turn with usable text", is_skipped=True)
    assert failed.verdict == Verdict(Reason.EMPTY, "the answer is empty")
    assert final.verdict == Verdict(Reason.CONTEXT_OVERFLOW, "too long", is_final=True)


def test_ids_of_different_types_are_distinct(journal: BatchJournal, path: Path) -> None:
    """1 and "1" are two documents."""
    for document_id in (1, "1", bson.Int64(1), None, {"a": 1}):
        journal.add("started", document_id)
    assert len(replay_journal(path)) == 5
    assert entry(path, 1.0) == JournalEntry()


def test_document_processed_at_two_crashes_is_poison(path: Path) -> None:
    """A crash is a start without what should follow it."""
    for deaths in range(1, MAX_DEATHS_PROCESSING + 1):
        crashed = BatchJournal(path)
        crashed.add("started", "a")
        crashed.close()
        assert entry(path).is_poison == (deaths >= MAX_DEATHS_PROCESSING)
    assert MAX_DEATHS_PROCESSING == 2


def test_waiting_document_is_poison_after_five_crashes(path: Path) -> None:
    """The crash was mostly the fault of another one."""
    for deaths in range(1, MAX_DEATHS_WAITING + 1):
        crashed = BatchJournal(path)
        crashed.add("started", "a")
        crashed.add("asked", "a")
        crashed.close()
        assert entry(path).is_poison == (deaths >= MAX_DEATHS_WAITING)
        assert entry(path).processing == 0
    assert MAX_DEATHS_WAITING == 5


def test_stop_does_not_count_as_a_crash(path: Path) -> None:
    """A document that was released may be asked as often as the operator stops the worker."""
    for _ in range(20):
        stopped = BatchJournal(path)
        stopped.add("started", "a")
        stopped.add("asked", "a")
        stopped.add("released", "a")
        stopped.close()
    assert (entry(path).waiting, entry(path).is_poison) == (0, False)


def test_answered_document_is_never_poison(path: Path) -> None:
    """However many crashes came before its answer."""
    journal = BatchJournal(path)
    for _ in range(10):
        journal.add("started", "a")
    journal.add("answered", "a", result=RESULT)
    journal.close()
    assert not entry(path).is_poison


def test_a_crash_at_any_byte_loses_at_most_the_event_being_written(journal: BatchJournal, path: Path) -> None:
    """Everything before it is still known, and the next event is written on a new line."""
    journal.add("started", "a")
    journal.add("asked", "a")
    journal.add("answered", "a", result=RESULT)
    journal.add("started", "b")
    journal.close()
    whole = path.read_bytes()
    ends = [position + 1 for position, byte in enumerate(whole) if byte == ord("\n")]
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut])
        found = entry(path)
        complete = sum(cut >= end - 1 for end in ends)  # the line end itself may be missing
        assert (found.result is not None) == (complete >= 3)
        assert found.processing == (1 if complete == 1 else 0)
        after = BatchJournal(path)
        after.add("started", "c")
        after.close()
        assert entry(path, "c").processing == 1
        assert (entry(path).result is not None) == (complete >= 3)


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"\x00" * 50,
        b"\xff\xfe",
        b"{",
        b"[]",
        b"5",
        b'"started"',
        b"{}",
        b'{"e": "started"}',
        b'{"id": "a"}',
        b'{"e": "failed", "id": "a", "reason": "unheard of", "problem": "x"}',
        b'{"e": "answered", "id": "a"}',
        b'{"e": "unheard of", "id": "a"}',
        b'{"e": "started", "id": 99999999999999999999999999}',
        b'{"e": "started", "id": {"$oid": "x"}}',
    ],
)
def test_invalid_line_is_ignored(path: Path, line: bytes) -> None:
    """A power cut leaves zeros and halves; what follows still counts."""
    path.write_bytes(line + b'\n{"e":"started","id":"a"}\n')
    assert (entry(path).processing, entry(path).result, entry(path).verdict) == (1, None, None)


def test_journal_is_private(journal: BatchJournal, path: Path) -> None:
    """It holds answers."""
    journal.add("started", "a")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_each_event_is_on_disk_when_the_call_returns(journal: BatchJournal, path: Path) -> None:
    """Nothing waits in a buffer of this process for the crash."""
    for number in range(5):
        journal.add("started", number)
        assert path.read_bytes().count(b"\n") == number + 1


def test_a_link_is_not_followed(path: Path, tmp_path: Path) -> None:
    """Nobody can make the worker write elsewhere."""
    target = tmp_path / "precious"
    target.write_bytes(b"")
    path.symlink_to(target)
    with pytest.raises(StateDirectoryError, match="cannot be written"):
        BatchJournal(path).add("started", "a")
    assert target.read_bytes() == b""


def test_full_disk_raises(journal: BatchJournal, path: Path) -> None:
    """In part or not at all; what was complete stays readable."""
    journal.add("started", "a")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200, hard))
    try:
        for expected in ("in part", "cannot be written"):
            with pytest.raises(StateDirectoryError, match=expected):
                journal.add("answered", "a", result={**RESULT, "text": "x" * 500})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert (entry(path).processing, entry(path).result) == (1, None)


def test_unreadable_journal_raises(path: Path) -> None:
    """The error names it."""
    path.mkdir()
    with pytest.raises(StateDirectoryError, match=r"batch_001_pending\.journal cannot be read"):
        replay_journal(path)

"""Retry queue and quarantine on disk: their documented form, rounds, and what an operator moves by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import bson
import pytest

from error_handler import Reason
from storage import extended_json
from storage.extended_json import id_key
from tests.utils.worker_files import AT, DOCUMENTS, IDS, content_of, failed, names, pending
from utils.batch_file_manager import BatchFiles
from utils.failed_documents import FailedDocument
from worker.quarantine import requeue


def test_a_retry_file(files: BatchFiles, directory: Path) -> None:
    """As documented; where only the write failed, the classification is kept."""
    result = {"_id": bson.ObjectId("0" * 24), "classification": {"intent": "Other"}}
    files.save_failed("retry", 1, [failed("a"), failed("b", status="write_failed", classification_result=result)])
    common = {"retry_count": 0, "failed_at": {"$date": {"$numberLong": str(int(AT.timestamp() * 1000))}}}
    common |= {"reason": "empty", "error": "the answer is empty"}
    assert content_of(directory / "retry/batch_001_retry_queue.json") == [
        {
            "conversation_id": "a",
            "status": "llm_failed",
            "classification_result": None,
            "conversation_data": {"_id": "a", "text": "hello"},
            **common,
        },
        {
            "conversation_id": "b",
            "status": "write_failed",
            "classification_result": {"_id": {"$oid": "0" * 24}, "classification": {"intent": "Other"}},
            "conversation_data": {"_id": "b", "text": "hello"},
            **common,
        },
    ]


@pytest.mark.parametrize("document_id", IDS, ids=lambda value: type(value).__name__)
def test_a_failed_document_round_trips(document_id: Any) -> None:
    """With all it knows, id types included."""
    entry = failed(document_id, status="write_failed", classification_result={"_id": bson.ObjectId()}, retry_count=2)
    read = FailedDocument.from_dict(extended_json.loads(extended_json.dumps(entry.as_dict())))
    assert read == entry
    assert id_key(read.conversation_id) == id_key(document_id)


def test_missing_fields_of_an_entry_get_defaults() -> None:
    """Missing fields get a sensible value."""
    read = FailedDocument.from_dict({"conversation_id": "a", "status": "?", "conversation_data": None})
    assert (read.status, read.retry_count, read.reason) == ("llm_failed", 0, Reason.TRANSPORT)


def test_entries_for_one_document_replace_each_other(files: BatchFiles, directory: Path) -> None:
    """One queue entry per document; others of the same batch stay."""
    files.save_failed("retry", 1, [failed("a"), failed(1), failed("1")])
    files.save_failed("retry", 1, [failed("a", retry_count=1), failed("b")])
    (batch,) = files.load_retry()
    assert {key: entry.retry_count for key, entry in batch.failures.items()} == {
        id_key("a"): 1,
        id_key(1): 0,
        id_key("1"): 0,
        id_key("b"): 0,
    }
    assert len(files.failed_keys("retry")) == 4
    assert len(files.failed_keys("quarantine")) == 0


def test_a_retry_round(files: BatchFiles, directory: Path) -> None:
    """A document that fails again stays with its count; each round has a separate journal; in the end the file is removed."""
    files.save_failed("retry", 1, [failed("a"), failed("b")])
    (batch,) = files.load_retry()
    batch.journal.add("failed", "a", reason=Reason.EMPTY, problem="x", is_final=False)
    files.finish_retry(batch, [failed("a", retry_count=1)])
    assert names(directory / "retry") == ["batch_001_retry_queue.json"]
    (batch,) = files.load_retry()
    assert [entry.retry_count for entry in batch.failures.values()] == [1]
    assert batch.replay == {}
    files.finish_retry(batch, [])
    assert names(directory / "retry") == []
    assert list(files.load_retry()) == []


def test_a_journal_of_an_interrupted_round_counts_for_that_round_alone(files: BatchFiles, directory: Path) -> None:
    """An interrupted round resumes; the next round starts from the beginning."""
    files.save_failed("retry", 1, [failed("a"), failed("b")])
    (batch,) = files.load_retry()
    batch.journal.add("started", "a")
    batch.journal.close()
    (again,) = files.load_retry()
    assert again.replay[id_key("a")].processing == 1
    files.save_failed("retry", 1, [failed("a", retry_count=1)])
    (later,) = files.load_retry()
    assert later.replay == {}


@pytest.mark.parametrize("kind", ["retry", "quarantine"])
def test_failure_file_moved_to_pending_gets_fresh_attempts(files: BatchFiles, directory: Path, kind: Any) -> None:
    """From retry/ or quarantine/ to pending/, by hand: fresh attempts, finished results kept."""
    result = {"_id": bson.ObjectId()}
    files.save_failed(kind, 3, [failed("a", retry_count=3), failed("b", classification_result=result, retry_count=2)])
    (source,) = (directory / kind).iterdir()
    source.rename(directory / "pending" / source.name)
    (batch,) = pending(files)
    assert [document["_id"] for document in batch.documents] == ["a", "b"]
    assert [entry.retry_count for entry in batch.failures.values()] == [0, 0]
    assert batch.failures[id_key("b")].classification_result == result
    files.save_completed(batch, {"successful": 2}, ["a", "b"])
    assert names(directory / "pending") == []


def test_a_moved_file_does_not_get_in_the_way_of_its_batch(files: BatchFiles, directory: Path) -> None:
    """Both are loaded, each with its own journal."""
    files.save_pending(DOCUMENTS)
    files.save_failed("retry", 1, [failed("z")])
    (directory / "retry/batch_001_retry_queue.json").rename(directory / "pending/batch_001_retry_queue.json")
    first, second = pending(files)
    assert first.journal.path != second.journal.path
    assert {len(first.documents), len(second.documents)} == {len(DOCUMENTS), 1}


def test_requeue_moves_quarantined_documents_to_pending(files: BatchFiles, directory: Path) -> None:
    """All of it, with fresh attempts; answers that could not be written are kept."""
    result = {"_id": bson.ObjectId()}
    files.save_failed("quarantine", 1, [failed("a", retry_count=3), failed("b", classification_result=result)])
    files.save_failed("quarantine", 2, [failed("c", conversation_data=None, retry_count=3)])
    assert requeue(files) == 3
    assert (len(files.failed_keys("quarantine")), names(directory / "quarantine")) == (0, [])
    first, second = pending(files)
    assert [document["_id"] for document in (*first.documents, *second.documents)] == ["a", "b", "c"]
    assert {entry.retry_count for batch in (first, second) for entry in batch.failures.values()} == {0}
    assert first.failures[id_key("b")].classification_result == result


def test_requeue_does_not_overwrite_a_batch_in_work(files: BatchFiles, directory: Path) -> None:
    """Each release has a separate file, whatever batch its documents were in."""
    files.save_failed("quarantine", 1, [failed("a")])
    assert requeue(files) == 1
    files.save_failed("quarantine", 1, [failed("b")])
    assert requeue(files) == 1
    assert files.failed_keys() == set()
    assert [document["_id"] for batch in pending(files) for document in batch.documents] == ["a", "b"]


def test_failed_keys(files: BatchFiles) -> None:
    """Those of both folders, by type."""
    files.save_failed("retry", 1, [failed(1)])
    files.save_failed("quarantine", 2, [failed("1")])
    assert files.failed_keys() == {id_key(1), id_key("1")}


@pytest.mark.parametrize(
    "content", [b"", b"{}x", b'{"a": 1}', b"[5]", b'[{"conversation_id": 1}]', b"5", b'["x"]', b"null"]
)
def test_a_corrupt_retry_file_is_set_aside(files: BatchFiles, directory: Path, content: bytes) -> None:
    """New entries of that batch start a new file."""
    path = directory / "retry/batch_001_retry_queue.json"
    path.write_bytes(content)
    assert list(files.load_retry()) == []
    assert names(directory / "retry") == ["batch_001_retry_queue.json.corrupt"]
    assert files.lost_failures, "its documents say failed in MongoDB, and only this tells to look for them"
    files.save_failed("retry", 1, [failed("a")])
    assert len(files.failed_keys("retry")) == 1

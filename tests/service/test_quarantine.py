"""Failed documents for the page, in the files of a worker."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pymongo.database import Database

from config import load_settings
from error_handler import DirectoryLockedError, Reason, StateDirectoryError
from mongo_client import DocumentStore
from service.quarantine import Outcome, QuarantineFiles, QuarantineInMongoDB, Selected
from storage.extended_json import canonical
from tests.commands.test_quarantine import LABELS, failed
from utils.batch_file_manager import BatchFiles


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """Return a directory with three documents in quarantine, one of them with an answer."""
    files = BatchFiles(tmp_path / "batch_files")
    files.save_failed("quarantine", 1, [failed("a", 1), failed(7, 3, reason=Reason.EMPTY)])
    written = {"status": "write_failed", "classification_result": {"classification": LABELS}}
    files.save_failed("quarantine", 2, [failed("d", 0, reason=Reason.STORE_FAILED, **written)])
    return files.directory


async def test_quarantine_is_listed_by_reason(directory: Path) -> None:
    """The newest first; the counts are those of all documents."""
    quarantine = QuarantineFiles(directory)
    every = await quarantine.listed(None)
    assert [row.id_text for row in every.rows] == ["7", "a", "d"]
    assert (every.total, every.counts["empty"]) == (3, 1)
    empty = await quarantine.listed("empty")
    assert ([row.id_text for row in empty.rows], empty.total) == (["7"], 3)
    assert every.rows[1].tries == "3 rounds"
    assert every.rows[1].error == "the label is not in the list"


async def test_detail_has_the_answer_and_the_text(directory: Path) -> None:
    quarantine = QuarantineFiles(directory)
    detail = await quarantine.detail(canonical("d"))
    assert detail is not None
    assert detail.labels["intent"] == "Complaint"
    assert [turn.text for turn in detail.turns or ()] == ["canary-4711 of d"]
    assert await quarantine.detail(canonical("7")) is None  # the document's id is a number


@pytest.mark.parametrize(
    ("selected", "moved"),
    [
        (Selected(ids=(canonical(7), canonical("a"))), [7, "a"]),
        (Selected(reason="empty"), [7]),
        (Selected(), [7, "a", "d"]),
        (Selected(ids=(canonical("nobody"),)), []),
    ],
    ids=["ids", "reason", "all", "unknown"],
)
async def test_replay_and_drop_move_the_selected_documents(
    directory: Path, selected: Selected, moved: list[Any]
) -> None:
    quarantine = QuarantineFiles(directory)
    assert await quarantine.replay(selected) == Outcome(len(moved))
    waiting = [document["_id"] for batch in BatchFiles(directory).load_pending() for document in batch.documents]
    assert sorted(map(str, waiting)) == [str(one) for one in moved]
    assert await quarantine.drop(Selected()) == Outcome(3 - len(moved))
    assert (await quarantine.listed(None)).total == 0


async def test_files_of_a_running_worker_are_read_and_not_changed(directory: Path) -> None:
    """Its lock is respected, and released after each change."""
    quarantine = QuarantineFiles(directory)
    worker = BatchFiles(directory)
    worker.acquire()
    for change in (quarantine.replay, quarantine.drop):
        with pytest.raises(DirectoryLockedError):
            await change(Selected())
    assert (await quarantine.listed(None)).total == 3
    worker.release()
    await quarantine.drop(Selected(reason="empty"))
    worker.acquire()
    worker.release()


async def test_directory_that_is_missing_is_an_error_and_not_created(tmp_path: Path) -> None:
    missing = QuarantineFiles(tmp_path / "elsewhere")
    for action in (missing.listed(None), missing.replay(Selected())):
        with pytest.raises(StateDirectoryError, match="there is no directory"):
            await action
    assert not (tmp_path / "elsewhere").exists()


async def test_detail_in_mongodb_has_the_reason_of_the_named_status(
    database: Database[dict[str, Any]], mongodb_uri: str, db_name: str
) -> None:
    """STATUS_FIELD names it, and the field of the reason."""
    settings = load_settings(None, mongodb_uri=mongodb_uri, db_name=db_name, status_field="triad")
    database[settings.source_collection].insert_one({"_id": 7, "triad": "failed", "triad_reason": "empty: no answer"})
    store = DocumentStore(settings)
    detail = await QuarantineInMongoDB(store, settings).detail(canonical(7))
    assert detail is not None
    assert detail.row.reason == "empty: no answer"
    await store.close()

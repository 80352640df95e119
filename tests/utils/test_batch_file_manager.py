"""The local files of one worker: their documented form, their way between folders, and what a bad one does."""

from __future__ import annotations

import logging
import stat
from pathlib import Path

import bson
import pytest

from error_handler import ConfigurationError, DirectoryLockedError, StateDirectoryError
from storage.extended_json import id_key
from tests.utils.worker_files import DOCUMENTS, IDS, content_of, failed, names, pending
from utils.batch_file_manager import FOLDERS, BatchFiles

# The form of the files


def test_a_pending_file(files: BatchFiles, directory: Path) -> None:
    """As documented, in Extended JSON."""
    batch = files.save_pending([{"_id": bson.ObjectId("0" * 24), "text": "x"}, {"_id": bson.Int64(2), "text": "y"}])
    assert batch.path == directory / "pending/batch_001_pending.json"
    content = content_of(batch.path)
    at = content["created_at"]
    assert set(at) == {"$date"}
    assert content == {
        "batch_id": "batch_001",
        "created_at": at,
        "first_object_id": {"$oid": "0" * 24},
        "last_object_id": {"$numberLong": "2"},
        "conversation_count": 2,
        "conversations": [
            {
                "_id": {"$oid": "0" * 24},
                "conversation_data": {"_id": {"$oid": "0" * 24}, "text": "x"},
                "created_at": at,
            },
            {
                "_id": {"$numberLong": "2"},
                "conversation_data": {"_id": {"$numberLong": "2"}, "text": "y"},
                "created_at": at,
            },
        ],
    }


def test_a_completed_file(files: BatchFiles, directory: Path) -> None:
    """Ids and counts, no text; the pending file and its journal are gone."""
    batch = files.save_pending(DOCUMENTS)
    batch.journal.add("started", "doc0")
    files.save_completed(batch, {"successful": 7, "failed": 0, "skipped": 1}, IDS)
    path = directory / "completed/batch_001_completed.json"
    content = content_of(path)
    assert set(content) == {
        "batch_id",
        "completed_at",
        "conversation_count",
        "successful",
        "failed",
        "skipped",
        "conversation_ids",
    }
    assert (content["batch_id"], content["conversation_count"], content["successful"]) == ("batch_001", 8, 7)
    assert "text of" not in path.read_text()
    assert names(directory / "pending") == []


def test_files_and_folders_are_private(files: BatchFiles, directory: Path) -> None:
    """Conversations of customers: files 0600, folders 0700."""
    batch = files.save_pending(DOCUMENTS)
    batch.journal.add("started", 1)
    files.save_failed("retry", 1, [failed()])
    files.save_failed("quarantine", 1, [failed()])
    files.write_state("checkpoint.json", {"a": 1})
    files.acquire()
    for path in (directory, *directory.rglob("*")):
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path
    files.release()


def test_the_folders(files: BatchFiles, directory: Path) -> None:
    """They are made at once, with their parents; what is there stays."""
    assert names(directory) == sorted(FOLDERS)
    BatchFiles(directory)
    deep = directory / "a/b"
    BatchFiles(deep)
    assert names(deep) == sorted(FOLDERS)


# Pending batches


def test_a_pending_batch_is_loaded_as_it_was_saved(files: BatchFiles, directory: Path) -> None:
    """With the types of all ids, and what its journal says."""
    batch = files.save_pending(DOCUMENTS)
    batch.journal.add("started", "doc0")
    batch.journal.close()
    (loaded,) = pending(BatchFiles(directory))
    assert bson.encode({"all": loaded.documents}) == bson.encode({"all": DOCUMENTS})
    assert (loaded.number, loaded.name, loaded.failures) == (1, "batch_001", {})
    assert loaded.replay[id_key("doc0")].processing == 1


def test_numbers_go_on_after_all_files_that_are_there(files: BatchFiles, directory: Path) -> None:
    """In whatever folder, set aside or not, of however many digits: no file is overwritten."""
    for name in ("completed/batch_007_completed.json", "pending/batch_1200_pending.json.corrupt", "retry/notes.txt"):
        (directory / name).write_text("[]")
    assert BatchFiles(directory).save_pending(DOCUMENTS).name == "batch_1201"


def test_batches_are_loaded_in_the_order_of_their_numbers(files: BatchFiles) -> None:
    """Batch 1000 comes after batch 999."""
    for _ in range(3):
        files.save_pending(DOCUMENTS)
    files._last_number = 998
    files.save_pending(DOCUMENTS)
    files.save_pending(DOCUMENTS)
    assert [batch.number for batch in pending(files)] == [1, 2, 3, 999, 1000]


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"\x00" * 100, id="zeros"),
        pytest.param(b'{"conversations": [', id="cut"),
        pytest.param(b"\xff\xfe", id="not-utf-8"),
        pytest.param(b"null", id="null"),
        pytest.param(b'"text"', id="text"),
        pytest.param(b"{}", id="no-fields"),
        pytest.param(b'{"conversations": [], "conversation_count": 0}', id="no-documents"),
        pytest.param(b'{"conversations": [{"conversation_data": {"_id": 1}}], "conversation_count": 2}', id="count"),
        pytest.param(b'{"conversations": [{"conversation_data": {"a": 1}}], "conversation_count": 1}', id="no-id"),
        pytest.param(
            b'{"conversations": [{"conversation_data": [1]}], "conversation_count": 1}', id="list-for-document"
        ),
        pytest.param(b'{"conversations": [7], "conversation_count": 1}', id="number-for-entry"),
        pytest.param(
            b'{"conversations": [{"conversation_data": {"_id": 1e400}}, {"conversation_data": {"_id": '
            b'99999999999999999999999}}], "conversation_count": 2}',
            id="id-beyond-bson",
        ),
        pytest.param(b'[{"conversation_id": 1}]', id="retry-entry-without-status"),
        pytest.param(b"[5]", id="retry-entry-is-number"),
        pytest.param(b"[" * 50_000, id="deep"),
    ],
)
def test_a_corrupt_pending_file_is_set_aside(
    files: BatchFiles, directory: Path, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    """With a message that names it; the other batches are loaded, and it is not looked at again."""
    path = directory / "pending/batch_001_pending.json"
    path.write_bytes(content)
    files._last_number = 1
    files.save_pending(DOCUMENTS)
    with caplog.at_level(logging.ERROR):
        assert [batch.number for batch in pending(files)] == [2]
    (record,) = caplog.records
    assert "batch_001_pending.json is corrupt and was renamed" in record.getMessage()
    assert path.with_name("batch_001_pending.json.corrupt").read_bytes() == content
    caplog.clear()
    assert [batch.number for batch in pending(files)] == [2]
    assert not caplog.records


def test_truncated_pending_file_is_never_loaded(files: BatchFiles, directory: Path) -> None:
    """Were it, documents would be lost."""
    batch = files.save_pending(DOCUMENTS[:3])
    whole = batch.path.read_bytes()
    for cut in range(0, len(whole), 7):
        batch.path.write_bytes(whole[:cut])
        assert pending(files) == []
    batch.path.write_bytes(whole)
    assert len(pending(files)) == 1


def test_links_and_other_files_are_ignored(files: BatchFiles, directory: Path, tmp_path: Path) -> None:
    """Notes of an operator are no batches."""
    outside = tmp_path / "batch_001_pending.json"
    files.save_pending(DOCUMENTS).path.rename(outside)
    (directory / "pending/batch_001_pending.json").symlink_to(outside)
    (directory / "pending/README").write_text("mine")
    (directory / "pending/batch_1.json").write_text("mine")
    assert pending(files) == []
    assert outside.exists()
    assert (directory / "pending/batch_1.json").read_text() == "mine"


# State, lock, errors


def test_state(files: BatchFiles, directory: Path) -> None:
    """None where it is missing, or was corrupt and set aside."""
    assert files.read_state("checkpoint.json") is None
    files.write_state("checkpoint.json", {"low_water_mark": bson.Int64(5)})
    read = files.read_state("checkpoint.json")
    assert read == {"low_water_mark": 5}
    assert type(read["low_water_mark"]) is bson.Int64
    (directory / "checkpoint.json").write_bytes(b'{"low_')
    assert files.read_state("checkpoint.json") is None
    assert (directory / "checkpoint.json.corrupt").exists()


def test_one_worker_per_directory(files: BatchFiles, directory: Path) -> None:
    """The second worker gets a message with the remedy; releasing a lock that was never taken is harmless."""
    files.acquire()
    other = BatchFiles(directory)
    with pytest.raises(DirectoryLockedError, match="--batch-files-dir"):
        other.acquire()
    other.release()
    with pytest.raises(DirectoryLockedError):
        BatchFiles(directory).acquire()
    files.release()
    other.acquire()
    other.release()


def test_leftovers_of_a_crash_are_removed(files: BatchFiles, directory: Path) -> None:
    """Half-written temporary files, and journals of batches that are settled; nothing else."""
    kept = files.save_pending(DOCUMENTS)
    kept.journal.add("started", 1)
    kept.journal.close()
    (directory / "pending/.batch_002_pending.json.ab12.tmp").write_bytes(b"{")
    (directory / ".checkpoint.json.ab12.tmp").write_bytes(b"{")
    (directory / "pending/batch_009_pending.journal").write_bytes(b"{}")
    files.acquire()
    files.release()
    assert names(directory / "pending") == ["batch_001_pending.journal", "batch_001_pending.json"]
    assert ".checkpoint.json.ab12.tmp" not in names(directory)


def test_unusable_directory_raises(tmp_path: Path) -> None:
    """A file, a link, a place below a file: the flag that names another is named."""
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    for name in ("file", "link", "file/below"):
        with pytest.raises(StateDirectoryError, match="--batch-files-dir"):
            BatchFiles(tmp_path / name)


def test_unreadable_state_file_raises(files: BatchFiles, directory: Path) -> None:
    """It is not taken for corrupt: its content may be fine."""
    (directory / "checkpoint.json").mkdir()
    with pytest.raises(StateDirectoryError, match="cannot be read"):
        files.read_state("checkpoint.json")


def test_linked_folder_is_refused(directory: Path, tmp_path: Path) -> None:
    """Nobody can lead conversations elsewhere."""
    (tmp_path / "elsewhere").mkdir()
    directory.mkdir()
    (directory / "pending").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StateDirectoryError, match="symbolic link"):
        BatchFiles(directory)


@pytest.mark.parametrize("kind", ["pending", "retry"])
def test_unfinished_work_of_another_collection_is_refused(files: BatchFiles, kind: str) -> None:
    """It is not mixed with this one's; both are named."""
    files.write_state("checkpoint.json", {"source": "db.first"})
    files.require_source("db.second")
    if kind == "pending":
        files.save_pending(DOCUMENTS)
    else:
        files.save_failed("retry", 1, [failed()])
    files.require_source("db.first")
    with pytest.raises(ConfigurationError, match=r"db\.first.*db\.second.*--batch-files-dir"):
        files.require_source("db.second")


def test_a_crash_while_a_worked_off_retry_file_is_removed_leaves_nothing(tmp_path: Path) -> None:
    """Its content is gone first, then the file, then the journal of its round: the next start finishes that."""
    files = BatchFiles(tmp_path / "batch_files")
    files.acquire()
    folder = files.directory / "retry"
    (folder / "batch_032_retry_queue.json").write_bytes(b"[]")
    (folder / "batch_032_retry_queue.1x0.journal").write_bytes(b"")
    files.release()
    again = BatchFiles(files.directory)
    again.acquire()
    assert list(again.load_retry()) == []
    assert list(folder.iterdir()) == []
    again.release()


def test_worked_off_retry_file_is_emptied_before_it_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A power cut may undo the removal; then nothing is retried a second time."""
    files = BatchFiles(tmp_path / "batch_files")
    files.save_failed("retry", 1, [failed()])
    (path,) = (files.directory / "retry").glob("*.json")
    monkeypatch.setattr("utils.batch_file_manager.remove_file", lambda _path: None)
    files.write_failures(path, [])
    assert path.read_bytes() == b"[]"

"""Checks of batch_files/ and of the process; they change nothing."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from commands.diagnosis import disk as disk_diagnosis
from commands.diagnosis.disk import diagnose_disk
from commands.diagnosis.findings import Finding
from config import Settings, load_settings
from error_handler import DirectoryLockedError
from tests.commands.found import the_one
from tests.utils.worker_files import failed
from utils.batch_file_manager import BatchFiles


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A directory as a worker creates it."""
    files = BatchFiles(tmp_path / "batch_files")
    files.acquire()
    files.release()
    return files.directory


def settings_for(directory: Path, **given: Any) -> Settings:
    return load_settings(None, batch_files_dir=directory, **given)


def findings(directory: Path, **given: Any) -> list[Finding]:
    return list(diagnose_disk(settings_for(directory, **given)))


def snapshot(directory: Path) -> list[tuple[str, int, int, bytes]]:
    """Return the names, modes, times and contents of all files."""
    paths = sorted(directory.rglob("*"))
    return [
        (str(p), p.stat().st_mode, p.stat().st_mtime_ns, p.read_bytes() if p.is_file() else b"")
        for p in (directory, *paths)
    ]


def test_intact_directory_has_no_remedies(directory: Path) -> None:
    found = findings(directory)
    assert {finding.level for finding in found} == {"ok"}, found
    assert the_one(found, "GB are free").numbers["free_bytes"] > 0
    assert the_one(found, "can write to")
    assert the_one(found, "Only this user can read")
    assert the_one(found, "No worker is using").numbers == {"locked": False}


def test_relative_directory_is_resolved_in_the_current_folder(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(directory.parent)
    assert the_one(findings(Path("batch_files")), "This user can write to batch_files.")


def test_missing_directory_is_ok_and_is_not_created(tmp_path: Path) -> None:
    found = findings(tmp_path / "not" / "yet")
    assert {finding.level for finding in found} == {"ok"}, found
    assert the_one(found, f"a run creates it in {tmp_path}")
    assert the_one(found, "No worker has used")
    assert list(tmp_path.iterdir()) == []


def test_low_disk_space_is_a_warning(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The limit is raised above the free space instead of filling the disk."""
    assert disk_diagnosis.LITTLE_SPACE_BYTES == 1e9
    monkeypatch.setattr(disk_diagnosis, "LITTLE_SPACE_BYTES", 10**18)
    found = the_one(findings(directory), "GB are free")
    assert found.level == "warning"
    assert "--batch-files-dir" in found.remedy


def a_file(path: Path) -> None:
    path.write_text("")


def below_a_file(path: Path) -> None:
    path.parent.write_text("")


def a_link(path: Path) -> None:
    (path.parent / "elsewhere").mkdir()
    path.symlink_to("elsewhere")


@pytest.mark.parametrize(
    ("make", "name", "words"),
    [
        (a_file, "x", "is not a directory"),
        (below_a_file, "file/x", "is not a directory"),
        (a_link, "x", "is a symbolic link"),
    ],
)
def test_unusable_directory_is_an_error(tmp_path: Path, make: Callable[[Path], None], name: str, words: str) -> None:
    make(tmp_path / name)
    found = findings(tmp_path / name)
    (error,) = [finding for finding in found if finding.level == "error"]
    assert words in error.sentence
    assert "--batch-files-dir" in error.remedy
    assert the_one(found, "GB are free")
    assert the_one(found, "open as many files")


def test_directory_without_write_permission_is_an_error() -> None:
    """If root runs the tests, the effective user is changed to one without permissions."""
    is_root = os.geteuid() == 0
    with tempfile.TemporaryDirectory() as folder:  # other users cannot enter pytest's folder
        Path(folder).chmod(0o755)
        directory = Path(folder) / "theirs"
        directory.mkdir(mode=0o555)
        if is_root:
            os.seteuid(65_534)
        try:
            found = findings(directory)
        finally:
            if is_root:
                os.seteuid(0)
    assert the_one(found, f"cannot write to {directory}").level == "error"


def test_files_readable_by_others_are_a_warning(directory: Path) -> None:
    (directory / "pending").chmod(0o750)
    BatchFiles(directory).write_state("checkpoint.json", {})
    (directory / "checkpoint.json").chmod(0o644)
    found = the_one(findings(directory), "Other users can access 2 paths")
    assert (found.level, found.numbers) == ("warning", {"paths": 2})
    subprocess.run(found.remedy.split(), check=True)
    assert the_one(findings(directory), "Only this user can read")
    assert not disk_diagnosis.is_open(directory / "finished by a worker meanwhile")


def test_fresh_checkout_is_no_warning(directory: Path) -> None:
    """git creates the directory, and the empty file that keeps it, with the usual rights."""
    directory.chmod(0o755)
    (directory / ".gitkeep").touch(mode=0o644)
    assert the_one(findings(directory), "Only this user can read").level == "ok"


def test_lock_of_a_worker_is_reported_and_kept(directory: Path) -> None:
    holder = BatchFiles(directory)
    holder.acquire()
    found = the_one(findings(directory), "A worker is using")
    assert (found.level, found.numbers) == ("warning", {"locked": True})
    with pytest.raises(DirectoryLockedError):
        BatchFiles(directory).acquire()
    holder.release()
    assert the_one(findings(directory), "No worker is using")
    next_one = BatchFiles(directory)
    next_one.acquire()  # the doctor keeps no lock
    next_one.release()


@pytest.fixture
def leftovers(directory: Path) -> BatchFiles:
    """Files of an interrupted run."""
    files = BatchFiles(directory)
    batch = files.save_pending([{"_id": 1, "text": "secret words"}, {"_id": 2, "text": "secret words"}])
    batch.journal.close()
    files.save_failed("retry", 2, [failed()])
    files.save_failed("quarantine", 3, [failed()])
    return files


def test_leftover_documents_are_counted_without_their_text(directory: Path, leftovers: BatchFiles) -> None:
    found = findings(directory)
    pending = the_one(found, "pending/ holds 2 documents in 1 file")
    assert (pending.level, pending.numbers) == ("ok", {"files": 1, "documents": 2, "unreadable": 0})
    assert the_one(found, "retry/ holds 1 document in 1 file").level == "ok"
    quarantine = the_one(found, "quarantine/ holds 1 document in 1 file")
    assert (quarantine.level, "--retry-failed" in quarantine.sentence) == ("warning", True)
    assert "secret" not in str(found)


def test_unreadable_files_are_a_warning_and_stay(directory: Path, leftovers: BatchFiles) -> None:
    (directory / "retry/batch_009_retry_queue.json").write_bytes(b'{"cut')
    (directory / "pending/batch_007_pending.json.corrupt").write_bytes(b"\xff")
    before = snapshot(directory)
    found = findings(directory)
    assert the_one(found, "1 of 2 files in").level == "warning"
    assert the_one(found, "Renamed to .corrupt: 1 file;").level == "warning"
    assert snapshot(directory) == before


def test_diagnosis_changes_no_file(directory: Path, leftovers: BatchFiles) -> None:
    before = snapshot(directory)
    findings(directory)
    assert snapshot(directory) == before


def test_low_open_file_limit_is_a_warning(directory: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (300, hard))
    try:
        found = the_one(findings(directory, max_concurrent=256), "can open 300 files")
        assert the_one(findings(directory, max_concurrent=5), "open as many files")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert (found.level, found.numbers) == ("warning", {"limit": 300, "needed": 340})
    assert "ulimit -n 1024" in found.remedy


@pytest.mark.thorough
def test_required_open_files_exceed_those_of_a_worker() -> None:
    """In addition to its connections, a worker has its libraries and journals open."""
    done = subprocess.run(
        [sys.executable, "-c", "import os, batch_processor; print(len(os.listdir('/proc/self/fd')))"],
        capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert int(done.stdout) < disk_diagnosis.FILES_OF_A_RUN / 2

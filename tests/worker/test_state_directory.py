"""The state directory is full, read-only, corrupt, foreign, shared, or rearranged by an operator."""

from __future__ import annotations

import json
import os
import shutil
import signal
import stat
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.cases import mostly_thorough
from tests.worker.site import (
    Site,
    calls,
    check_calls,
    check_directory,
    check_exactly_once,
    check_results,
    check_statuses,
    documents_of_all_shapes,
    filled,
    model_of,
)
from utils.batch_file_manager import BatchFiles

CONCURRENCY = 6
CORRUPT = (
    b"",
    b"{",
    b"\x00" * 64,
    b"\xff\xfe",
    b'"text"',
    b"7",
    b"null",
    b"{}",
    b'{"hello": 1}',
    b"[1, 2]",
    b'[{"a": 1}]',
)
MISUSED = (
    b'{"conversations": 5, "conversation_count": 1}',
    b'{"conversations": [5], "conversation_count": 1}',
    b'{"conversations": [], "conversation_count": 0}',
    b'{"conversations": [{"conversation_data": {}}], "conversation_count": 1}',
    b'{"conversations": [{"conversation_data": {"_id": 1}}], "conversation_count": 2}',
    b'{"conversations": [{"conversation_data": {"_id": {"$oid": "zz"}}}], "conversation_count": 1}',
    b'{"conversations": [{"conversation_data": {"_id": {"$binary": {}}}}], "conversation_count": 1}',
    b'{"conversations": [{"conversation_data": {"_id": {"$date": []}}}], "conversation_count": 1}',
    b'[{"conversation_id": 1, "status": "llm_failed", "conversation_data": 5}]',
    b'[{"conversation_id": 1, "status": "llm_failed", "conversation_data": {"_id": 1}, "reason": "whim"}]',
    b'[{"conversation_id": 1, "status": "llm_failed", "conversation_data": {"_id": 1}, "retry_count": "many"}]',
    b"[" * 100_000,
)


def killed_in_the_middle(site: Site) -> None:
    """Leave a pending file with a journal, as a crash does."""
    assert site.run(plan={"seam": "answered", "passage": 5}).code == -signal.SIGKILL
    assert site.files("pending/*.json")
    assert site.files("pending/*.journal")


def is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True


def mount(folder: Path, options: str) -> bool:
    """Mount a tmpfs on *folder*; False where this user may not."""
    folder.mkdir(mode=0o700, exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    try:
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        return False


def remount(folder: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", str(folder)], check=True)


@contextmanager
def small_disk(folder: Path, options: str) -> Iterator[None]:
    if not mount(folder, options):
        pytest.skip("this user may not mount a tmpfs")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def check_refused(ended: Any, *words: str) -> None:
    """Assert exit code 2 and one sentence for the operator that has *words*."""
    assert ended.code == 2, ended.err
    sentence = ended.err.splitlines()[-1]
    assert sentence.startswith("cli.py: ")
    for word in words:
        assert word in sentence, sentence


def test_full_disk_ends_with_a_message(site: Site) -> None:
    """The run ends with a clear sentence; after space is freed the same command finishes, and nothing is lost."""
    documents = filled(site, 200)
    with small_disk(site.directory, "size=96k,mode=700"):
        ended = site.run("--batch-size", "50")
        check_refused(ended, "space", str(site.directory))
        remount(site.directory, "size=8m")
        ended = site.run("--batch-size", "50")
        assert ended.code == 0, ended.err
        check_exactly_once(site, documents)
        check_calls(site, documents, repeated=CONCURRENCY)


@pytest.mark.thorough
@pytest.mark.parametrize(
    "limit", [7_000, *(pytest.param(size, marks=pytest.mark.thorough) for size in (2_000, 12_000))]
)
def test_file_size_limit_ends_with_a_message(site: Site, limit: int) -> None:
    """The same for a limit of the file size, which cuts a line of the journal in its middle."""
    documents = filled(site, 60)
    check_refused(site.run(plan={"file_limit": limit}), "space")
    ended = site.run()
    assert ended.code == 0, ended.err
    check_exactly_once(site, documents)
    check_calls(site, documents, repeated=CONCURRENCY)


def test_unwritable_directory_ends_with_a_message(site: Site) -> None:
    """Exit code 2 before anything is read or asked."""
    documents = filled(site, 10)
    if os.geteuid() == 0:
        with small_disk(site.directory, "ro"):
            check_refused(site.run(), str(site.directory), "--batch-files-dir")
    else:
        site.directory.mkdir(mode=0o500)
        check_refused(site.run(), str(site.directory), "--batch-files-dir")
    assert model_of(site).stats()["chat_requests"] == 0
    assert list(site.source.find().sort("_id", 1)) == documents


def test_symbolic_links_are_refused(site: Site, tmp_path: Path) -> None:
    """Neither the directory nor a folder in it may lead elsewhere."""
    filled(site, 10)
    (tmp_path / "elsewhere").mkdir()
    site.directory.symlink_to(tmp_path / "elsewhere")
    check_refused(site.run(), "symbolic link")
    site.directory.unlink()
    site.directory.mkdir()
    (site.directory / "pending").symlink_to(tmp_path / "elsewhere")
    check_refused(site.run(), "symbolic link")
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_files_are_private(site: Site) -> None:
    """0600 and 0700, whatever the umask allows, while the run is in the middle of its work."""
    filled(site, 40)
    old = os.umask(0)
    try:
        killed_in_the_middle(site)
    finally:
        os.umask(old)
    check_directory(site, clean=False)
    folders = [site.directory, *(path for path in site.directory.iterdir() if path.is_dir())]
    assert {stat.S_IMODE(folder.stat().st_mode) for folder in folders} == {0o700}


def test_second_worker_on_a_directory_is_refused(site: Site) -> None:
    """The second exits with 5 and harms nothing; a killed holder gives the directory back."""
    documents = filled(site, 30)
    model_of(site).configure(latency_s=0.5)
    with site.start() as worker:
        model_of(site).wait_for("in_flight", equals=CONCURRENCY)
        second = site.run()
        assert second.code == 5, second.err
        assert "--batch-files-dir" in second.err
        worker.send(signal.SIGKILL)
        worker.ended()
    model_of(site).configure(latency_s=0.02)
    assert site.run().code == 0
    check_exactly_once(site, documents)
    check_calls(site, documents, repeated=CONCURRENCY)


@pytest.mark.parametrize("content", mostly_thorough(CORRUPT + MISUSED, 2), ids=range(len(CORRUPT + MISUSED)))
@pytest.mark.parametrize(
    "name",
    [
        "pending/batch_001_pending.json",
        pytest.param("retry/batch_001_retry_queue.json", marks=pytest.mark.thorough),
        "checkpoint.json",
    ],
)
def test_unusable_files_do_no_harm(tmp_path: Path, name: str, content: bytes) -> None:
    """Whatever is in a file, reading it raises nothing; what cannot be used is set aside under its name."""
    files = BatchFiles(tmp_path)
    path = tmp_path / name
    path.write_bytes(content)
    if name.startswith("checkpoint"):
        assert isinstance(files.read_state(name), dict | None)
        return
    assert [*files.load_pending(), *files.load_retry()] == []
    assert path.with_name(path.name + ".corrupt").read_bytes() == content


def test_truncated_file_is_set_aside_and_truncated_journal_replayed_up_to_the_cut(site: Site) -> None:
    """No beginning of a batch file passes for a whole one."""
    filled(site, 20)
    killed_in_the_middle(site)
    path = site.files("pending/*.json")[0]
    whole = path.read_bytes()
    aside = path.with_name(path.name + ".corrupt")
    for size in {*range(0, len(whole), 397), *range(len(whole) - 60, len(whole), 7)}:
        path.write_bytes(whole[:size])
        assert list(BatchFiles(site.directory).load_pending()) == []
        assert aside.read_bytes() == whole[:size]
        aside.unlink()
    path.write_bytes(whole)
    check_truncated_journal(site, site.files("pending/*.journal")[0])


def check_truncated_journal(site: Site, path: Path) -> None:
    """Every whole line counts, and what follows a torn one is read too."""
    whole = path.read_bytes()
    for size in range(0, len(whole), 151):
        path.write_bytes(whole[:size])
        batch = next(BatchFiles(site.directory).load_pending())
        answered = sum(entry.result is not None for entry in batch.replay.values())
        lines = [line for line in whole[:size].splitlines() if b'"answered"' in line]
        assert answered == sum(is_json(line) for line in lines)


@pytest.mark.parametrize(
    "damage",
    [
        "cut",
        *(pytest.param(content, marks=pytest.mark.thorough) for content in ("foreign id", b"", b"{", b'{"hello": 1}')),
    ],
    ids=str,
)
def test_documents_of_a_corrupt_batch_are_found_in_mongodb(site: Site, damage: bytes | str) -> None:
    """It is set aside with a message, and every document of it gets its result all the same."""
    documents = filled(site, 30)
    killed_in_the_middle(site)
    for path in site.files("pending/*.json"):
        whole = path.read_bytes()
        cut = whole[: len(whole) // 2] if damage == "cut" else whole.replace(b'"_id"', b'"id"')
        path.write_bytes(damage if isinstance(damage, bytes) else cut)
    ended = site.run("--logs")
    assert ended.code == 0, ended.err
    assert ".corrupt" in ended.err
    check_results(site, documents)
    check_statuses(site, documents)
    assert site.files("pending/*.json") == []
    assert site.files("pending/*.corrupt")


def test_documents_of_a_corrupt_retry_file_are_found_in_mongodb(site: Site) -> None:
    """Its documents are found again from MongoDB, where they say failed."""
    documents = filled(site, 40)
    faults = [{"kind": "wrong_label", "when": {"text": f"Case {number:05d}"}, "times": 2} for number in (3, 25)]
    model_of(site).configure(faults=faults)
    assert site.run(plan={"seam": "completed", "passage": 2}).code == -signal.SIGKILL
    paths = site.files("retry/*.json")
    assert len(paths) == 2
    paths[0].write_bytes(b"[{")
    ended = site.run("--logs")
    assert ended.code == 0, ended.err
    check_results(site, documents)
    check_statuses(site, documents)
    assert site.files("retry/*.json") == []
    assert site.files("retry/*.corrupt")


@pytest.mark.thorough
@pytest.mark.parametrize(
    "content",
    [
        *(pytest.param(content, marks=pytest.mark.thorough) for content in (b"", b"[]", b"{")),
        b'{"source": 5, "job_id": 7, "low_water_mark": {"$oid": "x"}}',
    ],
    ids=str,
)
def test_corrupt_checkpoint_starts_a_new_run(site: Site, content: bytes) -> None:
    """It only knew a short cut."""
    documents = filled(site, 60)
    killed_in_the_middle(site)
    (site.directory / "checkpoint.json").write_bytes(content)
    ended = site.run("--logs")
    assert ended.code == 0, ended.err
    check_exactly_once(site, documents)
    check_calls(site, documents, repeated=CONCURRENCY)


def test_foreign_files_are_ignored(site: Site) -> None:
    """A file without the name of a batch file is neither read nor removed."""
    documents = filled(site, 6)
    (site.directory / "pending").mkdir(mode=0o700, parents=True)
    (site.directory / "pending/notes.txt").write_text("call Anna")
    (site.directory / "pending/batch_abc_pending.json").write_text("{")
    (site.directory / "pending/batch_900_pending.json").symlink_to("/etc/hostname")
    assert site.run().code == 0
    check_results(site, documents)
    left = sorted(path.name for path in (site.directory / "pending").iterdir())
    assert left == ["batch_900_pending.json", "batch_abc_pending.json", "notes.txt"]


@pytest.mark.thorough
def test_retry_file_moved_to_pending_gets_fresh_attempts(site: Site) -> None:
    """From ``retry/`` to ``pending/``: it is worked off like any batch, and its entries get fresh rounds."""
    documents = filled(site, 40)
    faults = [{"kind": "wrong_label", "when": {"text": f"Case {number:05d}"}, "times": 2} for number in (3, 25)]
    model_of(site).configure(faults=faults)
    assert site.run(plan={"seam": "completed", "passage": 2}).code == -signal.SIGKILL
    for path in site.files("retry/*.json"):
        shutil.move(path, site.directory / "pending")
    ended = site.run()
    assert ended.code == 0, ended.err
    check_exactly_once(site, documents)
    check_calls(site, documents, repeated=CONCURRENCY)


@pytest.mark.parametrize("way", [pytest.param("operator", marks=pytest.mark.thorough), "--retry-failed"])
def test_retry_failed_requeues_quarantined_documents(site: Site, way: str) -> None:
    """Moved to ``pending/`` by hand or by the flag, they are asked again, and nothing else is."""
    documents = filled(site, 24)
    hopeless = [documents[3], documents[21]]
    faults = [{"kind": "wrong_label", "when": {"text": f"Case {document['_id']:05d}"}} for document in hopeless]
    model_of(site).configure(faults=faults)
    assert site.run().code == 1
    assert len(site.entries("quarantine")) == 2
    assert site.run().code == 1  # nothing is pending, and what is in quarantine stays there
    asked = model_of(site).stats()["chat_requests"]
    model_of(site).configure(faults=[])
    if way == "operator":
        for path in site.files("quarantine/*.json"):
            shutil.move(path, site.directory / "pending")
    ended = site.run() if way == "operator" else site.run(way)
    assert ended.code == 0, ended.err
    check_exactly_once(site, documents)
    assert model_of(site).stats()["chat_requests"] == asked + len(hopeless)
    assert site.files("quarantine/*") == []


@pytest.mark.thorough
@pytest.mark.parametrize("way", ["operator", "--retry-failed"])
def test_unwritten_answer_is_not_asked_again(site: Site, way: str) -> None:
    """MongoDB refused the result; with the cause removed, the kept answer is written."""
    documents = filled(site, 30)
    refused = {"conversation_number": {"$ne": "7"}}
    site.database.create_collection("sentimental_analysis", validator=refused)
    assert site.run().code == 1
    assert [(entry["conversation_id"], entry["status"]) for entry in site.entries("quarantine")] == [
        (7, "write_failed")
    ]
    site.database.command({"collMod": "sentimental_analysis", "validator": {}})
    if way == "operator":
        for path in site.files("quarantine/*.json"):
            shutil.move(path, site.directory / "pending")
    ended = site.run() if way == "operator" else site.run(way)
    assert ended.code == 0, ended.err
    check_exactly_once(site, documents)
    assert calls(site, documents[7]) == 1


@pytest.mark.thorough
def test_documents_that_fail_again_are_queued_once(site: Site) -> None:
    """--retry-failed asks neither twice for what fails in the run itself nor keeps two entries of it."""
    documents = filled(site, 300)
    hopeless = [documents[3], documents[33]]
    faults = [{"kind": "wrong_label", "when": {"text": f"Case {document['_id']:05d}"}} for document in hopeless]
    model_of(site).configure(faults=faults)
    ended = site.run("--retry-failed")
    assert ended.code == 1, ended.err
    assert sorted(entry["conversation_id"] for entry in site.entries("quarantine")) == [3, 33]
    assert [calls(site, document) for document in hopeless] == [8, 8]


def test_worker_without_worker_json_keeps_its_leases(site: Site) -> None:
    """The checkpoint has its id as well; otherwise its own leases would lock it out until they expire."""
    documents = documents_of_all_shapes(40)
    site.source.insert_many(documents)
    assert site.model is not None
    with site.start() as worker:
        site.model.wait_for("answered", at_least=5, timeout_s=30)
        worker.send(signal.SIGKILL)
        worker.ended()
    (site.directory / "worker.json").unlink()
    assert site.run().code == 0
    check_exactly_once(site, documents)

"""Files are replaced as a whole and durably, or stay as they were."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import Any

import pytest

from error_handler import ErrorClass, StateDirectoryError
from storage import files as atomic_file
from storage.files import move_file, remove_file, replace_file, require_replaceable, sync_folder

CALLS = ("open", "fsync", "replace", "rename", "close")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Record what reaches the system, by name of the file: each call goes on to the real one."""
    recorded: list[tuple[str, str]] = []
    names: dict[int, str] = {}

    class Recorder:
        def __getattr__(self, name: str) -> Any:
            real = getattr(os, name)
            if name not in CALLS:
                return real

            def call(*arguments: Any, **options: Any) -> Any:
                result = real(*arguments, **options)
                if name == "open":
                    names[result] = Path(arguments[0]).name
                target = (
                    names.get(arguments[0])
                    if isinstance(arguments[0], int)
                    else Path(arguments[-1] if name == "replace" else arguments[0]).name
                )
                if name == "fsync" and not stat.S_ISDIR(os.fstat(arguments[0]).st_mode):
                    recorded.append(("size at fsync", str(os.fstat(arguments[0]).st_size)))
                recorded.append((name, str(target)))
                return result

            return call

    monkeypatch.setattr(atomic_file, "os", Recorder())
    return recorded


def test_replace_order_survives_a_power_cut(folder: Path, calls: list[tuple[str, str]]) -> None:
    """All bytes to a file beside it, fsync, rename, fsync of the folder: without any of these content can be lost."""
    replace_file(folder / "state.json", b"content")
    (_, temporary), *_ = calls
    assert temporary.startswith(".state.json.")
    assert [call for call in calls if call[0] != "close"] == [
        ("open", temporary),
        ("size at fsync", "7"),
        ("fsync", temporary),
        ("replace", "state.json"),
        ("open", folder.name),
        ("fsync", folder.name),
    ]


@pytest.mark.parametrize("content", [b"", b"x", b"\x00\xff" * 500_000], ids=["empty", "short", "1-MB"])
def test_replace(folder: Path, content: bytes) -> None:
    """New or not, the file has the content, is its owner's alone, and nothing is left beside it."""
    path = folder / "state.json"
    for expected in (content, b"second " + content):
        replace_file(path, expected)
        assert path.read_bytes() == expected
        assert mode_of(path) == 0o600
        assert list(folder.iterdir()) == [path]


def test_replaced_file_is_private(folder: Path) -> None:
    """Whatever mode it had."""
    path = folder / "state.json"
    path.write_bytes(b"old")
    path.chmod(0o644)
    old_umask = os.umask(0)
    try:
        replace_file(path, b"new")
    finally:
        os.umask(old_umask)
    assert mode_of(path) == 0o600


def test_open_readers_keep_the_old_content(folder: Path) -> None:
    """Never a mixture: who has it open reads on in the old one."""
    path = folder / "state.json"
    replace_file(path, b"old content")
    with path.open("rb") as reader:
        assert reader.read(3) == b"old"
        replace_file(path, b"new")
        assert reader.read() == b" content"


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_old_content_stays_if_the_disk_fails(folder: Path, failing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error names the file; the temporary one is removed."""
    path = folder / "state.json"
    replace_file(path, b"old")

    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(atomic_file.os, failing, fail)
    with pytest.raises(
        StateDirectoryError, match=r"state\.json cannot be written \(No space left on device\)"
    ) as caught:
        replace_file(path, b"new")
    assert caught.value.error_class is ErrorClass.RESOURCE
    assert path.read_bytes() == b"old"
    assert list(folder.iterdir()) == [path]


def test_full_disk_ends_with_a_message(folder: Path) -> None:
    """The real thing: a limit of this process on the size of files."""
    import resource
    import signal

    path = folder / "state.json"
    replace_file(path, b"old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(StateDirectoryError):
            replace_file(path, b"x" * 2000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert path.read_bytes() == b"old"
    assert list(folder.iterdir()) == [path]


def test_missing_folder_raises(folder: Path) -> None:
    """Nothing is made on the way."""
    with pytest.raises(StateDirectoryError):
        replace_file(folder / "missing" / "state.json", b"x")
    assert list(folder.iterdir()) == []


def test_path_that_is_a_folder_raises(folder: Path) -> None:
    """It stays one."""
    (folder / "state.json").mkdir()
    with pytest.raises(StateDirectoryError):
        replace_file(folder / "state.json", b"x")
    assert [path.name for path in folder.iterdir()] == ["state.json"]


def test_link_is_replaced_and_not_followed(folder: Path) -> None:
    """The target of the link is not changed."""
    target = folder / "precious"
    target.write_bytes(b"precious")
    (folder / "state.json").symlink_to(target)
    replace_file(folder / "state.json", b"new")
    assert target.read_bytes() == b"precious"
    assert not (folder / "state.json").is_symlink()


def test_remove(folder: Path) -> None:
    """A file that is not there is fine."""
    path = folder / "state.json"
    replace_file(path, b"x")
    remove_file(path)
    remove_file(path)
    assert list(folder.iterdir()) == []
    path.mkdir()
    with pytest.raises(StateDirectoryError, match="cannot be removed"):
        remove_file(path)


def test_move(folder: Path, calls: list[tuple[str, str]]) -> None:
    """Both folders are made durable: the file must not be in neither of them after a power cut."""
    source, target = folder / "quarantine/file", folder / "pending/file"
    for path in (source, target):
        path.parent.mkdir()
    source.write_bytes(b"content")
    move_file(source, target)
    assert target.read_bytes() == b"content"
    assert not source.exists()
    assert [call for call in calls if call[0] in ("rename", "fsync")] == [
        ("rename", "file"),
        ("fsync", "pending"),
        ("fsync", "quarantine"),
    ]


def test_impossible_move_leaves_the_file(folder: Path) -> None:
    """The file stays where it was."""
    (folder / "file").write_bytes(b"content")
    with pytest.raises(StateDirectoryError, match="cannot be moved"):
        move_file(folder / "file", folder / "missing/file")
    assert (folder / "file").read_bytes() == b"content"


def test_sync_folder_wants_a_folder(folder: Path) -> None:
    """It leaves no descriptor open either way."""
    (folder / "file").write_bytes(b"")
    before = len(os.listdir("/proc/self/fd"))
    sync_folder(folder)
    with pytest.raises(NotADirectoryError):
        sync_folder(folder / "file")
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EBADF])
def test_folder_that_cannot_be_synced_is_warned_of_once(
    folder: Path, code: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """CIFS and sshfs answer so; files are written all the same."""
    real = os.fsync

    def fsync(handle: int) -> None:
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(code, os.strerror(code))
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(atomic_file, "_warned_devices", set())
    (folder / "sub").mkdir()
    replace_file(folder / "file", b"1")
    replace_file(folder / "file", b"2")
    move_file(folder / "file", folder / "sub/file")
    assert (folder / "sub/file").read_bytes() == b"2"
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert str(folder) in caplog.text


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
def test_folder_that_fails_is_an_error(folder: Path, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A broken disk is not a file system without the call."""
    real = os.fsync

    def fsync(handle: int) -> None:
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(code, os.strerror(code))
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(StateDirectoryError):
        replace_file(folder / "file", b"1")


def test_output_file_is_checked_and_left_alone(folder: Path) -> None:
    """New and old files pass; nothing is created or emptied."""
    (folder / "old.json").write_bytes(b"{}")
    require_replaceable(folder / "old.json", "--output")
    require_replaceable(folder / "new.json", "--output")
    assert [path.name for path in folder.iterdir()] == ["old.json"]
    assert (folder / "old.json").read_bytes() == b"{}"


@pytest.mark.parametrize("name", ["missing/run.json", ".", "pipe", "old.json/run.json", "/dev/null"])
def test_output_that_cannot_be_written_is_named(folder: Path, name: str) -> None:
    """A pipe or a device would be replaced by a file."""
    (folder / "old.json").write_bytes(b"{}")
    os.mkfifo(folder / "pipe")
    with pytest.raises(StateDirectoryError, match="--output"):
        require_replaceable(folder / name, "--output")

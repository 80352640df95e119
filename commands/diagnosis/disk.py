"""Checks of the state directory and of this process for ``cli.py doctor``. They only read; no lock is kept."""

from __future__ import annotations

import fcntl
import os
import resource
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from commands.diagnosis.findings import Finding, error, ok, warning
from config import Settings
from domain.text import counted
from storage import extended_json
from storage.mongo_connection import MAX_POOL_SIZE

LITTLE_SPACE_BYTES = 1_000_000_000
FILES_OF_A_RUN = 64  # libraries, logs, journals, progress
LEFTOVERS = {
    "pending": "an interrupted run; the next run finishes it",
    "retry": "failed documents; the next run retries them",
    "quarantine": "documents that failed for good; python cli.py --retry-failed retries them",
}


def diagnose_disk(settings: Settings) -> Iterator[Finding]:
    """Yield the findings about the directory of *settings*; a failed check does not hide the others."""
    for check in (_space, _rights_to_write, _privacy, _lock, _leftovers, _open_files):
        try:
            yield from check(settings)
        except OSError as exc:
            place = exc.filename or settings.batch_files_dir
            remedy = "Fix its permissions, or choose another directory with --batch-files-dir."
            yield error(f"Cannot read {place} ({exc.strerror}).", remedy)


def _space(settings: Settings) -> Iterator[Finding]:
    place = _nearest(settings.batch_files_dir)
    free = shutil.disk_usage(place).free
    sentence = f"{free / 1e9:,.1f} GB are free on the disk of {settings.batch_files_dir}."
    if free >= LITTLE_SPACE_BYTES:
        yield ok(sentence, free_bytes=free)
    else:
        remedy = "Free some space, or choose another disk with --batch-files-dir: a full disk stops a run."
        yield warning(sentence, remedy, free_bytes=free)


def _rights_to_write(settings: Settings) -> Iterator[Finding]:
    directory = settings.batch_files_dir
    remedy = "Fix this, or choose another directory with --batch-files-dir."
    if directory.is_symlink():
        yield error(f"{directory} is a symbolic link; a run refuses those.", remedy)
        return
    place = _nearest(directory)
    if not place.is_dir():
        yield error(f"{place} is not a directory, so {directory} cannot be created.", remedy)
        return
    exists = place == directory.absolute()
    folders = [place, *(path for path in place.iterdir() if path.is_dir())] if exists else [place]
    closed = [path for path in folders if not os.access(path, os.W_OK | os.X_OK, effective_ids=True)]
    if closed:
        yield error(f"This user cannot write to {closed[0]}.", remedy)
    elif exists:
        yield ok(f"This user can write to {directory}.")
    else:
        yield ok(f"{directory} does not exist yet; a run creates it in {place}.")


def _privacy(settings: Settings) -> Iterator[Finding]:
    directory = settings.batch_files_dir
    if not directory.is_dir():
        return
    # A checkout has the directory itself, and an empty file in it, with the usual rights.
    paths = [path for path in directory.rglob("*") if not path.is_symlink()]
    open_paths = [path for path in paths if is_open(path)]
    if open_paths:
        sentence = (
            f"Other users can access {counted(len(open_paths), 'path')} in {directory}, which holds customer text."
        )
        yield warning(sentence, f"chmod -R go-rwx {directory}", paths=len(open_paths))
    else:
        yield ok(f"Only this user can read what is in {directory} (directories 0700, files 0600).")


def is_open(path: Path) -> bool:
    """Return whether other users can access *path*; False if it is an empty file, or gone because a worker finished it."""
    with suppress(FileNotFoundError):
        state = path.stat()
        return bool(state.st_mode & 0o077) and (path.is_dir() or state.st_size > 0)
    return False


def _lock(settings: Settings) -> Iterator[Finding]:
    """Try to take a shared lock and release it; this fails exactly if a worker holds its exclusive lock."""
    path = settings.batch_files_dir / ".lock"
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        yield ok("No worker has used this directory yet.", locked=False)
        return
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        remedy = "Give a second worker its own --batch-files-dir; with this one it ends with exit code 5."
        yield warning(f"A worker is using {settings.batch_files_dir}.", remedy, locked=True)
    else:
        yield ok("No worker is using this directory.", locked=False)
    finally:
        os.close(handle)


def _leftovers(settings: Settings) -> Iterator[Finding]:
    directory = settings.batch_files_dir
    for kind, meaning in LEFTOVERS.items():
        paths = sorted((directory / kind).glob("batch_*.json"))
        counts = [_documents_in(path) for path in paths]
        unreadable = sum(count is None for count in counts)
        documents = sum(count or 0 for count in counts)
        numbers = {"files": len(paths), "documents": documents, "unreadable": unreadable}
        if unreadable:
            remedy = "The next run renames them to .corrupt and reads their documents from MongoDB again."
            files = counted(len(paths), "file")
            yield Finding("warning", f"{unreadable} of {files} in {directory / kind} cannot be read.", remedy, numbers)
        elif paths:
            sentence = f"{kind}/ holds {counted(documents, 'document')} in {counted(len(paths), 'file')}: {meaning}."
            if kind == "quarantine":
                yield Finding("warning", sentence, "python cli.py quarantine list lists them with reasons.", numbers)
            else:
                yield Finding("ok", sentence, numbers=numbers)
    corrupt = len(list(directory.glob("**/*.corrupt")))
    if corrupt:
        sentence = f"Renamed to .corrupt: {counted(corrupt, 'file')}; their documents were read from MongoDB again."
        yield warning(sentence, "Inspect the files, then delete them.", corrupt=corrupt)


def _documents_in(path: Path) -> int | None:
    """Return how many documents *path* holds; None if it is not a file of the worker."""
    try:
        content: Any = extended_json.loads(path.read_bytes())
    except FileNotFoundError:  # a worker has just finished it
        return 0
    except ValueError:
        return None
    entries = content.get("conversations") if isinstance(content, dict) else content
    return len(entries) if isinstance(entries, list) else None


def _open_files(settings: Settings) -> Iterator[Finding]:
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = FILES_OF_A_RUN + MAX_POOL_SIZE + settings.most_in_flight
    if limit == resource.RLIM_INFINITY or limit >= needed:
        yield ok("This process can open as many files as a run needs.", limit=limit, needed=needed)
    else:
        sentence = f"This process can open {limit} files, and a run may need {needed}."
        remedy = f"Raise the limit: ulimit -n {max(1024, needed)} (systemd: LimitNOFILE=)."
        yield warning(sentence, remedy, limit=limit, needed=needed)


def _nearest(path: Path) -> Path:
    """Return *path* or its nearest parent that exists."""
    path = path.absolute()
    return next((place for place in (path, *path.parents) if os.path.lexists(place)), Path("/"))

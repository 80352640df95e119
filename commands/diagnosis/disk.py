"""Can a worker keep its files? Findings about ``batch_files/`` and this process. Reads only; no lock is kept."""

from __future__ import annotations

import fcntl
import os
import resource
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from commands.diagnosis.findings import Finding, counted
from config import Settings
from storage import extended_json
from storage.mongo_connection import MAX_POOL_SIZE

LITTLE_SPACE_BYTES = 1_000_000_000
FILES_OF_A_RUN = 64  # libraries, logs, journals, progress
LEFTOVERS = {
    "pending": "an interrupted run; the next run finishes it",
    "retry": "failed documents; the next run tries them again",
    "quarantine": "documents that failed for good; python cli.py --retry-failed takes them up again",
}

Check = Callable[[Settings], Iterator[Finding]]


def diagnose_disk(settings: Settings) -> Iterator[Finding]:
    """Yield what there is to say about the directory of *settings*; a check that fails does not hide the others."""
    checks: list[Check] = [_space, _rights_to_write, _privacy, _lock, _leftovers, _open_files]
    for check in checks:
        try:
            yield from check(settings)
        except OSError as exc:
            place = exc.filename or settings.batch_files_dir
            sentence = f"{place} cannot be looked at ({exc.strerror})."
            yield Finding("error", sentence, "Fix its rights, or name another directory with --batch-files-dir.")


def _space(settings: Settings) -> Iterator[Finding]:
    place = _nearest(settings.batch_files_dir)
    free = shutil.disk_usage(place).free
    sentence, numbers = f"{free / 1e9:,.1f} GB are free where {settings.batch_files_dir} lives.", {"free_bytes": free}
    if free >= LITTLE_SPACE_BYTES:
        yield Finding("ok", sentence, numbers=numbers)
    else:
        remedy = "Free some, or name a directory on another disk with --batch-files-dir: a full disk stops a run."
        yield Finding("warning", sentence, remedy, numbers)


def _rights_to_write(settings: Settings) -> Iterator[Finding]:
    directory = settings.batch_files_dir
    remedy = "Fix it, or name another directory with --batch-files-dir."
    if directory.is_symlink():
        yield Finding("error", f"{directory} is a symbolic link, which a run refuses.", remedy)
        return
    place = _nearest(directory)
    if not place.is_dir():
        yield Finding("error", f"{place} is not a folder, so {directory} cannot be one.", remedy)
        return
    exists = place == directory.absolute()
    folders = [place, *(path for path in place.iterdir() if path.is_dir())] if exists else [place]
    closed = [path for path in folders if not os.access(path, os.W_OK | os.X_OK, effective_ids=True)]
    if closed:
        yield Finding("error", f"This user may not write to {closed[0]}.", remedy)
    elif exists:
        yield Finding("ok", f"This user may write to {directory}.")
    else:
        yield Finding("ok", f"{directory} is not there yet; a run makes it in {place}.")


def _privacy(settings: Settings) -> Iterator[Finding]:
    directory = settings.batch_files_dir
    if not directory.is_dir():
        return
    paths = [directory, *(path for path in directory.rglob("*") if not path.is_symlink())]
    open_paths = [path for path in paths if path.stat().st_mode & 0o077]
    if open_paths:
        sentence = f"Others may use {counted(len(open_paths), 'path')} of {directory}, which holds customer text."
        numbers = {"paths": len(open_paths)}
        yield Finding("warning", sentence, f"chmod -R go-rwx {directory}", numbers)
    else:
        yield Finding("ok", f"Nobody else may read {directory} (folders 0700, files 0600).")


def _lock(settings: Settings) -> Iterator[Finding]:
    """Ask for a shared lock and give it back at once: it is refused exactly where a worker holds its own."""
    path = settings.batch_files_dir / ".lock"
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        yield Finding("ok", "No worker has used this directory yet.", numbers={"locked": False})
        return
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        remedy = "A second worker needs a --batch-files-dir of its own; this one ends with exit code 5."
        sentence = f"A worker is using {settings.batch_files_dir} now."
        yield Finding("warning", sentence, remedy, {"locked": True})
    else:
        yield Finding("ok", "No worker is using this directory now.", numbers={"locked": False})
    finally:
        os.close(handle)


def _leftovers(settings: Settings) -> Iterator[Finding]:
    directory = settings.batch_files_dir
    for kind, meaning in LEFTOVERS.items():
        paths = sorted((directory / kind).glob("batch_*.json"))
        counts = [_documents_in(path) for path in paths]
        unreadable = sum(count is None for count in counts)
        numbers = {"files": len(paths), "documents": sum(count or 0 for count in counts), "unreadable": unreadable}
        if unreadable:
            sentence = f"{unreadable} of {counted(len(paths), 'file')} in {directory / kind} cannot be read as what it should be."
            remedy = "The next run sets them aside as .corrupt and finds their documents again in MongoDB."
            yield Finding("warning", sentence, remedy, numbers)
        elif paths:
            sentence = f"{kind}/ holds {counted(numbers['documents'], 'document')} in {counted(len(paths), 'file')}: {meaning}."
            remedy = "Their reasons are in those files." if kind == "quarantine" else ""
            yield Finding("warning" if kind == "quarantine" else "ok", sentence, remedy, numbers)
    corrupt = len(list(directory.glob("**/*.corrupt")))
    if corrupt:
        sentence = f"Set aside as .corrupt: {counted(corrupt, 'file')}; the documents were found again in MongoDB."
        yield Finding("warning", sentence, "Delete them when you have looked at them.", {"corrupt": corrupt})


def _documents_in(path: Path) -> int | None:
    """Return how many documents *path* holds; None where it is not one of the worker's files."""
    try:
        content: Any = extended_json.loads(path.read_bytes())
    except FileNotFoundError:  # settled meanwhile by a worker
        return 0
    except ValueError:
        return None
    entries = content.get("conversations") if isinstance(content, dict) else content
    return len(entries) if isinstance(entries, list) else None


def _open_files(settings: Settings) -> Iterator[Finding]:
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = FILES_OF_A_RUN + MAX_POOL_SIZE + _calls_at_once(settings.max_concurrent)
    numbers = {"limit": limit, "needed": needed}
    if limit == resource.RLIM_INFINITY or limit >= needed:
        yield Finding("ok", "This process may open as many files as a run needs.", numbers=numbers)
    else:
        sentence = f"This process may open {limit} files at once, and a run may need {needed}."
        yield Finding("warning", sentence, f"ulimit -n {max(1024, needed)} (systemd: LimitNOFILE=).", numbers)


def _calls_at_once(setting: object) -> int:
    return setting if isinstance(setting, int) else 256  # the most that may be set


def _nearest(path: Path) -> Path:
    """Return *path*, or the nearest folder above it that exists."""
    path = path.absolute()
    return next((place for place in (path, *path.parents) if os.path.lexists(place)), Path("/"))

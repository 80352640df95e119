"""A copy of the ledger beside it, written at the end of each run that changed it, so that paid vectors exist twice."""

from __future__ import annotations

import logging
import os
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

from embedding_index.vector_ledger import VectorLedger
from error_handler import StateDirectoryError
from storage.files import sync_folder

logger = logging.getLogger(__name__)

COPY_FILE = "vectors.copy.sqlite3"


def restore_ledger(path: Path) -> None:
    """Restore the ledger *path* from its copy if it is missing or empty; the copy stays.

    Raises:
        StateDirectoryError: There is no room, or the folder does not allow it.
    """
    copy = path.with_name(COPY_FILE)
    if not copy.exists() or (path.exists() and path.stat().st_size):
        return
    try:
        for old in path.parent.glob(f"{path.name}*"):  # journals of the lost file
            old.unlink()
        part = copy.with_suffix(".part")
        shutil.copyfile(copy, part)
        _move_durably(part, path)
    except OSError as exc:
        raise _unusable(path, exc) from exc
    logger.warning("%s was missing; it is restored from %s", path.name, COPY_FILE)


def write_copy(ledger: VectorLedger) -> None:
    """Write the copy of *ledger* unless there is one of the same state; neither contains deleted vectors.

    Raises:
        StateDirectoryError: There is no room, or the folder does not allow it; the old copy stays.
    """
    copy = ledger.path.with_name(COPY_FILE)
    ledger.empty_journal()
    with ledger.reading() as db:
        state = tuple(db.execute("SELECT token, changes FROM search").fetchone())
        is_empty = not db.execute("SELECT EXISTS (SELECT 1 FROM vectors)").fetchone()[0]
        if state == _state_of(copy) or (is_empty and not copy.exists()):
            return
        part = copy.with_suffix(".part")
        try:
            part.unlink(missing_ok=True)
            os.close(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
            db.execute("VACUUM INTO ?", (str(part),))
            _move_durably(part, copy)
        except OSError as exc:
            raise _unusable(copy, exc) from exc


def _state_of(copy: Path) -> tuple[str, int] | None:
    try:
        with closing(sqlite3.connect(f"{copy.absolute().as_uri()}?mode=ro&immutable=1", uri=True)) as db:
            state: tuple[str, int] = db.execute("SELECT token, changes FROM search").fetchone()
            return state
    except sqlite3.Error:  # missing or damaged; the caller writes a new copy
        return None


def _move_durably(part: Path, path: Path) -> None:
    with part.open("rb") as file:
        os.fsync(file.fileno())
    os.chmod(part, 0o600)
    os.replace(part, path)
    sync_folder(path.parent)


def _unusable(path: Path, exc: OSError) -> StateDirectoryError:
    return StateDirectoryError(
        f"{path} cannot be written ({exc.strerror}); free space or fix the permissions, then run again."
    )

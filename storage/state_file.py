"""A SQLite file: durable transactions, readable by its owner only, errors as one sentence.

WAL mode with ``synchronous=FULL``: a committed transaction survives a power cut
(sqlite.org/pragma.html#pragma_synchronous), and other processes may read while one writes.
"""

from __future__ import annotations

import os
import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from error_handler import StateDirectoryError

BUSY_TIMEOUT_S = 30.0
PAGE_BYTES = 16_384  # rows of several kilobytes would span SQLite's usual pages of 4,096 bytes


@dataclass(frozen=True, slots=True)
class Schema:
    """The tables of one file, for ``PRAGMA user_version`` *version* and ``PRAGMA application_id`` *application*.

    *what* names the content in error messages; *if_damaged* and *if_foreign* tell the user what to do about a damaged
    file and about one of another program or later version. *migrate* brings a file of an older version up to date,
    inside the transaction that sets the version. *oldest* is 0 if early files had no version.
    """

    what: str
    tables: str
    version: int
    if_damaged: str
    if_foreign: str
    application: int = 0
    oldest: int = 1
    migrate: Callable[[sqlite3.Connection, Path], None] | None = None


class StateFile:
    """An open SQLite file. Any thread may use it; one at a time is served. Use as ``with``, or close it."""

    def __init__(self, path: Path, schema: Schema, *, create: bool = True) -> None:
        """Open *path*; with *create*, a missing file is created with mode 0600 (its folder with mode 0700).

        Raise StateDirectoryError if it cannot be opened, is damaged, or belongs to another program or a later version.
        """
        self.path = path
        self._schema = schema
        self._lock = threading.RLock()
        try:
            if create:
                path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            flags = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | (os.O_CREAT if create else 0)
            os.close(os.open(path, flags, 0o600))
            # Few, because SQLite keeps the parameters of cached statements, which may be large.
            self._db = sqlite3.connect(
                path, BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False, cached_statements=8
            )
            self._db.row_factory = sqlite3.Row
            try:
                self._prepare(create=create)
            except (StateDirectoryError, sqlite3.Error):
                self._db.close()
                raise
        except (OSError, sqlite3.Error) as exc:
            raise self._unusable(exc) from exc

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file. Committed transactions are durable already."""
        with self._lock:
            self._db.close()

    @contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """Yield the connection for queries."""
        try:
            with self._lock:
                yield self._db
        except sqlite3.Error as exc:
            raise self._unusable(exc) from exc

    @contextmanager
    def snapshot(self) -> Iterator[sqlite3.Connection]:
        """Yield the connection inside a transaction: all queries see one state of the file."""
        with self.reading() as db:
            db.execute("BEGIN")
            with db:
                yield db

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """Write everything inside durably, or nothing of it."""
        with self.reading() as db:
            db.execute("BEGIN IMMEDIATE")
            with db:  # commits, or rolls back after an error
                yield db

    def empty_journal(self) -> None:
        """Move the journal into the file and empty it: it may hold what was deleted."""
        with self.reading() as db:
            db.execute("PRAGMA wal_checkpoint(TRUNCATE)")

    def damaged(self, how: str) -> StateDirectoryError:
        """Return the error for a file whose content is wrong."""
        return StateDirectoryError(f"{self._schema.what} in {self.path} is damaged ({how}); {self._schema.if_damaged}")

    def _prepare(self, *, create: bool) -> None:
        if self._has_tables():
            self._require_own()  # before anything is changed
        elif not create:
            raise self.damaged("empty")
        for pragma in (f"page_size={PAGE_BYTES}", "journal_mode=WAL", "synchronous=FULL"):
            self._db.execute(f"PRAGMA {pragma}")
        self._db.execute("PRAGMA secure_delete=ON")  # deleted content is overwritten with zeros
        if self._pragma("user_version") == self._schema.version:
            return
        with self.transaction() as db:
            if not self._has_tables():
                for statement in self._schema.tables.split(";\n"):
                    db.execute(statement)
                db.execute(f"PRAGMA application_id={self._schema.application}")
            elif self._pragma("user_version") < self._schema.version and self._schema.migrate is not None:
                self._schema.migrate(db, self.path.parent)
            db.execute(f"PRAGMA user_version={self._schema.version}")

    def _has_tables(self) -> bool:
        return bool(self._db.execute("SELECT count(*) FROM sqlite_schema").fetchone()[0])

    def _require_own(self) -> None:
        version = self._pragma("user_version")
        if version < self._schema.oldest or self._pragma("application_id") != self._schema.application:
            raise StateDirectoryError(f"{self.path} is a database of another program; {self._schema.if_foreign}")
        if version > self._schema.version:
            raise StateDirectoryError(
                f"{self.path} was written by a later version of this program (format {version}, this one reads up to "
                f"{self._schema.version}); use that version, or {self._schema.if_foreign}"
            )

    def _pragma(self, name: str) -> int:
        return int(self._db.execute(f"PRAGMA {name}").fetchone()[0])

    def _unusable(self, exc: Exception) -> StateDirectoryError:
        if type(exc) is sqlite3.DatabaseError:
            return self.damaged(str(exc))
        return StateDirectoryError(
            f"{self._schema.what} in {self.path} cannot be used ({exc}); free space or fix the permissions, then run again."
        )

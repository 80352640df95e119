"""A small database for first steps: a shop with a support desk, tables without rows."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

from error_handler import ConfigurationError, StateDirectoryError
from storage.files import replace_file

# Written into the file (sqlite.org/fileformat.html, offset 68): other databases are never replaced.
APPLICATION_ID = 0x7472_6961
SAMPLE_SCHEMA = Path(__file__).parent.parent / "schema_examples/support_database.sql"


def make_sample_database(path: Path) -> None:
    """Make the SQLite file *path* with the tables of ``schema_examples/support_database.sql``.

    An older sample is replaced in one step; no other file is.

    Raises:
        ConfigurationError: *path* cannot be written, or is another file.
    """
    try:
        _refuse_other_files(path)
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with closing(sqlite3.connect(":memory:")) as database:
            database.executescript(f"PRAGMA application_id = {APPLICATION_ID};\n{SAMPLE_SCHEMA.read_text('utf-8')}")
            replace_file(path, database.serialize())
    except (OSError, StateDirectoryError) as exc:
        raise ConfigurationError(
            f"the sample database {path} cannot be written ({type(exc).__name__}); free space or fix the permissions."
        ) from exc


def _refuse_other_files(path: Path) -> None:
    if not path.exists() or path.stat().st_size == 0:
        return
    with open(path, "rb") as file:
        header = file.read(72)
    if header[:16] != b"SQLite format 3\0" or int.from_bytes(header[68:72], "big") != APPLICATION_ID:
        raise ConfigurationError(f"{path} exists and is not the sample database; move it away, then run again.")

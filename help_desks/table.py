"""A temporary SQLite table: it groups the rows of one conversation, wherever they are in the file."""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from error_handler import ConfigurationError

# Spreadsheets show long numbers as 1.23457E+17; many ids become one.
ROUNDED = re.compile(r"\d(?:[.,]\d+)?e\+\d+", re.IGNORECASE)


@contextmanager
def temporary_table(path: Path) -> Iterator[sqlite3.Connection]:
    """Open a table ``entries``, which SQLite keeps in an unnamed file and deletes on close; *path* is for errors."""
    try:
        # Several threads may read pages, but never two at the same time.
        with closing(sqlite3.connect("", check_same_thread=False)) as table:
            table.execute("CREATE TABLE entries (place INTEGER PRIMARY KEY, name TEXT, parent TEXT, inbound, entry)")
            yield table
    except UnicodeEncodeError as exc:
        raise ConfigurationError(
            f"{path}: an id contains half of a surrogate pair (\\ud800 to \\udfff), which cannot be stored; correct it."
        ) from exc
    except sqlite3.Error as exc:
        raise ConfigurationError(
            f"{path} cannot be grouped in the temporary folder ({exc}); free space, or set TMPDIR to a larger disk."
        ) from exc

"""State that survives a restart: files on disk, and their rows, the batches and all counts in SQLite."""

import json
import sqlite3
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_TABLES = """
CREATE TABLE IF NOT EXISTS objects(kind TEXT, seq INTEGER, id TEXT PRIMARY KEY, body TEXT);
CREATE INDEX IF NOT EXISTS objects_order ON objects(kind, seq);
CREATE TABLE IF NOT EXISTS meters(kind TEXT, key TEXT, submitted INTEGER, billed INTEGER, PRIMARY KEY(kind, key));
CREATE TABLE IF NOT EXISTS counters(name TEXT PRIMARY KEY, n REAL);
"""
_METER = """
INSERT INTO meters VALUES(?, ?, ?, ?)
ON CONFLICT(kind, key) DO UPDATE SET submitted = submitted + excluded.submitted, billed = billed + excluded.billed
"""


class Store:
    """State of one fake in *directory*; a killed process loses nothing that was answered."""

    def __init__(self, directory: Path) -> None:
        self.files = directory / "files"
        self.files.mkdir(parents=True, exist_ok=True)
        # A killed process leaves its pages with the kernel: only a power cut would need the waiting for the disk.
        self._database = sqlite3.connect(directory / "state.sqlite", isolation_level=None)
        self._database.executescript("PRAGMA journal_mode=WAL; PRAGMA synchronous=OFF;" + _TABLES)
        self.counters: Counter[str] = Counter(dict(self._database.execute("SELECT name, n FROM counters")))
        self._saved = dict(self.counters)
        self.objects: dict[str, dict[str, dict[str, Any]]] = {"file": {}, "batch": {}}
        for kind, body in self._database.execute("SELECT kind, body FROM objects ORDER BY seq"):
            row = json.loads(body)
            self.objects[kind][row["id"]] = row

    def path(self, file_id: str) -> Path:
        """Return the path of the bytes of a file."""
        return self.files / file_id

    def save(self, kind: str, row: dict[str, Any]) -> None:
        """Keep a file's or a batch's row; ``row["seq"]`` orders it."""
        self.objects[kind][row["id"]] = row
        self._database.execute(
            "INSERT OR REPLACE INTO objects VALUES(?, ?, ?, ?)", (kind, row["seq"], row["id"], json.dumps(row))
        )

    def next_seq(self, kind: str) -> int:
        """Number of the next object of its kind, from 0; never used twice."""
        self.counters[f"seq:{kind}"] += 1
        self.save_counters()
        return int(self.counters[f"seq:{kind}"]) - 1

    def save_counters(self) -> None:
        """Write the counters that changed."""
        changed = [(name, n) for name, n in self.counters.items() if self._saved.get(name) != n]
        if changed:
            self._database.executemany("INSERT OR REPLACE INTO counters VALUES(?, ?)", changed)
            self._saved.update(changed)

    @contextmanager
    def together(self) -> Iterator[None]:
        """All that is written inside is there after a kill, or nothing of it."""
        self._database.execute("BEGIN")
        yield
        self._database.execute("COMMIT")

    def meter(self, kind: str, keys: Iterable[str], *, submitted: int = 0, billed: int = 0) -> None:
        """Count each of *keys* once more as submitted or billed."""
        rows = ((kind, key, submitted, billed) for key in keys)
        if self._database.in_transaction:
            self._database.executemany(_METER, rows)
        else:
            with self.together():
                self._database.executemany(_METER, rows)

    def meters(self, kind: str) -> dict[str, dict[str, int]]:
        """``{key: {"submitted", "billed"}}``."""
        rows = self._database.execute("SELECT key, submitted, billed FROM meters WHERE kind = ?", (kind,))
        return {key: {"submitted": submitted, "billed": billed} for key, submitted, billed in rows}

    def meter_totals(self, kind: str) -> tuple[int, int, int]:
        """Sum of submitted, sum of billed, and the most that one key was billed."""
        sums = self._database.execute(
            "SELECT coalesce(sum(submitted), 0), coalesce(sum(billed), 0), coalesce(max(billed), 0)"
            " FROM meters WHERE kind = ?",
            (kind,),
        )
        submitted, billed, most = sums.fetchone()
        return submitted, billed, most

    def clear(self) -> None:
        """As on the first day; counters are the same object as before."""
        for table in ("objects", "meters", "counters"):
            self._database.execute(f"DELETE FROM {table}")
        self.counters.clear()
        self._saved.clear()
        for rows in self.objects.values():
            rows.clear()
        for path in self.files.iterdir():
            path.unlink()

    def close(self) -> None:
        """Save and close."""
        self.save_counters()
        self._database.close()

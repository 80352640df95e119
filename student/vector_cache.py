"""The vectors of conversations on disk: MiniLM reads about 60 conversations a second, so each is embedded once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

import numpy as np

from storage.state_file import Schema, StateFile
from student.features import FEATURES, KIND, Numbers

SCHEMA = Schema(
    what="the vectors of the student",
    tables="CREATE TABLE vectors (input_sha256 BLOB, kind TEXT, vector BLOB, PRIMARY KEY (input_sha256, kind)) WITHOUT ROWID",
    version=1,
    if_damaged="remove the file: the next training computes them again",
    if_foreign="remove it",
    application=0x53565631,
)
KEYS_PER_QUERY = 500


class VectorCache:
    """The features of conversations by ``transcript_sha256``, half precision. Use as ``with``; any thread may use it."""

    def __init__(self, path: Path) -> None:
        """Open *path*; a missing file is created. Raises StateDirectoryError."""
        self._file = StateFile(path, SCHEMA)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def find(self, hashes: Sequence[str]) -> dict[str, Numbers]:
        """Return the features of those *hashes* that are known."""
        found: dict[str, Numbers] = {}
        with self._file.reading() as db:
            for start in range(0, len(hashes), KEYS_PER_QUERY):
                keys = [bytes.fromhex(one) for one in hashes[start : start + KEYS_PER_QUERY]]
                marks = ", ".join("?" * len(keys))
                query = f"SELECT input_sha256, vector FROM vectors WHERE kind = ? AND input_sha256 IN ({marks})"  # noqa: S608 - only question marks
                for key, blob in db.execute(query, (KIND, *keys)):
                    vector = np.frombuffer(blob, np.float16)
                    if len(vector) == FEATURES:
                        found[key.hex()] = vector.astype(np.float32)
        return found

    def add(self, vectors: Mapping[str, Numbers]) -> None:
        """Store *vectors* durably, by hash."""
        rows = [(bytes.fromhex(key), KIND, vector.astype(np.float16).tobytes()) for key, vector in vectors.items()]
        with self._file.transaction() as db:
            db.executemany("INSERT OR REPLACE INTO vectors VALUES (?, ?, ?)", rows)

    def keep_only(self, hashes: Sequence[str]) -> None:
        """Remove every other vector: conversations that are gone leave no trace, and the file stays small."""
        with self._file.transaction() as db:
            db.execute("CREATE TEMP TABLE kept (input_sha256 BLOB PRIMARY KEY)")
            db.executemany("INSERT OR IGNORE INTO kept VALUES (?)", ((bytes.fromhex(one),) for one in hashes))
            db.execute("DELETE FROM vectors WHERE kind != ? OR input_sha256 NOT IN (SELECT * FROM kept)", (KIND,))
            db.execute("DROP TABLE kept")
        self._file.empty_journal()

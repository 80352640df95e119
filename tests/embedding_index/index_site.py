"""The place where crash tests run ``cli.py index``: a database, conversations, the fake OpenAI, an empty INDEX_DIR.

The judge (`IndexSite.check`) knows from the sources alone what must be in the index, and reads the files of the index by
other means than the product.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import sqlite3
import tempfile
import time
from collections.abc import Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from pymongo.database import Database

from config.settings import known_environment_names
from database_docs.items import content_hash
from embedding_index.providers.contract import ModelIdentity
from storage.extended_json import canonical
from tests.embedding_index.index_entries import Searcher
from tests.fakes.fake_openai import FakeOpenAI
from tests.forked_process import OF_THE_INDEX, ForkedProcess
from tests.in_process import run_cli

ROOT = Path(__file__).parents[2]
MODEL = "text-embedding-3-small"
CONCURRENCY, BATCH_SIZE, WRITE_AT = 2, 3, 4
PRELOADED = (*OF_THE_INDEX, "tests.crash.faulty_job")
FILES = {".lock", "index.sqlite3", "vectors.sqlite3", "vectors.copy.sqlite3"}
LABELS = {"intent": "Order Status", "topic": "Shipping/Delivery", "sentiment": "Negative", "categorization": "Late."}
END_TIMEOUT_S = 100.0


@dataclass(frozen=True)
class Ended:
    """The end of a process: its exit code (negative: the signal) and its output."""

    code: int
    out: str
    err: str


@dataclass
class IndexSite:
    """One INDEX_DIR and its two sources; *flags* choose the source of all commands."""

    folder: Path
    fake: FakeOpenAI
    uri: str
    mongo: Database[dict[str, Any]]
    flags: tuple[str, ...] = ()
    settings: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        (self.folder / "tmp").mkdir()

    @property
    def identity(self) -> ModelIdentity:
        """The provider that makes the vectors."""
        return ModelIdentity("openai", self.settings.get("EMBEDDING_MODEL", MODEL))

    @property
    def index(self) -> Path:
        """INDEX_DIR."""
        return self.folder / "index"

    @property
    def database(self) -> Path:
        """The file of DATABASE_URL."""
        return self.folder / "app.sqlite3"

    def environment(self, **settings: str) -> dict[str, str]:
        """Return the environment of a process: nothing of the developer's own settings gets in."""
        own = {name: value for name, value in os.environ.items() if name not in known_environment_names()}
        return {
            **own,
            "EMBEDDING_PROVIDER": "openai",
            "OPENAI_BASE_URL": self.fake.url,
            "OPENAI_API_KEY": "sk-canary-0123456789",
            "EMBEDDING_BATCH_SIZE": str(BATCH_SIZE),
            "EMBEDDING_CONCURRENCY": str(CONCURRENCY),
            "INDEX_DIR": str(self.index),
            "DATABASE_URL": f"sqlite:///{self.database}",
            "MONGODB_URI": self.uri,
            "MONGODB_DB": self.mongo.name,
            "TMPDIR": str(self.folder / "tmp"),
            "PYTHONPATH": str(ROOT),
            **self.settings,
            **settings,
        }

    def start(self, *flags: str, plan: Mapping[str, Any] | None = None, **settings: str) -> ForkedProcess:
        """Start ``cli.py index``; with *plan* that of ``tests/crash/faulty_index.py``."""
        program = (
            [str(ROOT / "cli.py")] if plan is None else [str(ROOT / "tests/crash/faulty_index.py"), json.dumps(plan)]
        )
        console = self.folder / "console"
        console.mkdir(exist_ok=True)
        files = (console / f"{time.monotonic_ns()}.out", console / f"{time.monotonic_ns()}.err")
        command = [*program, "index", *flags, *self.flags]
        return ForkedProcess(command, self.environment(**settings), self.folder, files, preload=PRELOADED)

    def run(self, *flags: str, plan: Mapping[str, Any] | None = None, **settings: str) -> Ended:
        """Run it to its end: in this process, or with *plan* in one that can be killed."""
        if plan is None:
            return Ended(*run_cli(["index", *flags, *self.flags], self.environment(**settings), self.folder))
        with self.start(*flags, plan=plan, **settings) as process:
            out, err = process.communicate(END_TIMEOUT_S)
            return Ended(process.wait(), out, err)

    def run_well(self, *flags: str) -> dict[str, Any]:
        """Run it to a good end; return its report."""
        ended = self.run(*(flags or ("--batch",)), "--json")
        assert ended.code == 0, ended.err
        report: dict[str, Any] = json.loads(ended.out)
        return report

    # Sources

    def make_database(self, tables: int) -> None:
        """Recreate the database with *tables* tables; each but the first has a foreign key to the one before it."""
        self.database.unlink(missing_ok=True)
        with closing(sqlite3.connect(self.database)) as database, database:
            for number in range(tables):
                key = f", before_id INTEGER REFERENCES t{number - 1:03d}(id)" if number else ""
                database.execute(f"CREATE TABLE t{number:03d} (id INTEGER PRIMARY KEY, note_{number} TEXT{key})")

    def add_conversations(self, numbers: Iterable[int]) -> None:
        """Insert classified conversations of different texts, or replace them."""
        for number in numbers:
            self.say(number, said(number))

    def say(self, number: int, text: str) -> None:
        """Let conversation *number* consist of *text*."""
        document = {"_id": number, "messages": [{"sender": "customer", "text": text}], "status": "processed"}
        result = {"source_conversation_id": number, "classification": LABELS}
        self.mongo["conversation_set"].replace_one({"_id": number}, document, upsert=True)
        self.mongo["sentimental_analysis"].replace_one({"source_conversation_id": number}, result, upsert=True)

    def remove_conversations(self, numbers: Iterable[int]) -> None:
        """Delete them and their results."""
        for number in numbers:
            self.mongo["conversation_set"].delete_one({"_id": number})
            self.mongo["sentimental_analysis"].delete_one({"source_conversation_id": number})

    def conversations(self) -> dict[str, str]:
        """Return what must be in the index: ids of items and their texts."""
        found = self.mongo["conversation_set"].find()
        return {f"conversation:{canonical(each['_id'])}": each["messages"][0]["text"] for each in found}

    def database_ids(self) -> set[str]:
        """Return what must be in the index: ids of tables and relationships."""
        with closing(sqlite3.connect(self.database)) as database:
            names = [name for (name,) in database.execute("SELECT name FROM sqlite_schema ORDER BY name")]
        tables = {f"table:{name}" for name in names}
        return tables | {
            f"relationship:{name}(before_id) -> {before}(id)" for before, name in itertools.pairwise(names)
        }

    def files_with(self, content: bytes) -> list[str]:
        """Return the names of the files below INDEX_DIR that contain *content*, used or not."""
        paths = sorted(path for path in self.index.rglob("*") if path.is_file())
        return [path.name for path in paths if content in path.read_bytes()]

    # What was paid

    def billed(self) -> dict[str, int]:
        """Return how often each text was paid for, by its hash."""
        self.fake.wait_for("sync_in_flight", equals=0)
        return {key: counts["billed"] for key, counts in self.fake.embedded().items() if counts["billed"]}

    def stored(self) -> set[str]:
        """Return the hashes of all texts with a stored vector."""
        if not (self.index / "vectors.sqlite3").exists():
            return set()
        return {row["hash"].hex() for row in self.rows("vectors.sqlite3", "SELECT hash FROM vectors")}

    def hashes(self) -> set[str]:
        """Return the hashes of the texts of all items."""
        return {row["hash"].hex() for row in self.rows("index.sqlite3", "SELECT hash FROM items")}

    def rows(self, name: str, query: str) -> list[sqlite3.Row]:
        """Ask one of the files of the index; nothing of it changes."""
        with tempfile.TemporaryDirectory() as folder:
            for path in self.index.glob(f"{name}*"):  # its journal, too: a mere reader would leave files beside it
                shutil.copy(path, folder)
            with closing(sqlite3.connect(Path(folder, name))) as database:
                database.row_factory = sqlite3.Row
                try:
                    return database.execute(query).fetchall()
                except sqlite3.OperationalError as exc:
                    if "no such table" in str(exc):  # killed before it was made
                        return []
                    raise

    # The judge

    def check(self, expected: set[str] | None = None) -> None:
        """Everything of the sources, and nothing else, is indexed, stored and found; nothing is left behind."""
        if expected is None:
            expected = set(self.conversations()) if self.flags else self.database_ids()
        hashes = self._check_states(expected)
        vectors = self._check_ledger(hashes)
        self._check_search(hashes, vectors)
        assert {path.name for path in self.index.iterdir()} == FILES
        assert list((self.folder / "tmp").iterdir()) == []
        assert self.fake.stats()["internal_errors"] == 0

    def _check_states(self, expected: set[str]) -> dict[str, str]:
        items = self.rows("index.sqlite3", "SELECT * FROM items")
        assert {f"{item['kind']}:{item['name']}" for item in items} == expected
        assert {(item["state"], item["is_outdated"], item["problem"]) for item in items} == {("indexed", 0, None)}
        hashes = {f"{item['kind']}:{item['name']}": item["hash"].hex() for item in items}
        texts = self.rows("index.sqlite3", "SELECT kind, name, text FROM documentation")
        said_now = {f"{row['kind']}:{row['name']}": row["text"] for row in texts} | self.conversations()
        assert {id_: content_hash(said_now[id_]) for id_ in hashes} == hashes
        return hashes

    def _check_ledger(self, hashes: Mapping[str, str]) -> dict[str, np.ndarray[Any, np.dtype[np.float32]]]:
        for name in ("index.sqlite3", "vectors.sqlite3"):
            assert [tuple(row) for row in self.rows(name, "PRAGMA integrity_check")] == [("ok",)]
        rows = self.rows(
            "vectors.sqlite3",
            "SELECT hash, vector FROM vectors JOIN models ON models.id = vectors.model "
            f"WHERE models.model = '{self.identity.model}'",
        )
        vectors = {row["hash"].hex(): np.frombuffer(row["vector"], "<f4") for row in rows}
        assert set(hashes.values()) <= vectors.keys()
        if self.flags:
            assert set(hashes.values()) == vectors.keys(), "a text that nobody has any more is still stored"
        return vectors

    def _check_search(self, hashes: Mapping[str, str], vectors: Mapping[str, Any]) -> None:
        searcher = Searcher(self.index)
        for id_, key in hashes.items():
            hits = searcher.hits(vectors[key], limit=len(hashes) + 1)
            assert len(hits) == len(hashes)
            assert (f"{hits[0].kind}:{hits[0].name}", hits[0].similarity > 0.9999) == (id_, True)
        searcher.close()


def said(number: int) -> str:
    """The text of the customer in conversation *number*."""
    return f"Case {number:04d}: my parcel with number {number * 7919} is late"

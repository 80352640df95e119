"""The place where tests run ``cli.py index``: a database, a folder, an environment, and real processes that work on them."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pymongo.database import Database

from config.settings import known_environment_names
from tests.fakes.fake_openai import FakeOpenAI
from tests.forked_process import OF_THE_INDEX, Ended, ForkedProcess
from tests.in_process import run_cli
from tests.service.service_process import conversation
from tests.terminal import Terminal

ROOT = Path(__file__).parents[2]
END_S = 90.0
KEY = "sk-canary-0123456789"
CALLS = "requests:embeddings.create"

SHOP = (
    "CREATE TABLE customers (id INTEGER PRIMARY KEY, mail TEXT NOT NULL)",
    "CREATE TABLE orders (id INTEGER PRIMARY KEY, customer_id INTEGER NOT NULL REFERENCES customers(id))",
    "CREATE TABLE refunds (id INTEGER PRIMARY KEY, order_id INTEGER REFERENCES orders(id), amount INTEGER)",
    "CREATE TABLE shipments (id INTEGER PRIMARY KEY, order_id INTEGER REFERENCES orders(id), carrier TEXT)",
)
TABLES, RELATIONSHIPS = 4, 3


class IndexSite:
    """*environment* may be changed between two commands; the provider is OpenAI, at *fake*."""

    def __init__(self, folder: Path, fake: FakeOpenAI) -> None:
        self.folder, self.fake = folder, fake
        self.database, self.index = folder / "shop.db", folder / "index"
        other = known_environment_names() | {"COLUMNS", "LINES"}
        own = {name: value for name, value in os.environ.items() if name not in other}
        self.environment = own | {
            "PYTHONPATH": str(ROOT),
            "OPENBLAS_NUM_THREADS": "1",
            "EMBEDDING_PROVIDER": "openai",
            "OPENAI_API_KEY": KEY,
            "OPENAI_BASE_URL": fake.url,
            "DATABASE_URL": f"sqlite:///{self.database}",
            "INDEX_DIR": str(self.index),
        }
        self.change(*SHOP)

    def change(self, *statements: str) -> None:
        """Execute *statements* in the database."""
        with contextlib.closing(sqlite3.connect(self.database)) as database, database:
            for statement in statements:
                database.execute(statement)

    def states(self) -> dict[str, int]:
        """Return how many items are in each state."""
        with contextlib.closing(sqlite3.connect(self.index / "index.sqlite3")) as database:
            return dict(database.execute("SELECT state, count(*) FROM items GROUP BY state"))

    def texts(self) -> list[str]:
        """Return the texts of all tables and relationships, as they are embedded."""
        with contextlib.closing(sqlite3.connect(self.index / "index.sqlite3")) as database:
            return [text for (text,) in database.execute("SELECT text FROM documentation")]

    def vectors(self) -> int:
        """Return how many vectors are stored."""
        with contextlib.closing(sqlite3.connect(self.index / "vectors.sqlite3")) as ledger:
            return int(ledger.execute("SELECT count(*) FROM vectors").fetchone()[0])

    def files(self) -> bytes:
        """Return the content of all files of the index."""
        return b"".join(path.read_bytes() for path in self.index.rglob("*") if path.is_file())

    @property
    def calls(self) -> int:
        """The number of calls to the provider."""
        return int(self.fake.stats().get(CALLS, 0))

    @contextmanager
    def started(self, *flags: str, **changes: str) -> Iterator[ForkedProcess]:
        """Start ``cli.py index``; what is left of it is killed at the end."""
        files = tuple(self.folder / f"{time.monotonic_ns()}.{name}" for name in ("out", "err"))
        with ForkedProcess(
            self._command(flags), self.environment | changes, self.folder, files, preload=OF_THE_INDEX
        ) as process:
            yield process

    def run(self, *flags: str, **changes: str) -> Ended:
        """Run ``cli.py index`` in this process; *changes* are additional variables."""
        return Ended(*run_cli(["index", *flags], self.environment | changes, self.folder))

    def on_terminal(self, *flags: str, answer: str | None = None, columns: int = 80, **changes: str) -> Ended:
        """Run it on a terminal; *answer* is typed when a question appears."""
        environment = self.environment | {"TERM": "xterm"} | changes
        answers = [] if answer is None else [("[y/N]", answer)]
        with (
            Terminal(columns) as terminal,
            ForkedProcess(
                self._command(flags),
                environment,
                self.folder,
                None,
                streams=[terminal.inner] * 3,
                preload=OF_THE_INDEX,
            ) as process,
        ):
            shown = terminal.shown_until_end_of(process, answers)
            return Ended(process.wait(END_S), shown, "")

    def _command(self, flags: Sequence[str]) -> list[str]:
        return [str(ROOT / "cli.py"), "index", *flags]


def until(met: Callable[[], bool], what: str) -> None:
    """Wait until *met* holds; the state of another process has no event here."""
    end = time.monotonic() + END_S
    while not met():
        assert time.monotonic() < end, what
        time.sleep(0.02)


def add_conversation(database: Database[Any], name: str, text: str, intent: str = "Other") -> None:
    """Insert a conversation with its classification."""
    labels = {"intent": intent, "topic": "Other", "sentiment": "Negative", "categorization": f"About {name}."}
    database["conversation_set"].insert_one({"_id": name, **conversation(text, number=name)})
    made = {"processed_at": datetime(2026, 11, 21, 10, tzinfo=UTC), "model_used": "llama3.2"}
    database["sentimental_analysis"].insert_one(
        {"source_conversation_id": name, "classification": labels, "processing_metadata": made}
    )

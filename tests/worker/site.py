"""Starts ``cli.py`` as a real process, fills its collection, and judges what it left behind.

The judge computes from the source documents alone what must be stored: which documents have a result,
which labels it holds (the fake model's answers are a function of the prompt), and which status.
"""

from __future__ import annotations

import json
import os
import re
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import bson
from bson.raw_bson import RawBSONDocument
from pymongo import MongoClient
from pymongo.database import Database

from aggregator import aggregate_conversation
from config import load_taxonomy
from config.settings import known_environment_names
from error_handler import SkippedDocumentError
from prompt_builder import chat_messages
from storage import extended_json
from tests.fakes.fake_ollama import FakeOllama, expected_labels, text_sha256
from tests.forked_process import Ended, ForkedProcess
from tests.in_process import run_cli

ROOT = Path(__file__).parents[2]
FAULTY_WORKER = ROOT / "tests/crash/faulty_worker.py"
END_TIMEOUT_S = 60.0
POLL_S = 0.02

# Waits of a test, not of production; everything else is as shipped.
FAST = {
    "OLLAMA_MODEL": "llama3.2",
    "LLM_BACKOFF_S": "0.05",
    "MONGODB_BACKOFF_S": "0.2",
    "MONGODB_TIMEOUT_MS": "5000",
    "MAX_CONCURRENT": "6",
    "BATCH_SIZE": "20",
    "LLM_TIMEOUT_S": "20",
}

Document = dict[str, Any]


class WorkerProcess:
    """A running worker in a separate process group; ``with`` kills it at the end."""

    def __init__(self, command: list[str], environment: dict[str, str], folder: Path, **popen: Any) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._out, self._err = folder / f"{time.monotonic_ns()}.out", folder / f"{time.monotonic_ns()}.err"
        self.process: subprocess.Popen[bytes] | ForkedProcess
        if command[1].endswith(".py") and not popen:
            self.process = ForkedProcess(command[1:], environment, folder, (self._out, self._err))
            return
        with self._out.open("wb") as out, self._err.open("wb") as err:
            self.process = subprocess.Popen(
                command,
                env=environment,
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                start_new_session=True,
                **popen,
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def send(self, number: signal.Signals) -> None:
        """Send a signal to the worker alone."""
        self.process.send_signal(number)

    def ended(self, timeout_s: float = END_TIMEOUT_S) -> Ended:
        """Wait for its end; fails with what it printed when it takes longer than *timeout_s*."""
        try:
            code = self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"the worker still runs after {timeout_s} s: {self.err_so_far()}") from None
        return Ended(code, self._out.read_text(errors="replace"), self._err.read_text(errors="replace"))

    def err_so_far(self) -> str:
        """Return what it wrote to stderr until now."""
        return self._err.read_text(errors="replace")

    def await_text(self, text: str, timeout_s: float = 60.0) -> None:
        """Return as soon as *text* is on stderr."""
        until(lambda: text in self.err_so_far() or self.process.poll() is not None, timeout_s)
        assert text in self.err_so_far(), self.err_so_far()


@dataclass
class Site:
    """The place where a worker runs: a database, a model server, a state directory, and settings."""

    uri: str
    database: Database[Document]
    model: FakeOllama | None
    folder: Path
    settings: dict[str, str] = field(default_factory=lambda: dict(FAST))
    directory_name: str = "batch_files"

    @property
    def directory(self) -> Path:
        """The state directory of the worker."""
        return self.folder / self.directory_name

    def environment(self, **settings: str) -> dict[str, str]:
        """Return the environment of a worker here: nothing of the developer's own settings gets in."""
        clean = {name: value for name, value in os.environ.items() if name not in known_environment_names()}
        address = {"OLLAMA_ENDPOINT": self.model.url} if self.model else {}
        place = {"MONGODB_URI": self.uri, "MONGODB_DB": self.database.name, "BATCH_FILES_DIR": str(self.directory)}
        return clean | place | address | self.settings | settings

    def start(self, *flags: str, plan: dict[str, Any] | None = None, **settings: str) -> WorkerProcess:
        """Start a worker; with *plan* it is the one of ``tests/crash/faulty_worker.py``."""
        program = [str(ROOT / "cli.py")] if plan is None else [str(FAULTY_WORKER), json.dumps(plan)]
        return WorkerProcess([sys.executable, *program, *flags], self.environment(**settings), self.folder / "console")

    def run(self, *flags: str, plan: dict[str, Any] | None = None, **settings: str) -> Ended:
        """Run it to its end: in this process, or with *plan* in one that can be killed."""
        if plan is None:
            return Ended(*run_cli(flags, self.environment(**settings), self.folder))
        with self.start(*flags, plan=plan, **settings) as worker:
            return worker.ended()

    @property
    def source(self) -> Any:
        """The collection of source documents."""
        return self.database.get_collection("conversation_set")

    @property
    def results(self) -> Any:
        """The collection of results."""
        return self.database.get_collection("sentimental_analysis")

    def sibling(self, directory_name: str) -> Site:
        """Return the same site with another state directory, for a second worker."""
        return Site(self.uri, self.database, self.model, self.folder, dict(self.settings), directory_name)

    def files(self, pattern: str = "**/*") -> list[Path]:
        """Return the files of the state directory that match *pattern*, sorted."""
        return sorted(path for path in self.directory.glob(pattern) if path.is_file())

    def entries(self, kind: str) -> list[Document]:
        """Return the entries of all files of ``retry`` or ``quarantine``."""
        return [entry for path in self.files(f"{kind}/*.json") for entry in extended_json.loads(path.read_bytes())]


@contextmanager
def open_site(uri: str, db_name: str, model: FakeOllama | None, folder: Path) -> Iterator[Site]:
    """Yield a Site whose client is closed at the end."""
    with MongoClient[Document](uri, tz_aware=True, serverSelectionTimeoutMS=20_000) as client:
        yield Site(uri, client[db_name], model, folder)


BROKEN = bson.Binary(b"123")


def store_raw(collection: Any, document: Document) -> None:
    """Store *document* with its binary values, of three digits each, in the old subtype and without its inner length.

    MongoDB stores this, and no driver reads it.
    """
    raw = re.sub(rb"\x03\0\0\0\0(?=\d23)", b"\x03\0\0\0\x02", bson.encode(document))
    collection.insert_one(RawBSONDocument(raw))


def requests(site: Site) -> int:
    """Return how many requests the model has got."""
    assert site.model is not None
    return int(site.model.stats()["chat_requests"])


def until(condition: Callable[[], object], timeout_s: float = 60.0) -> None:
    """Return as soon as *condition* holds; fail after *timeout_s*."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(POLL_S)


def conversation(number: int, text: str = "my parcel is three weeks late and nobody answers", **extra: Any) -> Document:
    """Return a pending conversation whose text begins with ``Case <number>``."""
    messages = [
        {"sender": "customer", "text": f"Case {number:05d}: {text}"},
        {"sender": "agent", "text": "We are sorry!"},
    ]
    return {"_id": number, "conversation_number": str(number), "messages": messages, "status": "pending", **extra}


def documents_of_all_shapes(count: int) -> list[Document]:
    """Return *count* documents, ids from 0: messages, tweets and single queries in turn; each 13th has nothing to classify."""
    documents: list[Document] = []
    for number in range(count):
        text = f"Case {number:05d}: the app says my order does not exist"
        if number % 13 == 7:
            documents.append(conversation(number, messages=[{"sender": "agent", "text": "Anything else?"}]))
        elif number % 3 == 0:
            documents.append(conversation(number))
        elif number % 3 == 1:
            tweets = [{"tweet_id": 1, "author_id": "a", "inbound": True, "text": text}]
            documents.append({"_id": number, "conversation_number": str(number), "tweets": tweets, "status": "pending"})
        else:
            documents.append(
                {"_id": number, "text": text, "metadata": {}, "processed": False, "processing_attempts": 0}
            )
    return documents


def filled(site: Site, count: int, first: int = 0) -> list[Document]:
    """Store *count* conversations, numbered from *first*, and return them."""
    documents = [conversation(number) for number in range(first, first + count)]
    site.source.insert_many(documents)
    return documents


def filled_with_all_shapes(site: Site, count: int) -> list[Document]:
    """Store *count* documents of all shapes, and return them."""
    documents = documents_of_all_shapes(count)
    site.source.insert_many(documents)
    return documents


def model_of(site: Site) -> FakeOllama:
    """Return the fake model server of *site*, which has one."""
    assert site.model is not None
    return site.model


def user_message(document: Document) -> str | None:
    """Return the user message the model gets for *document*; None where there is nothing to ask."""
    try:
        return chat_messages("", aggregate_conversation(document).transcript)[-1]["content"]
    except SkippedDocumentError:
        return None


def sha(document: Document) -> str:
    """Return the key of *document* in the fake's ``calls_by_sha``."""
    message = user_message(document)
    assert message is not None
    return text_sha256(message)


def key(document_id: Any) -> bytes:
    """Return a key of a value of any type: equal keys mean equal BSON."""
    return extended_json.id_key(document_id)


def check_results(site: Site, documents: Iterable[Document]) -> None:
    """Assert that exactly the *documents* have a result each, of their id's type, with their own labels."""
    wanted = {key(document["_id"]): document for document in documents}
    results = list(site.results.find())
    found = [key(result["source_conversation_id"]) for result in results]
    assert len(found) == len(set(found)), "a document has two results"
    lost, foreign = wanted.keys() - set(found), set(found) - wanted.keys()
    assert not lost, f"lost: {[wanted[name]['_id'] for name in lost]}"
    assert not foreign, f"never asked for: {foreign}"
    taxonomy = load_taxonomy()
    enums = [taxonomy.names(name) for name in ("intent", "topic", "sentiment")]
    for result in results:
        message = user_message(wanted[key(result["source_conversation_id"])])
        assert message is not None
        assert result["classification"] == expected_labels(message, *enums), result["source_conversation_id"]


def foreign_fields(document: Document) -> Document:
    """Return the fields of *document* that the worker must leave alone."""
    ours = {"status", "last_processed_at", "status_reason", "processed", "processing_attempts"}
    return {name: value for name, value in document.items() if name not in ours}


def check_statuses(site: Site, documents: Iterable[Document], failed: Iterable[Any] = ()) -> None:
    """Assert that each of *documents* says how it ended, and that nothing else in it has changed."""
    failures = {key(document_id) for document_id in failed}
    stored = {key(document["_id"]): document for document in site.source.find()}
    for before in documents:
        after = stored[key(before["_id"])]
        assert key(foreign_fields(after)) == key(foreign_fields(before)), after["_id"]
        is_query = "processed" in before
        wanted = (
            "failed" if key(before["_id"]) in failures else "skipped" if user_message(before) is None else "processed"
        )
        if is_query:
            assert after["processed"] is (wanted != "failed"), after["_id"]
            assert after["processing_attempts"] >= 1
            assert "status" not in after
        else:
            assert after["status"] == wanted, after["_id"]
            assert after["last_processed_at"] is not None
        assert bool(after.get("status_reason")) is (wanted != "processed"), after["_id"]


def check_directory(site: Site, *, clean: bool = True) -> None:
    """Assert that each local file can be read and is private; with *clean*, that nothing is left in work."""
    for path in site.files():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path
        assert not clean or not path.name.endswith(".tmp"), path  # a kill leaves one that the next start removes
        if path.suffix == ".json":
            extended_json.loads(path.read_bytes())
    if clean:
        assert [path.name for path in site.files("pending/*")] == []
        assert [path.name for path in site.files("retry/*")] == []


def check_exactly_once(site: Site, documents: list[Document]) -> None:
    """Assert the whole guarantee for a run in which nothing failed for good."""
    check_results(site, [document for document in documents if user_message(document) is not None])
    check_statuses(site, documents)
    check_directory(site)


def calls(site: Site, document: Document) -> int:
    """Return how often the model was asked for *document*."""
    assert site.model is not None
    return int(site.model.stats()["calls_by_sha"].get(sha(document), 0))


def check_calls(site: Site, documents: list[Document], *, repeated: int) -> None:
    """Assert that no more than *repeated* calls were made beyond one for each document and fault served."""
    assert site.model is not None
    stats = site.model.stats()
    asked = [document for document in documents if user_message(document) is not None]
    assert all(sha(document) in stats["calls_by_sha"] for document in asked)
    allowed = len(asked) + sum(stats["faults_served"].values()) + repeated
    assert stats["chat_requests"] <= allowed, f"{stats['chat_requests']} calls, {allowed} allowed"
    assert stats["internal_errors"] == 0

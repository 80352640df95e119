"""Files that the version before the move into packages left behind are picked up: nothing is lost, asked or paid for twice.

previous_version/README.md describes the files and how they were made. The folder is beside this file; the variable
PREVIOUS_VERSION names another place.
"""

from __future__ import annotations

import gzip
import importlib.util
import json
import os
import shutil
import sqlite3
import subprocess
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from bson.binary import Binary
from pymongo import MongoClient
from pymongo.database import Database

# All names of the product and of its tests, so that they can be changed in one place.
from cli import main
from config.index_settings import load_index_settings
from config.openai_settings import load_openai_settings
from config.service_settings import load_service_settings
from config.settings import known_environment_names, load_settings
from embedding_index.vector_ledger import VectorLedger
from embedding_index.vector_search import VectorSearch
from storage.extended_json import canonical, loads
from tests.cases import mostly_thorough
from tests.fakes.fake_ollama import FakeOllama
from tests.fakes.fake_openai import FakeOpenAI
from tests.in_process import run_script
from tests.worker.site import (
    ROOT,
    Site,
    check_directory,
    check_exactly_once,
    check_results,
    check_statuses,
    open_site,
    sha,
    user_message,
)

Document = dict[str, Any]

_BESIDE = Path(__file__).with_name("previous_version")
RECORDED = Path(os.environ.get("PREVIOUS_VERSION") or (_BESIDE if _BESIDE.is_dir() else _BESIDE.parent))
DATABASE = "previous_version"  # checkpoint, ledger and the name of the job's folder name it
CONCURRENCY = 4  # of the worker that was killed
LEASE_S = 300
FILES_OF_AN_INDEX = {".lock", "index.sqlite3", "vectors.sqlite3", "vectors.copy.sqlite3"}

needs_index = pytest.mark.skipif(
    importlib.util.find_spec("bpe_openai") is None, reason="requirements-index.txt is not installed"
)


# Restoring


def recorded(name: str) -> Any:
    """Return the content of a recorded JSON file."""
    return json.loads((RECORDED / name).read_bytes())


def restore_files(name: str, target: Path) -> None:
    """Copy the recorded folder *name*, unpacked, readable by its owner only, as the old version left it."""
    shutil.copytree(RECORDED / name, target)
    for packed in list(target.rglob("*.gz")):
        packed.with_suffix("").write_bytes(gzip.decompress(packed.read_bytes()))
        packed.unlink()
    for path in [target, *target.rglob("*")]:
        path.chmod(0o700 if path.is_dir() else 0o600)


def restore_collections(database: Database[Document], folder: str = ".") -> None:
    """Restore the dumps of *folder*; each collection gets its UUID, by which the worker knows its own checkpoint."""
    for file, facts in recorded(f"{folder}/collections.json")["files"].items():
        create = {
            "op": "c",
            "ns": f"{database.name}.$cmd",
            "ui": Binary(UUID(facts["uuid"]).bytes, 4),
            "o": {"create": facts["collection"], "idIndex": {"v": 2, "key": {"_id": 1}, "name": "_id_"}},
        }
        database.client.admin.command({"applyOps": [create]})
        documents = [loads(line) for line in (RECORDED / folder / file).read_bytes().splitlines()]
        database[facts["collection"]].insert_many(documents)


@pytest.fixture
def database(mongodb_uri: str) -> Iterator[Database[Document]]:
    """Return the database of the recorded name, empty; it is dropped afterwards."""
    with MongoClient[Document](mongodb_uri, tz_aware=True) as client:
        client.drop_database(DATABASE)
        yield client[DATABASE]
        client.drop_database(DATABASE)


# The worker


@pytest.fixture
def killed(database: Database[Document], mongodb_uri: str, model: FakeOllama, tmp_path: Path) -> Iterator[Site]:
    """Return the place where the old worker was killed a moment ago: its leases have not ended."""
    restore_collections(database)
    leases = database["conversation_set_leases"]
    assert leases.count_documents({}) > 0
    in_future = [{"$set": {"expires_at": {"$add": ["$$NOW", LEASE_S * 1000]}}}]
    leases.update_many({}, in_future)
    with open_site(mongodb_uri, DATABASE, model, tmp_path) as site:
        restore_files("state", site.directory)
        yield site


def documents_of(site: Site) -> dict[str, Document]:
    """Return all source documents by their ids as canonical Extended JSON."""
    return {canonical(document["_id"]): document for document in site.source.find()}


def calls_to_come(documents: Mapping[str, Document], facts: Mapping[str, Any]) -> dict[str, int]:
    """Return the calls that are left, by the text that is asked about: one for each that no document has an answer to."""
    answered = {sha(documents[name]) for name in (*facts["with_result"], *facts["answered_in_journal"])}
    asked = [
        document
        for name, document in documents.items()
        if name not in facts["quarantine"] and user_message(document) is not None
    ]
    return {text: 1 for text in map(sha, asked) if text not in answered}


def test_a_killed_worker_is_gone_on_with(killed: Site, model: FakeOllama) -> None:
    """One result for each document; the model is asked for what has no answer; what was quarantined stays there."""
    facts, documents = recorded("facts.json"), documents_of(killed)
    quarantined = [documents[name] for name in facts["quarantine"]]
    stored = {canonical(result["_id"]): result for result in killed.results.find()}
    job_id = loads((killed.directory / "checkpoint.json").read_bytes())["job_id"]

    ended = killed.run()
    assert ended.code == 1, ended.err  # something is in quarantine

    others = [document for document in documents.values() if document not in quarantined]
    check_results(killed, [document for document in others if user_message(document) is not None])
    check_statuses(killed, documents.values(), failed=[document["_id"] for document in quarantined])
    check_directory(killed)
    after = {canonical(result["_id"]): result for result in killed.results.find()}
    assert {name: after[name] for name in stored} == stored, "a stored result was made again"
    assert {result["processing_metadata"]["batch_job_id"] for result in after.values()} == {job_id}
    assert [entry["conversation_id"] for entry in killed.entries("quarantine")] == [doc["_id"] for doc in quarantined]
    assert killed.database["conversation_set_leases"].count_documents({}) == 0
    check_files_of_a_finished_run(killed, job_id)

    calls = model.stats()["calls_by_sha"]
    assert calls == calls_to_come(documents, facts)
    failed_before = {sha(documents[name]) for name in (*facts["retry"], *facts["failed_in_journal"])}
    repeated = calls.keys() & facts["calls"].keys() - failed_before
    assert repeated <= {sha(documents[name]) for name in facts["in_flight"]}  # one was killed before its call went out
    assert len(repeated) <= CONCURRENCY

    ended = killed.run()
    assert (ended.code, model.stats()["calls_by_sha"]) == (1, calls), "a finished run asked again"


def check_files_of_a_finished_run(site: Site, job_id: str) -> None:
    """Assert that the run of before, and no new one, came to its end."""
    checkpoint = loads((site.directory / "checkpoint.json").read_bytes())
    assert (checkpoint["job_id"], checkpoint["finished"]) == (job_id, True)
    assert not list(site.directory.glob("asked_before.sqlite*"))
    assert not list(site.directory.rglob("*.corrupt"))
    completed = [loads(path.read_bytes()) for path in site.files("completed/*.json")]
    ids = [canonical(value) for each in completed for value in each["conversation_ids"]]
    assert sorted(ids) == sorted(documents_of(site))
    progress = json.loads((site.directory / f"progress/{job_id}.json").read_bytes())
    assert (progress["job_id"], progress["status"]) == (job_id, "completed")


def test_what_a_killed_worker_quarantined_comes_back(killed: Site, model: FakeOllama) -> None:
    """``quarantine list`` reads the old file, ``replay`` moves the document, and the next run has its result."""
    facts, documents = recorded("facts.json"), documents_of(killed)
    listed = killed.run("quarantine", "list", "--json")
    assert listed.code == 0, listed.err
    for name in facts["quarantine"]:
        assert json.dumps(documents[name]["_id"]) in listed.out
    replayed = killed.run("quarantine", "replay", "--all")
    assert replayed.code == 0, replayed.err
    ended = killed.run()
    assert ended.code == 0, ended.err
    check_exactly_once(killed, list(documents.values()))
    quarantined = {sha(documents[name]): 1 for name in facts["quarantine"]}
    assert model.stats()["calls_by_sha"] == calls_to_come(documents, facts) | quarantined


# The document job


@pytest.fixture
def openai_folder(tmp_path: Path) -> Path:
    """Return the state of the fake OpenAI: its files, and the batches that the old job made."""
    restore_files("openai_job/openai", tmp_path / "openai")
    return tmp_path / "openai"


def test_a_submitted_job_is_collected(
    database: Database[Document], mongodb_uri: str, openai_folder: Path, tmp_path: Path
) -> None:
    """No second batch, no second upload: the one that the ledger does not know yet is found by its metadata."""
    facts = recorded("openai_job/facts.json")
    restore_collections(database, "openai_job")
    restore_files("openai_job/batch_files", tmp_path / "batch_files")
    shutil.copy(RECORDED / "openai_job/schema.py", tmp_path)
    (tmp_path / "schema.py").chmod(0o600)
    count = database["items"].count_documents({"ai_status": "in_progress"})
    assert count == facts["lines_submitted"] == database["items"].count_documents({})
    with FakeOpenAI(directory=openai_folder, polls_until_done=1) as fake:
        before = fake.stats()
        settings = {
            "OPENAI_API_KEY": "sk-any",
            "OPENAI_BASE_URL": fake.url,
            "MONGODB_URI": mongodb_uri,
            "MONGODB_DB": DATABASE,
            "MONGODB_SOURCE_COLLECTION": "items",
            "BATCH_FILES_DIR": str(tmp_path / "batch_files"),
            "POLL_INTERVAL": "0.05",
        }
        done = cli(settings, tmp_path, "openai-batch", "run", "--schema", "schema.py", "--json")
        assert done.returncode == 0, done.stderr
        stats = fake.stats()
        made = ("batches_created", "files_uploaded", "lines_submitted")
        assert {name: stats[name] for name in made} == {name: facts[name] for name in made}
        assert stats["requests:batches.create"] == before["requests:batches.create"]
        assert (stats["lines_billed"], stats["max_billed_per_body"]) == (count, 1)
        assert [row["id"] for row in fake.files() if not row.get("deleted")] == []
        batches = {batch["id"] for batch in fake.batches()}
        assert stats["internal_errors"] == 0
    for document in database["items"].find():
        assert document["ai_status"] == "completed"
        assert document["event_response"]["talking_points"]
        assert document["processing_info"]["attempts"] == 1
        assert document["processing_info"]["batch_id"] in batches
    [ledger] = (tmp_path / "batch_files").glob("openai_batch/*/ledger.sqlite")  # no folder of another name beside it
    assert {path.name for path in ledger.parent.iterdir()} <= {".lock", "ledger.sqlite"}
    with closing(sqlite3.connect(ledger)) as rows:
        assert rows.execute("SELECT DISTINCT state FROM shards").fetchall() == [("cleaned",)]
        assert rows.execute("SELECT state, COUNT(*) FROM items GROUP BY state").fetchall() == [("ok", count)]


# The index


@contextmanager
def restored_index(tmp_path: Path) -> Iterator[tuple[Path, FakeOpenAI]]:
    """Yield the restored INDEX_DIR, and the provider that made its vectors."""
    restore_files("index", tmp_path / "index")
    with FakeOpenAI(dimensions=recorded_dimensions()) as fake:
        yield tmp_path / "index", fake
        assert fake.stats()["internal_errors"] == 0


def recorded_dimensions() -> int:
    """Return the length of the recorded vectors."""
    return int(recorded("index/generation")["identity"]["dimensions"])


def calls(fake: FakeOpenAI) -> int:
    """Return how often the provider was asked for vectors."""
    return int(fake.stats().get("requests:embeddings.create", 0))


def items_of(index: Path) -> list[tuple[str, str, bytes]]:
    """Return kind, name and vector of all items, read by other means than the product."""
    with closing(sqlite3.connect(index / "vectors.sqlite3")) as ledger:
        vectors = dict(ledger.execute("SELECT hash, vector FROM vectors"))
    with closing(sqlite3.connect(index / "index.sqlite3")) as states:
        rows = states.execute("SELECT kind, name, hash, state FROM items ORDER BY kind, name").fetchall()
    assert {state for *_, state in rows} == {"indexed"}
    return [(kind, name, vectors[text_hash]) for kind, name, text_hash, _ in rows]


@needs_index
def test_an_index_is_searched_without_a_call(tmp_path: Path) -> None:
    """Every item is found by its stored vector; a search from the command line asks for the vector of its question alone."""
    import numpy as np

    with restored_index(tmp_path) as (index, fake):
        items = items_of(index)
        assert {kind for kind, *_ in items} == {"table", "relationship", "conversation"}
        with VectorLedger(index / "vectors.sqlite3", create=False) as ledger, closing(VectorSearch(index)) as search:
            for kind, name, vector in items:
                # Some conversations say the same.
                hits = search.search(ledger, np.frombuffer(vector, "<f4"), kinds=None, limit=5)
                assert (kind, name) in [(str(hit.kind), hit.name) for hit in hits if hit.similarity > 0.9999]
        assert calls(fake) == 0
        with closing(sqlite3.connect(index / "index.sqlite3")) as states:
            kind, name, text = states.execute("SELECT kind, name, text FROM documentation ORDER BY name").fetchone()
        found = cli(index_settings(fake), tmp_path, "index", "--search", text, "--index-dir", "index", "--json")
        assert found.returncode == 0, found.stderr
        best = json.loads(found.stdout)[0]
        assert (best["kind"], best["name"], best["similarity"] > 0.9999) == (kind, name, True)
        assert calls(fake) == 1


@needs_index
@pytest.mark.parametrize("source", mostly_thorough(["database", "conversations"], 2, first=1))
def test_an_index_is_gone_on_with_without_a_call(
    source: str, database: Database[Document], mongodb_uri: str, tmp_path: Path
) -> None:
    """``--batch`` over the same sources finds nothing to send, to change or to remove."""
    restore_collections(database)
    flags = ("--sample",) if source == "database" else ("--source", "conversations")
    with restored_index(tmp_path) as (index, fake):
        before = items_of(index)
        place = {"MONGODB_URI": mongodb_uri, "MONGODB_DB": DATABASE}
        done = cli(index_settings(fake) | place, tmp_path, "index", "--batch", *flags, "--index-dir", "index", "--json")
        assert done.returncode == 0, done.stderr
        report = json.loads(done.stdout)
        wanted = dict.fromkeys(("indexed", "failed", "removed", "calls", "tokens"), 0)
        assert {name: report[name] for name in wanted} == wanted
        if source == "conversations":
            assert report["changed"] == 0
        assert report["all_runs"]["calls"] > 0
        assert calls(fake) == 0
        assert items_of(index) == before
        assert {path.name for path in index.iterdir()} == FILES_OF_AN_INDEX


def index_settings(fake: FakeOpenAI) -> dict[str, str]:
    """Return the settings of the recorded index."""
    return {"EMBEDDING_PROVIDER": "openai", "OPENAI_BASE_URL": fake.url, "OPENAI_API_KEY": "sk-any"}


def cli(settings: Mapping[str, str], folder: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    """Run ``cli.py`` in *folder* to its end; nothing of the developer's own settings gets in."""
    own = {name: value for name, value in os.environ.items() if name not in known_environment_names()}
    environment = {**own, **settings, "PYTHONPATH": str(ROOT)}
    return run_script(main, ROOT / "cli.py", flags, environment, folder)


# Settings


LOADERS: dict[str, Callable[[Path], Any]] = {
    "Settings": load_settings,
    "ServiceSettings": load_service_settings,
    "OpenAISettings": load_openai_settings,
    "IndexSettings": load_index_settings,
}


@pytest.mark.parametrize("file", mostly_thorough(["env", "env.example"], 2))
@pytest.mark.parametrize("name", LOADERS)
def test_an_old_env_file_gives_the_same_settings(name: str, file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """``env`` sets all variables, by their other names where there are some; ``env.example`` is what was shipped."""
    for variable in (*known_environment_names(), *recorded("env_values.json")["names"]):
        monkeypatch.delenv(variable, raising=False)
    settings = LOADERS[name](RECORDED / file)
    wanted = recorded("env_values.json")[file][name]
    assert {field: plain(getattr(settings, field)) for field in wanted} == wanted


def test_all_old_variables_are_known() -> None:
    """No name of a variable was lost, nor an other name of one."""
    assert set(recorded("env_values.json")["names"]) <= known_environment_names()


def plain(value: Any) -> Any:
    """Return a setting as the recorded values have it: secrets in clear, paths as texts."""
    if hasattr(value, "get_secret_value"):
        return value.get_secret_value()
    return str(value) if isinstance(value, Path) else value

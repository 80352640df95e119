"""MongoDB dies, comes back, refuses, or answers with an error: nothing is lost, and no answer is asked for twice."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from pymongo import MongoClient

from embedded.mongod import EmbeddedMongod
from embedded.replica_set import ReplicaSetMongod
from tests.fakes.fake_ollama import FakeOllama
from tests.worker.site import (
    Document,
    Site,
    calls,
    check_calls,
    check_directory,
    check_exactly_once,
    check_results,
    check_statuses,
    conversation,
    filled_with_all_shapes,
    open_site,
    until,
)

CONCURRENCY = 6
PASSWORD = "s3cret-Pa55"
TEST_COMMANDS = ("--setParameter", "enableTestCommands=1")


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedMongod]:
    """A mongod of this module alone, because it is killed, obeys fail points and has access control.

    Its users are ``owner``, and ``writer`` and ``reader`` of the database ``guarded``, which has ten conversations.
    """
    with EmbeddedMongod(tmp_path_factory.mktemp("guarded"), extra_arguments=["--auth", *TEST_COMMANDS]) as mongod:
        with MongoClient[Document](mongod.uri) as client:
            client.admin.command("createUser", "owner", pwd=PASSWORD, roles=["root"])
        with MongoClient[Document](uri_of(mongod, "owner", database="admin")) as client:
            for user, role in (("writer", "readWrite"), ("reader", "read")):
                client.guarded.command("createUser", user, pwd=PASSWORD, roles=[role])
            client.guarded.conversation_set.insert_many([conversation(number) for number in range(10)])
        yield mongod


def uri_of(server: EmbeddedMongod, user: str, password: str = PASSWORD, *, database: str = "guarded") -> str:
    return f"mongodb://{user}:{password}@127.0.0.1:{server.port}/?authSource={database}"


@pytest.fixture(scope="module", params=["standalone", pytest.param("replica set", marks=pytest.mark.thorough)])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedMongod]:
    """The mongod of this module, or one of a replica set, which then has no access control."""
    if request.param == "standalone":
        yield request.getfixturevalue("guarded")
        return
    with ReplicaSetMongod(tmp_path_factory.mktemp("mongod"), extra_arguments=TEST_COMMANDS) as mongod:
        yield mongod


@pytest.fixture
def place(server: EmbeddedMongod, model: FakeOllama, tmp_path: Path) -> Iterator[Site]:
    """A site on *server*; its database is dropped afterwards."""
    server.start()  # a test that failed may have left it down
    uri = server.uri if isinstance(server, ReplicaSetMongod) else uri_of(server, "owner", database="admin")
    # An error that says "shutting down" makes the driver look again at its next heartbeat, normally in 10 s.
    with open_site(f"{uri}&heartbeatFrequencyMS=500", tmp_path.name[:30], model, tmp_path) as site:
        yield site
        site.database.client.drop_database(site.database.name)


@contextmanager
def fail_point(site: Site, mode: Any, **data: Any) -> Iterator[None]:
    """Let commands of the worker fail as *data* says while inside."""
    admin = site.database.client.admin
    data = {**data, "appName": "customer-support-triad"}
    admin.command({"configureFailPoint": "failCommand", "mode": mode, "data": data})
    try:
        yield
    finally:
        served = admin.command({"configureFailPoint": "failCommand", "mode": "off"})["count"]
    assert served > 0, "the fail point struck nothing"


@pytest.mark.slow
def test_mongod_is_killed_and_comes_back(place: Site, server: EmbeddedMongod, tmp_path: Path) -> None:
    """The run waits for it and ends complete; no answer is asked for again."""
    documents = filled_with_all_shapes(place, 60)
    with place.start("--output", str(tmp_path / "run.json"), MONGODB_TIMEOUT_MS="20000") as worker:
        until(lambda: place.results.count_documents({}) > 20)
        server.kill()
        server.start()
        ended = worker.ended()
    assert ended.code == 0, ended.err
    check_exactly_once(place, documents)
    check_calls(place, documents, repeated=0)


@pytest.mark.thorough
def test_mongod_stays_away(place: Site, server: EmbeddedMongod) -> None:
    """Exit code 3; the answers that could not be stored are kept, and the next run stores them without asking."""
    documents = filled_with_all_shapes(place, 200)
    concurrency = 16  # many answers wait for one write: more than the tenth that may fail for other reasons
    place.settings["MAX_CONCURRENT"] = str(concurrency)
    assert place.model is not None
    place.model.configure(slots=concurrency)
    with place.start(MONGODB_TIMEOUT_MS="300", MONGODB_BACKOFF_S="0.05") as worker:
        until(lambda: place.results.count_documents({}) > 50)
        server.kill()
        ended = worker.ended()
    assert ended.code == 3, ended.err
    assert "MongoDB" in ended.err.splitlines()[-1]
    check_directory(place, clean=False)
    server.start()
    ended = place.run()
    assert ended.code == 0, ended.err
    check_exactly_once(place, documents)
    check_calls(place, documents, repeated=concurrency)


PASSING: list[dict[str, Any]] = [
    {"failCommands": ["insert"], "closeConnection": True},
    {"failCommands": ["update"], "closeConnection": True},
    {"failCommands": ["find"], "closeConnection": True},
    {"failCommands": ["insert"], "errorCode": 91},
    {"failCommands": ["update"], "errorCode": 11600},
    {"failCommands": ["find"], "errorCode": 91},
    {"failCommands": ["insert"], "writeConcernError": {"code": 91, "errmsg": "shutdown"}},
    {"failCommands": ["update"], "writeConcernError": {"code": 64, "errmsg": "timeout"}},
    {"failCommands": ["delete", "aggregate", "createIndexes"], "errorCode": 11602},
]


def passing_faults() -> Iterator[Any]:
    """Return each fault with each kind of server. The driver itself repeats most of them on a replica set."""
    for place, data in enumerate(PASSING):
        name = f"{'+'.join(data['failCommands'])}-{list(data)[1]}"
        for kind, usual in (("standalone", (2, 6)), ("replica set", ())):
            marks = () if place in usual else pytest.mark.thorough
            yield pytest.param(kind, data, id=f"{kind}-{name}", marks=marks)


@pytest.mark.parametrize(("server", "data"), list(passing_faults()), indirect=["server"])
def test_a_passing_fault(place: Site, data: dict[str, Any]) -> None:
    """Two failures in a row of the same command are repeated within the call."""
    documents = filled_with_all_shapes(place, 20)
    if data["failCommands"] == ["update"]:  # not those of the window that workers agree on, which a run can do without
        data = data | {"namespace": f"{place.database.name}.conversation_set"}
    with fail_point(place, {"times": 2}, **data):
        ended = place.run()
    assert ended.code == 0, ended.err
    if "writeConcernError" in data and "replicaSet" not in place.uri:  # the driver repeats the others, and says nothing
        assert "attempt 1 failed" in ended.err
    check_exactly_once(place, documents)
    check_calls(place, documents, repeated=0)


def test_results_cannot_be_written_for_a_while(place: Site) -> None:
    """The run stops with exit code 3; answers wait on disk, and are stored without asking when writing works again."""
    documents = filled_with_all_shapes(place, 20)
    namespace = f"{place.database.name}.sentimental_analysis"
    place.results.create_index("source_conversation_id", unique=True)
    with fail_point(place, "alwaysOn", failCommands=["insert"], errorCode=14031, namespace=namespace):
        ended = place.run(MONGODB_BACKOFF_S="0.01")
    assert ended.code == 3, ended.err
    assert place.results.count_documents({}) == 0
    ended = place.run()
    assert ended.code == 0, ended.err
    check_exactly_once(place, documents)
    check_calls(place, documents, repeated=CONCURRENCY)


def test_not_reachable_at_the_start(model: FakeOllama, tmp_path: Path) -> None:
    """Exit code 3, one sentence, and no password anywhere, not even in the traceback of --verbose."""
    address = f"mongodb://worker:{PASSWORD}@127.0.0.1:1/?authSource=admin"
    with open_site(address, "nowhere", model, tmp_path) as site:
        for flags in ([], ["--verbose", "--logs"]):
            ended = site.run(*flags, MONGODB_TIMEOUT_MS="200", MONGODB_BACKOFF_S="0.01")
            assert ended.code == 3, ended.err
            sentences = [line for line in ended.err.splitlines() if line.startswith("cli.py: ")]
            assert len(sentences) == 1, ended.err
            assert "MONGODB_URI" in sentences[0]
            assert PASSWORD not in ended.said
        assert site.files("pending/*") == []
    assert model.stats()["chat_requests"] == 0


@pytest.mark.parametrize(
    ("user", "password"),
    [pytest.param("writer", "wrong", marks=pytest.mark.thorough), ("reader", PASSWORD)],
    ids=["wrong password", "reader"],
)
def test_forbidden(guarded: EmbeddedMongod, model: FakeOllama, tmp_path: Path, user: str, password: str) -> None:
    """Exit code 3 and one sentence; no model call, no password."""
    guarded.start()
    with open_site(uri_of(guarded, user, password), "guarded", model, tmp_path) as site:
        ended = site.run("--logs")
    assert ended.code == 3, ended.err
    assert "refuses" in ended.err.splitlines()[-1]
    assert password not in ended.said
    assert model.stats()["chat_requests"] == 0


@pytest.mark.thorough
def test_the_right_to_read_and_write_is_enough(guarded: EmbeddedMongod, model: FakeOllama, tmp_path: Path) -> None:
    """A user with readWrite on the one database can run the worker."""
    guarded.start()
    with open_site(uri_of(guarded, "writer"), "guarded", model, tmp_path) as site:
        ended = site.run("--logs")
        assert ended.code == 0, ended.err
        check_exactly_once(site, [conversation(number) for number in range(10)])
    assert PASSWORD not in ended.said


def test_stored_duplicates_block_the_index(site: Site) -> None:
    """Exit code 2 with the query that finds them; when they are gone, the run goes through."""
    documents = filled_with_all_shapes(site, 10)
    site.results.insert_many([{"source_conversation_id": "old", "n": number} for number in range(2)])
    ended = site.run()
    assert ended.code == 2, ended.err
    assert "db.sentimental_analysis.aggregate([" in ended.err
    assert site.source.count_documents({"status": "processing"}) == 0
    site.results.delete_many({})
    ended = site.run()
    assert ended.code == 0, ended.err
    check_exactly_once(site, documents)


def test_an_index_with_other_options(site: Site) -> None:
    """The run creates a unique one beside it: it is never without protection from duplicates."""
    documents = filled_with_all_shapes(site, 10)
    site.results.create_index("source_conversation_id")
    ended = site.run()
    assert ended.code == 0, ended.err
    assert site.results.index_information()["source_conversation_id_unique"]["unique"]
    check_exactly_once(site, documents)


def test_results_that_are_there_already(site: Site, tmp_path: Path) -> None:
    """They are counted, the source gets its status, and the model is not asked."""
    documents = filled_with_all_shapes(site, 14)
    assert site.run().code == 0
    assert site.model is not None
    before = site.model.stats()["chat_requests"]
    site.source.update_many({"status": "processed"}, {"$set": {"status": "pending"}})
    site.source.update_many({"processed": True}, {"$set": {"processed": False}})
    ended = site.run("--output", str(tmp_path / "run.json"))
    assert ended.code == 0, ended.err
    run = json.loads((tmp_path / "run.json").read_text())
    results = site.results.count_documents({})
    assert run["already_done"] == results
    assert run["successful"] == 0
    assert site.model.stats()["chat_requests"] == before
    check_exactly_once(site, documents)


@pytest.mark.slow
@pytest.mark.parametrize("refusal", ["by a rule", pytest.param("too large", marks=pytest.mark.thorough)])
def test_a_result_that_mongodb_will_never_take(site: Site, refusal: str) -> None:
    """It goes to quarantine alone; the results that were in the same group are stored."""
    documents = [conversation(number) for number in range(12)]
    if refusal == "too large":
        documents[5]["attachment"] = b"x" * (16 * 1024 * 1024 - 600)
    else:
        site.database.create_collection("sentimental_analysis", validator={"source_conversation_id": {"$ne": 5}})
    site.source.insert_many(documents)
    ended = site.run(STORE_ORIGINAL_CONVERSATION="true")
    assert ended.code == 1, ended.err
    entries = site.entries("quarantine")
    assert [(entry["conversation_id"], entry["status"], entry["reason"]) for entry in entries] == [
        (5, "write_failed", "store_failed")
    ]
    assert calls(site, documents[5]) == 1
    check_results(site, [document for document in documents if document["_id"] != 5])
    check_statuses(site, documents, [5])

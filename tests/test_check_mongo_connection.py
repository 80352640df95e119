"""The diagnosis of real servers: standalone, replica set, with access control, and unreachable."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from bson import ObjectId
from pymongo import MongoClient
from pymongo.database import Database
from pymongo.errors import OperationFailure

from commands.diagnosis import mongo as mongo_diagnosis
from commands.diagnosis.findings import Finding
from commands.diagnosis.mongo import allowed_actions, diagnose
from config import load_settings
from embedded.mongod import EmbeddedMongod
from embedded.replica_set import ReplicaSetMongod
from mongo_client import DocumentStore
from tests.environment import clean_environment
from tests.forked_process import run_forked

ROOT = Path(__file__).parent.parent
PASSWORD = "p%40ss/w0rd".replace("/", "%2F")


async def findings(mongodb_uri: str, db_name: str = "customer_support", **settings: Any) -> list[Finding]:
    loaded = load_settings(dotenv=None, mongodb_uri=mongodb_uri, db_name=db_name, mongodb_max_retries=1, **settings)
    return [finding async for finding in diagnose(loaded)]


async def finding_with(words: str, mongodb_uri: str, db_name: str = "customer_support") -> Finding:
    """Return the one finding that has *words*."""
    found = await findings(mongodb_uri, db_name)
    (one,) = [finding for finding in found if words in finding.sentence] or [found]  # type: ignore[list-item]
    return one


# Reaching it


def run(mongodb_uri: str, *arguments: str, timeout_ms: int = 20_000) -> subprocess.CompletedProcess[str]:
    """Run the script in its own process, because a driver that gives up while connecting leaks a socket."""
    command = [ROOT / "check_mongo_connection.py", "--mongodb-uri", mongodb_uri, *arguments]
    return run_forked(command, clean_environment() | {"MONGODB_TIMEOUT_MS": str(timeout_ms)}, Path.cwd())


@pytest.mark.parametrize(
    ("host", "remedy"), [("127.0.0.1:1", "systemctl start mongod"), ("mongo.example.invalid:27017", "firewall")]
)
def test_unreachable_server_ends_the_diagnosis_with_a_remedy(host: str, remedy: str) -> None:
    done = run(f"mongodb://user:secret@{host}/", timeout_ms=300)
    assert done.returncode == 3
    error, shown, summary = done.stdout.splitlines()
    assert error.startswith(f"error    MongoDB does not answer (connect to {host}): ")
    assert remedy in shown
    assert summary == "Errors: 1, warnings: 0."
    assert "secret" not in done.stdout + done.stderr


def test_command_prints_every_finding_and_exits_with_0(mongodb_uri: str, db_name: str) -> None:
    done = run(mongodb_uri, "--db-name", db_name)
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert re.fullmatch(r"ok       MongoDB [0-9.]+ answers at 127\.0\.0\.1:[0-9]+\.", lines[0])
    assert f"warning  {db_name}.conversation_set is empty." in done.stdout
    assert "         -> Import documents with python -m utils.mongodb_import" in done.stdout
    assert lines[-1] == "Errors: 0, warnings: 2."


def test_invalid_setting_exits_with_2() -> None:
    done = run("localhost")
    assert done.returncode == 2
    assert "MONGODB_URI" in done.stderr


# What kind of server


async def test_standalone_server_is_explained(mongodb_uri: str) -> None:
    finding = await finding_with("standalone", mongodb_uri)
    assert finding.level == "ok"
    assert "no failover" in finding.sentence


@pytest.mark.thorough
async def test_replica_set_is_explained(tmp_path: Path) -> None:
    with ReplicaSetMongod(tmp_path) as server:
        finding = await finding_with("replica set", server.uri)
        assert finding.level == "ok"
        assert "(rs0, 1 member)" in finding.sentence
        with MongoClient[dict[str, Any]](server.uri) as client:
            # No other member can be elected, so it stays a secondary.
            client.admin.command("replSetStepDown", 60, force=True)
        secondary = f"mongodb://127.0.0.1:{server.port}/?directConnection=true&readPreference=secondaryPreferred"
        finding = await finding_with("takes no writes", secondary)
        assert finding.level == "error"
        assert "replicaSet" in finding.remedy
        server.kill()  # a secondary takes 15 s to shut down


# Rights


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedMongod]:
    """A server with access control and four users: root, reader, nobody, and worker with the minimal rights."""
    with EmbeddedMongod(tmp_path_factory.mktemp("guarded"), extra_arguments=["--auth"]) as server:
        with MongoClient[dict[str, Any]](server.uri) as client:
            client.admin.command("createUser", "root", pwd="p@ss/w0rd", roles=["root"])
        with MongoClient[dict[str, Any]](uri_of(server, "root")) as client:
            create = client.admin.command
            create("createUser", "reader", pwd="p@ss/w0rd", roles=[{"role": "read", "db": "customer_support"}])
            create("createUser", "nobody", pwd="p@ss/w0rd", roles=[])
            read_write = {"insert", "update", "find", "remove", "createIndex"}
            privileges = [
                {"resource": {"db": "customer_support", "collection": collection}, "actions": sorted(actions)}
                for collection, actions in {
                    "conversation_set": {"find", "update", "createIndex"},
                    "conversation_set_leases": read_write,
                    "sentimental_analysis": read_write,
                }.items()
            ]
            create("createRole", "worker", privileges=privileges, roles=[])
            create("createUser", "worker", pwd="p@ss/w0rd", roles=["worker"])
        yield server


def uri_of(server: EmbeddedMongod, user: str) -> str:
    return f"mongodb://{user}:{PASSWORD}@127.0.0.1:{server.port}/?authSource=admin"


@pytest.mark.parametrize("user", ["root", "worker"])
async def test_sufficient_rights_are_ok(guarded: EmbeddedMongod, user: str) -> None:
    finding = await finding_with("The user may read the source", uri_of(guarded, user))
    assert finding.level == "ok"
    assert "error" not in {finding.level for finding in await findings(uri_of(guarded, user))}


@pytest.mark.parametrize("user", ["root", "worker"])
async def test_required_rights_are_those_of_a_run(guarded: EmbeddedMongod, user: str) -> None:
    """The store works with the rights that the diagnosis accepts."""
    store = DocumentStore(load_settings(dotenv=None, mongodb_uri=uri_of(guarded, user)))
    try:
        await store.check()
        await store.ensure_source_indexes()
        await store.ensure_result_indexes()
        await store.claim([1])
        await store.mark_processing([1])
        await store.write_results([{"source_conversation_id": 1}])
        await store.write_results([{"source_conversation_id": 1}], replace=True)
        await store.release([1])
    finally:
        await store.close()


async def test_missing_rights_are_listed(guarded: EmbeddedMongod) -> None:
    found = [finding for finding in await findings(uri_of(guarded, "reader")) if finding.level == "error"]
    assert [finding.sentence for finding in found] == [
        "The user lacks createIndex, update on customer_support.conversation_set.",
        "The user lacks createIndex, insert, update on customer_support.sentimental_analysis.",
        "The user lacks createIndex, insert, remove, update on customer_support.conversation_set_leases.",
    ]
    assert "readWrite" in found[0].remedy
    with MongoClient[dict[str, Any]](uri_of(guarded, "reader")) as client, pytest.raises(OperationFailure):
        client.customer_support.sentimental_analysis.insert_one({})


async def test_user_without_any_rights_is_an_error(guarded: EmbeddedMongod) -> None:
    found = await findings(uri_of(guarded, "nobody"))
    refused = [finding for finding in found if finding.level == "error"]
    assert refused
    assert all("refuses this user" in finding.sentence for finding in refused)


@pytest.mark.parametrize("uri", ["mongodb://root:wrong@{}/?authSource=admin", "mongodb://root:p%40ss%2Fw0rd@{}/other"])
async def test_wrong_password_or_auth_database_is_an_error(guarded: EmbeddedMongod, uri: str) -> None:
    (only,) = await findings(uri.format(f"127.0.0.1:{guarded.port}"))
    assert only.level == "error"
    assert "refuses this user" in only.sentence
    assert "authSource=admin" in only.remedy


async def test_missing_access_control_is_reported(mongodb_uri: str) -> None:
    finding = await finding_with("No access control", mongodb_uri)
    assert finding.level == "ok"


def test_wildcard_privileges_count() -> None:
    privileges = [
        {"resource": {"db": "shop", "collection": ""}, "actions": ["find"]},
        {"resource": {"db": "", "collection": "orders"}, "actions": ["insert"]},
        {"resource": {"anyResource": True}, "actions": ["remove"]},
        {"resource": {"cluster": True}, "actions": ["shutdown"]},
        {"resource": {"db": "other", "collection": "orders"}, "actions": ["update"]},
    ]
    assert allowed_actions(privileges, "shop", "orders") == {"find", "insert", "remove"}


# Documents, results and indexes


async def test_documents_are_counted_by_shape_and_state(
    mongodb_uri: str, db_name: str, database: Database[dict[str, Any]]
) -> None:
    database.conversation_set.insert_many(
        [
            {"tweets": [], "status": "pending"},
            {"tweets": []},
            {"tweets": [], "status": "processed"},
            {"messages": [], "status": None},
            {"messages": [], "status": "processing"},
            {"messages": [], "status": "done"},
            {"text": "a"},
            {"text": "a", "processed": True},
            {"text": "a", "processed": False, "status_reason": "timeout"},
            {"text": "a", "processed": True, "status_reason": "skipped_no_text"},
            {"body": "a"},
        ]
    )
    found = {
        finding.sentence.removeprefix(f"{db_name}.conversation_set, "): finding
        for finding in await findings(mongodb_uri, db_name)
    }
    assert "shape tweets: 2 pending, 1 processed." in found
    assert "shape messages: 1 done, 1 pending, 1 processing." in found
    assert "shape query: 1 failed, 1 pending, 1 processed, 1 skipped." in found
    assert found["of no accepted shape: 1 pending."].level == "warning"
    (foreign,) = [finding for sentence, finding in found.items() if "unrecognised status" in sentence]
    assert foreign.level == "warning"
    assert foreign.sentence.endswith(": done (1).")
    (elsewhere,) = [finding for sentence, finding in found.items() if "marked processed" in sentence]
    assert (elsewhere.level, elsewhere.sentence[:1]) == ("warning", "2")
    assert any("died" in sentence for sentence in found)


async def test_age_of_the_oldest_pending_document_comes_from_its_id(
    mongodb_uri: str, db_name: str, database: Database[dict[str, Any]]
) -> None:
    now = datetime.now(UTC)
    old, older = (ObjectId.from_datetime(now - timedelta(days=days, hours=1)) for days in (3, 30))
    database.conversation_set.insert_many(
        [{"_id": old, "tweets": []}, {"_id": older, "tweets": [], "status": "processed"}, {"_id": "a", "tweets": []}]
    )
    finding = await finding_with("oldest pending", mongodb_uri, db_name)
    assert str(old) in finding.sentence
    assert finding.sentence.endswith("3 days ago.")


async def test_pending_documents_without_a_time_in_their_id(
    mongodb_uri: str, db_name: str, database: Database[dict[str, Any]]
) -> None:
    assert await finding_with("Nothing is pending", mongodb_uri, db_name)
    database.conversation_set.insert_one({"_id": "chat-7", "tweets": []})
    assert "chat-7" in (await finding_with("first pending document", mongodb_uri, db_name)).sentence


@pytest.mark.parametrize(
    "made_up",
    [
        "000000000000000000000001",  # 1970
        "1234567890abcdef12345678",  # 1979
        "ffffffffffffffffffffffff",  # 2106
        "65f000000000000000000007",  # counted up by a script
    ],
)
async def test_object_ids_that_were_not_made_by_date_tell_no_age(
    made_up: str, mongodb_uri: str, db_name: str, database: Database[dict[str, Any]]
) -> None:
    database.conversation_set.insert_one({"_id": ObjectId(made_up), "tweets": []})
    assert "contains no time" in (await finding_with("first pending document", mongodb_uri, db_name)).sentence


async def test_missing_indexes_are_listed_and_the_store_creates_them(mongodb_uri: str, db_name: str) -> None:
    finding = await finding_with("Indexes are missing", mongodb_uri, db_name)
    assert finding.level == "warning"
    assert "sentimental_analysis.source_conversation_id (unique)" in finding.sentence
    assert "conversation_set.status" in finding.sentence
    store = DocumentStore(load_settings(dotenv=None, mongodb_uri=mongodb_uri, db_name=db_name))
    try:
        await store.ensure_source_indexes()
        await store.ensure_result_indexes()
    finally:
        await store.close()
    assert (await finding_with("All indexes exist", mongodb_uri, db_name)).level == "ok"


async def test_several_results_of_one_document_are_an_error(
    mongodb_uri: str, db_name: str, database: Database[dict[str, Any]]
) -> None:
    database.sentimental_analysis.insert_many([{"source_conversation_id": 1}, {"source_conversation_id": 1}])
    finding = await finding_with("several results", mongodb_uri, db_name)
    assert finding.level == "error"
    assert "db.sentimental_analysis.aggregate(" in finding.remedy


async def test_non_unique_index_is_a_warning(
    mongodb_uri: str, db_name: str, database: Database[dict[str, Any]]
) -> None:
    database.sentimental_analysis.create_index("source_conversation_id")
    finding = await finding_with("not unique", mongodb_uri, db_name)
    assert finding.level == "warning"
    database.sentimental_analysis.drop_index([("source_conversation_id", 1)])  # what the remedy says
    assert "not unique" not in str(await findings(mongodb_uri, db_name))


async def test_diagnosis_changes_nothing(mongodb_uri: str, db_name: str, database: Database[dict[str, Any]]) -> None:
    database.conversation_set.insert_one({"_id": 1, "tweets": []})
    await findings(mongodb_uri, db_name)
    assert list(database.conversation_set.find()) == [{"_id": 1, "tweets": []}]
    assert database.list_collection_names() == ["conversation_set"]


@pytest.mark.thorough
async def test_slow_check_is_a_warning(
    mongodb_uri: str, db_name: str, database: Database[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    database.conversation_set.insert_many([{"tweets": []} for _ in range(10)])
    # Limited to 2 s, because MongoDB does not stop a function and other tests use the same mongod.
    body = "function() { const end = Date.now() + 2000; while (Date.now() < end) {} }"
    slow = [{"$match": {"$expr": {"$function": {"body": body, "args": [], "lang": "js"}}}}]
    monkeypatch.setattr(mongo_diagnosis, "count_stages", lambda _: slow)
    found = await findings(mongodb_uri, db_name, mongodb_timeout_ms=500)
    (warning,) = [finding for finding in found if "count the documents" in finding.sentence]
    assert warning.level == "warning"
    assert "MONGODB_TIMEOUT_MS" in warning.remedy
    assert found[-1].sentence.startswith("The local clock"), "the checks after it ran"

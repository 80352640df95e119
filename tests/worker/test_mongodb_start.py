"""The start of a run on MongoDB servers that are slow, strict with rights, or not quite MongoDB."""

from __future__ import annotations

import copy
import itertools
import os
import re
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import yaml
from pymongo import AsyncMongoClient, MongoClient
from pymongo.errors import OperationFailure

from batch_processor import BASELINE_PLAN, BatchProcessor, built_in_classify
from commands.diagnosis.mongo import diagnose
from config import load_settings, load_taxonomy
from embedded.baseline import BaselineClassifier
from embedded.mongod import EmbeddedMongod
from error_handler import ConfigurationError, StoreForbiddenError
from mongo_client import DocumentStore
from storage.extended_json import canonical
from storage.service_lease import COLLECTION, lease_renewal, renew_lease
from tests.cases import mostly_thorough
from tests.fakes.fake_ollama import FakeOllama
from tests.in_process import run_cli, run_script
from tests.review.review_site import result
from tests.service.service_process import NO_MODEL, Answer, serve
from tests.worker.site import ROOT, conversation, open_site, until
from utils import mongodb_import
from utils.batch_file_manager import is_same_source
from worker import left_out

Client = MongoClient[dict[str, Any]]
DB_NAME = "customer_support"  # as in the role of docs/operations.md


@pytest.fixture(scope="module")
def strict(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedMongod]:
    """A mongod with access control and fail points; its root user is ``root``, password ``r``."""
    arguments = ["--auth", "--setParameter", "enableTestCommands=1"]
    with EmbeddedMongod(tmp_path_factory.mktemp("strict"), extra_arguments=arguments) as server:
        with Client(server.uri) as client:
            client.admin.command("createUser", "root", pwd="r", roles=["root"])
        yield server


@pytest.fixture
def client(strict: EmbeddedMongod) -> Iterator[Client]:
    """The root user's client, on a database with three conversations."""
    with Client(uri_of(strict, "root", "r")) as opened:
        opened.drop_database(DB_NAME)
        opened[DB_NAME].conversation_set.insert_many([conversation(number) for number in range(3)])
        yield opened


def uri_of(server: EmbeddedMongod, user: str, password: str) -> str:
    return f"mongodb://{user}:{password}@127.0.0.1:{server.port}/?authSource=admin"


def documented_role(name: str) -> dict[str, Any]:
    """Return the role *name* as docs/operations.md shows it."""
    text = (ROOT / "docs/operations.md").read_text(encoding="utf-8")
    shown = map(yaml.safe_load, re.findall(r"db\.createRole\((\{.*?\})\)\n", text, re.DOTALL))
    return next(role for role in shown if role["role"] == name)


@contextmanager
def user_with_role(server: EmbeddedMongod, client: Client, name: str) -> Iterator[str]:
    """Yield the address for a user who has exactly the role *name* that docs/operations.md shows."""
    role = documented_role(name)
    client[DB_NAME].command("createRole", name, roles=role["roles"], privileges=role["privileges"])
    client.admin.command("createUser", "worker", pwd="w", roles=[{"role": name, "db": DB_NAME}])
    yield uri_of(server, "worker", "w")
    client.admin.command("dropUser", "worker")
    client[DB_NAME].command("dropRole", name)


@pytest.fixture
def worker_uri(strict: EmbeddedMongod, client: Client) -> Iterator[str]:
    """The address for a user who has the role of the worker."""
    with user_with_role(strict, client, "triad_worker") as uri:
        yield uri


@pytest.fixture
def reviewer_uri(strict: EmbeddedMongod, client: Client) -> Iterator[str]:
    """The address for a user who has the role of a reviewer."""
    with user_with_role(strict, client, "triad_reviewer") as uri:
        yield uri


@contextmanager
def failing(client: Client, commands: list[str], mode: Any = "alwaysOn", **data: Any) -> Iterator[int]:
    """Let *commands* of the product fail, or block, as *data* says; yield how many have done so before."""
    data |= {"failCommands": commands, "appName": "customer-support-triad"}
    before = client.admin.command({"configureFailPoint": "failCommand", "mode": mode, "data": data})["count"]
    try:
        yield int(before)
    finally:
        client.admin.command({"configureFailPoint": "failCommand", "mode": "off"})


async def run(uri: str, folder: Path, **settings: Any) -> Mapping[str, Any]:
    """Run the baseline on *uri*, without a model server."""
    loaded = load_settings(None, mongodb_uri=uri, batch_files_dir=folder, mongodb_backoff_s=0, **settings)
    classify = built_in_classify(BaselineClassifier(load_taxonomy()))
    async with BatchProcessor(loaded, classify=classify, plan=BASELINE_PLAN) as processor:
        return await processor.run()


@pytest.mark.parametrize(
    "command", mostly_thorough(["", "plan --offline", "estimate --sample 1", "doctor --no-probe", "--dry-run"], 3)
)
def test_documented_role_is_enough_for_each_command(
    command: str, worker_uri: str, client: Client, model: FakeOllama, tmp_path: Path
) -> None:
    """A2: no command of a run needs another right."""
    with open_site(worker_uri, DB_NAME, model, tmp_path) as site:
        code, out, err = run_cli(command.split(), site.environment(), tmp_path)
    assert code == 0, out + err
    assert "refuses" not in out + err
    if not command:
        assert client[DB_NAME].sentimental_analysis.count_documents({}) == 3
        assert client[DB_NAME].conversation_set.count_documents({"status": "processed"}) == 3


async def test_role_of_the_service_is_enough_for_its_lease(strict: EmbeddedMongod, client: Client) -> None:
    """The first renewal creates the collection; nothing else can be read."""
    with user_with_role(strict, client, "triad_service") as uri:
        async with AsyncMongoClient[dict[str, Any]](uri, serverMonitoringMode="poll") as service:
            await renew_lease(service[DB_NAME], "one:80")
            await renew_lease(service[DB_NAME], "one:80")
            with pytest.raises(StoreForbiddenError):
                await lease_renewal(service[DB_NAME], "one:80")
    assert client[DB_NAME][COLLECTION].count_documents({}) == 1


@pytest.mark.thorough
def test_role_of_reviewers_is_enough_and_changes_no_result(
    reviewer_uri: str, client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Accept, undo, correct and skip; conversations and results cannot be written."""
    client[DB_NAME].sentimental_analysis.insert_many([result(number) for number in range(3)])
    read, write = os.pipe()
    os.write(write, b"\nu4\nsq")
    os.close(write)
    with os.fdopen(read) as stdin, open_site(reviewer_uri, DB_NAME, None, tmp_path) as site:
        monkeypatch.setattr("sys.stdin", stdin)
        code, out, err = run_cli(["review", "--reviewer", "anna"], site.environment(), tmp_path)
        assert code == 0, out + err
        assert "refuses" not in out + err
        assert "1 conversation reviewed by anna" in out
        for name in ("sentimental_analysis", "conversation_set"):
            with pytest.raises(OperationFailure, match="not authorized"):
                site.database[name].update_one({}, {"$set": {"status": "x"}})
    assert client[DB_NAME].sentimental_analysis_corrections.count_documents({}) == 3


def test_few_rights_are_enough_to_import_and_to_update(strict: EmbeddedMongod, client: Client, tmp_path: Path) -> None:
    """Rights on the results, or to create an index, are not needed."""
    source = {"db": DB_NAME, "collection": "conversation_set"}
    leases = {"db": DB_NAME, "collection": "conversation_set_leases"}
    rights = [{"resource": source, "actions": ["find", "insert", "update"]}, {"resource": leases, "actions": ["find"]}]
    client[DB_NAME].command("createRole", "importer", roles=[], privileges=rights)
    client.admin.command("createUser", "importer", pwd="i", roles=[{"role": "importer", "db": DB_NAME}])
    path = tmp_path / "a.csv"
    rows = ["ticket_id,role,body", "1,user,hi"]
    with open_site(uri_of(strict, "importer", "i"), DB_NAME, None, tmp_path) as site:
        for expected in ("1 new, 0 grown", "0 new, 1 grown (1 turn added)"):
            path.write_text("\n".join(rows))
            command = ["--file", str(path), "--update"]
            done = run_script(
                mongodb_import.main, ROOT / "utils/mongodb_import.py", command, site.environment(), tmp_path
            )
            assert expected in done.stdout, done.stderr
            rows.append("1,agent,ho")
    client.admin.command("dropUser", "importer")
    client[DB_NAME].command("dropRole", "importer")


@contextmanager
def tabs(uri: str, folder: Path, **settings: str) -> Iterator[Callable[[], dict[str, bool]]]:
    """Yield a function that uses the tabs Labels and Quarantine of a service; it returns what worked."""
    place = {"MONGODB_URI": uri, "MONGODB_DB": DB_NAME, "MONGODB_BACKOFF_S": "0", "DASHBOARD_SHOW_TEXT": "true"}
    others = {"API_EXPOSE_DASHBOARD": "key", "API_EXPOSE_JOBS": "off", "SERVICE_LEASE": "false"}
    with serve(folder, **NO_MODEL, **others, **place, **settings) as service:
        days = itertools.count(1)

        def computed(path: str) -> Answer:
            answers: list[Answer] = []
            until(lambda: answers.append(service.get(path)) or answers[-1].status != 202)
            return answers[-1]

        def use() -> dict[str, bool]:
            view = f"?since=1970-01-{next(days):02}"  # figures of a view are kept for some seconds
            one, page = f"?id={quote(canonical(1))}", "/dashboard/quarantine"
            examples = computed(f"/dashboard/examples/newest{view}")
            return {
                "charts": computed(f"/dashboard/charts{view}").status == 200,
                "examples": examples.status == 200,
                "texts": b"Case 00001" in examples.body,
                "list": service.get(page).status == 200,
                "text": b"Case 00001" in service.get(f"{page}/show{one}").body,
                "replay": service.request("POST", f"{page}/replay{one}").status == 303,
            }

        yield use


def fail_all(client: Client, day: int = 1) -> None:
    """Let the three conversations have results, of a *day* in 2026, and a status as if they had failed later."""
    facts = {"conversation": {"last_message_at": datetime(2026, 1, day, 12, tzinfo=UTC)}}
    client[DB_NAME].drop_collection("sentimental_analysis")
    client[DB_NAME].sentimental_analysis.insert_many([result(number) | facts for number in range(3)])
    client[DB_NAME].conversation_set.update_many({}, {"$set": {"status": "failed", "status_reason": "timeout"}})


@pytest.mark.thorough
def test_documented_role_is_enough_for_the_tabs_labels_and_quarantine(
    strict: EmbeddedMongod, client: Client, tmp_path: Path
) -> None:
    fail_all(client)
    with user_with_role(strict, client, "triad_dashboard") as uri, tabs(uri, tmp_path) as use:
        assert all(use().values())
    assert client[DB_NAME].conversation_set.count_documents({"status": "pending"}) == 1
    assert client[DB_NAME].sentimental_analysis_orders.count_documents({"action": "replay", "done": 1}) == 1
    assert client[DB_NAME].sentimental_analysis_counts.count_documents({}) == 1


@pytest.mark.thorough
def test_each_right_of_the_role_for_the_tabs_is_needed(strict: EmbeddedMongod, client: Client, tmp_path: Path) -> None:
    """Without one, what docs/operations.md says does not work, and everything else does."""
    of_labels = {"charts", "examples", "texts"}
    lost: dict[tuple[str, str], set[str]] = {
        ("conversation_set", "find"): {"list", "text", "texts", "examples"},
        ("conversation_set", "update"): {"replay"},
        ("sentimental_analysis", "find"): of_labels | {"counts"},
        ("sentimental_analysis_corrections", "find"): of_labels,
        **{("sentimental_analysis_counts", action): {"counts"} for action in ("find", "insert", "update", "remove")},
        ("sentimental_analysis_orders", "find"): {"list"},
        ("sentimental_analysis_orders", "insert"): {"replay"},
        ("sentimental_analysis_orders", "update"): {"replay"},
    }
    role = documented_role("triad_dashboard")
    rights = {(one["resource"]["collection"], action) for one in role["privileges"] for action in one["actions"]}
    assert rights == lost.keys()
    counts = client[DB_NAME].sentimental_analysis_counts
    with user_with_role(strict, client, "triad_dashboard") as uri, tabs(uri, tmp_path) as use:
        for (collection, action), expected in lost.items():
            counts.drop()
            left = copy.deepcopy(role["privileges"])
            for one in left:
                if one["resource"]["collection"] == collection:
                    one["actions"].remove(action)
            client[DB_NAME].command(
                "updateRole", role["role"], roles=[], privileges=[one for one in left if one["actions"]]
            )
            for day in (1, 2):
                fail_all(client, day)
                worked = use()
            worked["counts"] = [one["day"] for one in counts.find()] == [
                "2026-01-02"
            ]  # and no more those of the first day
            missing = {name for name, is_there in worked.items() if not is_there}
            assert missing == expected, (collection, action)


def test_documented_role_is_enough_to_index_conversations(worker_uri: str, model: FakeOllama, tmp_path: Path) -> None:
    """The names of the collections are listed without an additional right."""
    with open_site(worker_uri, DB_NAME, model, tmp_path) as site:
        assert run_cli([], site.environment(), tmp_path)[0] == 0
        environment = site.environment(INDEX_DIR=str(tmp_path / "index"))
        _, out, err = run_cli(["index", "--estimate-costs", "--source", "conversations"], environment, tmp_path)
    assert "refuses" not in out + err


async def test_unfinished_work_is_matched_by_name_if_the_user_may_not_list_collections() -> None:
    """A right that is granted or taken away later does not make it another source."""
    known, other, unknown = (
        "db.source -> results (0a1b)",
        "db.source -> results (2c3d)",
        "db.source -> results (unknown)",
    )
    assert is_same_source(known, unknown)
    assert is_same_source(unknown, known)
    assert not is_same_source(known, other)
    assert not is_same_source("db.elsewhere -> results (unknown)", known)


async def test_run_without_create_index_on_the_source(
    strict: EmbeddedMongod, client: Client, worker_uri: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The indexes of the source are a help; that of the results is required."""
    for collection in ("conversation_set", "conversation_set_leases"):
        resource = {"db": DB_NAME, "collection": collection}
        privileges = [{"resource": resource, "actions": ["createIndex"]}]
        client[DB_NAME].command("revokePrivilegesFromRole", "triad_worker", privileges=privileges)
    assert (await run(worker_uri, tmp_path))["successful"] == 3
    assert "the index status_1 of conversation_set was not created" in caplog.text
    settings = load_settings(None, mongodb_uri=worker_uri)
    levels = {finding.level for finding in [one async for one in diagnose(settings)] if "lacks" in finding.sentence}
    assert levels == {"warning"}
    resource = {"db": DB_NAME, "collection": "sentimental_analysis"}
    privileges = [{"resource": resource, "actions": ["createIndex"]}]
    client[DB_NAME].command("revokePrivilegesFromRole", "triad_worker", privileges=privileges)
    with pytest.raises(StoreForbiddenError):
        await run(worker_uri, tmp_path)


@pytest.mark.parametrize(
    "index", mostly_thorough([{"keys": "conversation_number", "unique": True}, {"keys": "status", "name": "mine"}], 2)
)
async def test_index_of_the_application_does_not_stop_a_run(
    strict: EmbeddedMongod, client: Client, tmp_path: Path, index: dict[str, Any]
) -> None:
    """A1: the run goes on, and doctor agrees."""
    client[DB_NAME].conversation_set.create_index(**index)
    uri = uri_of(strict, "root", "r")
    assert (await run(uri, tmp_path))["successful"] == 3
    settings = load_settings(None, mongodb_uri=uri)
    store = DocumentStore(settings)
    await store.ensure_source_indexes()  # a run that has ended before does not wait for them
    await store.close()
    found = [finding async for finding in diagnose(settings)]
    assert "error" not in {finding.level for finding in found}
    assert "All indexes exist." in [finding.sentence for finding in found]


async def test_slow_index_build_delays_no_run(strict: EmbeddedMongod, client: Client, tmp_path: Path) -> None:
    """A13: a build that takes longer than the time limit of a call is waited for."""
    with failing(client, ["createIndexes"], blockConnection=True, blockTimeMS=1100):
        done = await run(uri_of(strict, "root", "r"), tmp_path, mongodb_timeout_ms=1000, mongodb_max_retries=1)
    assert done["successful"] == 3
    assert "source_conversation_id_1" in client[DB_NAME].sentimental_analysis.index_information()


@pytest.mark.parametrize("code", mostly_thorough([50, 89, 262], 3))
async def test_index_build_that_the_server_ends_is_a_warning(
    strict: EmbeddedMongod, client: Client, tmp_path: Path, caplog: pytest.LogCaptureFixture, code: int
) -> None:
    """A13: a time limit of the server or of a proxy."""
    with failing(client, ["createIndexes"], errorCode=code):
        done = await run(uri_of(strict, "root", "r"), tmp_path, mongodb_max_retries=1)
    assert done["successful"] == 3
    assert "the indexes of sentimental_analysis are not ready" in caplog.text


def test_slow_counts_stop_no_run(strict: EmbeddedMongod, client: Client, model: FakeOllama, tmp_path: Path) -> None:
    """A13: neither the count nor the sample for the window; a slow model is asked meanwhile."""
    with (
        open_site(uri_of(strict, "root", "r"), DB_NAME, model, tmp_path) as site,
        failing(client, ["aggregate", "count"], blockConnection=True, blockTimeMS=1100),
    ):
        ended = site.run(MONGODB_TIMEOUT_MS="1000", MONGODB_MAX_RETRIES="1")
    assert ended.code == 0, ended.said
    assert "the window is chosen without a sample" in ended.err
    assert client[DB_NAME].sentimental_analysis.count_documents({}) == 3


async def test_count_that_the_server_ends_is_a_warning(
    strict: EmbeddedMongod, client: Client, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The run goes on without a total."""
    with failing(client, ["aggregate", "count"], errorCode=50):
        done = await run(uri_of(strict, "root", "r"), tmp_path, mongodb_max_retries=1)
    assert done["successful"] == 3
    assert "the run goes on without the number of documents" in caplog.text


SLOW_REPORTS = {
    "--dry-run": (0, "The documents that are not selected were not counted: MongoDB did not count", 0),
    "estimate": (3, "MongoDB did not count the documents within 0.2 s", 0),
    "doctor --no-probe": (0, "The documents that a run does not select were not counted.", 1),
    "": (0, "3 documents processed", 0),
}


@pytest.mark.parametrize("command", mostly_thorough(SLOW_REPORTS, 3))
def test_report_whose_counts_take_long_shows_it_and_ends(
    command: str, client: Client, model: FakeOllama, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counts have no time limit of the client, but reports have one of their own, with the progress before it."""
    monkeypatch.setattr(left_out, "COUNT_LIMIT_S", 0.2)
    monkeypatch.setattr(left_out, "LINE_EVERY_S", 0.05)
    code, sentence, harmless = SLOW_REPORTS[command]
    uri = f"mongodb://root:r@127.0.0.1:{(client.address or ('', 0))[1]}/?authSource=admin"
    with (
        open_site(uri, DB_NAME, model, tmp_path) as site,
        failing(client, ["aggregate", "count"], {"skip": harmless}, blockConnection=True, blockTimeMS=800),
    ):
        ended, out, err = run_cli(command.split(), site.environment(), tmp_path)
    assert ended == code, out + err
    assert sentence in out + err
    assert "counting the documents: 0 s of at most 0 s" in err or command in ("doctor --no-probe", "")


@pytest.mark.thorough
def test_stop_waits_for_no_count(strict: EmbeddedMongod, client: Client, model: FakeOllama, tmp_path: Path) -> None:
    """Counts have no time limit, so one at the end of a run must not delay its stop."""
    with (
        open_site(uri_of(strict, "root", "r"), DB_NAME, model, tmp_path) as site,
        failing(client, ["aggregate", "count"], blockConnection=True, blockTimeMS=12_000) as before,
        site.start(MONGODB_TIMEOUT_MS="500", MONGODB_MAX_RETRIES="1") as worker,
    ):
        # The sample, the count at the start, and the one at the end.
        entered = {"waitForFailPoint": "failCommand", "timesEntered": before + 3, "maxTimeMS": 30_000}
        client.admin.command(entered)
        assert site.source.count_documents({"status": "processed"}) == 3
        assert worker.process.poll() is None
        worker.send(signal.SIGTERM)
        assert worker.ended(8).code == 130
    assert client[DB_NAME].sentimental_analysis.count_documents({}) == 3


async def test_server_without_retryable_writes_is_named_by_run_and_doctor(
    strict: EmbeddedMongod, client: Client, tmp_path: Path
) -> None:
    """B15: both say what to add to the address; no document is blamed."""
    uri = uri_of(strict, "root", "r")
    with failing(client, ["insert", "update"], errorCode=301):
        with pytest.raises(ConfigurationError, match="add retryWrites=false to MONGODB_URI"):
            await run(uri, tmp_path)
        found = [finding async for finding in diagnose(load_settings(None, mongodb_uri=uri))]
    assert ["retryWrites=false" in finding.sentence for finding in found if finding.level == "error"] == [True]
    assert client[DB_NAME].conversation_set.count_documents({"status": "failed"}) == 0


async def test_view_as_source_is_named_by_run_and_doctor(
    strict: EmbeddedMongod, client: Client, worker_uri: str, tmp_path: Path
) -> None:
    """With the right to list collections at the start, without it at the first write."""
    database = client[DB_NAME]
    database.conversation_set.rename("conversations")
    database.create_collection("conversation_set", viewOn="conversations", pipeline=[])
    for uri in (uri_of(strict, "root", "r"), worker_uri):
        with pytest.raises(ConfigurationError, match="view"):
            await run(uri, tmp_path / uri[10:14])
        found = [finding async for finding in diagnose(load_settings(None, mongodb_uri=uri))]
        assert any("view" in finding.sentence for finding in found if finding.level == "error")

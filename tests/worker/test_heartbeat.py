"""The heartbeat of real workers, and orders that the service gives them: pause, resume, stop, kill, rights."""

from __future__ import annotations

import asyncio
import json
import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from pymongo import AsyncMongoClient, MongoClient
from pymongo.database import Database

from config import load_settings
from embedded.mongod import EmbeddedMongod
from model_server.protocol import ChatReply
from storage import heartbeats
from storage.heartbeats import KEPT, LOST_AFTER_S, Order, give_order, read_all, tidy
from tests.fakes.fake_ollama import FakeOllama
from tests.service.service_process import ServiceProcess, serve
from tests.worker.site import Site, check_exactly_once, conversation, filled, model_of, open_site, requests, until
from worker import heartbeat
from worker.checkpoint import RunStats
from worker.model_use import ModelUse

Document = dict[str, Any]
SETTINGS = load_settings(None, results_collection="results", max_concurrent=5)
NO_RIGHT = "no heartbeat for the dashboard"
OPERATIONS = Path(__file__).parents[2] / "docs/operations.md"


def workers(site: Site) -> list[Document]:
    return list(site.database["sentimental_analysis_workers"].find().sort("started_at"))


def worker_of(site: Site) -> Document:
    (found,) = workers(site)
    return found


def status_of(site: Site) -> str | None:
    found = workers(site)
    return found[-1]["status"] if found else None


@contextmanager
def dashboard(site: Site, uri: str | None = None) -> Iterator[ServiceProcess]:
    place = {"MONGODB_URI": uri or site.uri, "MONGODB_DB": site.database.name, "SERVICE_LEASE": "false"}
    with serve(site.folder, API_EMBEDDED="true", API_EXPOSE_DASHBOARD="key", **place) as service:
        yield service


def give(service: ServiceProcess, site: Site, action: str) -> None:
    answer = service.request("POST", f"/dashboard/runs/{workers(site)[-1]['_id']}/{action}")
    assert answer.status == 303, answer.body


def test_run_leaves_its_counts_and_its_end(site: Site) -> None:
    """Tokens and failures by reason included; nothing of a conversation."""
    filled(site, 12)
    model_of(site).configure(faults=[{"kind": "invalid_json", "when": {"text": "Case 00003"}}])
    ended = site.run("--logs")
    assert ended.code == 1, ended.err
    found = worker_of(site)
    assert (found["status"], found["breaker"]) == ("completed", "closed")
    assert {name: found["counts"][name] for name in ("processed", "expected", "successful", "failed")} == {
        "processed": 12,
        "expected": 12,
        "successful": 11,
        "failed": 1,
    }
    assert sum(found["reasons"].values()) == 1
    assert found["tokens"]["prompt"] > 0
    assert found["started_at"] <= found["beat_at"] == found["ended_at"]
    assert "parcel" not in str(found)


def test_run_without_work_leaves_no_document(site: Site) -> None:
    """A cron job each minute would fill the list of ended runs."""
    assert site.run().code == 0
    assert workers(site) == []


def test_switched_off_heartbeat_writes_nothing(site: Site) -> None:
    filled(site, 3)
    assert site.run(WORKER_HEARTBEAT="false").code == 0
    assert workers(site) == []


async def test_orders_pause_resume_and_stop(mongodb_uri: str, db_name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last order counts, and its effect is written with the next beat."""
    monkeypatch.setattr(heartbeat, "BEAT_S", 0.01)
    async with AsyncMongoClient[Document](mongodb_uri) as client:
        collection = heartbeats.heartbeats(client[db_name], "results")
        stop = asyncio.Event()
        model = ModelUse()
        beating = heartbeat.Heartbeat(client[db_name], SETTINGS, "$worker", stop, model)
        model.note_answer(ChatReply("", 10, 2, queue_wait_s=0.5))
        beating.update("job_1", "running", RunStats(total=9), 3)
        beating.start()

        async def wait_for(status: str) -> None:
            async with asyncio.timeout(20):
                while [one["status"] for one in await read_all(collection)] != [status]:
                    await asyncio.sleep(0.01)

        await wait_for("running")
        for action, status in (("pause", "paused"), ("resume", "running"), ("pause", "paused"), ("stop", "stopping")):
            assert await give_order(collection, beating.id, Order(action, "$anna"))  # type: ignore[arg-type]
            await wait_for(status)
        assert stop.is_set()
        beating.update("job_1", "interrupted", RunStats(total=9), 0)
        await beating.close()
        (found,) = await read_all(collection)
        assert (found["status"], found["worker"], found["orders"][0]["by"]) == ("interrupted", "$worker", "$anna")
        assert (found["queue_wait_s"], found["tokens"]) == (0.5, {"prompt": 10, "reply": 2})
        assert not await give_order(collection, beating.id, Order("pause", "anna"))


async def test_empty_pass_does_not_replace_the_last_one(mongodb_uri: str, db_name: str) -> None:
    """A continuous worker ends between two passes, and most of them have no documents."""
    async with AsyncMongoClient[Document](mongodb_uri) as client:
        beating = heartbeat.Heartbeat(client[db_name], SETTINGS, "worker", asyncio.Event(), ModelUse())
        beating.start()
        beating.update("job_1", "running", RunStats(total=3), 3)
        beating.update("job_1", "completed", RunStats(total=3, processed=3, successful=3), 0)
        for status in ("running", "completed"):
            beating.update("job_2", status, RunStats(), 0)
        await beating.close()
        (found,) = await read_all(heartbeats.heartbeats(client[db_name], "results"))
    assert (found["status"], found["job_id"], found["counts"]["successful"]) == ("completed", "job_1", 3)


async def test_history_is_bounded(mongodb_uri: str, database: Database[Document]) -> None:
    """The newest documents are kept, and a worker that starts again ends what its earlier start left."""
    many = [{"_id": str(number), "worker": "w", "beat_at": 1, "started_at": 1} for number in range(KEPT + 20)]
    database["results_workers"].insert_many([*many, {"_id": "new", "worker": "w", "beat_at": 2, "started_at": 2}])
    async with AsyncMongoClient[Document](mongodb_uri) as client:
        await tidy(heartbeats.heartbeats(client[database.name], "results"), "new", "w")
    left = {one["_id"]: one for one in database["results_workers"].find()}
    assert len(left) == KEPT
    assert "ended_at" not in left.pop("new")
    assert {one["status"] for one in left.values()} == {"died"}


@pytest.mark.thorough
def test_paused_worker_makes_no_call_until_it_is_resumed(site: Site) -> None:
    documents = filled(site, 150)
    model_of(site).configure(latency_s=0.3)
    with dashboard(site) as service, site.start("--logs") as worker:
        until(lambda: requests(site) > 6 and status_of(site) == "running")
        give(service, site, "pause")
        until(lambda: status_of(site) == "paused" and worker_of(site)["in_flight"] == 0)
        made = requests(site)
        assert made < 150
        beats: set[Any] = set()

        def has_lived_on() -> bool:
            beats.add(worker_of(site)["beat_at"])
            return len(beats) > 2

        until(has_lived_on)
        assert requests(site) == made
        assert 'class="card paused"' in service.get("/dashboard").body.decode()
        model_of(site).configure(latency_s=0.0)
        give(service, site, "resume")
        ended = worker.ended()
    assert ended.code == 0, ended.err
    assert "order of the dashboard: pause, by anonymous" in ended.err
    assert [one["action"] for one in worker_of(site)["orders"]] == ["pause", "resume"]
    check_exactly_once(site, documents)


@pytest.mark.thorough
@pytest.mark.parametrize("is_paused", [False, True])
def test_stopped_worker_ends_with_130_and_resumes(site: Site, is_paused: bool) -> None:
    """As after SIGTERM, also while it is paused."""
    documents = filled(site, 150)
    model_of(site).configure(latency_s=0.3)
    with dashboard(site) as service:
        with site.start("--logs") as worker:
            until(lambda: requests(site) > 6 and status_of(site) == "running")
            if is_paused:
                give(service, site, "pause")
                until(lambda: status_of(site) == "paused")
            give(service, site, "stop")
            ended = worker.ended()
        assert ended.code == 130, ended.err
        assert "run the same command again to resume" in ended.err
        assert status_of(site) == "interrupted"
        assert '<span class="badge interrupted">' in service.get("/dashboard").body.decode()
    model_of(site).configure(latency_s=0.0)
    assert site.run().code == 0
    assert [one["status"] for one in workers(site)] == ["interrupted", "completed"]
    check_exactly_once(site, documents)


@pytest.mark.thorough
def test_killed_worker_is_lost_until_it_starts_again(site: Site) -> None:
    """The page shows it while the service runs, and after a restart of the service."""
    filled(site, 60)
    model_of(site).configure(latency_s=0.3)
    with dashboard(site) as service, site.start() as worker:
        until(lambda: requests(site) > 6 and status_of(site) == "running")
        assert 'class="card running"' in service.get("/dashboard").body.decode()
        worker.send(signal.SIGKILL)
        worker.ended()
        found = worker_of(site)
        assert "ended_at" not in found
        long_ago = found["beat_at"] - timedelta(seconds=LOST_AFTER_S + 1)  # nobody waits for it
        site.database["sentimental_analysis_workers"].update_one({}, {"$set": {"beat_at": long_ago}})
        until(lambda: 'class="card lost"' in service.get("/dashboard").body.decode())
        model_of(site).configure(latency_s=0.0)
        assert site.run().code == 0
    assert [one["status"] for one in workers(site)] == ["died", "completed"]
    with dashboard(site) as service:
        page = service.get("/dashboard").body.decode()
    assert '<span class="badge died">' in page
    assert '<span class="badge completed">' in page


def documented_role(name: str) -> list[Document]:
    """Return the privileges of a role of docs/operations.md."""
    (text,) = re.findall(rf'role: "{name}", roles: \[\], privileges: (\[.*?\])\}}\)', OPERATIONS.read_text(), re.DOTALL)
    found: list[Document] = json.loads(re.sub(r"(\w+):", r'"\1":', text))
    return found


@pytest.mark.thorough
@pytest.mark.parametrize("has_right", [True, False])
def test_documented_roles_are_enough(tmp_path: Path, model: FakeOllama, has_right: bool) -> None:
    """For the worker and for the page. Without the right on the heartbeats, one line is logged, and the run goes on."""
    name, roles = "customer_support", {role: documented_role(role) for role in ("triad_worker", "triad_service")}
    if not has_right:
        roles = {
            role: [one for one in rights if not one["resource"]["collection"].endswith("_workers")]
            for role, rights in roles.items()
        }
    with EmbeddedMongod(tmp_path / "db") as mongod, MongoClient[Document](mongod.uri) as client:
        client[name].conversation_set.insert_many([conversation(number) for number in range(10)])
        for role, rights in roles.items():
            client[name].command("createRole", role, privileges=rights, roles=[])
            client[name].command("createUser", role, pwd="secret-of-a-test", roles=[role])
    with EmbeddedMongod(tmp_path / "db", extra_arguments=["--auth"]) as mongod:

        def address(user: str) -> str:
            return f"mongodb://{user}:secret-of-a-test@127.0.0.1:{mongod.port}/?authSource={name}"

        with open_site(address("triad_worker"), name, model, tmp_path) as site:
            ended = site.run("--logs")
            assert (ended.code, ended.err.count(NO_RIGHT)) == (0, 0 if has_right else 1), ended.err
            with dashboard(site, address("triad_service")) as service:
                assert service.get("/dashboard").status == (200 if has_right else 503)

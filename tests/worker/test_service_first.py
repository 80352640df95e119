"""The service goes before the worker on one model server: the lease, the floor, the end of both, and the switch."""

from __future__ import annotations

import asyncio
import http.client
import logging
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from threading import Thread
from typing import Any

import pytest
from pymongo import AsyncMongoClient

from storage.service_lease import COLLECTION, LEASE_S, lease_renewal, renew_lease, server_name
from tests.fakes.fake_ollama import FakeOllama
from tests.service.service_process import ServiceProcess, conversation, serve
from tests.worker.site import Site, WorkerProcess, check_exactly_once, filled, model_of, sha, until
from worker.service_first import ServiceFirst

HELD = "the service has requests: at most"
HANG = {"kind": "hang", "when": {"text": "HOLD"}}  # the server keeps requests of the service until they are cut off


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def reader(floor: int = 1) -> tuple[ServiceFirst, Clock]:
    clock = Clock()
    return ServiceFirst(None, ["server:80"], floor, clock), clock


def test_lease_of_an_earlier_service_holds_no_worker() -> None:
    """What the first look finds may be years old."""
    lease, _ = reader()
    lease.note("old")
    lease.note("old")
    assert lease.limit is None


def test_renewed_lease_leaves_the_floor() -> None:
    lease, _ = reader(floor=2)
    lease.note(None)
    lease.note("first")
    assert lease.limit == 2


def test_lease_without_renewal_ends_by_the_readers_clock() -> None:
    """No clock of another machine counts, so the value may be anything that changes."""
    lease, clock = reader()
    lease.note("a")
    lease.note("b")
    clock.now += LEASE_S * 0.9
    lease.note("c")
    clock.now += LEASE_S * 0.9
    lease.note("c")
    assert lease.limit == 1
    clock.now += LEASE_S * 0.2
    lease.note("c")
    assert lease.limit is None
    assert lease.held_s == pytest.approx(LEASE_S * 2)


def test_local_addresses_name_the_machine_and_aliases_are_one_server() -> None:
    names = {server_name(f"http://{host}:11434") for host in ("localhost", "127.0.0.1", "[::1]", "LOCALHOST")}
    assert len(names) == 1
    assert "localhost" not in names.pop()
    assert server_name("https://Models.example/team") == server_name("https://models.example:443/team")
    assert server_name("http://one:8000") != server_name("http://one:8001")


def test_name_of_a_server_has_no_path_that_may_hold_a_key() -> None:
    """Everybody who reads MongoDB, or a copy of it, sees the names."""
    name = server_name("http://one:8000/sk-secret")
    assert "secret" not in name
    assert name not in (server_name("http://one:8000"), server_name("http://one:8000/sk-other"))


def test_lease_names_its_server(mongodb_uri: str, db_name: str) -> None:
    """A renewal changes what a reader of that server sees, and nothing for readers of another."""

    async def see() -> None:
        async with AsyncMongoClient[dict[str, Any]](mongodb_uri, serverMonitoringMode="poll") as client:
            database = client[db_name]
            assert await lease_renewal(database, "one:80") is None
            await renew_lease(database, "one:80")
            first = await lease_renewal(database, "one:80")
            await asyncio.gather(renew_lease(database, "two:80"), renew_lease(database, "two:80"))
            assert await lease_renewal(database, "one:80") == first is not None
            assert await lease_renewal(database, "three:80") is None

    asyncio.run(see())


def test_mongodb_away_is_one_warning_and_no_lease(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However often the worker looks."""
    monkeypatch.setattr("worker.service_first.POLL_S", 0.0)

    async def look() -> None:
        client = AsyncMongoClient[dict[str, Any]]("mongodb://127.0.0.1:1")
        await client.close()  # each call fails
        looks = iter(range(3))
        lease = ServiceFirst(client["absent"], ["one:80"], 1, clock=lambda: next(looks))
        with pytest.raises(RuntimeError, match="StopIteration"):
            await lease.watch(lambda _: None)
        assert lease.limit is None

    with caplog.at_level(logging.WARNING, "worker.service_first"):
        asyncio.run(look())
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "the run goes on without the lease" in caplog.text


def ask(service: ServiceProcess, text: str) -> None:
    with suppress(OSError, http.client.HTTPException):  # the service is killed while it works on it
        service.classify(conversation(text))


@contextmanager
def busy_service(site: Site, fake: FakeOllama, **settings: str) -> Iterator[ServiceProcess]:
    """Yield a service of the database of *site* with one request at *fake* that is not answered."""
    place = {"MONGODB_URI": site.uri, "MONGODB_DB": site.database.name, "OLLAMA_MODEL": "llama3.2"}
    with serve(site.folder, OLLAMA_ENDPOINT=fake.url, **place, **settings) as service:
        fake.configure(faults=[HANG])
        caller = Thread(target=ask, args=(service, "HOLD the line"))
        caller.start()
        fake.wait_for("in_flight", at_least=1)
        try:
            yield service
        finally:
            service.process.kill()
            caller.join()


def leases(site: Site) -> list[dict[str, Any]]:
    return list(site.database[COLLECTION].find())


def most_beside(fake: FakeOllama, documents: list[dict[str, Any]], after: int) -> int:
    """Return the most calls of the worker that were in flight when one from the *after*-th on began."""
    shas = {sha(document) for document in documents}
    calls = [record for record in fake.requests() if record["user_sha256"] in shas]
    return max(sum(one["start_s"] < call["start_s"] < one["end_s"] for one in calls) for call in calls[after:])


def started(site: Site, *flags: str, **settings: str) -> WorkerProcess:
    """Start a worker with six calls in flight and verbose logs."""
    return site.start("--logs", "--console", *flags, **settings)


@pytest.mark.thorough
def test_worker_keeps_to_the_floor_and_goes_on_after_the_service_was_killed(site: Site) -> None:
    """Killed with a request that is not answered: nobody ends the lease, and all documents are done."""
    fake = model_of(site)
    documents = filled(site, 60)
    fake.configure(latency_s=0.5)
    with busy_service(site, fake) as service, started(site) as worker:
        worker.await_text(HELD)
        begun = fake.stats()["chat_requests"]
        fake.configure(latency_s=0.05)
        fake.wait_for("chat_requests", at_least=begun + 10)
        assert most_beside(fake, documents, begun) == 0
        assert len(site.results.distinct("_id")) < 60
        service.process.kill()
        fake.configure(latency_s=0.3)
        fake.wait_for("in_flight", at_least=6)
        ended = worker.ended()
    assert ended.code == 0, ended.said
    check_exactly_once(site, documents)


def unhindered(site: Site, worker: WorkerProcess) -> None:
    """Assert that the worker keeps six calls in flight while the lease is renewed, and finishes."""
    fake, renewals = model_of(site), set[Any]()
    fake.wait_for("chat_requests", at_least=6)

    def is_renewed_often() -> bool:
        renewals.update(lease["renewed_at"] for lease in leases(site))
        return len(renewals) > 3

    until(is_renewed_often)
    fake.wait_for("in_flight", at_least=6)
    fake.configure(latency_s=0.0)
    ended = worker.ended()
    assert ended.code == 0, ended.said
    assert HELD not in ended.err


@pytest.mark.thorough
def test_service_on_another_server_holds_no_worker(site: Site) -> None:
    filled(site, 80)
    model_of(site).configure(latency_s=0.4)
    with FakeOllama(slots=2) as other, busy_service(site, other), started(site) as worker:
        unhindered(site, worker)


@pytest.mark.thorough
def test_worker_whose_lease_is_switched_off_is_not_held(site: Site) -> None:
    filled(site, 80)
    model_of(site).configure(latency_s=0.4)
    with busy_service(site, model_of(site)), started(site, SERVICE_LEASE="false") as worker:
        unhindered(site, worker)


@pytest.mark.thorough
def test_service_writes_the_lease_only_while_it_has_requests_and_the_switch_is_on(site: Site) -> None:
    """A request that takes no time counts as well."""
    fake = model_of(site)
    place = {"MONGODB_URI": site.uri, "MONGODB_DB": site.database.name, "OLLAMA_MODEL": "llama3.2"}
    with serve(site.folder, OLLAMA_ENDPOINT=fake.url, **place, SERVICE_LEASE="false") as service:
        fake.configure(latency_s=0.5)  # time enough to write it
        assert service.classify().status == 200
        assert leases(site) == []
    fake.configure(latency_s=0.0)
    with serve(site.folder, OLLAMA_ENDPOINT=fake.url, **place) as service:
        assert leases(site) == []
        assert service.classify().status == 200
        until(lambda: leases(site))
    assert [lease["_id"] for lease in leases(site)] == [server_name(fake.url)]


@pytest.mark.thorough
def test_service_without_mongodb_answers_and_warns_once(site: Site) -> None:
    fake = model_of(site)
    place = {"MONGODB_URI": "mongodb://127.0.0.1:1", "OLLAMA_MODEL": "llama3.2"}
    with serve(site.folder, OLLAMA_ENDPOINT=fake.url, **place) as service:
        for _ in range(3):
            assert service.classify().status == 200
        service.wait_for_log(
            "batch workers are not held back while requests wait (SERVICE_LEASE=false if there are none): MongoDB"
        )
        assert service.classify().status == 200
        assert service.terminate(20) == -signal.SIGTERM
    assert service.log.count("batch workers are not held back") == 1

"""SIGTERM, SIGINT, a second one, and SIGSTOP: what was begun is finished or begun again, and never twice."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime

import pytest
from pymongo.errors import AutoReconnect

from embedded.mongod import EmbeddedMongod
from storage.files import replay_journal
from tests.embedding_index.stores import open_store
from tests.worker.site import (
    Document,
    Site,
    check_calls,
    check_directory,
    check_exactly_once,
    filled_with_all_shapes,
    model_of,
    until,
)

CONCURRENCY = 6
PROMISED_S = 2.0  # a second signal ends the worker within this time
SLACK_S = 23.0  # for a machine with other things to do; the grace period is far longer
LONG_S = 60.0  # an answer that takes this long never comes in these tests


@contextmanager
def stopped(pid: int) -> Iterator[None]:
    """Hold a process by SIGSTOP while inside."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def await_all_slots_busy(site: Site) -> None:
    model_of(site).wait_for("in_flight", equals=CONCURRENCY, timeout_s=30)


def finish(site: Site, documents: list[Document], *, repeated: int) -> None:
    """Run the same command again and judge the whole."""
    model_of(site).configure(latency_s=0.02)
    ended = site.run("--logs")
    assert ended.code == 0, ended.err
    check_exactly_once(site, documents)
    check_calls(site, documents, repeated=repeated)


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.thorough)])
def test_first_signal_lets_calls_in_flight_finish(site: Site, number: signal.Signals) -> None:
    """No new call after it; those in flight are answered and stored; nothing is asked twice."""
    documents = filled_with_all_shapes(site, 30)
    model_of(site).configure(latency_s=1.0)
    with site.start("--logs") as worker:
        await_all_slots_busy(site)
        worker.send(number)
        ended = worker.ended()
    assert ended.code == 130, ended.err
    assert "same command" in ended.err
    assert model_of(site).stats()["chat_requests"] == CONCURRENCY
    assert site.results.count_documents({}) == CONCURRENCY
    check_directory(site, clean=False)
    finish(site, documents, repeated=0)


@pytest.mark.slow
def test_a_stop_while_earlier_work_is_recovered_takes_no_new_work(site: Site) -> None:
    """Neither the rest of the recovered batch nor a fresh page is begun after the signal."""
    documents = filled_with_all_shapes(site, 30)
    model_of(site).configure(latency_s=1.0)
    with site.start() as worker:
        await_all_slots_busy(site)
        worker.send(signal.SIGKILL)
        worker.ended()
    model_of(site).wait_for("in_flight", equals=0)
    with site.start("--logs") as worker:
        await_all_slots_busy(site)
        worker.send(signal.SIGTERM)
        ended = worker.ended()
    assert ended.code == 130, ended.err
    assert model_of(site).stats()["chat_requests"] == 2 * CONCURRENCY
    finish(site, documents, repeated=CONCURRENCY)


@pytest.mark.thorough
def test_a_second_signal_ends_the_worker_at_once(site: Site) -> None:
    """It does not wait for the calls in flight, which are asked again by the next run."""
    documents = filled_with_all_shapes(site, 30)
    model_of(site).configure(latency_s=LONG_S)
    with site.start("--logs") as worker:
        await_all_slots_busy(site)
        worker.send(signal.SIGTERM)
        worker.await_text("a second signal stops at once")
        start = time.monotonic()
        worker.send(signal.SIGTERM)
        ended = worker.ended()
        assert time.monotonic() - start < PROMISED_S + SLACK_S
    assert ended.code == 130, ended.err
    check_directory(site, clean=False)
    finish(site, documents, repeated=CONCURRENCY)


def test_a_second_signal_wins_over_a_hanging_database(site: Site, mongod: EmbeddedMongod) -> None:
    """If even the last writes hang, the process still ends, and the journal has the answers."""
    documents = filled_with_all_shapes(site, 30)
    model_of(site).configure(latency_s=0.3)
    with site.start("--logs", MONGODB_TIMEOUT_MS="60000") as worker:
        await_all_slots_busy(site)
        assert mongod.pid is not None
        # The answers come while nobody stores them, so the last writes of the run hang.
        with stopped(mongod.pid):
            model_of(site).wait_for("answered", at_least=CONCURRENCY)
            worker.send(signal.SIGTERM)
            worker.await_text("a second signal stops at once")
            worker.send(signal.SIGTERM)
            ended = worker.ended(PROMISED_S + SLACK_S)
    assert ended.code == 130, ended.err
    check_directory(site, clean=False)
    finish(site, documents, repeated=CONCURRENCY)


def test_the_grace_period_ends_and_stops_make_no_poison(site: Site) -> None:
    """Calls that do not finish in time are given up; the journal counts that as no crash, however often it happens."""
    documents = filled_with_all_shapes(site, 20)
    model_of(site).configure(latency_s=LONG_S)
    with site.start("--logs", SHUTDOWN_GRACE_S="0") as worker:
        await_all_slots_busy(site)
        worker.send(signal.SIGTERM)
        assert worker.ended().code == 130
    model_of(site).wait_for("in_flight", equals=0)
    entries = [entry for path in site.files("pending/*.journal") for entry in replay_journal(path).values()]
    crashes = [(entry.processing, entry.waiting) for entry in entries if entry.verdict is None]
    assert crashes == [(0, 0)] * CONCURRENCY
    finish(site, documents, repeated=CONCURRENCY)
    assert site.entries("quarantine") == []


def test_signal_during_connect_ends_at_once(site: Site) -> None:
    """Nothing is in work yet, so nothing is waited for."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"mongodb://127.0.0.1:{silent.getsockname()[1]}"
        with site.start(MONGODB_URI=address, MONGODB_TIMEOUT_MS="60000") as worker:
            silent.settimeout(30)
            connection, _ = silent.accept()
            with connection:
                connection.settimeout(30)
                assert connection.recv(16)
                worker.send(signal.SIGTERM)
                assert worker.ended(SLACK_S).code == 130


@pytest.mark.thorough
def test_short_pause_is_harmless(site: Site) -> None:
    """After SIGSTOP and SIGCONT the run goes on where it was."""
    documents = filled_with_all_shapes(site, 30)
    model_of(site).configure(latency_s=0.2)
    with site.start("--logs") as worker:
        await_all_slots_busy(site)
        worker.send(signal.SIGSTOP)
        model_of(site).wait_for("in_flight", equals=0)
        worker.send(signal.SIGCONT)
        assert worker.ended().code == 0
    check_exactly_once(site, documents)
    check_calls(site, documents, repeated=0)


@pytest.mark.slow
def test_pause_longer_than_the_lease_repeats_no_document_of_others(site: Site) -> None:
    """Another worker takes over meanwhile; the first one wakes up, finds it out, and stores nothing twice."""
    documents = filled_with_all_shapes(site, 30)
    site.settings["LEASE_S"] = "2"
    model_of(site).configure(latency_s=0.2)
    leases = site.database["conversation_set_leases"]
    with site.start("--logs") as worker:
        await_all_slots_busy(site)
        until(lambda: site.results.count_documents({}))
        worker.send(signal.SIGSTOP)
        until(lambda: leases.count_documents({"expires_at": {"$gt": datetime.now(UTC)}}) == 0)
        other = site.sibling("other_files").run("--logs")
        assert other.code == 0, other.err
        worker.send(signal.SIGCONT)
        assert worker.ended().code == 0
    check_exactly_once(site, documents)
    # Those in flight, and those whose answers it had not written yet.
    check_calls(site, documents, repeated=2 * CONCURRENCY)


@pytest.mark.parametrize("error", [None, AutoReconnect("lost")])
async def test_call_whose_library_swallows_a_cancellation_still_ends(
    mongodb_uri: str, db_name: str, error: AutoReconnect | None
) -> None:
    """``asyncio.wait_for`` of Python 3.11 swallows one inside PyMongo; a task of a stopped run would never end."""

    async def swallows() -> None:
        with suppress(asyncio.CancelledError):
            await asyncio.Event().wait()
        if error is not None:
            raise error

    async with open_store(mongodb_uri, db_name) as store:
        task = asyncio.create_task(store._call("wait", swallows))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

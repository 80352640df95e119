"""``--mode stream`` while the worker is killed, the primary steps down, or the network is cut."""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import AsyncIterator, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from pymongo import MongoClient
from pymongo.errors import PyMongoError

from embedded.mongod import EmbeddedMongod
from embedded.replica_set import ReplicaSetMongod
from tests.crash.faulty_worker import SEAMS
from tests.fakes.fake_ollama import FakeOllama
from tests.worker.site import Site, check_exactly_once, conversation, filled, open_site, requests
from tests.worker.site import until as wait_until
from tests.worker.stream_site import following, grow, has_result, until
from worker.intake import RunOptions
from worker.stream import StreamIntake

STREAM = ("--mode", "stream", "--settle-s", "0")


@pytest.fixture
def there(members: ReplicaSetMongod, model: FakeOllama, tmp_path: Path) -> Iterator[Site]:
    """Return a site on the replica set."""
    with open_site(members.uri, f"test_{uuid.uuid4().hex[:16]}", model, tmp_path) as site:
        yield site
        site.database.client.drop_database(site.database.name)


def kill_while_it_follows(site: Site, seam: str) -> None:
    """Kill the worker at *seam*, which it passes for a new and for a grown conversation; then follow to the end."""
    filled(site, 1)
    assert site.run().code == 0
    with site.start(*STREAM, plan={"seam": seam, "passage": 1}) as worker:
        wait_until(lambda: worker.process.poll() is not None or "Waiting for" in worker.err_so_far())
        with contextlib.suppress(PyMongoError):
            filled(site, 1, first=1)
            grow(site, 0)
        assert worker.ended().code == -9
    with site.start(*STREAM) as worker:
        wait_until(lambda: has_result(site, 1) and has_result(site, 0, earlier=1))
        wait_until(lambda: not site.files("pending/*"))
    check_exactly_once(site, list(site.source.find()))
    assert requests(site) in (3, 4, 5)  # each of the two calls in flight may be repeated


@pytest.mark.slow
@pytest.mark.parametrize("seam", [pytest.param("answered", marks=pytest.mark.thorough), "results_written"])
def test_killed_worker_loses_nothing_and_does_nothing_twice(there: Site, seam: str) -> None:
    kill_while_it_follows(there, seam)


@pytest.mark.thorough
@pytest.mark.parametrize(
    "seam", ["claimed", "pending_saved", "started", "asked", "answer_received", "before_write", "marked", "completed"]
)
def test_killed_worker_at_other_places(there: Site, seam: str) -> None:
    assert seam in SEAMS
    kill_while_it_follows(there, seam)


@pytest.mark.slow
async def test_stream_goes_on_after_the_primary_has_stepped_down(there: Site) -> None:
    """The only member steps up again after a second."""
    async with following(there, mongodb_max_retries=10):
        filled(there, 1)
        await until(lambda: has_result(there, 0))
        with contextlib.suppress(PyMongoError):  # it closes connections
            there.database.client.admin.command("replSetStepDown", 1, force=True)
        await until(lambda: there.database.client.admin.command("hello")["isWritablePrimary"])
        filled(there, 1, first=1)
        grow(there, 0)
        await until(lambda: has_result(there, 1) and has_result(there, 0, earlier=1))
    check_exactly_once(there, list(there.source.find()))
    assert requests(there) == 3


class Cable:
    """A TCP connection to *port* that can be cut: open connections are reset, and new ones are refused."""

    def __init__(self, port: int) -> None:
        self._target = port
        self._open: set[asyncio.StreamWriter] = set()
        self._is_cut = False
        self._server: asyncio.Server

    @contextlib.asynccontextmanager
    async def plugged(self) -> AsyncIterator[int]:
        """Yield the port to connect to."""
        async with await asyncio.start_server(self._connect, "127.0.0.1", 0) as self._server:
            yield self._server.sockets[0].getsockname()[1]
            self.cut()

    def cut(self) -> None:
        """Reset all connections."""
        self._is_cut = True
        for writer in self._open:
            writer.transport.abort()

    def mend(self) -> None:
        """Allow connections again."""
        self._is_cut = False

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._is_cut:
            writer.transport.abort()
            return
        far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._target)
        self._open |= {writer, far_writer}
        await asyncio.gather(self._copy(reader, far_writer), self._copy(far_reader, writer))
        self._open -= {writer, far_writer}

    async def _copy(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65_536):
                writer.write(data)
                await writer.drain()
        writer.close()


@pytest.mark.slow
async def test_what_changes_while_the_network_is_cut_is_found_afterwards(
    there: Site, members: ReplicaSetMongod, caplog: pytest.LogCaptureFixture
) -> None:
    cable = Cable(members.port)
    async with cable.plugged() as port:
        far = Site(f"mongodb://127.0.0.1:{port}/?directConnection=true", there.database, there.model, there.folder)
        async with following(far, mongodb_max_retries=10):
            filled(there, 1)
            await until(lambda: has_result(there, 0))
            cable.cut()
            filled(there, 1, first=1)
            grow(there, 0)
            await until(lambda: "the change stream is interrupted" in caplog.text)
            cable.mend()
            await until(lambda: has_result(there, 1) and has_result(there, 0, earlier=1))
    check_exactly_once(there, list(there.source.find()))
    assert requests(there) == 3


@pytest.mark.thorough
async def test_two_workers_share_the_stream(there: Site) -> None:
    """Both see each change, and one of them labels the conversation."""
    async with following(there), following(there.sibling("second")):
        documents = filled(there, 10)
        await until(lambda: there.results.count_documents({}) == 10)
        grow(there, 3)
        await until(lambda: has_result(there, 3, earlier=1))
    check_exactly_once(there, [*documents[:3], *there.source.find({"_id": 3}), *documents[4:]])
    assert requests(there) == 11


@pytest.mark.slow
async def test_document_in_work_is_not_taken_again(there: Site) -> None:
    """Each sweep sees it, because it has no result and its lease is this worker's own."""
    assert there.model is not None
    there.model.configure(latency_s=0.5)
    async with following(there, sweep_every_s=0.05, options=RunOptions(dedupe=False)):
        filled(there, 1)
        await until(lambda: has_result(there, 0))
    assert requests(there) == 1


@pytest.mark.slow
def test_sweep_finds_what_no_change_announced(there: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """A lost change costs the time until the next sweep."""

    async def lose(self: StreamIntake, positions: asyncio.Queue[Any]) -> AsyncIterator[Any]:
        await asyncio.sleep(0)
        while not positions.empty():
            positions.get_nowait()
        for nothing in ():
            yield nothing

    monkeypatch.setattr(StreamIntake, "_announced", lose)

    async def follow() -> None:
        async with following(there, sweep_every_s=0.1):
            for number in (0, 1):  # the first sweep may find one
                filled(there, 1, first=number)
                await until(partial(has_result, there, number))

    asyncio.run(follow())


@pytest.mark.thorough
async def test_primary_of_three_members_is_killed(model: FakeOllama, tmp_path: Path) -> None:
    """Another member becomes primary; each conversation gets one result, before, during and after it."""
    arguments = ("--replSet", "three", "--oplogSize", "64")
    with contextlib.ExitStack() as stack:
        servers = [
            stack.enter_context(EmbeddedMongod(tmp_path / str(number), extra_arguments=arguments))
            for number in range(3)
        ]
        hosts = [f"127.0.0.1:{server.port}" for server in servers]
        members = [{"_id": number, "host": host} for number, host in enumerate(hosts)]
        settings = {"electionTimeoutMillis": 2000}
        with MongoClient[dict[str, Any]](f"mongodb://{hosts[0]}/?directConnection=true") as first:
            first.admin.command("replSetInitiate", {"_id": "three", "members": members, "settings": settings})
        uri = f"mongodb://{','.join(hosts)}/?replicaSet=three&w=majority"
        with open_site(uri, "three", model, tmp_path) as site:
            client = site.database.client
            filled(site, 10)
            async with following(site, mongodb_max_retries=10, mongodb_timeout_ms=20_000):
                await until(lambda: site.results.count_documents({}) == 10)
                primary = await asyncio.to_thread(lambda: client.primary)
                assert primary is not None
                next(server for server in servers if server.port == primary[1]).kill()
                for number in range(10, 40):
                    await asyncio.to_thread(site.source.insert_one, conversation(number))
                await asyncio.to_thread(grow, site, 3)
                await until(lambda: site.results.count_documents({}) == 40 and has_result(site, 3, earlier=1), 90)
            check_exactly_once(site, list(site.source.find()))
            assert requests(site) == 41

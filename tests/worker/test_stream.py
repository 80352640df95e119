"""``--mode stream``: new conversations are labelled as they come, grown ones again, and nothing is lost or done twice."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import bson
import pytest
from bson.raw_bson import RawBSONDocument
from pymongo import AsyncMongoClient, MongoClient
from pymongo.database import Database

from embedded.replica_set import ReplicaSetMongod
from storage.change_stream import ChangeWatch, Position
from storage.selection import StateFields
from storage.subset import Subset
from tests.fakes.fake_ollama import FakeOllama
from tests.worker.site import (
    BROKEN,
    Site,
    check_exactly_once,
    check_results,
    conversation,
    filled,
    filled_with_all_shapes,
    model_of,
    requests,
    store_raw,
)
from tests.worker.site import until as wait_until
from tests.worker.stream_site import NEVER_S, following, grow, has_result, stream_processor, until
from utils.batch_file_manager import BatchFiles
from worker.checkpoint import RunStats
from worker.intake import RunOptions
from worker.progress import GroupLines
from worker.stream import StreamState


@pytest.fixture(scope="module")
def client(members: ReplicaSetMongod) -> Iterator[MongoClient[dict[str, Any]]]:
    with MongoClient[dict[str, Any]](members.uri, tz_aware=True) as opened:
        yield opened


@pytest.fixture
def there(
    client: MongoClient[dict[str, Any]], members: ReplicaSetMongod, model: FakeOllama, tmp_path: Path
) -> Iterator[Site]:
    """Return a site on the replica set."""
    database: Database[dict[str, Any]] = client[f"test_{uuid.uuid4().hex[:16]}"]
    yield Site(members.uri, database, model, tmp_path)
    client.drop_database(database.name)


@pytest.mark.thorough
async def test_only_the_subset_is_labelled_new_or_grown(there: Site) -> None:
    """A conversation outside it keeps the label that it has."""
    there.source.insert_one(conversation(1, channel="chat"))
    async with following(there):
        await until(lambda: has_result(there, 1))
    async with following(there, options=RunOptions(subset=Subset({"channel": "email"}))):
        grow(there, 1)
        there.source.insert_many([conversation(2, channel="chat"), conversation(3, channel="email")])
        await until(lambda: has_result(there, 3))
        grow(there, 3)
        await until(lambda: has_result(there, 3, earlier=1))
    assert there.results.count_documents({}) == 2
    assert has_result(there, 1)


async def test_new_conversations_of_all_shapes_are_labelled_from_the_stream(there: Site) -> None:
    """No sweep finds them, because there is none after the start."""
    first = filled(there, 1, first=100)
    async with following(there) as stats:
        await until(lambda: has_result(there, 100))
        documents = filled_with_all_shapes(there, 14)
        await until(lambda: there.source.count_documents({"status": "skipped"}) == 1)
        await until(lambda: there.results.count_documents({}) == 14)
    check_exactly_once(there, [*first, *documents])
    assert requests(there) == 14
    assert stats["documents_processed"] == 14  # the first one is of the pass before
    assert stats["interrupted"]


async def test_grown_conversation_is_labelled_again_and_its_old_label_is_kept(there: Site) -> None:
    filled(there, 1)
    async with following(there):
        await until(lambda: has_result(there, 0))
        old = there.results.find_one({})
        grow(there, 0)
        await until(lambda: has_result(there, 0, earlier=1))
        there.source.update_one({"_id": 0}, {"$set": {"note": "read"}})  # no text
        grow(there, 0)
        await until(lambda: has_result(there, 0, earlier=2))
    check_results(there, there.source.find())
    assert old is not None
    kept = there.results.find_one({})["history"][0]
    assert kept["classification"] == old["classification"]
    for name in ("processed_at", "model_used", "input_sha256"):
        assert kept[name] == old["processing_metadata"][name]
    assert requests(there) == 3


@pytest.mark.thorough
async def test_conversation_without_a_customer_is_labelled_when_the_customer_writes(there: Site) -> None:
    there.source.insert_one(conversation(1, messages=[{"sender": "agent", "text": "How can I help?"}]))
    async with following(there):
        await until(lambda: there.source.find_one({"status": "skipped"}))
        grow(there, 1)
        await until(lambda: has_result(there, 1))
    check_exactly_once(there, list(there.source.find()))


async def test_what_happened_during_the_absence_is_found_through_the_stored_token(there: Site) -> None:
    filled(there, 2)
    async with following(there):
        await until(lambda: has_result(there, 1))
    grow(there, 0)
    filled(there, 1, first=5)
    async with following(there):
        await until(lambda: has_result(there, 0, earlier=1))
        await until(lambda: has_result(there, 5))
    check_results(there, there.source.find())
    assert requests(there) == 4


async def test_changes_that_an_ended_run_had_read_are_read_again(there: Site) -> None:
    """After an outage, the next run follows in the same process; only changes announce that a conversation has grown."""
    filled(there, 1)
    async with stream_processor(there) as processor:
        await processor.run()
        assert processor._stream is not None
        positions: asyncio.Queue[Position] = asyncio.Queue()
        reader = asyncio.create_task(processor._stream.watch.run(positions))
        grow(there, 0)
        while (await positions.get()).change is None:
            pass
        reader.cancel()
        following_again = asyncio.create_task(processor.follow(NEVER_S))
        await until(lambda: has_result(there, 0, earlier=1))
        processor.stop.set()
        await following_again


async def test_conversations_that_grew_during_a_stream_of_another_part_are_found(there: Site) -> None:
    """The other stream reads these changes and drops them."""
    there.source.insert_many([conversation(1, channel="chat"), conversation(2, channel="email")])
    async with following(there):
        await until(lambda: has_result(there, 2))
    async with following(there, options=RunOptions(subset=Subset({"channel": "email"}))):
        grow(there, 1)
        grow(there, 2)
        await until(lambda: has_result(there, 2, earlier=1))
    async with following(there):
        await until(lambda: has_result(there, 1, earlier=1))
    assert requests(there) == 4


@pytest.mark.thorough
async def test_changes_stay_in_mongodb_while_too_many_conversations_wait(
    there: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """New conversations are found by polling meanwhile, and nothing is lost."""
    for name, value in {"MOST_WAITING": 2, "MOST_POSITIONS": 2, "POLL_MIN_S": 0.01, "POLL_MAX_S": 0.01}.items():
        monkeypatch.setattr(f"worker.stream.{name}", value)
    sizes = set()
    filled(there, 12)
    async with stream_processor(there, settle_s=NEVER_S, batch_size=1) as processor:
        await processor.run()
        for number in range(12):
            grow(there, number)
        filled(there, 1, first=12)
        task = asyncio.create_task(processor.follow(NEVER_S))
        assert processor._stream is not None
        while there.results.count_documents({"history": {"$exists": True}}) < 10 or not has_result(there, 12):
            sizes.add(len(processor._stream.waiting))
            await asyncio.sleep(0)
        processor.stop.set()
        await task
    assert max(sizes) <= 6  # those that may wait, and what one look reads


async def test_watch_ends_if_the_driver_swallows_its_cancellation(there: Site) -> None:
    """Python 3.11 swallows one inside PyMongo, also while the stream is opened."""
    client = AsyncMongoClient[dict[str, Any]](there.uri)
    collection = client[there.database.name]["conversation_set"]
    is_opening = asyncio.Event()

    async def watch(*arguments: Any, **options: Any) -> Any:
        is_opening.set()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.Event().wait()
        return await collection.watch(*arguments, **options)

    reader = asyncio.create_task(ChangeWatch(SimpleNamespace(watch=watch), StateFields()).run(asyncio.Queue()))
    await is_opening.wait()
    reader.cancel()
    ended, _ = await asyncio.wait([reader], timeout=5)
    assert ended
    await client.close()


@pytest.mark.parametrize("hostile", [pytest.param("not UTF-8", marks=pytest.mark.thorough), "not BSON"])
async def test_id_that_the_driver_cannot_read_does_not_hold_up_the_stream(there: Site, hostile: str) -> None:
    async with following(there):
        if hostile == "not UTF-8":
            raw = bson.encode({"_id": "ABCD", "text": "Case 1: late", "processed": False}).replace(
                b"ABCD", b"AB\xff\xff"
            )
            there.source.insert_one(RawBSONDocument(raw))
        else:
            store_raw(there.source, {"_id": BROKEN, "text": "Case 1: late", "processed": False})
        filled(there, 1, first=2)
        await until(lambda: has_result(there, 2))
        grow(there, 2)
        await until(lambda: has_result(there, 2, earlier=1))


def elsewhere(site: Site) -> str:
    """Return a token of another collection, which the stream of the source does not contain."""
    with site.database["other"].watch() as stream:
        site.database["other"].insert_one({})
        return str(stream.next()["_id"]["_data"])


@pytest.mark.parametrize("lost", ["00", pytest.param("another", marks=pytest.mark.thorough)])
async def test_lost_token_is_dropped_and_all_documents_are_compared(there: Site, lost: str) -> None:
    """The server refuses what is no token, and a token of a place that it has not."""
    filled(there, 3)
    async with following(there):
        await until(lambda: has_result(there, 2))
    path = there.directory / "stream.json"
    saved = json.loads(path.read_bytes())
    path.write_text(json.dumps({**saved, "token": {"_data": lost if lost != "another" else elsewhere(there)}}))
    grow(there, 1)
    async with following(there):
        await until(lambda: has_result(there, 1, earlier=1))
        filled(there, 1, first=7)
        await until(lambda: has_result(there, 7))
    assert json.loads(path.read_bytes())["token"]["_data"] > saved["token"]["_data"]
    assert requests(there) == 5


async def test_token_of_another_collection_is_not_used(there: Site, tmp_path: Path) -> None:
    """A token is only used for the collection from which it comes."""
    files = BatchFiles(tmp_path / "state")
    state = StreamState(files, "one", ChangeWatch(there.source, StateFields()), 0.0)
    state.token, state.is_comparing = {"_data": "00"}, True
    state.wait_for(bson.ObjectId())
    state.save(at_once=True)
    again = StreamState(files, "one", ChangeWatch(there.source, StateFields()), 0.0)
    assert (again.token, again.is_comparing, list(again.waiting)) == ({"_data": "00"}, True, list(state.waiting))
    part = StreamState(files, "one", ChangeWatch(there.source, StateFields()), 0.0, "part")
    assert (part.token, list(part.waiting)) == ({"_data": "00"}, list(state.waiting))
    other = StreamState(files, "two", ChangeWatch(there.source, StateFields()), 0.0)
    assert (other.token, other.is_comparing, other.waiting) == (None, False, {})


def test_conversation_that_grows_again_waits_again(there: Site, tmp_path: Path) -> None:
    state = StreamState(BatchFiles(tmp_path / "state"), "one", ChangeWatch(there.source, StateFields()), NEVER_S)
    for document_id in (1, 2, 1):
        state.wait_for(document_id)
    assert [document_id for _, document_id in state.waiting.values()] == [2, 1]
    assert state.due(10) == []
    state.settle_s = 0.0
    state.wait_for(2)
    state.wait_for(1)
    assert state.due(10) == [2, 1]


async def test_standalone_server_is_polled(site: Site) -> None:
    """New and grown conversations are found there, too."""
    filled(site, 1)
    async with following(site):
        await until(lambda: has_result(site, 0))
        filled(site, 1, first=3)
        await until(lambda: has_result(site, 3))
        grow(site, 0)
        await until(lambda: has_result(site, 0, earlier=1))
    check_results(site, site.source.find())
    assert requests(site) == 3


async def test_urgent_conversations_go_first_among_new_ones(there: Site) -> None:
    """Those with a priority and those of a rule pass what has been announced before them; nothing twice."""
    model_of(there).configure(latency_s=0.05)
    rules = '[{"query": {"tier": "vip"}, "priority": 3}]'
    async with following(there, max_concurrent=1, batch_size=30, priority_rules=rules):
        waiting = filled(there, 30)
        await until(lambda: requests(there) >= 3)
        urgent = [conversation(500, priority=1), conversation(501, tier="vip")]
        there.source.insert_many(urgent)
        await until(lambda: has_result(there, 500) and has_result(there, 501))
        assert requests(there) < 24
        await until(lambda: there.results.count_documents({}) == 32)
    check_exactly_once(there, [*waiting, *urgent])
    assert requests(there) == 32


async def test_failed_conversation_is_retried_while_the_stream_goes_on(there: Site) -> None:
    async with following(there) as stats:
        assert there.model is not None
        there.model.configure(faults=[{"kind": "wrong_label", "times": 2}])
        filled(there, 1)
        await until(lambda: has_result(there, 0))
    assert (stats["retried"], stats["failed"]) == (1, 0)


def test_worker_waits_in_silence_shows_its_mode_and_ends_with_the_signal(there: Site) -> None:
    filled(there, 1)
    with there.start("--mode", "stream") as worker:
        worker.await_text("Waiting for conversations")
        before = worker.err_so_far()
        heartbeats = there.database["sentimental_analysis_workers"]
        seen = heartbeats.find_one({})
        wait_until(lambda: heartbeats.find_one({"beat_at": {"$ne": seen and seen.get("beat_at")}, "mode": "stream"}))
        assert worker.err_so_far() == before
        assert "mode stream" in there.run("status").out
        worker.send(signal.SIGTERM)
        ended = worker.ended()
    assert ended.code == 130
    assert "Nothing to do" not in ended.out


def test_lines_are_written_when_documents_are_done_and_only_then(capsys: pytest.CaptureFixture[str]) -> None:
    lines = GroupLines(sys.stderr)
    idle, done = RunStats(), RunStats(processed=2, successful=2)
    for stats, in_flight in ((idle, 0), (done, 0), (done, 0)):
        lines.update("job", "running", stats, in_flight)
    assert capsys.readouterr().err.count("\n") == 1
    lines.update("next", "running", idle, 0)
    lines.update("next", "running", RunStats(processed=1, skipped=1), 0)
    assert "1 conversation done; since the start 0 ok, 0 failed, 1 skipped" in capsys.readouterr().err


def test_failed_documents_are_retried_in_the_first_pass_only(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """An outage begins another pass, which must not move the quarantine back again."""
    later: list[RunOptions | None] = []

    async def follow(_processor: Any, _report: Any, after: RunOptions | None, _sweep_every_s: float) -> int:
        later.append(after)
        return 0

    monkeypatch.setattr("commands.stream.follow", follow)
    assert site.run("--mode", "stream", "--retry-failed").code == 0
    assert [options and options.retry_failed for options in later] == [False]


@pytest.mark.parametrize("flags", [("--limit", "3"), ("--only", "stale"), ("--reprocess",), ("--describe",)])
def test_flags_that_select_documents_are_refused(site: Site, flags: tuple[str, ...]) -> None:
    ended = site.run("--mode", "stream", *flags)
    assert (ended.code, flags[0] in ended.err) == (2, True)

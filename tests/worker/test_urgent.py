"""Urgent documents go first, the others keep a share, and no guarantee is lost."""

from __future__ import annotations

import asyncio
import itertools
import signal
import threading
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from pydantic import SecretStr
from pymongo import MongoClient
from pymongo.database import Database

from config import load_settings
from mongo_client import DocumentStore
from storage.extended_json import id_key
from storage.mongo_indexes import urgent_key
from storage.selection import StateFields
from tests.worker.site import (
    Document,
    Site,
    check_calls,
    check_exactly_once,
    conversation,
    documents_of_all_shapes,
    model_of,
    requests,
    sha,
    until,
)
from utils.batch_file_manager import BatchFiles
from utils.failed_documents import FailedDocument
from worker.checkpoint import Checkpoint, RunStats
from worker.intake import DocumentIntake, RunOptions, RunParts
from worker.settlement import Settlement
from worker.staleness import StalenessChecker
from worker.stream import StreamIntake
from worker.urgent import MOST_IN_A_ROW, UrgentLane, keys_in_files

CONCURRENCY = 2


class Lane(UrgentLane):
    """A lane without a run, which a test fills."""

    def __init__(self) -> None:
        options = SimpleNamespace(most_in_flight=CONCURRENCY, batch_size=100)
        self.entries: asyncio.Queue[Any] = asyncio.Queue()
        parts = cast("Any", SimpleNamespace(settings=options))
        settlement = SimpleNamespace(admit=lambda _: None, stats=RunStats())
        super().__init__(parts, cast("Any", None), cast("Any", settlement), self.entries)

    def urgent(self, *priorities: float) -> None:
        """Add a document for each of *priorities*."""
        items = [SimpleNamespace(key=str(priority).encode(), priority=priority) for priority in priorities]
        batch = cast("Any", SimpleNamespace(items=items, unsettled=len(items)))
        self._add(batch, {item.key: item.priority for item in items})

    def normal(self, *names: str) -> None:
        """Add documents that are not urgent."""
        for name in names:
            self.entries.put_nowait(SimpleNamespace(priority=name))

    def taken_in_order(self, number: int) -> list[Any]:
        """Take *number* documents as a worker task does."""
        found = []
        for _ in range(number):
            entry = self.entries.get_nowait()
            found.append(cast("Any", self.exchange(entry) if self.waiting or entry is None else entry).priority)
        return found


def test_most_urgent_is_taken_first_and_each_fourth_place_is_kept() -> None:
    """Urgent documents that come later pass those that wait; the others keep their order."""
    lane = Lane()
    lane.normal("a", "b", "c", "d")
    assert lane.taken_in_order(1) == ["a"]
    lane.urgent(1.0, 2.0, 5.0, 3.0, 4.0)
    assert lane.taken_in_order(4) == [5.0, 4.0, 3.0, "b"]
    lane.urgent(9.0)
    lane.normal("e")
    assert lane.taken_in_order(6) == [9.0, 2.0, 1.0, "c", "d", "e"]
    assert (lane.waiting, lane.entries.empty()) == (0, True)


def test_share_is_kept_for_documents_behind_urgent_ones() -> None:
    """A page that is read while only urgent documents wait gets its share at once."""
    lane = Lane()
    lane.urgent(*map(float, range(1, 21)))
    assert all(isinstance(one, float) for one in lane.taken_in_order(5))  # nobody else waits
    lane.normal(*"abcd")
    places = [isinstance(one, str) for one in lane.taken_in_order(19)]
    assert places.count(True) == 4
    assert all(any(places[start : start + 4]) for start in range(12))  # docs/order.md: at least one of four
    assert (lane.waiting, lane.entries.empty()) == (0, True)


def test_document_of_the_queue_that_turns_out_urgent_is_put_first() -> None:
    lane = Lane()
    lane.normal("a", "b", "c")
    for entry in lane.entries._queue:  # type: ignore[attr-defined]
        entry.key = entry.priority.encode()
    lane._promote({b"c": 2.0, b"elsewhere": 1.0})
    assert lane.taken_in_order(3) == ["c", "a", "b"]
    assert (lane.waiting, lane._settlement.stats.urgent, lane.entries.empty()) == (0, 1, True)


def asked(site: Site, documents: Iterable[Document]) -> list[int]:
    """Return the ids of *documents* in the order in which the model was asked about them."""
    ids = {sha(document): document["_id"] for document in documents}
    found = (ids.get(str(request.get("user_sha256"))) for request in model_of(site).requests())
    return [number for number in found if number is not None]


@contextmanager
def inserted(site: Site, documents: list[Document], after: int) -> Iterator[None]:
    """Insert *documents* while the block runs, when the model has got *after* requests."""

    def insert() -> None:
        with MongoClient[Document](site.uri) as client:
            until(lambda: requests(site) >= after)
            client[site.database.name]["conversation_set"].insert_many(documents)

    thread = threading.Thread(target=insert)
    thread.start()
    try:
        yield
    finally:
        thread.join()


def longest_row(order: Iterable[int], urgent: set[int]) -> int:
    return max(
        len(list(group)) if is_urgent else 0 for is_urgent, group in itertools.groupby(order, urgent.__contains__)
    )


def test_urgent_documents_pass_those_that_wait(site: Site) -> None:
    """Those with a priority and those of a rule, whether they are there at the start or come later; nothing twice."""
    model_of(site).configure(latency_s=0.02, slots=CONCURRENCY)
    waiting = [conversation(number) for number in range(80)]
    early = [conversation(500, priority=1), conversation(501, tier="vip"), conversation(502, priority=0, tier="vip")]
    late = [conversation(900 + number, priority=7) for number in range(6)]
    late.append(
        {"_id": 910, "text": "Case 00910: it burns", "metadata": {}, "processed": False, "processing_attempts": 0}
    )
    late[-1]["priority"] = 9.5
    site.source.insert_many([*waiting, *early])
    site.settings |= {
        "MAX_CONCURRENT": str(CONCURRENCY),
        "PRIORITY_RULES": '[{"query": {"tier": "vip"}, "priority": 3}]',
    }
    with inserted(site, late, after=10):
        ended = site.run("--logs")
    assert ended.code == 0, ended.err
    check_exactly_once(site, [*waiting, *early, *late])
    order = asked(site, [*waiting, *early, *late])
    urgent = {document["_id"] for document in late} | {500, 501}
    assert max(order.index(number) for number in urgent) < 70 < order.index(502)
    assert (
        longest_row(order, urgent) <= MOST_IN_A_ROW + CONCURRENCY
    )  # calls that start together may arrive in any order
    assert len(order) == len(waiting) + len(early) + len(late)
    index = list(urgent_key(StateFields(), "priority"))
    assert [
        one["partialFilterExpression"] for one in site.source.index_information().values() if one["key"] == index
    ] == [{"priority": {"$gt": 0}}]


def test_limit_counts_urgent_documents(site: Site) -> None:
    """--limit N takes N documents in all."""
    model_of(site).configure(latency_s=0.02, slots=CONCURRENCY)
    site.source.insert_many([conversation(number) for number in range(40)])
    site.source.insert_many([conversation(500 + number, priority=1) for number in range(20)])
    ended = site.run("--limit", "30", "--batch-size", "10", MAX_CONCURRENT=str(CONCURRENCY))
    assert ended.code == 0, ended.err
    assert (site.results.count_documents({}), requests(site)) == (30, 30)
    assert site.source.count_documents({"status": "pending"}) == 30
    assert site.database["conversation_set_leases"].count_documents({}) == 0


async def test_documents_of_local_files_are_left_to_these_files(tmp_path: Path) -> None:
    """After a crash, their leases may have expired and their statuses may be pending."""
    files = BatchFiles(tmp_path)
    files.save_pending([conversation(1)])
    failure = FailedDocument(2, "llm_failed", conversation(2), 0, "timeout", "late")
    files.save_failed("retry", 7, [failure])
    (tmp_path / "pending/batch_009_pending.json").write_text("{}")  # corrupt; a run sets it aside
    assert keys_in_files(tmp_path) == {id_key(1), id_key(2)}
    lane, taken = Lane(), []

    class Intake:
        def free(self, keys: Iterable[bytes], left_alone: set[bytes]) -> list[bytes]:
            return [key for key in keys if key not in left_alone]

        async def urgent(self, document_ids: list[Any]) -> None:
            taken.extend(document_ids)

    lane._intake = cast("Any", Intake())
    lane._parts = cast("Any", SimpleNamespace(files=files))
    await lane._take([(1.0, number, 10) for number in (1, 2, 3)])
    assert taken == [3]


@pytest.fixture
async def parts(mongodb_uri: str, database: Database[Document], tmp_path: Path) -> AsyncIterator[RunParts]:
    """Return the parts of a run that has not started."""
    settings = load_settings(None, mongodb_uri=SecretStr(mongodb_uri), db_name=database.name)
    store, files, checkpoint = DocumentStore(settings), BatchFiles(tmp_path), Checkpoint("source", "job")
    yield RunParts(settings, RunOptions(), store, files, checkpoint, asyncio.Event(), cast("Any", None))
    await store.close()


def settlement_of(parts: RunParts, *, replaces: bool = False) -> Settlement:
    return Settlement(parts.store, parts.files, parts.checkpoint, replaces=replaces, on_rejected=lambda _: None)


async def test_neither_lane_takes_what_the_other_has_in_work(parts: RunParts, database: Database[Document]) -> None:
    """Single queries look pending while they are in work."""
    queries = [{"_id": number, "text": f"Case {number}", "processed": False} for number in range(6)]
    database["conversation_set"].insert_many(queries)
    intake = DocumentIntake(replace(parts, options=RunOptions(batch_size=3)), settlement_of(parts))
    pages = intake.fresh()
    first = await anext(pages)
    assert first.document_ids == [0, 1, 2]
    urgent = await intake.urgent([4, 1])
    assert urgent is not None
    assert urgent.document_ids == [4]
    assert await intake.urgent([0, 4]) is None
    assert [batch.document_ids async for batch in pages] == [[3, 5]]


async def test_stream_and_urgent_lane_take_nothing_twice(
    parts: RunParts, database: Database[Document], tmp_path: Path
) -> None:
    """Documents in work look pending in a stream, and their leases are those of this worker."""
    queries = [{"_id": number, "text": f"Case {number}", "processed": False} for number in range(4)]
    database["conversation_set"].insert_many(queries)
    kinds = StalenessChecker(parts.store, tmp_path, None)
    parts = replace(parts, options=RunOptions(only="changed"), kinds=kinds)
    intake = StreamIntake(cast("Any", None), parts, settlement_of(parts, replaces=True))

    async def announced(*document_ids: int) -> list[list[int]]:
        documents = await parts.store.read_documents("sweep", list(document_ids))
        return [batch.document_ids async for batch in intake._new(documents)]

    assert await announced(0, 1) == [[0, 1]]
    urgent = await intake.urgent([1, 2])
    assert urgent is not None
    assert urgent.document_ids == [2]
    assert intake.free([id_key(number) for number in range(4)], set()) == [id_key(3)]
    assert await announced(0, 1, 2, 3) == [[3]]


async def test_limit_holds_while_a_page_gives_back_its_surplus(
    parts: RunParts, database: Database[Document], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Urgent documents are taken at the same time."""
    urgent: list[Any] = []
    release = parts.store.release

    async def release_and_take(document_ids: list[Any]) -> None:
        await release(document_ids)
        urgent.append(await intake.urgent([9]))

    monkeypatch.setattr(parts.store, "release", release_and_take)
    database["conversation_set"].insert_many([conversation(number) for number in range(10)])
    intake = DocumentIntake(replace(parts, options=RunOptions(batch_size=9, limit=4)), settlement_of(parts))
    assert [batch.document_ids async for batch in intake.fresh()] == [[0, 1, 2, 3]]
    assert urgent == [None]


def test_a_kill_with_urgent_documents_in_work(site: Site) -> None:
    """The next run finishes what both lanes had in work; nothing is lost, nothing twice."""
    documents = documents_of_all_shapes(60)
    for document in documents[3::4]:
        document["priority"] = 1 + document["_id"] % 3
    site.source.insert_many(documents)
    model_of(site).configure(latency_s=0.05)
    killed = site.run("--batch-size", "10", plan={"seam": "urgent_taken"})
    assert killed.code == -signal.SIGKILL, killed.err
    ended = site.run("--logs", "--batch-size", "10")
    assert ended.code == 0, ended.err
    check_exactly_once(site, documents)
    check_calls(site, documents, repeated=6)


@pytest.mark.thorough
def test_wrong_rule_is_named(site: Site) -> None:
    """An operator that MongoDB does not know ends the start, with the setting in the message."""
    ended = site.run(PRIORITY_RULES='[{"query": {"tier": {"$is": 1}}, "priority": 3}]')
    assert ended.code == 2
    assert "PRIORITY_RULES" in ended.err

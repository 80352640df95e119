"""The memory of a run depends on the texts of a page, not on what else its documents carry."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import bson
import pytest
from pymongo.database import Database

from aggregator import aggregate_conversation
from config import load_settings
from domain.conversation import source_paths
from mongo_client import DocumentStore
from storage.extended_json import SMALL_BYTES
from storage.mongo_pages import PAGE_BYTES, SAMPLE_BYTES
from storage.selection import UNREADABLE, StateFields
from tests.worker.site import ROOT, Site, conversation, documents_of_all_shapes, filled
from worker.plan import SAMPLE_FIELDS, SAMPLE_SIZE
from worker.settlement import is_query

MOST_KB = 200_000
ATTACHMENT = 8_000_000
# The peak of the worker alone: what it inherits from pytest does not count after an exec.
PROGRAM = """
import atexit, re, resource, runpy, sys
resource.setrlimit(resource.RLIMIT_AS, (512 << 20, 512 << 20))
atexit.register(lambda: print(re.search("VmHWM:.*", open("/proc/self/status").read()).group()))
sys.argv, sys.path[0] = ["cli.py"], sys.argv[1]
runpy.run_path(sys.path[0] + "/cli.py", run_name="__main__")
"""


class Recorded(Mapping[str, Any]):
    """A document that notes which of its fields are looked at."""

    def __init__(self, document: dict[str, Any], seen: set[str]) -> None:
        self._document, self._seen = document, seen

    def __getitem__(self, name: str) -> Any:
        self._seen.add(name)
        return self._document[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._document)

    def __len__(self) -> int:
        return len(self._document)


def test_fields_that_are_read_are_asked_for() -> None:
    """A shape with another field needs it in ``source_paths``, or its documents would look empty."""
    seen: set[str] = set()
    paths = source_paths(StateFields(), ["channel"])
    for document in documents_of_all_shapes(6):
        aggregate_conversation(Recorded(document, seen))
        kept = {name: value for name, value in document.items() if name in paths}
        assert aggregate_conversation(kept) == aggregate_conversation(document)
        assert is_query(StateFields(), kept) is is_query(StateFields(), document)
    assert seen <= {*paths, "metadata", "_id", UNREADABLE}


@pytest.mark.parametrize("keeps", [False, True])
async def test_pages_hold_what_is_used(mongodb_uri: str, database: Database[dict[str, Any]], keeps: bool) -> None:
    """Beside the fields and within the turns; with STORE_ORIGINAL_CONVERSATION, results need the whole document."""
    document = conversation(1, attachment=b"x")
    document["messages"][0]["file"] = bytes(SMALL_BYTES)
    database["conversation_set"].insert_one(document)
    settings = load_settings(mongodb_uri=mongodb_uri, db_name=database.name, store_original_conversation=keeps)
    store = DocumentStore(settings)
    try:
        (read,) = await store.read_page("pending", [], [], 10)
    finally:
        await store.close()
    assert read == (document if keeps else conversation(1))


async def test_pages_are_bounded_by_bytes(mongodb_uri: str, database: Database[dict[str, Any]]) -> None:
    """Each holds at least one document, and all documents are read."""
    texts = [PAGE_BYTES // 3, PAGE_BYTES // 3, PAGE_BYTES // 3, PAGE_BYTES + 1, 1, 1]
    database["conversation_set"].insert_many([conversation(n, "x" * size) for n, size in enumerate(texts)])
    store = DocumentStore(load_settings(mongodb_uri=mongodb_uri, db_name=database.name))
    pages, after = [], list[Any]()
    try:
        while page := await store.read_page("pending", after, [], 100):
            pages.append([document["_id"] for document in page])
            after = [page[-1]["_id"]]
    finally:
        await store.close()
    assert pages == [[0, 1, 2], [3], [4, 5]]


def peak_kb(site: Site, **settings: str) -> int:
    """Run a worker to its end in an address space of 512 MB; return its peak."""
    ended = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(ROOT)],
        env=site.environment(MONGODB_TIMEOUT_MS="60000", **settings), capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    return int(ended.stdout.rsplit("VmHWM:", 1)[1].split()[0])


@pytest.mark.thorough
@pytest.mark.timeout(300)
@pytest.mark.parametrize("place", ["beside", "within"])
def test_attachments_are_not_held(site: Site, place: str) -> None:
    """A hundred documents of 8 MB, in one page by their number."""
    for number in range(100):
        document = conversation(number)
        (document if place == "beside" else document["messages"][0])["attachment"] = bytes(ATTACHMENT)
        site.source.insert_one(document)
    assert peak_kb(site, BATCH_SIZE="100") < MOST_KB
    assert site.results.count_documents({}) == 100


@pytest.mark.thorough
def test_few_attachments_are_not_held(site: Site) -> None:
    """Ten of them alone would exceed the bound."""
    filled(site, 30)
    site.source.update_many({"_id": {"$lt": 10}}, {"$set": {"attachment": bytes(ATTACHMENT)}})
    assert peak_kb(site, BATCH_SIZE="100") < 120_000
    assert site.results.count_documents({}) == 30


async def test_sample_holds_texts_up_to_a_limit(mongodb_uri: str, database: Database[dict[str, Any]]) -> None:
    """It is drawn before the first page: attachments in turns are not sent, and long texts end it early."""
    for number in range(30):
        document = conversation(number, "x" * (SAMPLE_BYTES // 10 if number % 2 else 10), attachment=bytes(100_000))
        document["messages"][0]["file"] = bytes(100_000)
        database["conversation_set"].insert_one(document)
    store = DocumentStore(load_settings(mongodb_uri=mongodb_uri, db_name=database.name))
    try:
        drawn = [document async for document in store.sample(SAMPLE_SIZE, SAMPLE_FIELDS)]
    finally:
        await store.close()
    sizes = [len(bson.encode(document)) for document in drawn]
    assert sum(sizes) <= SAMPLE_BYTES * 1.2
    assert sorted(size > 100_000 for size in sizes)[-10:] == [True] * 10
    assert not any(50_000 < size < 1_000_000 for size in sizes), "an attachment came along"

"""``cli.py index`` is killed (SIGKILL) at each step, and run again: nothing is lost, and nothing stored is paid for twice."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pymongo import MongoClient

from database_docs.items import Kind
from embedding_index.embedding_run import STORING_THREADS
from embedding_index.search_entries import SearchEntries
from embedding_index.vector_ledger import VectorLedger
from tests.embedding_index.index_entries import Searcher
from tests.embedding_index.index_site import BATCH_SIZE, CONCURRENCY, ROOT, WRITE_AT, IndexSite
from tests.embedding_index.test_vector_search import (
    test_graph_that_does_not_match_is_not_used_and_is_rebuilt as graph_test,
)
from tests.fakes.fake_openai import FakeOpenAI, FakeOpenAIError

TABLES = 8  # and 7 relationships: 3 + 3 calls, 2 + 2 writes to ChromaDB
CONVERSATIONS = 14
VECTORS = "SELECT hash, vector FROM vectors"
IN_FLIGHT = (CONCURRENCY + STORING_THREADS) * BATCH_SIZE

STATES = "database_docs.documentation_store.DocumentationStore"
FILE = "storage.state_file.StateFile"
LEDGER = "embedding_index.vector_ledger.VectorLedger"
ENTRIES = "embedding_index.search_entries.SearchEntries"
PROVIDER = "embedding_index.providers.openai_embeddings.OpenAIProvider"
STORE = "embedding_index.vector_store.SQLVectorStore"

COPYING = [
    (f"{STORE}._publish:before", 1),
    ("embedding_index.vector_ledger.os.replace:before", 1),
    ("embedding_index.vector_ledger.os.replace:after", 1),
    (f"{STORE}._publish:after", 1),
]

# A point at which the process dies, and the number of the passage. Only FIRST is in the usual suite, with a database.
FIRST = (f"{PROVIDER}.embed:after", 3)
MORE = [
    (f"{ENTRIES}.put:after", 1),
    (f"{LEDGER}.add:after", 2),
    (f"{STATES}.mark_ended:after", 1),
    *((f"{FILE}._prepare:{when}", nth) for when in ("before", "after") for nth in (1, 2)),
    *((f"{PROVIDER}.embed:before", nth) for nth in (1, 2)),
    *((f"{PROVIDER}.embed:after", nth) for nth in (1, 5)),
    *((f"{LEDGER}.add:before", nth) for nth in (1, 4)),
    (f"{LEDGER}.add:after", 5),
    *((f"{ENTRIES}.put:before", nth) for nth in (1, 2)),
    *((f"{ENTRIES}.put:after", nth) for nth in (2, 3)),
    (f"{STATES}.mark_ended:before", 2),
    (f"{STATES}.mark_ended:after", 3),
    *COPYING,
]
OF_DATABASES = [(f"{STATES}.sync_database:before", 1), (f"{STATES}.sync_database:after", 1)]
OF_CONVERSATIONS = [
    (f"{STATES}.begin_pass:after", 1),
    (f"{STATES}.offer:after", 1),
    (f"{STATES}.end_pass:after", 1),
    (f"{LEDGER}.keep_only:before", 1),
    (f"{LEDGER}.keep_only:after", 1),
]


@pytest.fixture(scope="module")
def running() -> Iterator[FakeOpenAI]:
    with FakeOpenAI(dimensions=512) as started:
        yield started


@pytest.fixture
def site(running: FakeOpenAI, mongodb_uri: str, db_name: str, tmp_path: Path) -> Iterator[IndexSite]:
    running.renew()
    with MongoClient[dict[str, Any]](mongodb_uri, tz_aware=True) as client:
        yield IndexSite(tmp_path, running, mongodb_uri, client[db_name])


def fill(site: IndexSite, source: str) -> None:
    if source == "conversations":
        site.flags = ("--source", "conversations")
        site.add_conversations(range(CONVERSATIONS))
    else:
        site.make_database(TABLES)


def die(site: IndexSite, point: str, nth: int, *flags: str) -> None:
    """Kill a run at *point*."""
    ended = site.run(*(flags or ("--batch",)), plan={"point": point, "nth": nth, "write_at": WRITE_AT})
    assert ended.code == -signal.SIGKILL, f"it never came to {point}: {ended.err}"


def finish(site: IndexSite, *flags: str, kills: int = 1) -> None:
    """Run to the end: stored vectors are not paid for again, and only calls in flight at a kill are paid for twice."""
    before, stored = site.billed(), site.stored()
    assert len(before.keys() - stored) <= kills * IN_FLIGHT
    site.run_well(*flags)
    after = site.billed()
    repeated = {key for key, times in after.items() if times > before.get(key, 0) and key in before}
    assert repeated.isdisjoint(stored), "what was stored was paid for again"
    assert sum(after.values()) - len(after) <= kills * IN_FLIGHT
    if kills == 1:
        assert max(after.values()) <= 2
    site.check()


def cases() -> Iterator[Any]:
    for source, own in (("database", OF_DATABASES), ("conversations", OF_CONVERSATIONS)):
        for point, nth in [FIRST, *MORE, *own]:
            is_usual = source == "database" and (point, nth) == FIRST
            marks = () if is_usual else pytest.mark.thorough
            yield pytest.param(source, point, nth, id=f"{source}-{point}-{nth}", marks=marks)


@pytest.mark.parametrize(("source", "point", "nth"), list(cases()))
def test_a_kill_at_each_step(site: IndexSite, source: str, point: str, nth: int) -> None:
    """The same command finishes the work after any step; only calls in flight are paid for twice."""
    fill(site, source)
    die(site, point, nth)
    finish(site)


CHANGES = [
    (f"{ENTRIES}.delete:before", 1),
    (f"{ENTRIES}.delete:after", 1),
    (f"{STATES}.remove:before", 1),
    (f"{STATES}.remove:after", 1),
]
REBUILDS = [
    (f"{STATES}.mark_pending:before", 1),
    (f"{STATES}.mark_pending:after", 1),
    (f"{ENTRIES}.replace:before", 1),
    (f"{ENTRIES}._put:after", 1),  # all is replaced, and nothing is committed
    (f"{ENTRIES}.replace:after", 1),
    *COPYING,
]


def thoroughly(points: list[tuple[str, int]], *always: int) -> list[Any]:
    """*points* as parameters, of which only those at the places *always* are of each run of the tests."""
    return [
        pytest.param(*point, marks=() if place in always else pytest.mark.thorough)
        for place, point in enumerate(points)
    ]


@pytest.mark.parametrize(("point", "nth"), thoroughly(CHANGES))
def test_a_kill_while_tables_leave_the_index(site: IndexSite, point: str, nth: int) -> None:
    """Dropped tables have left the index afterwards, after any step."""
    site.make_database(TABLES)
    site.run_well()
    site.make_database(TABLES - 3)
    die(site, point, nth)
    finish(site)
    assert max(site.billed().values()) == 1


FORGETTING = [
    *CHANGES,
    (f"{ENTRIES}.put:after", 1),
    (f"{LEDGER}.keep_only:before", 1),
    (f"{LEDGER}.keep_only:after", 1),
    *COPYING,
]


@pytest.mark.parametrize(("point", "nth"), thoroughly(FORGETTING, 6))
def test_deleted_and_changed_conversations_leave_every_file(site: IndexSite, point: str, nth: int) -> None:
    """After a pass no file has their vectors or labels, even if an earlier pass was killed."""
    fill(site, "conversations")
    site.mongo["sentimental_analysis"].update_one(
        {"source_conversation_id": 3}, {"$set": {"classification.categorization": "A quokka of Perth is angry."}}
    )
    site.run_well()
    old = {row["hash"].hex(): row["vector"] for row in site.rows("vectors.sqlite3", "SELECT hash, vector FROM vectors")}
    assert all(site.files_with(vector) for vector in old.values()), "the rest would prove nothing"
    assert site.files_with(b"quokka") == ["index.sqlite3", "vectors.copy.sqlite3", "vectors.sqlite3"]
    before = set(site.hashes())
    site.remove_conversations([3, 4])
    site.say(5, "I never said that.")
    site.add_conversations([CONVERSATIONS])
    die(site, point, nth)
    finish(site)
    gone = before - set(site.hashes())
    assert len(gone) == 3
    for key in gone:
        assert site.files_with(old[key]) == []
        assert site.files_with(bytes.fromhex(key)) == []
    assert site.files_with(b"quokka") == []
    assert all(site.files_with(vector) for key, vector in old.items() if key not in gone)


def test_a_changed_text_that_fails_leaves_no_old_vector(site: IndexSite) -> None:
    """The old text no longer finds it; the new text does as soon as it can be embedded."""
    fill(site, "conversations")
    site.run_well()
    old = {row["hash"].hex(): row["vector"] for row in site.rows("vectors.sqlite3", VECTORS)}
    before = site.hashes()
    site.say(5, "poison")
    site.fake.configure(faults=[{"kind": "bad_request_400", "when": {"text": "poison"}}])
    assert site.run("--batch").code == 1
    (gone,) = before - site.hashes()
    assert site.files_with(old[gone]) == []
    site.fake.configure(faults=[])
    finish(site)


@pytest.mark.parametrize(("point", "nth"), thoroughly(REBUILDS, 3))
def test_a_kill_in_rebuild_and_in_mending(site: IndexSite, point: str, nth: int) -> None:
    """Nothing is paid for: the entries are made from stored vectors."""
    site.make_database(TABLES)
    site.run_well()
    paid = site.billed()
    die(site, point, nth, "--rebuild")
    finish(site)
    with VectorLedger(site.index / "vectors.sqlite3") as ledger:
        SearchEntries(ledger).delete(Kind.TABLE, ["t001", "t002"])  # a loss that nobody can explain
    finish(site)
    assert site.billed() == paid


@pytest.mark.parametrize(("point", "nth"), thoroughly([(f"{PROVIDER}.embed:after", 2), *REBUILDS]))
def test_a_kill_in_a_rebuild_with_another_model(site: IndexSite, point: str, nth: int) -> None:
    """Each text is paid for once per model, except calls in flight; going back to the first model costs nothing."""
    site.make_database(TABLES)
    site.run_well()
    texts = site.billed().keys()
    site.settings["EMBEDDING_MODEL"] = "text-embedding-3-large"
    assert site.run("--batch").code == 2
    die(site, point, nth, "--rebuild")
    ended = site.run("--batch")
    assert ended.code in (0, 2), ended.err
    if ended.code == 2:
        assert "--rebuild" in ended.err
        site.run_well("--rebuild")
    billed = site.billed()
    assert billed.keys() == texts
    assert all(2 <= times <= 3 for times in billed.values())
    assert sum(times == 3 for times in billed.values()) <= IN_FLIGHT
    site.check()
    del site.settings["EMBEDDING_MODEL"]
    site.run_well("--rebuild")
    assert site.billed() == billed
    site.check()


@pytest.mark.slow
@pytest.mark.parametrize("source", ["database", pytest.param("conversations", marks=pytest.mark.thorough)])
def test_random_kills(site: IndexSite, source: str, request: pytest.FixtureRequest) -> None:
    """One job is killed repeatedly (SIGKILL): each stored answer was paid for once."""
    kills = request.config.getoption("--kills") * (6 if source == "database" else 3) // 10
    seed = request.config.getoption("--seed")
    seed = random.randrange(1_000_000) if seed is None else seed
    print(f"seed {seed}, {kills} kills")
    moments = random.Random(seed)
    fill(site, source)
    if source == "database":
        site.make_database(8 * kills + 8)  # enough for a run to be killed before its end
    else:
        site.add_conversations(range(8 * kills))
    site.fake.configure(latency_s=0.05)
    killed = 0
    for _ in range(kills):
        asked = site.fake.stats().get("requests:embeddings.create", 0)
        stored = site.stored()
        paid = site.billed()
        with site.start("--batch") as process:
            if moments.random() < 0.7:
                with suppress(FakeOpenAIError):
                    site.fake.wait_for("requests:embeddings.create", asked + moments.randint(1, 4), timeout_s=2)
            time.sleep(moments.uniform(0, 0.1))
            process.kill()
            killed += process.wait() == -signal.SIGKILL
        now = site.billed()
        assert all(now[key] == paid[key] for key in stored), "what was stored was paid for again"
        assert len(now.keys() - site.stored()) <= IN_FLIGHT
    assert killed > kills // 2, "most runs ended before they were killed: this proves little"
    site.fake.configure(latency_s=0.0)
    finish(site, kills=killed)


def test_a_killed_holder_lets_the_next_one_in(site: IndexSite) -> None:
    """A second writer is refused and changes nothing; a search needs no lock, and a killed writer holds none."""
    site.make_database(TABLES - 4)
    site.run_well()
    site.make_database(TABLES)
    site.fake.configure(faults=[{"kind": "hang", "when": {"route": "embeddings.create", "from": 2}}])
    with site.start("--batch") as first:
        site.fake.wait_for("faults:hang", 1)
        second = site.run("--batch")
        assert second.code == 5
        assert (
            second.err.strip().splitlines()[-1].endswith("wait for it to end, or set INDEX_DIR to another directory.")
        )
        site.fake.configure(faults=[])
        assert site.run("--search", "notes").code == 0
        first.kill()
        first.wait()
    finish(site)


def test_search_beside_a_killed_writer_sees_committed_steps(site: IndexSite) -> None:
    """A reader sees each committed step, before the kill, after it, and after the next run."""
    site.make_database(TABLES)
    site.run_well()
    vectors = {row["hash"].hex(): np.frombuffer(row["vector"], "<f4") for row in site.rows("vectors.sqlite3", VECTORS)}
    wanted = {item["name"]: item["hash"].hex() for item in site.rows("index.sqlite3", "SELECT * FROM items")}
    searcher = Searcher(site.index)

    def first(name: str) -> str:
        return searcher.hits(vectors[wanted[name]], limit=1)[0].name

    assert first("t007") == "t007"
    site.make_database(TABLES - 1)
    die(site, f"{ENTRIES}.delete:after", 1)
    assert (first("t007") == "t007", first("t005")) == (False, "t005")
    assert site.run("--search", "notes").code == 0
    finish(site)
    assert max(site.billed().values()) == 1
    assert (first("t007") == "t007", first("t005")) == (False, "t005")
    found = json.loads(site.run("--search", "notes", "--json").out)
    assert len(found) == 5
    searcher.close()


@pytest.mark.parametrize(
    "file_bytes",
    [200_000, *(pytest.param(size, marks=pytest.mark.thorough) for size in (2_000, 10_000, 60_000, 260_000))],
)
@pytest.mark.parametrize("source", ["database", pytest.param("conversations", marks=pytest.mark.thorough)])
def test_no_room_on_the_disk(site: IndexSite, source: str, file_bytes: int) -> None:
    """A full disk ends a run with one sentence and exit code 2; with free space the same command resumes."""
    fill(site, source)
    for is_first in (True, False):
        full = site.run("--batch", plan={"file_bytes": file_bytes})
        if not is_first and full.code == 0:
            break  # the first one left little enough to be written
        assert full.code == 2, full.err
        last = full.err.strip().splitlines()[-1]
        assert "Traceback" not in full.err
        assert "free space" in last
        billed = site.billed()
    assert sum(billed.values()) - len(billed) <= 2 * IN_FLIGHT
    finish(site, kills=2)


def test_a_directory_that_cannot_be_written(site: IndexSite) -> None:
    """Nothing is sent if nothing can be stored."""
    site.make_database(2)
    (site.folder / "file").write_text("")
    ended = site.run("--batch", "--index-dir", str(site.folder / "file" / "index"))
    assert ended.code == 2
    assert "fix its permissions, or set INDEX_DIR to another directory" in ended.err
    assert site.billed() == {}


def spoil(path: Path, how: str) -> None:
    """Damage the file *path*."""
    if how == "deleted":
        path.unlink()
    elif how == "overwritten":
        path.write_bytes(random.Random(1).randbytes(path.stat().st_size))
    elif how == "emptied":
        path.write_bytes(b"")
    else:
        os.truncate(path, path.stat().st_size // 3)


# The message: none, or the reason and the remedy, which is then applied.
RESTORED = "vectors.sqlite3 was missing; it is restored from vectors.copy.sqlite3"
DAMAGE = {
    ("index.sqlite3", "deleted"): None,
    ("index.sqlite3", "emptied"): None,
    ("index.sqlite3", "overwritten"): "remove it with its -wal and -shm, and index again",
    ("index.sqlite3", "truncated"): "remove it with its -wal and -shm, and index again",
    ("vectors.sqlite3", "deleted"): RESTORED,
    ("vectors.sqlite3", "emptied"): RESTORED,
    ("vectors.sqlite3", "overwritten"): "delete it with its -wal and -shm and run `python cli.py index --batch`",
    ("vectors.sqlite3", "truncated"): "delete it with its -wal and -shm and run `python cli.py index --batch`",
    ("vectors.copy.sqlite3", "deleted"): None,
    ("vectors.copy.sqlite3", "emptied"): None,
    ("vectors.copy.sqlite3", "overwritten"): None,
    ("vectors.copy.sqlite3", "truncated"): None,
    (".lock", "deleted"): None,
}
USUAL_DAMAGE = {
    ("index.sqlite3", "truncated"),
    ("vectors.sqlite3", "deleted"),
    ("vectors.sqlite3", "overwritten"),
}


@pytest.mark.parametrize(
    ("name", "how"),
    [pytest.param(*damage, marks=() if damage in USUAL_DAMAGE else pytest.mark.thorough) for damage in DAMAGE],
)
def test_a_damaged_file_costs_nothing(site: IndexSite, name: str, how: str) -> None:
    """For each file, the remedy in the message works, nothing is paid for again, and searches find everything."""
    site.make_database(TABLES)
    site.run_well()
    paid, stored = site.billed(), site.stored()
    spoil(site.index / name, how)
    told = DAMAGE[name, how]
    ended = site.run("--batch")
    assert told is None or told in ended.err
    if "remove it" in (told or "") or "delete it" in (told or ""):
        assert ended.code == 2
        assert len(ended.err.strip().splitlines()) == 1
        for path in site.index.glob(f"{name}*"):
            path.unlink()
        ended = site.run("--batch")
    assert ended.code == 0, ended.err
    assert (site.billed(), site.stored()) == (paid, stored)
    site.check()


def test_items_are_paid_again_if_ledger_and_copy_are_lost(site: IndexSite) -> None:
    """The next run embeds everything again and says how many items."""
    site.make_database(TABLES)
    site.run_well()
    spoil(site.index / "vectors.sqlite3", "deleted")
    spoil(site.index / "vectors.copy.sqlite3", "deleted")
    report = site.run_well()
    assert (report["indexed"], report["failed"]) == (15, 0)
    assert set(site.billed().values()) == {2}
    site.check()


@pytest.mark.thorough
def test_the_states_of_both_sources_are_lost(site: IndexSite) -> None:
    """Both sources are read again, the database first; no vector is lost or paid for again."""
    site.make_database(3)
    site.run_well()
    fill(site, "conversations")
    site.run_well()
    expected = site.database_ids() | set(site.conversations())
    paid = site.billed()
    site.check(expected)
    spoil(site.index / "index.sqlite3", "deleted")
    site.flags = ()
    site.run_well()
    site.flags = ("--source", "conversations")
    site.run_well()
    assert site.billed() == paid
    site.check(expected)


ROWS = {
    "the process was killed": test_random_kills,
    "killed during `--rebuild`": test_a_kill_in_rebuild_and_in_mending,
    "another process writes the index (exit 5)": test_a_killed_holder_lets_the_next_one_in,
    "a search runs beside a writer": test_search_beside_a_killed_writer_sees_committed_steps,
    "the disk is full (exit 2)": test_no_room_on_the_disk,
    "`INDEX_DIR` cannot be made or written (exit 2)": test_a_directory_that_cannot_be_written,
    "`chroma/` is damaged or gone": graph_test,
    "`index.sqlite3` is gone": test_the_states_of_both_sources_are_lost,
    "`index.sqlite3` is damaged (exit 2)": test_a_damaged_file_costs_nothing,
    "`vectors.sqlite3` is gone": test_a_damaged_file_costs_nothing,
    "`vectors.sqlite3` is damaged (exit 2)": test_a_damaged_file_costs_nothing,
    "`vectors.sqlite3` and `vectors.copy.sqlite3` are gone": test_items_are_paid_again_if_ledger_and_copy_are_lost,
    "another model is set (exit 2)": test_a_kill_in_a_rebuild_with_another_model,
}


def test_each_row_of_the_recovery_table_has_a_test() -> None:
    page = (ROOT / "docs/embedding-index.md").read_text(encoding="utf-8")
    table = page.split("### Crashes, disks and files")[1].split("###")[0]
    rows = [line.split("|")[1].strip() for line in table.splitlines() if line.startswith("|")]
    assert rows[2:] == list(ROWS)

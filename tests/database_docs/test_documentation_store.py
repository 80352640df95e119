"""The state of items on disk: through runs that end, runs that are killed, and sources that change."""

from __future__ import annotations

import os
import signal
import sqlite3
import stat
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from database_docs.documentation import ColumnFacts, RelationshipFacts, TableFacts
from database_docs.documentation_store import DocumentationStore
from database_docs.items import IndexItem, Kind, State, content_hash
from error_handler import StateDirectoryError
from tests.forked_process import PipedProcess

TALK = Kind.CONVERSATION


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "index" / "index.sqlite3"


@pytest.fixture
def store(path: Path) -> Iterator[DocumentationStore]:
    with DocumentationStore(path) as opened:
        yield opened


def talks(count: int, text: str = "Where is my parcel", **metadata: str) -> list[IndexItem]:
    return [IndexItem(TALK, f"talk-{number}", f"{text} {number}", metadata) for number in range(count)]


def table(name: str, *columns: str, comment: str | None = None) -> TableFacts:
    facts = tuple(ColumnFacts(column, "INT", is_nullable=False) for column in columns or ("id",))
    return TableFacts("public", name, columns=facts, primary_key=("id",), comment=comment)


KEY = RelationshipFacts(
    "public.refunds(order_id) -> public.orders(id)",
    "public.refunds",
    ("order_id",),
    "public.orders",
    ("id",),
    "many-to-one",
    is_required=True,
)
TABLES = [table("orders"), table("refunds", "id", "order_id")]


def index_all(store: DocumentationStore, items: list[IndexItem]) -> None:
    store.mark_ended([(item, None) for item in items])


def states(store: DocumentationStore, kind: Kind = TALK) -> dict[str, State]:
    return {item.name: item.state for item in store.items(kind)}


def test_new_items_are_pending_until_they_are_indexed(store: DocumentationStore) -> None:
    """They are offered as pending again if a run ends in between."""
    items = talks(3)
    assert store.offer(items).pending == items
    index_all(store, items[1:2])
    again = store.offer(items)
    assert (again.pending, again.changed) == ([items[0], items[2]], [])
    assert store.counts()[TALK] == {State.PENDING: 2, State.INDEXED: 1, State.FAILED: 0}
    assert store.counts()[Kind.TABLE] == {State.PENDING: 0, State.INDEXED: 0, State.FAILED: 0}


def test_another_text_makes_an_item_pending(store: DocumentationStore) -> None:
    """Other items stay indexed; the problem of the old text is removed."""
    items = talks(2)
    store.offer(items)
    index_all(store, items)
    store.mark_ended([(items[0], "the provider refuses it")])
    changed = [IndexItem(TALK, "talk-0", "Another question"), items[1]]
    assert store.offer(changed).pending == changed[:1]
    stored = next(store.items(TALK))
    assert (stored.problem, stored.content_hash) == (None, content_hash("Another question"))


def test_the_mark_of_an_old_text_counts_for_nothing(store: DocumentationStore) -> None:
    """If the text changes while it is embedded, the item stays pending."""
    old = talks(1)
    store.offer(old)
    store.offer(talks(1, "Newer"))
    index_all(store, old)
    assert states(store) == {"talk-0": State.PENDING}


def test_changed_metadata_is_offered_until_it_is_indexed(store: DocumentationStore) -> None:
    """Text and vector stay; a crash before the index is updated loses nothing."""
    old = talks(2, intent="Refund")
    store.offer(old)
    index_all(store, old)
    new = [replace(old[0], metadata={"intent": "Complaint"}), old[1]]
    for _ in range(2):
        offered = store.offer(new)
        assert (offered.pending, offered.changed) == ([], new[:1])
    index_all(store, new)
    assert store.offer(new).changed == []
    assert dict(next(store.items(TALK)).metadata) == {"intent": "Complaint"}


def test_failed_items_are_pending_in_the_next_run(store: DocumentationStore) -> None:
    """Their problem stays until they are indexed."""
    items = talks(1)
    for _ in range(2):
        assert store.offer(items).pending == items
        store.mark_ended([(items[0], "too odd")])
        assert next(store.items(TALK, State.FAILED)).problem == "too odd"
    store.offer(items)
    assert next(store.items(TALK, State.PENDING)).problem == "too odd"
    index_all(store, items)
    assert next(store.items(TALK, State.INDEXED)).problem is None


def test_removed_names_are_returned_until_they_are_deleted(store: DocumentationStore) -> None:
    """An item is removed here after it has left the index."""
    store.offer(talks(3))
    for _ in range(2):
        store.begin_pass(TALK)
        store.offer(talks(1))
        assert store.end_pass(TALK) == ["talk-1", "talk-2"]
    store.remove(TALK, ["talk-1", "talk-2"])
    assert list(states(store)) == ["talk-0"]


def test_a_pass_that_was_cut_off_removes_nothing(path: Path) -> None:
    """The next process begins its own pass; ``end_pass`` without one is an error."""
    with DocumentationStore(path) as store:
        store.offer(talks(3))
        store.begin_pass(TALK)
        store.offer(talks(1))
    with DocumentationStore(path) as store:
        with pytest.raises(ValueError, match="no pass"):
            store.end_pass(TALK)
        store.begin_pass(TALK)
        store.offer(talks(3))
        assert store.end_pass(TALK) == []


def test_a_pass_of_one_kind_says_nothing_of_the_others(store: DocumentationStore) -> None:
    store.offer(talks(1))
    store.sync_database(TABLES, [KEY])
    with pytest.raises(ValueError, match="no pass"):
        store.end_pass(TALK)
    assert list(states(store)) == ["talk-0"]


def test_no_text_of_a_conversation_reaches_the_disk(path: Path) -> None:
    """It is neither in the file nor in its journal."""
    with DocumentationStore(path) as store:
        store.offer(talks(100, "unmistakable sentence"), keep_text=False)
        contents = b"".join(file.read_bytes() for file in path.parent.iterdir())
        assert b"talk-7" in contents
        assert b"unmistakable" not in contents
        assert next(store.items(TALK)).text is None


def test_a_database_as_it_is_documented(store: DocumentationStore) -> None:
    """The shapes of section 6 of the contract."""
    done = store.sync_database(TABLES, [KEY])
    assert [item.id for item in done.pending] == [
        "table:public.orders",
        "table:public.refunds",
        f"relationship:{KEY.id}",
    ]
    assert store.get_pending_tables() == ["public.orders", "public.refunds"]
    assert store.get_pending_relationships() == [
        {"id": KEY.id, "constrained_table": "public.refunds", "referred_table": "public.orders"}
    ]
    info = store.get_table_info("public.refunds")
    assert info is not None
    assert info["table_name"] == "public.refunds"
    assert info["schema_data"]["columns"][1]["name"] == "order_id"
    assert info["business_purpose"].startswith("Keeps refunds, which refer to orders")
    assert info["documentation"] == done.pending[1].text
    assert (info["status"], info["content_hash"]) == ("pending", done.pending[1].content_hash)
    relationship = store.get_relationship_info(KEY.id)
    assert relationship is not None
    assert (relationship["id"], relationship["relationship_type"]) == (KEY.id, "many-to-one")
    assert relationship["documentation"] == done.pending[2].text
    assert store.get_table_info("public.nothing") is None
    assert store.get_relationship_info("nothing") is None


def test_a_database_that_changes(store: DocumentationStore) -> None:
    """Only items with another text are pending; removed names are returned by kind."""
    index_all(store, store.sync_database(TABLES, [KEY]).pending)
    same = store.sync_database(TABLES, [KEY])
    assert (same.pending, same.changed) == ([], [])
    assert same.removed == {Kind.TABLE: [], Kind.RELATIONSHIP: []}
    assert store.get_pending_tables() == []
    done = store.sync_database([table("refunds", "id", "order_id", comment="Money given back")], [])
    assert [item.name for item in done.pending] == ["public.refunds"]
    assert done.removed == {Kind.TABLE: ["public.orders"], Kind.RELATIONSHIP: [KEY.id]}
    for kind, names in done.removed.items():
        store.remove(kind, names)
    assert store.get_table_info("public.orders") is None
    assert store.get_relationship_info(KEY.id) is None


def test_hashes_of_all_kinds(store: DocumentationStore) -> None:
    """Equal texts have equal hashes."""
    store.offer([IndexItem(TALK, "a", "x"), IndexItem(TALK, "b", "x"), IndexItem(Kind.TABLE, "c", "y")])
    index_all(store, [IndexItem(TALK, "b", "x")])
    x, y = content_hash("x"), content_hash("y")
    assert store.hashes() == {"conversation:a": x, "conversation:b": x, "table:c": y}
    assert store.hashes(State.INDEXED) == {"conversation:b": x}


def test_items_are_read_in_portions(store: DocumentationStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each item is returned once, for any name, even while items change."""
    monkeypatch.setattr("database_docs.documentation_store.CHUNK", 3)
    items = [IndexItem(TALK, name, f"text {name}") for name in ("", "a", "ä", "b'", 'c"', "d%", "日本")]
    assert store.offer(items).pending == items
    found = []
    for item in store.items(TALK):
        store.mark_ended([(item, None)])
        found.append(item.name)
    assert sorted(found) == sorted(item.name for item in items)
    assert store.counts()[TALK][State.INDEXED] == len(items)


def test_threads_share_one_store(store: DocumentationStore) -> None:
    """No item is lost."""
    items = talks(200)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda item: store.offer([item]), items))
        list(pool.map(lambda item: store.mark_ended([(item, None)]), items))
    assert store.counts()[TALK][State.INDEXED] == 200


def test_another_process_reads_while_one_writes(path: Path, store: DocumentationStore) -> None:
    store.offer(talks(2))
    with DocumentationStore(path) as reader:
        assert reader.counts()[TALK][State.PENDING] == 2
        index_all(store, talks(2))
        assert reader.counts()[TALK][State.INDEXED] == 2


KILLED = """
import sys
from pathlib import Path
from database_docs.documentation_store import DocumentationStore
from database_docs.items import IndexItem, Kind
store = DocumentationStore(Path(sys.argv[1]))
items = [IndexItem(Kind.CONVERSATION, f"talk-{n}", f"text {n}") for n in range(2000)]
store.offer(items, keep_text=False)
for item in items:
    store.mark_ended([(item, None)])
    print(item.name, flush=True)
"""


def test_a_kill_loses_no_mark(path: Path) -> None:
    """Marks before SIGKILL are there afterwards."""
    process = PipedProcess(["-c", KILLED, str(path)])
    told = [process.stdout.readline().strip() for _ in range(20)]
    process.kill()
    told += process.finish().split("\n")[:-1]
    assert process.returncode == -signal.SIGKILL
    with DocumentationStore(path) as store:
        marked = {item.name for item in store.items(TALK, State.INDEXED)}
        assert store.counts()[TALK][State.PENDING] + len(marked) == 2000
    assert set(filter(None, told)) <= marked
    assert len(marked) - len(set(told)) <= 1


def test_the_folder_and_the_file_are_of_their_owner_only(path: Path, store: DocumentationStore) -> None:
    store.offer(talks(1))
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert {stat.S_IMODE(file.stat().st_mode) for file in path.parent.iterdir()} == {0o600}


def test_every_step_is_synchronous(store: DocumentationStore) -> None:
    """FULL is 2: with WAL's usual NORMAL a power cut would undo marks whose work was reported."""
    assert store._rows("PRAGMA synchronous")[0][0] == 2
    assert store._rows("PRAGMA journal_mode")[0][0] == "wal"


def test_a_newer_file_is_refused(path: Path) -> None:
    """The file stays unchanged."""
    with DocumentationStore(path):
        pass
    with closing(sqlite3.connect(path)) as db:
        db.execute("PRAGMA user_version = 2")
    with pytest.raises(StateDirectoryError, match="later version"):
        DocumentationStore(path)


def test_file_that_is_no_store_is_refused(path: Path) -> None:
    """The message says that nothing is paid for twice."""
    path.parent.mkdir()
    path.write_text("something else " * 500)
    with pytest.raises(StateDirectoryError, match="not paid for twice"):
        DocumentationStore(path)


def test_a_folder_that_cannot_be_written(path: Path) -> None:
    path.parent.write_text("a file where the folder should be")
    with pytest.raises(StateDirectoryError, match="fix the permissions"):
        DocumentationStore(path)


def test_a_link_is_not_followed(path: Path, tmp_path: Path) -> None:
    path.parent.mkdir()
    os.symlink(tmp_path / "elsewhere", path)
    with pytest.raises(StateDirectoryError):
        DocumentationStore(path)
    assert not (tmp_path / "elsewhere").exists()


def test_the_usual_place_is_the_folder_of_the_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("INDEX_DIR", "somewhere")
    with DocumentationStore() as store:
        assert store.path == Path("somewhere/index.sqlite3")


def test_a_pass_over_unchanged_items_writes_nothing(path: Path, store: DocumentationStore) -> None:
    """A pass over 100,000 unchanged conversations only reads."""
    items = talks(500)
    for _ in range(2):
        store.begin_pass(TALK)
        store.offer(items, keep_text=False)
        store.end_pass(TALK)
        index_all(store, items)
    store._rows("PRAGMA wal_checkpoint(TRUNCATE)")
    store.begin_pass(TALK)
    assert store.offer(items, keep_text=False).pending == []
    index_all(store, items)
    assert store.end_pass(TALK) == []
    assert path.with_name("index.sqlite3-wal").stat().st_size == 0

"""Searches: what is stored is found exactly, through ChromaDB's graph as well, whatever happens to its folder."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest

from database_docs.items import IndexItem, Kind
from embedding_index import search_graph
from embedding_index.search_entries import SearchEntries
from embedding_index.vector_ledger import LEDGER_FILE, VectorLedger
from embedding_index.vector_search import nearest
from error_handler import MixedIndexError, StateDirectoryError, UnusableVectorsError
from tests.embedding_index.index_entries import (
    DIMENSIONS,
    MODEL,
    OTHER_MODEL,
    Searcher,
    add,
    has_graph,
    item,
    make_index,
    publish,
    vector_of,
)


def graph_folder(folder: Path) -> Path:
    (path,) = (folder / "chroma").iterdir()
    return path


def assert_finds(folder: Path, numbers: Iterable[int]) -> None:
    searcher = Searcher(folder)
    assert {number: searcher.first(number) for number in numbers} == {number: str(number) for number in numbers}
    searcher.close()


# Comparing


def test_nearest_equals_sorting_all_cosines() -> None:
    """Vectors are clustered, pages have any size, limits exceed the number of entries."""
    random = np.random.default_rng(3)
    centres = random.standard_normal((5, 16), dtype=np.float32)
    vectors = centres[random.integers(0, 5, 400)] + 0.1 * random.standard_normal((400, 16), dtype=np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    names = [f"id{number:03}" for number in random.permutation(400)]
    pages = [(names[start : start + 150], vectors[start : start + 150]) for start in range(0, 400, 150)]
    for limit in (1, 5, 399, 400, 1000):
        query = centres[limit % 5] * 7
        cosines = vectors.astype(np.float64) @ (query / np.linalg.norm(query))
        expected = sorted(zip(cosines, names, strict=True), reverse=True)
        found = nearest(pages, query, limit)
        assert len(found) == min(limit, 400)
        assert [cosine for _, cosine in found] == pytest.approx([cosine for cosine, _ in expected[:limit]], abs=2e-5)


def test_equal_vectors_come_by_name_wherever_their_rows_are() -> None:
    vector = np.linspace(0.1, 1, 48, dtype=np.float32)
    vector /= np.linalg.norm(vector)
    rows = [(f"{number:03}", vector) for number in reversed(range(333))]
    pages = [([name], vector[np.newaxis]) for name, vector in rows]
    assert nearest(pages, vector * 7, 4) == [("000", 1.0), ("001", 1.0), ("002", 1.0), ("003", 1.0)]
    assert nearest([], vector, 5) == []


# Entries


@pytest.mark.parametrize(
    "exact_bytes",
    [pytest.param(search_graph.EXACT_UP_TO_BYTES, marks=pytest.mark.thorough), 0],
    ids=["exact", "graph"],
)
def test_each_vector_finds_itself_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exact_bytes: int) -> None:
    """This holds with the graph as well, and after changes between two searches."""
    monkeypatch.setattr(search_graph, "EXACT_UP_TO_BYTES", exact_bytes)
    make_index(tmp_path, range(200))
    publish(tmp_path)
    assert has_graph(tmp_path) == (exact_bytes == 0)
    searcher = Searcher(tmp_path)
    assert [searcher.first(number) for number in range(0, 200, 4)] == list(map(str, range(0, 200, 4)))
    with VectorLedger(tmp_path / LEDGER_FILE) as ledger:
        SearchEntries(ledger).delete(Kind.TABLE, ["5", "no such table"])
    assert searcher.first(5) != "5"
    make_index(tmp_path, [5, 200])
    assert [searcher.first(number) for number in (5, 200)] == ["5", "200"]
    publish(tmp_path)
    assert [searcher.first(number) for number in (5, 200)] == ["5", "200"]
    assert len(searcher.hits(vector_of(5), limit=300)) == 201
    searcher.close()


def test_hits_have_order_kind_text_and_metadata(tmp_path: Path) -> None:
    """Equally similar hits are sorted by kind and name; other kinds take no place."""
    with VectorLedger(tmp_path / LEDGER_FILE) as ledger:
        entries = SearchEntries(ledger)
        ledger.add(MODEL, {item(1).content_hash: vector_of(1), item(2).content_hash: -vector_of(1)})
        entries.put(MODEL, [IndexItem(Kind.TABLE, name, "text of 1", {"big": 2**70}) for name in "gbeafdc"])
        entries.put(MODEL, [IndexItem(Kind.CONVERSATION, "a", "text of 1"), item(2, Kind.RELATIONSHIP)])
    search = Searcher(tmp_path).hits
    assert [hit.name for hit in search(vector_of(1), [Kind.TABLE], 3)] == ["a", "b", "c"]
    assert [(hit.kind, hit.name) for hit in search(vector_of(1), limit=2)] == [
        (Kind.CONVERSATION, "a"),
        (Kind.TABLE, "a"),
    ]
    (table, *_) = search(vector_of(1), [Kind.TABLE])
    assert (table.text, table.metadata, table.similarity) == ("text of 1", {"big": 2**70}, 1.0)
    (opposite,) = search(vector_of(1), [Kind.RELATIONSHIP])
    assert opposite.similarity == pytest.approx(-1)
    assert search(vector_of(1), [Kind.CONVERSATION])[0].text is None
    assert search(vector_of(1), []) == []


def test_metadata_is_replaced_as_a_whole(tmp_path: Path) -> None:
    """Old keys are removed; text and vector stay."""
    with VectorLedger(tmp_path / LEDGER_FILE) as ledger:
        add(ledger, [1, 2])
        entries = SearchEntries(ledger)
        entries.update_metadata([IndexItem(Kind.TABLE, "2", "", {"note": "\ud800"}), item(9)])
        assert entries.counts() == {Kind.TABLE: 2}
    (hit,) = Searcher(tmp_path).hits(vector_of(2), limit=1)
    assert (hit.metadata, hit.text) == ({"note": "\ud800"}, "text of 2")


def test_another_model_is_refused_and_nothing_is_added(tmp_path: Path) -> None:
    with VectorLedger(tmp_path / LEDGER_FILE) as ledger:
        add(ledger, range(3))
        with pytest.raises(MixedIndexError, match=r"--rebuild") as caught:
            add(ledger, [4], OTHER_MODEL)
        assert str(MODEL) in str(caught.value)
        assert str(OTHER_MODEL) in str(caught.value)
        assert len(SearchEntries(ledger).hashes()) == 3
        SearchEntries(ledger).replace(OTHER_MODEL, [item(0), item(4)])
        assert SearchEntries(ledger).hashes() == {"table:4": item(4).content_hash}, "only 4 has a vector of the model"
        assert SearchEntries(ledger).identity() == OTHER_MODEL


def test_query_of_another_length_or_without_direction_is_refused(tmp_path: Path) -> None:
    make_index(tmp_path, range(2))
    searcher = Searcher(tmp_path)
    with pytest.raises(MixedIndexError, match="length 5"):
        searcher.hits(np.ones(5, np.float32))
    with pytest.raises(UnusableVectorsError):
        searcher.hits(np.zeros(DIMENSIONS, np.float32))


def test_damaged_vector_is_an_error_and_no_answer(tmp_path: Path) -> None:
    with VectorLedger(tmp_path / LEDGER_FILE) as ledger:
        add(ledger, range(3))
        with ledger.transaction() as db:
            db.execute(
                "UPDATE vectors SET vector = zeroblob(length(vector)) WHERE hash = ?",
                (bytes.fromhex(item(1).content_hash),),
            )
    with pytest.raises(StateDirectoryError, match="checksum"):
        Searcher(tmp_path).first(2)


def test_no_text_of_a_conversation_is_on_disk(tmp_path: Path) -> None:
    """The text of a table is on disk: this proves that the test can find one."""
    with VectorLedger(tmp_path / LEDGER_FILE) as ledger:
        items = [
            IndexItem(Kind.CONVERSATION, "c", "zebrafish-of-a-customer"),
            IndexItem(Kind.TABLE, "t", "quokka table"),
        ]
        ledger.add(MODEL, {each.content_hash: vector_of(1) for each in items})
        SearchEntries(ledger).put(MODEL, items)
    content = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert b"quokka table" in content
    assert b"zebrafish" not in content


def test_each_of_many_equal_conversations_is_found(tmp_path: Path) -> None:
    """Groups of equal vectors: a graph loses whole groups of them, comparing with all does not."""
    with VectorLedger(tmp_path / LEDGER_FILE) as ledger:
        for number in range(8):
            copies = [IndexItem(Kind.CONVERSATION, f"{number}-{copy:03}", f"text of {number}") for copy in range(300)]
            ledger.add(MODEL, {copies[0].content_hash: vector_of(number)})
            SearchEntries(ledger).put(MODEL, copies)
    searcher = Searcher(tmp_path)
    for number in range(8):
        hits = searcher.hits(vector_of(number), [Kind.CONVERSATION], limit=3)
        assert [hit.name for hit in hits] == [f"{number}-000", f"{number}-001", f"{number}-002"]


def test_index_that_was_replaced_on_disk_is_followed(tmp_path: Path) -> None:
    """A file with the same number of changes is still recognised as another file."""
    make_index(tmp_path, range(3))
    searcher = Searcher(tmp_path)
    assert searcher.first(1) == "1"
    for path in tmp_path.glob(f"{LEDGER_FILE}*"):
        path.unlink()
    make_index(tmp_path, range(3, 6))
    assert searcher.first(4) == "4"


@pytest.mark.thorough
def test_searches_go_on_in_threads_while_the_index_is_written(tmp_path: Path, large: None) -> None:
    make_index(tmp_path, range(100))
    publish(tmp_path)
    searcher = Searcher(tmp_path)
    done = threading.Event()
    searches, wrong = [0] * 3, []

    def search(place: int) -> None:
        while not done.is_set():
            if (found := searcher.first(5)) != "5":
                wrong.append(found)
            searches[place] += 1

    threads = [threading.Thread(target=search, args=(place,)) for place in range(3)]
    for thread in threads:
        thread.start()
    for turn in range(3):
        make_index(tmp_path, [1000 + turn])
        publish(tmp_path)
    done.set()
    for thread in threads:
        thread.join()
    assert not wrong
    assert all(searches)
    assert searcher.first(1002) == "1002"
    searcher.close()


# The graph is a cache


def test_graph_is_built_for_large_kinds_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_index(tmp_path, range(50))
    publish(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [LEDGER_FILE]
    monkeypatch.setattr(search_graph, "EXACT_UP_TO_BYTES", 50 * DIMENSIONS * 4 - 1)
    publish(tmp_path)
    assert has_graph(tmp_path)
    assert graph_folder(tmp_path).stat().st_mode & 0o777 == 0o700
    with VectorLedger(tmp_path / LEDGER_FILE) as ledger:
        SearchEntries(ledger).delete(Kind.TABLE, ["1"])
    publish(tmp_path)
    assert not (tmp_path / "chroma").exists()


def test_graph_that_fits_is_kept_and_one_that_does_not_is_replaced(tmp_path: Path, large: None) -> None:
    """New labels keep the graph; new names or texts replace it."""
    make_index(tmp_path, range(10))
    publish(tmp_path)
    first = graph_folder(tmp_path)
    with VectorLedger(tmp_path / LEDGER_FILE) as ledger:
        SearchEntries(ledger).update_metadata([item(3, label="new")])
    publish(tmp_path)
    assert graph_folder(tmp_path) == first
    make_index(tmp_path, [10])
    assert not has_graph(tmp_path)
    assert_finds(tmp_path, range(11))
    publish(tmp_path)
    assert graph_folder(tmp_path) != first
    assert has_graph(tmp_path)
    assert_finds(tmp_path, range(11))


@pytest.mark.slow
@pytest.mark.parametrize(
    "change",
    [
        "count",
        "checksum",
        *(pytest.param(change, marks=pytest.mark.thorough) for change in ("missing", "emptied", "no database")),
    ],
)
def test_graph_that_does_not_match_is_not_used_and_is_rebuilt(tmp_path: Path, large: None, change: str) -> None:
    """Until then, searches compare all vectors and find everything."""
    make_index(tmp_path, range(10))
    publish(tmp_path)
    database = graph_folder(tmp_path) / "chroma.sqlite3"
    graph = search_graph.SearchGraph(graph_folder(tmp_path))
    collection = graph._collections[Kind.TABLE]
    if change == "count":
        collection.delete(ids=["3"])
    elif change == "checksum":
        collection.modify(metadata={"checksum": "of other entries"})
    graph.close()
    if change == "missing":
        database.parent.rename(tmp_path / "away")
    elif change == "emptied":
        database.write_bytes(b"")
    elif change == "no database":
        database.write_bytes(b"no database" * 1000)
    assert_finds(tmp_path, range(10))
    publish(tmp_path)
    assert has_graph(tmp_path)
    assert_finds(tmp_path, range(10))


def test_leftovers_of_a_killed_build_are_removed(tmp_path: Path, large: None) -> None:
    """Also if the folder has the name of the next one."""
    make_index(tmp_path, range(5))
    with VectorLedger(tmp_path / LEDGER_FILE) as ledger:
        name = SearchEntries(ledger).checksum([Kind.TABLE])[:16]
    for folder in (name, "0-other"):
        (tmp_path / "chroma" / folder).mkdir(parents=True)
        (tmp_path / "chroma" / folder / "chroma.sqlite3").write_bytes(b"half")
    publish(tmp_path)
    assert has_graph(tmp_path)
    assert graph_folder(tmp_path).name == name

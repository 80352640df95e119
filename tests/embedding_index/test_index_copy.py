"""Readers of the index: finished states only, beside writers that live, finish or die."""

from __future__ import annotations

import os
import shutil
import threading
from pathlib import Path

import pytest

from embedding_index.chroma_index import ChromaIndex
from embedding_index.finished_state import MARKER, FinishedState
from embedding_index.index_copy import PREFIX, IndexCopy
from error_handler import MixedIndexError, VectorStoreError
from tests.embedding_index.index_entries import MODEL, OTHER_MODEL, entries, entry, make_index, vector_of
from tests.forked_process import OF_THE_INDEX, PipedProcess


@pytest.fixture
def index_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "index"
    folder.mkdir()
    return folder


@pytest.fixture
def work_dir(tmp_path: Path) -> Path:
    return tmp_path / "work"


def start_reader(index_dir: Path, work_dir: Path) -> PipedProcess:
    return PipedProcess(
        ["-m", "tests.embedding_index.index_reader", str(index_dir), str(work_dir)], preload=OF_THE_INDEX
    )


def count_of(copy: IndexCopy) -> int:
    assert isinstance(copy.state, FinishedState)
    return sum(copy.state.counts.values())


def test_a_reader_follows_finished_states_only(index_dir: Path, work_dir: Path) -> None:
    """What a writer is at is not seen before it is finished; what is not newer is not copied."""
    make_index(index_dir, range(10))
    with IndexCopy(index_dir, work_dir=work_dir) as copy:
        assert copy.search(vector_of(3), limit=1)[0].name == "3"
        (folder,) = work_dir.iterdir()
        assert copy.refresh() is False
        writer = ChromaIndex(index_dir, MODEL)
        writer.upsert([entry(20)])
        assert copy.refresh() is False
        assert copy.search(vector_of(20), limit=1)[0].name != "20"
        writer.finish()
        assert copy.refresh() is True
        assert copy.search(vector_of(20), limit=1)[0].name == "20"
        assert list(work_dir.iterdir()) != [folder]
        assert len(list(work_dir.iterdir())) == 1
        writer.upsert([entry(21)])
        writer.close()
        with ChromaIndex(index_dir, MODEL) as only_looked:
            only_looked.search(vector_of(1))
        assert (copy.refresh(), count_of(copy), copy.refresh()) == (True, 12, False)
    assert list(work_dir.iterdir()) == []


def test_no_state_is_told_with_what_to_do(index_dir: Path, work_dir: Path) -> None:
    """No index, one whose first writer is at work, and one whose writer was killed."""
    copy = IndexCopy(index_dir, work_dir=work_dir)
    with pytest.raises(VectorStoreError, match=r"there is no index in .*index --batch"):
        copy.search(vector_of(1))
    (index_dir / MARKER).write_text("")
    with pytest.raises(VectorStoreError, match=r"being written, or its writer was killed; .*index --batch"):
        copy.refresh()
    (index_dir / MARKER).unlink()
    make_index(index_dir, range(3))
    assert copy.search(vector_of(1), limit=1)[0].name == "1"
    copy.close()
    copy.close()
    with pytest.raises(VectorStoreError, match="was closed"):
        copy.search(vector_of(1))
    assert list(work_dir.iterdir()) == []


def test_damage_and_another_model_leave_the_state_at_hand(index_dir: Path, work_dir: Path) -> None:
    """Told, and the search goes on with what was good."""
    make_index(index_dir, range(3))
    with IndexCopy(index_dir, identity=MODEL, work_dir=work_dir) as copy:
        copy.refresh()
        make_index(index_dir, range(3, 5))
        database = index_dir / "chroma" / "chroma.sqlite3"
        good = database.read_bytes()
        database.write_bytes(good[:-1] + b"?")
        with pytest.raises(VectorStoreError, match="is damaged"):
            copy.refresh()
        database.unlink()
        with pytest.raises(VectorStoreError, match="is damaged"):
            copy.refresh()
        database.write_bytes(good)
        with ChromaIndex(index_dir, OTHER_MODEL, discard=True) as index:
            index.remake(entries(range(2)))
        with pytest.raises(MixedIndexError, match="--rebuild"):
            copy.refresh()
        assert count_of(copy) == 3
        assert copy.search(vector_of(2), limit=1)[0].name == "2"
        assert len(list(work_dir.iterdir())) == 1


@pytest.mark.parametrize("change", ["marker", "state", "swap"])
def test_a_state_that_changes_while_it_is_copied_is_not_taken(
    index_dir: Path, work_dir: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    """The writer begins, ends, or swaps a new folder in, between the first file copied and the last."""
    make_index(index_dir, range(3))

    def copy_while_written(source: Path, target: Path) -> None:
        monkeypatch.undo()
        shutil.copytree(source, target)
        if change == "marker":
            (index_dir / MARKER).write_text("")
        elif change == "state":
            make_index(index_dir, range(3, 5))
        else:
            shutil.rmtree(source)
            (index_dir / MARKER).write_text("")
            raise shutil.Error([("a", "b", "gone")])

    with IndexCopy(index_dir, work_dir=work_dir) as copy:
        monkeypatch.setattr(shutil, "copytree", copy_while_written)
        with pytest.raises(VectorStoreError, match="being written at this moment"):
            copy.search(vector_of(1))
        assert list(work_dir.iterdir()) == []


def test_copies_are_private_and_those_of_the_dead_are_removed(index_dir: Path, work_dir: Path) -> None:
    """Only this user reads them; a killed reader's goes with the next reader, a living one's stays."""
    make_index(index_dir, range(3))
    readers = []
    for _ in range(2):
        reader = start_reader(index_dir, work_dir)
        assert reader.stdout.readline() == "1 3\n"
        readers.append(reader)
    foreign = work_dir / f"{PREFIX}link"
    foreign.symlink_to(index_dir)
    assert {folder.stat().st_mode & 0o777 for folder in work_dir.iterdir() if not folder.is_symlink()} == {0o700}
    assert len(list(work_dir.iterdir())) == 3
    readers[0].kill()
    readers[0].finish()
    with IndexCopy(index_dir, work_dir=work_dir) as copy:
        copy.refresh()
        assert len(list(work_dir.iterdir())) == 3
    assert len(list(work_dir.iterdir())) == 2
    readers[1].finish("end\n")
    assert readers[1].returncode == 0
    assert list(work_dir.iterdir()) == [foreign]
    assert (index_dir / "generation").exists()


def used() -> tuple[int, int, int]:
    """Open files, threads and MB of memory of this process."""
    status = Path("/proc/self/status").read_text()
    memory_kb = int(status.split("VmRSS:")[1].split()[0])
    return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task")), memory_kb // 1024


def test_old_copies_cost_nothing(index_dir: Path, work_dir: Path) -> None:
    """Over 20 states, neither open files nor threads nor memory grow."""
    vectors = range(3000)
    make_index(index_dir, vectors)
    with IndexCopy(index_dir, work_dir=work_dir) as copy:
        after: list[tuple[int, int, int]] = []
        for turn in range(24):
            with ChromaIndex(index_dir, MODEL) as index:
                index.update_metadata({"table:1": {"number": 1, "turn": turn}})
            assert copy.refresh()
            assert copy.search(vector_of(1), limit=1)[0].metadata["turn"] == turn
            after.append(used())
        files, threads, memory = (list(column) for column in zip(*after, strict=True))
        # What the libraries open for a moment comes and goes; 20 copies that stay open would be at least 20 files more.
        assert max(files[4:]) <= files[3] + 10
        assert max(threads[4:]) <= threads[3] + 10
        assert memory[-1] <= memory[3] * 1.3


def test_searches_go_on_while_states_are_taken_and_closed(index_dir: Path, work_dir: Path) -> None:
    """From several threads; none meets a copy that is being removed, and all are told the end."""
    make_index(index_dir, range(100))
    copy = IndexCopy(index_dir, work_dir=work_dir)
    copy.refresh()
    done = threading.Event()
    searches, problems = [0] * 4, []

    def search(place: int) -> None:
        try:
            while not done.is_set():
                assert copy.search(vector_of(5), limit=1)[0].name == "5"
                copy.refresh()
                searches[place] += 1
        except (AssertionError, VectorStoreError) as exc:
            problems.append(exc)

    threads = [threading.Thread(target=search, args=(place,)) for place in range(4)]
    for thread in threads:
        thread.start()
    for turn in range(6):
        make_index(index_dir, [1000 + turn])
    done.set()
    for thread in threads:
        thread.join()
    assert not problems
    assert all(searches)
    copy.refresh()
    assert count_of(copy) == 106
    copy.close()
    assert list(work_dir.iterdir()) == []


def test_a_search_that_is_under_way_keeps_its_copy(index_dir: Path, work_dir: Path) -> None:
    """Until it is done; then the copy goes."""
    make_index(index_dir, range(3))
    with IndexCopy(index_dir, work_dir=work_dir) as copy:
        copy.refresh()
        with copy._searching() as under_way:
            make_index(index_dir, range(3, 6))
            assert copy.refresh()
            assert len(list(work_dir.iterdir())) == 2
            assert under_way.search(vector_of(2), limit=1)[0].name == "2"
        assert len(list(work_dir.iterdir())) == 1
        assert copy.search(vector_of(5), limit=1)[0].name == "5"


def test_a_writer_beside_readers_in_processes_of_their_own(index_dir: Path, work_dir: Path) -> None:
    """Each reader sees states in their order, each whole; the last one in the end."""
    make_index(index_dir, range(500))
    readers = [start_reader(index_dir, work_dir) for _ in range(2)]
    for reader in readers:
        assert reader.stdout.readline() == "1 500\n"
    for turn in range(1, 6):
        make_index(index_dir, range(500 * turn, 500 * (turn + 1)))
    with ChromaIndex(index_dir, MODEL) as index:
        index.remake(entries(range(3500)))
    for reader in readers:
        while (line := reader.stdout.readline()) != "7 3500\n":
            generation, count = map(int, line.split())
            assert count == 500 * generation
        assert (reader.finish("end\n"), reader.returncode) == ("", 0)
    assert list(work_dir.iterdir()) == []

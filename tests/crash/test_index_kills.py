"""Writers that are really killed: afterwards the index is whole, or says that it is not and can be made anew."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest

from embedding_index.chroma_index import ChromaIndex
from embedding_index.finished_state import MARKER, file_hashes, read_state
from tests.embedding_index.index_entries import MODEL, assert_holds, entries, make_index
from tests.forked_process import OF_THE_INDEX, PipedProcess

LOT = 250


def start_writer(folder: Path, *arguments: object) -> PipedProcess:
    command = ["-m", "tests.crash.index_writer", str(folder), *map(str, arguments)]
    return PipedProcess(command, preload=OF_THE_INDEX)


def kill_after(writer: PipedProcess, line: str, more_s: float) -> list[str]:
    """Wait for *line*, then *more_s* seconds, which is where in its next step the process dies; return what it said."""
    said = []
    while said[-1:] != [line]:
        said_now = writer.stdout.readline()
        assert said_now, f"the writer never said {line!r}"
        said.append(said_now.strip())
    time.sleep(more_s)
    writer.kill()
    return said + writer.finish().splitlines()


# Lots end around the sync threshold of 1000 records; what follows a lot is the next one, or what finishes the state.
KILLS = [f"done {LOT * number}" for number in (1, 3, 4, 5, 8, 11, 12)] + ["finishing"] * 3
USUAL = {1, 5, 7}  # places: before the threshold, behind it, and at the end


@pytest.mark.parametrize(
    ("place", "line"),
    [pytest.param(*kill, marks=() if kill[0] in USUAL else pytest.mark.thorough) for kill in enumerate(KILLS)],
)
def test_a_killed_writer_loses_nothing_that_cannot_be_made_again(tmp_path: Path, place: int, line: str) -> None:
    """The marker tells the next one; made anew, each vector is there and is the first hit of itself."""
    make_index(tmp_path, range(100))
    before = read_state(tmp_path)
    writer = start_writer(tmp_path, "upsert", 100, 12 * LOT, LOT)
    said = kill_after(writer, line, random.Random(place).uniform(0, 0.1))
    total = 100 + 12 * LOT
    is_finished = not (tmp_path / MARKER).exists()
    print(f"killed after {said[-1]}; finished: {is_finished}")
    index = ChromaIndex(tmp_path, MODEL)
    if is_finished:
        assert "finishing" in said
        assert index.needs_rebuild is None
    else:
        assert index.needs_rebuild
        index.remake(entries(range(total)))
    assert before is not None
    assert index.generation == before.generation + 1
    assert_holds(index, range(total), searched_every=7)
    index.close()
    state = read_state(tmp_path)
    assert state is not None
    assert file_hashes(tmp_path / "chroma") == state.files


def test_a_killed_remake_leaves_the_old_state(tmp_path: Path) -> None:
    """It is made beside; what is left of it does not disturb the next one."""
    make_index(tmp_path, range(50))
    kill_after(start_writer(tmp_path, "remake", 5000), "done 2000", 0.01)
    assert (tmp_path / "chroma.new").exists()
    with ChromaIndex(tmp_path, MODEL) as index:
        assert index.needs_rebuild is None
        assert_holds(index, range(50))
        index.remake(entries(range(60)))
        assert_holds(index, range(60))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["chroma", "generation"]


@pytest.mark.parametrize(
    "more_s", [0.0, 0.05, *(pytest.param(more_s, marks=pytest.mark.thorough) for more_s in (0.1, 0.2))]
)
def test_a_remake_killed_while_it_is_swapped_in(tmp_path: Path, more_s: float) -> None:
    """The old state, the new one, or one that says it must be made anew."""
    make_index(tmp_path, range(50))
    kill_after(start_writer(tmp_path, "remake", 1000), "done 1000", more_s)
    index = ChromaIndex(tmp_path, MODEL)
    if index.needs_rebuild:
        index.remake(entries(range(1000)))
    assert_holds(index, range(50 if index.generation == 1 else 1000), searched_every=10)
    index.close()

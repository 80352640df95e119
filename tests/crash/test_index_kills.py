"""Writers of a large index that are really killed: everything stored is found, and the graph is built again."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tests.embedding_index.index_entries import Searcher, has_graph, make_index, publish
from tests.forked_process import PipedProcess
from tests.worker.site import until

FIRST = 100
PRELOADED = ("embedding_index.vector_search",)  # not chromadb: other tests look whether a process loads it


pytestmark = pytest.mark.usefixtures("large")


def start(folder: Path, *arguments: object) -> PipedProcess:
    return PipedProcess(["-m", "tests.crash.index_writer", str(folder), *map(str, arguments)], preload=PRELOADED)


# A line of the writer, and the seconds from there to the kill; None: as soon as the folder of the new graph is there.
KILLS: list[tuple[str, float | None]] = [("done 350", 0.0), ("done 850", 0.01)]
KILLS += [("publishing", number / 10) for number in range(8)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("line", "more_s", "lot"),
    [("publishing", None, 50), *(pytest.param(*kill, 250, marks=pytest.mark.thorough) for kill in KILLS)],
)
def test_killed_writer_loses_nothing_and_leaves_no_wrong_graph(
    tmp_path: Path, line: str, more_s: float | None, lot: int
) -> None:
    """Each entry that the writer reported is found by its own vector, before and after the graph is rebuilt."""
    make_index(tmp_path, range(FIRST))
    publish(tmp_path)
    writer = start(tmp_path, "write", FIRST, 4 * lot, lot)
    said = [""]
    while said[-1] != line:
        said.append(writer.stdout.readline().strip())
        assert said[-1], f"the writer never said {line!r}"
    if more_s is None:
        until(lambda: len(list((tmp_path / "chroma").iterdir())) == 2)
    else:
        time.sleep(more_s)
    writer.kill()
    said += writer.finish().splitlines()
    stored = max(int(each.split()[1]) for each in said if each.startswith("done"))
    assert has_graph(tmp_path) or "published" not in said
    for _ in range(2):
        searcher = Searcher(tmp_path)
        assert [searcher.first(number) for number in range(0, stored, 21)] == [*map(str, range(0, stored, 21))]
        searcher.close()
        publish(tmp_path)
        assert has_graph(tmp_path)
        assert len(list((tmp_path / "chroma").iterdir())) == 1


@pytest.mark.thorough
def test_readers_follow_a_writer_in_another_process(tmp_path: Path) -> None:
    """Readers see entries in their order and every search is right while graphs are replaced."""
    make_index(tmp_path, range(100))
    publish(tmp_path)
    readers = [start(tmp_path, "follow") for _ in range(2)]
    for reader in readers:
        assert reader.stdout.readline() == "100\n"
    for turn in range(1, 4):
        make_index(tmp_path, range(100 * turn, 100 * (turn + 1)))
        publish(tmp_path)
    for reader in readers:
        while reader.stdout.readline() not in ("400\n", ""):
            pass
        assert (reader.finish("end\n"), reader.returncode) == ("", 0)

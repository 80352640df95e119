"""Writes or follows an index with a graph, and says what it does, so that it can be killed while it does it.

``python -m tests.crash.index_writer FOLDER write FIRST COUNT LOT``; ``... FOLDER follow``: search until a line comes in.
"""

from __future__ import annotations

import select
import sys
from pathlib import Path

from embedding_index import search_graph
from embedding_index.search_entries import SearchEntries
from embedding_index.vector_ledger import LEDGER_FILE, VectorLedger
from tests.embedding_index.index_entries import Searcher, add, vector_of

PAUSE_S = 0.02  # leaves the writer a processor


def say(line: str) -> None:
    print(line, flush=True)


def write(folder: Path, first: int, count: int, lot: int) -> None:
    with VectorLedger(folder / LEDGER_FILE) as ledger:
        for start in range(first, first + count, lot):
            add(ledger, range(start, start + lot))
            say(f"done {start + lot}")
        say("publishing")
        search_graph.publish_graph(SearchEntries(ledger), folder)
    say("published")


def follow(folder: Path) -> None:
    """Print the number of entries when it changes; fail if one of them is not found."""
    searcher, seen = Searcher(folder), 0
    while not select.select([sys.stdin], [], [], PAUSE_S)[0]:
        count = len(searcher.hits(vector_of(0), limit=10_000))
        assert count >= seen
        for number in (0, count // 2, count - 1):
            assert searcher.first(number) == str(number), (number, count)
        if count > seen:
            seen = count
            say(str(count))


if __name__ == "__main__":
    search_graph.EXACT_UP_TO_BYTES = 0
    {"write": write, "follow": follow}[sys.argv[2]](Path(sys.argv[1]), *map(int, sys.argv[3:]))

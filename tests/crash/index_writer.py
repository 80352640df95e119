"""Writes an index in small lots and says what it does, to be killed while it does it.

``python -m tests.crash.index_writer FOLDER upsert FIRST COUNT LOT | remake COUNT``
"""

from __future__ import annotations

import sys
from pathlib import Path

from embedding_index.chroma_index import ChromaIndex
from tests.embedding_index.index_entries import MODEL, entries


def say(line: str) -> None:
    print(line, flush=True)


def main(folder: Path, action: str, *numbers: int) -> None:
    index = ChromaIndex(folder, MODEL)
    if action == "remake":
        index.remake(entries(range(numbers[0])), on_progress=lambda done: say(f"done {done}"))
    else:
        first, count, lot = numbers
        for start in range(first, first + count, lot):
            index.upsert(entries(range(start, start + lot)))
            say(f"done {start + lot - first}")
    say("finishing")
    index.close()
    say("finished")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], *map(int, sys.argv[3:]))

"""Follows an index and searches it until a line comes in; says what it saw, or fails.

``python -m tests.embedding_index.index_reader FOLDER WORK_DIR``; each line it prints is ``GENERATION COUNT``.
"""

from __future__ import annotations

import select
import sys
from pathlib import Path

from embedding_index.index_copy import IndexCopy
from tests.embedding_index.index_entries import MODEL, vector_of

PAUSE_S = 0.02  # the writer has a processor to itself where there are two


def main(folder: Path, work_dir: Path) -> None:
    seen = 0
    with IndexCopy(folder, identity=MODEL, work_dir=work_dir) as copy:
        while not select.select([sys.stdin], [], [], PAUSE_S)[0]:
            copy.refresh()
            assert copy.state is not None
            count = sum(copy.state.counts.values())
            assert copy.state.generation >= seen
            for number in (0, count // 2, count - 1):
                (hit,) = copy.search(vector_of(number), limit=1)
                assert hit.name == str(number), (hit, number, count)
            assert copy.search(vector_of(count), limit=1)[0].similarity < 0.999, "more than the state says"
            if copy.state.generation > seen:
                seen = copy.state.generation
                print(seen, count, flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))

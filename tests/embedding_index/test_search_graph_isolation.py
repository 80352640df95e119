"""ChromaDB in a separate process: it sends nothing, prints nothing, and writes nothing elsewhere."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest

from embedding_index import search_graph
from error_handler import VectorStoreError
from tests.forked_process import OF_THE_INDEX, run_forked

ROOT = Path(__file__).parents[2]


def run_python(code: str, *arguments: object, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run *code* in a process in which ChromaDB has not been loaded."""
    return run_forked(["-c", code, *map(str, arguments)], {**os.environ, **variables}, ROOT, preload=OF_THE_INDEX)


def test_foreign_errors_are_translated(tmp_path: Path) -> None:
    """This includes a panic of the Rust part, a BaseException of a class that cannot be imported."""

    class PanicException(BaseException):
        pass

    (tmp_path / "file").write_text("")
    with pytest.raises(VectorStoreError, match="index --batch"):
        search_graph.SearchGraph(tmp_path / "file")
    with pytest.raises(VectorStoreError, match="PanicException"), search_graph._Translated(tmp_path):
        raise PanicException("secret")
    with pytest.raises(KeyboardInterrupt), search_graph._Translated(tmp_path):
        raise KeyboardInterrupt


# A filter of system calls (seccomp(2)): the process dies with SIGSYS where it opens a socket of the internet, in
# whichever language; then the code. x86-64: socket is call 41.
GUARD = """
import ctypes, struct, sys
steps = [(0x20, 0, 0, 0), (0x15, 0, 4, 41), (0x20, 0, 0, 16), (0x15, 1, 0, 2), (0x15, 0, 1, 10),
         (0x06, 0, 0, 0x80000000), (0x06, 0, 0, 0x7FFF0000)]
program = b"".join(struct.pack("HBBI", *step) for step in steps)
buffer = ctypes.create_string_buffer(program)
filter = struct.pack("HxxxxxxP", len(steps), ctypes.addressof(buffer))
libc = ctypes.CDLL(None, use_errno=True)
assert libc.prctl(38, 1, 0, 0, 0) == 0
assert libc.prctl(22, 2, ctypes.c_char_p(filter), 0, 0) == 0, ctypes.get_errno()
"""
USE = """
import logging
from pathlib import Path
from embedding_index import search_graph
from embedding_index.vector_ledger import LEDGER_FILE
from embedding_index.search_entries import SearchEntries
from embedding_index.vector_ledger import VectorLedger
from tests.embedding_index.index_entries import Searcher, make_index
folder = Path(sys.argv[1])
folder.mkdir()
make_index(folder, range(3))
for search_graph.EXACT_UP_TO_BYTES in (search_graph.EXACT_UP_TO_BYTES, 0):
    with VectorLedger(folder / LEDGER_FILE) as ledger:
        search_graph.publish_graph(SearchEntries(ledger), folder)
    searcher = Searcher(folder)
    is_large = search_graph.EXACT_UP_TO_BYTES == 0
    assert searcher.first(2) == "2" and (searcher._search._graph is not None) == is_large
    searcher.close()
    assert ("chromadb" in sys.modules) == is_large, "loading it takes a second"
assert logging.getLogger().handlers == [] and logging.getLogger().level == logging.WARNING
"""


@pytest.mark.slow
@pytest.mark.skipif(os.uname().machine != "x86_64", reason="the filter knows the system calls of x86-64")
def test_chromadb_sends_nothing_and_says_nothing(tmp_path: Path) -> None:
    """It opens no socket, writes no file to the home folder and leaves logging unchanged; a small index does not load it."""
    home = tmp_path / "home"
    home.mkdir()
    caught = run_python(GUARD + "import socket\nsocket.socket(socket.AF_INET, socket.SOCK_DGRAM)")
    assert caught.returncode == -signal.SIGSYS, caught.stderr
    done = run_python(GUARD + USE, tmp_path / "index", HOME=str(home))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert list(home.rglob("*")) == []


@pytest.mark.thorough
def test_environment_does_not_move_the_graph(tmp_path: Path) -> None:
    """ChromaDB would use these variables; one that it refuses is reported in one sentence."""
    moved = {"CHROMA_API_IMPL": "chromadb.api.fastapi.FastAPI", "PERSIST_DIRECTORY": str(tmp_path / "elsewhere")}
    done = run_python("import sys\n" + USE, tmp_path / "index", **moved)
    assert (done.returncode, done.stderr) == (0, "")
    assert not (tmp_path / "elsewhere").exists()
    refused = run_python("import sys\n" + USE, tmp_path / "other", MIGRATIONS="2024")
    assert "ConfigurationError: ChromaDB reads settings from the environment" in refused.stderr

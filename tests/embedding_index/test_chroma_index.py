"""Vectors on disk: what is stored is found, damage is never opened, and nothing of a conversation is in clear."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from embedding_index.chroma_folder import ChromaFolder, _Translated
from embedding_index.chroma_index import ChromaIndex, Entry
from embedding_index.finished_state import MARKER, read_state, write_state
from embedding_index.items import Kind, ModelIdentity
from error_handler import MixedIndexError, UnusableVectorsError, VectorStoreError
from tests.embedding_index.index_entries import (
    DIMENSIONS,
    MODEL,
    OTHER_MODEL,
    assert_holds,
    entries,
    entry,
    make_index,
    vector_of,
)

ROOT = Path(__file__).parents[2]


def run_python(code: str, *arguments: object, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_what_is_stored_is_found_again(tmp_path: Path) -> None:
    """The most similar first, with its metadata and text, also after opening again."""
    make_index(tmp_path, range(50))
    with ChromaIndex(tmp_path, MODEL) as index:
        assert_holds(index, range(50))
        hits = index.search(vector_of(7) + vector_of(8), limit=3)
        assert {hit.name for hit in hits[:2]} == {"7", "8"}
        assert [hit.similarity for hit in hits] == sorted((hit.similarity for hit in hits), reverse=True)
        assert (hits[0].kind, hits[0].text) == (Kind.TABLE, "a table")
    assert not (tmp_path / MARKER).exists()


def test_equally_similar_ones_come_by_id_and_kinds_are_told_apart(tmp_path: Path) -> None:
    """The cut is the same each time, and a kind that is not asked for never takes a place."""
    vector = vector_of(1)
    with ChromaIndex(tmp_path, MODEL) as index:
        index.upsert([Entry(f"table:{name}", vector, {}, "t") for name in "gbeafdc"])
        index.upsert([Entry("conversation:a", vector, {}), Entry("relationship:r", -vector, {}, "r")])
        assert [hit.name for hit in index.search(vector, [Kind.TABLE], limit=3)] == ["a", "b", "c"]
        assert [(hit.kind, hit.name) for hit in index.search(vector, limit=2)] == [
            (Kind.CONVERSATION, "a"),
            (Kind.TABLE, "a"),
        ]
        (opposite,) = index.search(vector, [Kind.RELATIONSHIP])
        assert opposite.similarity == pytest.approx(-1)
        assert index.search(vector, [Kind.CONVERSATION])[0].text is None
        assert index.search(vector, []) == []


def test_metadata_is_replaced_as_a_whole(tmp_path: Path) -> None:
    """No key of the old metadata stays, by either way of changing it; text and vector stay with update_metadata."""
    with ChromaIndex(tmp_path, MODEL) as index:
        index.upsert([entry(1, old=1), entry(2, old=1)])
        index.upsert([Entry("table:1", vector_of(1), {"new": True}, None)])
        index.update_metadata({"table:2": {"big": 2**70, "share": 0.5, "text": "\ud800"}, "table:9": {"x": 1}})
        first, second = (index.search(vector_of(number), limit=1)[0] for number in (1, 2))
        assert (first.metadata, first.text) == ({"new": True}, None)
        assert (second.metadata, second.text) == ({"big": 2**70, "share": 0.5, "text": "\ud800"}, "a table")
        assert index.count() == 2


def test_deleted_ones_are_gone(tmp_path: Path) -> None:
    """Also after opening again; ids that are not there, and no ids at all, are fine."""
    make_index(tmp_path, range(20))
    with ChromaIndex(tmp_path, MODEL) as index:
        index.delete([f"table:{number}" for number in range(5)])
        index.delete(["table:77", "conversation:1"])
        index.delete([])
        index.upsert([])
    with ChromaIndex(tmp_path, MODEL) as index:
        assert_holds(index, range(5, 20))
        assert index.search(vector_of(1), limit=1)[0].similarity < 0.999


def test_another_model_is_refused_with_the_remedy(tmp_path: Path) -> None:
    """Before anything is touched, naming both, also where the first writer was killed."""
    make_index(tmp_path, range(3))
    shorter = replace(MODEL, dimensions=16)
    for other in (OTHER_MODEL, shorter):
        with pytest.raises(MixedIndexError, match=r"--rebuild") as caught:
            ChromaIndex(tmp_path, other)
        assert str(MODEL) in str(caught.value)
        assert str(other) in str(caught.value)
    index = ChromaIndex(tmp_path, OTHER_MODEL, discard=True)
    index.remake(entries(range(2)))
    index.close()
    assert read_state(tmp_path).identity == OTHER_MODEL  # type: ignore[union-attr]
    (tmp_path / "killed").mkdir()
    (tmp_path / "killed" / MARKER).write_text(json.dumps({"provider": "local", "model": "m", "dimensions": None}))
    with pytest.raises(MixedIndexError, match="m of local"):
        ChromaIndex(tmp_path / "killed", MODEL)


def test_a_vector_of_another_length_or_no_direction_is_refused_whole(tmp_path: Path) -> None:
    """Nothing of its lot is stored, and the index goes on."""
    with ChromaIndex(tmp_path, MODEL) as index:
        index.upsert(entries(range(2)))
        with pytest.raises(MixedIndexError, match="length 5"):
            index.upsert([entry(3), Entry("table:4", np.ones(5, np.float32), {})])
        for bad in (np.zeros(DIMENSIONS, np.float32), np.full(DIMENSIONS, np.nan, np.float32)):
            with pytest.raises(UnusableVectorsError, match="table:4"):
                index.upsert([entry(3), Entry("table:4", bad, {})])
        with pytest.raises(MixedIndexError):
            index.search(np.ones(5, np.float32))
        index.upsert([entry(5)])
        assert index.ids() == {"table:0", "table:1", "table:5"}
    assert ChromaIndex(tmp_path, MODEL).needs_rebuild is None


def test_the_length_of_the_vectors_is_learned(tmp_path: Path) -> None:
    """A provider that did not tell it yet may open an index; from the first vector on it counts."""
    unknown = replace(MODEL, dimensions=None)
    with ChromaIndex(tmp_path, unknown) as index:
        assert index.count() == 0
        index.upsert(entries(range(2)))
        assert index.identity == MODEL
    assert ChromaIndex(tmp_path, unknown).identity == MODEL


@pytest.fixture(scope="module")
def whole_index(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    make_index(folder, range(300))
    return folder


def spoil(path: Path, how: str) -> None:
    size = path.stat().st_size
    if how == "missing":
        path.unlink()
    elif how == "cut":
        os.truncate(path, size // 2)
    elif how == "zeros":
        path.write_bytes(bytes(size))
    else:
        content = bytearray(path.read_bytes())
        content[size // 2] ^= 1
        path.write_bytes(content)


FILES = ["chroma.sqlite3", "data_level0.bin", "header.bin", "index_metadata.pickle", "length.bin", "link_lists.bin"]


@pytest.mark.parametrize("how", ["missing", "cut", "zeros", "one bit"])
@pytest.mark.parametrize("name", FILES)
def test_damage_is_noticed_before_anything_is_opened(tmp_path: Path, whole_index: Path, name: str, how: str) -> None:
    """ChromaDB itself would answer wrongly, or end the process."""
    for source in [path for path in whole_index.rglob("*") if path.is_file()]:
        target = tmp_path / source.relative_to(whole_index)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(source.read_bytes())
    assert ChromaIndex(tmp_path, MODEL).needs_rebuild is None
    spoil(next((tmp_path / "chroma").rglob(name)), how)
    index = ChromaIndex(tmp_path, MODEL)
    assert index.needs_rebuild == "its files are not those that were written"
    with pytest.raises(VectorStoreError, match="--rebuild"):
        index.search(vector_of(1))
    with pytest.raises(VectorStoreError, match="--rebuild"):
        index.count()


def test_what_is_not_whole_is_made_anew(tmp_path: Path) -> None:
    """A missing folder, one of another version, one that says nothing of itself: remake ends it."""
    make_index(tmp_path, range(5))
    state = read_state(tmp_path)
    assert state is not None
    write_state(tmp_path, replace(state, chromadb="0.4.0"))
    assert "0.4.0" in (ChromaIndex(tmp_path, MODEL).needs_rebuild or "")
    write_state(tmp_path, state)
    (tmp_path / MARKER).write_text("")
    assert "did not end well" in (ChromaIndex(tmp_path, MODEL).needs_rebuild or "")
    (tmp_path / MARKER).unlink()
    assert ChromaIndex(tmp_path, MODEL).needs_rebuild is None
    (tmp_path / "generation").write_text("?")
    assert ChromaIndex(tmp_path, MODEL).needs_rebuild
    (tmp_path / "chroma").rename(tmp_path / "away")
    write_state(tmp_path, state)
    index = ChromaIndex(tmp_path, MODEL)
    assert index.needs_rebuild
    progress: list[int] = []
    index.remake(iter(entries(range(2500))), progress.append)
    assert progress == [1000, 2000, 2500]
    assert index.generation > state.generation
    assert_holds(index, range(2500), searched_every=10)
    index.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["away", "chroma", "generation"]
    assert ChromaIndex(tmp_path, MODEL).needs_rebuild is None


def test_an_index_of_nothing_is_fine(tmp_path: Path) -> None:
    """Nothing stored, nothing found, and remade from nothing."""
    index = ChromaIndex(tmp_path, MODEL)
    assert (index.count(), index.ids(), index.generation) == (0, set(), 0)
    index.remake([])
    assert index.search(vector_of(1)) == []
    index.close()
    assert ChromaIndex(tmp_path, MODEL).count() == 0


def test_a_writer_that_changed_nothing_makes_no_new_state(tmp_path: Path) -> None:
    """Readers have nothing to copy, though ChromaDB changes its files when it is only opened."""
    make_index(tmp_path, range(3))
    before = read_state(tmp_path)
    with ChromaIndex(tmp_path, MODEL) as index:
        index.search(vector_of(1))
    after = read_state(tmp_path)
    assert before is not None
    assert after is not None
    assert after.is_content_of(before)
    assert ChromaIndex(tmp_path, MODEL).needs_rebuild is None


def test_nothing_is_finished_after_a_failure(tmp_path: Path) -> None:
    """ChromaDB loses its file while it writes: translated, and the marker stays."""
    make_index(tmp_path, range(3))
    index = ChromaIndex(tmp_path, MODEL)
    index.search(vector_of(1))
    (tmp_path / "chroma" / "chroma.sqlite3").write_bytes(b"no database" * 1000)
    with pytest.raises(VectorStoreError, match="--rebuild") as caught:
        index.upsert(entries(range(3, 6)))
    assert caught.value.__cause__ is not None
    assert index.needs_rebuild
    index.close()
    assert (tmp_path / MARKER).exists()
    again = ChromaIndex(tmp_path, MODEL)
    again.remake(entries(range(6)))
    assert_holds(again, range(6))
    again.close()


def test_what_was_written_is_verified_before_it_is_finished(tmp_path: Path) -> None:
    """A vector that is lost in between keeps the marker where it is."""
    index = ChromaIndex(tmp_path, MODEL)
    index.upsert(entries(range(3)))
    assert index._chroma is not None
    index._chroma.delete(["table:1"])  # behind its back
    with pytest.raises(VectorStoreError, match="2 vectors, 3 were written"):
        index.close()
    assert ChromaIndex(tmp_path, MODEL).needs_rebuild


def test_foreign_errors_are_translated(tmp_path: Path) -> None:
    """Whatever their base: a panic of the Rust part is a BaseException of a class that cannot be imported."""

    class PanicException(BaseException):
        pass

    (tmp_path / "file").write_text("")
    with pytest.raises(VectorStoreError, match="--rebuild"):
        ChromaFolder(tmp_path / "file", MODEL)
    with pytest.raises(VectorStoreError, match="PanicException"), _Translated(tmp_path):
        raise PanicException("secret")
    with pytest.raises(KeyboardInterrupt), _Translated(tmp_path):
        raise KeyboardInterrupt


def test_a_folder_that_could_not_be_opened_can_be_opened_later(tmp_path: Path) -> None:
    """ChromaDB keeps what failed to start, for all later openings of the same path."""
    chroma = tmp_path / "chroma"
    chroma.mkdir()
    (chroma / "chroma.sqlite3").write_bytes(b"no database" * 1000)
    with pytest.raises(VectorStoreError):
        ChromaFolder(chroma, MODEL)
    (chroma / "chroma.sqlite3").unlink()
    ChromaFolder(chroma, MODEL).close()


def test_no_text_of_a_conversation_is_on_disk(tmp_path: Path) -> None:
    """Even where a caller hands it in, nor after it was changed; a table's text is, or this would prove nothing."""
    words = "zebrafish-of-a-customer"
    with ChromaIndex(tmp_path, MODEL) as index:
        index.upsert(
            [Entry("conversation:1", vector_of(1), {"intent": "refund"}, words), entry(2, text="quokka table")]
        )
        index.upsert([Entry("conversation:1", vector_of(3), {"intent": "delay"}, words)])
        assert index.search(vector_of(3), limit=1)[0].text is None
    content = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert b"quokka table" in content
    assert b"delay" in content
    assert words.encode() not in content


@pytest.mark.parametrize("number", [3, 60])
def test_no_memory_of_the_process_is_on_disk(tmp_path: Path, number: int) -> None:
    """ChromaDB writes room for 100 vectors as its memory is: what is behind the last one is overwritten."""
    make_index(tmp_path, range(number))
    for name in ("data_level0.bin", "length.bin"):
        (path,) = (tmp_path / "chroma").rglob(name)
        content = path.read_bytes()
        assert len(content) % 100 == 0, "it has no room to spare: this proves nothing"
        used = len(content) // 100 * number
        assert any(content[:used])
        assert not any(content[used:])
    with ChromaIndex(tmp_path, MODEL) as index:
        index.upsert(entries(range(number, 150)))
        assert_holds(index, range(150))
    with ChromaIndex(tmp_path, MODEL) as index:
        assert_holds(index, range(150))


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
from tests.embedding_index.index_entries import MODEL, assert_holds, make_index
from embedding_index.chroma_index import ChromaIndex
from embedding_index.index_copy import IndexCopy
folder = Path(sys.argv[1])
folder.mkdir()
make_index(folder, range(3))
with ChromaIndex(folder, MODEL) as index:
    assert_holds(index, range(3))
with IndexCopy(folder) as copy:
    copy.refresh()
assert logging.getLogger().handlers == [] and logging.getLogger().level == logging.WARNING
"""


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="the filter knows the system calls of x86-64")
def test_chromadb_sends_nothing_and_says_nothing(tmp_path: Path) -> None:
    """No socket is ever opened, no file made in the home, nothing printed, logging left alone."""
    home = tmp_path / "home"
    home.mkdir()
    caught = run_python(GUARD + "import socket\nsocket.socket(socket.AF_INET, socket.SOCK_DGRAM)")
    assert caught.returncode == -signal.SIGSYS, caught.stderr
    done = run_python(GUARD + USE, tmp_path / "index", HOME=str(home), PYTHONDONTWRITEBYTECODE="1")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert list(home.rglob("*")) == []


def test_the_environment_does_not_move_the_index(tmp_path: Path) -> None:
    """ChromaDB would obey these; what it refuses to read ends in a sentence."""
    moved = {"CHROMA_API_IMPL": "chromadb.api.fastapi.FastAPI", "PERSIST_DIRECTORY": str(tmp_path / "elsewhere")}
    done = run_python("import sys\n" + USE, tmp_path / "index", **moved)
    assert (done.returncode, done.stderr) == (0, "")
    assert not (tmp_path / "elsewhere").exists()
    refused = run_python("import sys\n" + USE, tmp_path / "other", MIGRATIONS="2024")
    assert "ConfigurationError: ChromaDB takes settings from the environment" in refused.stderr


def test_chromadb_is_loaded_when_it_is_needed(tmp_path: Path) -> None:
    """Loading takes a second; looking at an index, and asking how much is in it, does not need it."""
    make_index(tmp_path, range(3))
    code = (
        "import sys\nfrom pathlib import Path\nfrom embedding_index.index_copy import IndexCopy\n"
        "from embedding_index.chroma_index import ChromaIndex\nfrom tests.embedding_index.index_entries import MODEL\n"
        "folder = Path(sys.argv[1])\nIndexCopy(folder).close()\n"
        "with ChromaIndex(folder, MODEL) as index:\n    assert index.count() == 3\nassert 'chromadb' not in sys.modules\n"
    )
    done = run_python(code, tmp_path)
    assert done.returncode == 0, done.stderr


def test_a_model_without_a_known_length_can_be_compared() -> None:
    """ModelIdentity of a provider that was not asked yet."""
    assert MODEL.is_same_model(ModelIdentity(MODEL.provider, MODEL.model))

"""Vectors that were paid for are there after whatever happens, and never of two models at once."""

from __future__ import annotations

import signal
import sqlite3
import stat
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from database_docs.items import content_hash
from embedding_index.providers.contract import ModelIdentity, Vector
from embedding_index.vector_ledger import Totals, VectorLedger
from error_handler import MixedIndexError, StateDirectoryError
from tests.forked_process import PipedProcess

MODEL = ModelIdentity("openai", "small")


def vector(*numbers: float) -> Vector:
    return np.array(numbers, np.float32)


def entries(*names: str, length: int = 3) -> dict[str, Vector]:
    return {content_hash(name): np.full(length, number + 1, np.float32) for number, name in enumerate(names)}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "index" / "vectors.sqlite3"


def test_more_than_one_statement_takes_are_added_at_once(path: Path) -> None:
    many = {content_hash(str(number)): vector(number, 1.0) for number in range(9000)}
    with VectorLedger(path) as ledger:
        ledger.add(MODEL, many, 70)
        found = ledger.vectors(MODEL, many)
    assert found.keys() == many.keys()
    assert all((found[key] == many[key]).all() for key in many)


def test_added_vectors_are_there_after_reopening(path: Path) -> None:
    added = entries("a", "b")
    with VectorLedger(path) as ledger:
        ledger.add(MODEL, added, 70)
        ledger.add(MODEL, {}, 5)
        ledger.add(MODEL, entries("a", "c"), 30)
    with VectorLedger(path) as ledger:
        wanted = [content_hash(name) for name in "abcd"]
        assert ledger.known(MODEL, wanted) == set(wanted[:3])
        found = ledger.vectors(MODEL, wanted)
        assert found.keys() == set(wanted[:3])
        assert all((found[key] == added[key]).all() for key in added), "the first vector of a text stays"
        assert ledger.totals(MODEL) == Totals(vectors=3, calls=3, tokens=105)
        assert ledger.dimensions(ModelIdentity("openai", "small")) == 3
        assert ledger.totals(ModelIdentity("ollama", "small")) == Totals(0, 0, 0)


def test_more_hashes_than_a_query_takes(path: Path) -> None:
    added = {content_hash(str(number)): vector(number, 1) for number in range(3000)}
    with VectorLedger(path) as ledger:
        ledger.add(MODEL, added)
        assert ledger.known(MODEL, [*added, content_hash("x")]) == added.keys()
        assert len(ledger.vectors(MODEL, added)) == 3000


def test_only_the_owner_reads_it(path: Path) -> None:
    with VectorLedger(path) as ledger:
        ledger.add(MODEL, entries("a"))
        modes = {each.name: stat.S_IMODE(each.stat().st_mode) for each in path.parent.iterdir()}
        assert modes == {f"vectors.sqlite3{end}": 0o600 for end in ("", "-wal", "-shm")}
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def test_another_dimension_is_refused_and_nothing_is_added(path: Path) -> None:
    with VectorLedger(path) as ledger:
        ledger.add(MODEL, entries("a"))
        with pytest.raises(MixedIndexError, match=r"4 dimensions, and the stored ones have 3.*--rebuild"):
            ledger.add(MODEL, entries("b", length=4), 9)
        with pytest.raises(MixedIndexError):
            ledger.add(MODEL, entries("b") | entries("c", length=4), 9)
        with pytest.raises(MixedIndexError):
            ledger.add(ModelIdentity("openai", "small", 5), entries("b", length=4), 9)
        assert ledger.totals(MODEL) == Totals(1, 1, 0)


def test_failed_add_stores_nothing(path: Path) -> None:
    """Neither vectors nor usage are stored."""
    with VectorLedger(path) as ledger:
        with pytest.raises(ValueError, match="hex"):
            ledger.add(MODEL, {**entries("a"), "no hash": vector(1, 2, 3)}, 7)
        assert not ledger.known(MODEL, [content_hash("a")])
        assert ledger.dimensions(ModelIdentity(MODEL.provider, MODEL.model)) is None
        assert ledger.totals(MODEL).tokens == 0


def test_models_and_dimensions_stand_beside_each_other(path: Path) -> None:
    short = ModelIdentity("openai", "small", 2)
    large = ModelIdentity("openai", "large")
    key = content_hash("a")
    with VectorLedger(path) as ledger:
        ledger.add(MODEL, entries("a"))
        assert not ledger.known(short, [key]) | ledger.known(large, [key])
        ledger.add(short, entries("a", length=2))
        ledger.add(large, entries("a", length=5))
        lengths = [len(ledger.vectors(identity, [key])[key]) for identity in (MODEL, short, large)]
        assert lengths == [3, 2, 5]
        assert [ledger.dimensions(identity) for identity in (MODEL, short, large)] == [3, 2, 5]
        assert ledger.known(ModelIdentity("openai", "small", 3), [key]) == {key}, "the default length, by its number"


def test_vectors_of_a_length_that_was_asked_for_are_not_those_of_the_default(path: Path) -> None:
    """They become the default vectors once an answer shows that the default has this length."""
    key = content_hash("a")
    with VectorLedger(path) as ledger:
        assert ledger.dimensions(MODEL) is None
        ledger.add(ModelIdentity("openai", "small", 3), entries("a"))
        assert ledger.dimensions(MODEL) is None
        assert not ledger.known(MODEL, [key])
        ledger.add(ModelIdentity("openai", "small", 2), entries("a", length=2))
        ledger.add(MODEL, entries("b"))
        assert ledger.known(MODEL, [key]) == {key}


def test_keep_only_spares_the_pieces_of_kept_texts(path: Path) -> None:
    hashes = {name: content_hash(name) for name in ("kept", "gone", "long", "p1", "p2", "p1a", "other", "q1")}
    with VectorLedger(path) as ledger:
        ledger.add(MODEL, entries("kept", "gone", "p1", "p1a", "q1"))
        ledger.note_parts({hashes["long"]: [hashes["p1"], hashes["p2"]], hashes["p1"]: [hashes["p1a"]]})
        ledger.note_parts({hashes["other"]: [hashes["q1"]]})
        assert ledger.keep_only([hashes["kept"], hashes["long"]]) == 2
        assert ledger.known(MODEL, hashes.values()) == {hashes[name] for name in ("kept", "p1", "p1a")}
        assert ledger.keep_only([]) == 3


def test_many_threads(path: Path) -> None:
    with VectorLedger(path) as ledger:

        def add(number: int) -> None:
            for step in range(20):
                ledger.add(MODEL, {content_hash(f"{number} {step}"): vector(1, 2)}, 1)
                assert ledger.known(MODEL, [content_hash(f"{number} {step}")])

        threads = [threading.Thread(target=add, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert ledger.totals(MODEL) == Totals(160, 160, 160)


def test_a_killed_process_loses_nothing_that_was_added(path: Path) -> None:
    code = (
        "import sys, itertools, numpy as np; from pathlib import Path; from database_docs.items import content_hash;"
        "from embedding_index.vector_ledger import VectorLedger; from embedding_index.providers.contract import ModelIdentity\n"
        "ledger = VectorLedger(Path(sys.argv[1]))\n"
        "for n in itertools.count():\n"
        "    ledger.add(ModelIdentity('openai', 'small'), {content_hash(f'{n} {i}'): np.ones(100, np.float32) for i in range(9)}, 1)\n"
        "    print(n, flush=True)\n"
    )
    process = PipedProcess(["-c", code, str(path)], preload=["embedding_index.vector_ledger"])
    for _ in range(12):
        process.stdout.readline()
    process.kill()
    added = 12 + len(process.finish().splitlines())
    assert process.returncode == -signal.SIGKILL
    with VectorLedger(path) as ledger:
        totals = ledger.totals(MODEL)
    assert totals.vectors == 9 * totals.calls, "half of an addition"
    assert totals.calls in (added, added + 1)


def test_durability_is_switched_on(path: Path) -> None:
    """A test cannot cut the power; it can read the setting for which SQLite guarantees durability."""
    with VectorLedger(path) as ledger:
        assert ledger._db.execute("PRAGMA synchronous").fetchone()[0] == 2
        assert ledger._db.execute("PRAGMA journal_mode").fetchone()[0] == "wal"


def test_deleted_vectors_are_overwritten(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also with a SQLite that only does it on request; some are built to do it always."""
    connect = sqlite3.connect

    def without_default(*arguments: Any, **options: Any) -> sqlite3.Connection:
        connection = connect(*arguments, **options)
        connection.execute("PRAGMA secure_delete=OFF")
        return connection

    monkeypatch.setattr(sqlite3, "connect", without_default)
    secret = np.linspace(0.1, 0.9, 64, dtype="<f4")
    with VectorLedger(path) as ledger:
        ledger.add(MODEL, {content_hash("secret"): secret, content_hash("other"): secret + 1})
        ledger.empty_journal()
        assert secret.tobytes() in path.read_bytes()
        assert ledger.keep_only([content_hash("other")]) == 1
        ledger.empty_journal()
    assert secret.tobytes() not in b"".join(file.read_bytes() for file in path.parent.iterdir())


def damage_file(path: Path) -> None:
    path.write_bytes(b"no database, whatever its name says" * 100)


def damage_pages(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[4096:] = b"\xff" * (len(raw) - 4096)
    path.write_bytes(raw)


def damage_vector(path: Path) -> None:
    raw = path.read_bytes()
    place = raw.rindex(np.ones(3, "<f4").tobytes())
    path.write_bytes(raw[:place] + b"\x01" + raw[place + 1 :])


@pytest.mark.parametrize("damage", [damage_file, damage_pages, damage_vector])
def test_damaged_ledger_error_says_what_to_do(path: Path, damage: object) -> None:
    with VectorLedger(path) as ledger:
        ledger.add(MODEL, entries("a"))
    assert callable(damage)
    damage(path)
    with (
        pytest.raises(StateDirectoryError, match=r"damaged.*the copy beside it takes its place"),
        VectorLedger(path) as ledger,
    ):
        ledger.vectors(MODEL, entries("a"))


@pytest.mark.parametrize(
    ("statement", "message"), [("user_version=3", "later version"), ("application_id=7", "another program")]
)
def test_file_of_another_program_is_left_unchanged(path: Path, statement: str, message: str) -> None:
    VectorLedger(path).close()
    with sqlite3.connect(path) as db:
        db.execute(f"PRAGMA {statement}")
        db.execute("PRAGMA journal_mode=DELETE")
    db.close()
    before = path.read_bytes()
    with pytest.raises(StateDirectoryError, match=message):
        VectorLedger(path)
    assert path.read_bytes() == before


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "index").write_text("a file")
    with pytest.raises(StateDirectoryError, match="cannot be used"):
        VectorLedger(tmp_path / "index" / "vectors.sqlite3")
    (tmp_path / "target").touch()
    (tmp_path / "link").symlink_to(tmp_path / "target")
    with pytest.raises(StateDirectoryError, match="cannot be used"):
        VectorLedger(tmp_path / "link")

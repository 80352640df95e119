"""The copy of the ledger: written when something changed, put back when the ledger is lost."""

from __future__ import annotations

from pathlib import Path

import pytest

from embedding_index.search_entries import SearchEntries
from embedding_index.vector_ledger import COPY_FILE, LEDGER_FILE, VectorLedger, restore_ledger, write_copy
from error_handler import StateDirectoryError
from tests.embedding_index.index_entries import MODEL, add, item, vector_of


@pytest.fixture
def path(tmp_path: Path) -> Path:
    with VectorLedger(tmp_path / LEDGER_FILE) as ledger:
        add(ledger, range(5))
        write_copy(ledger)
    return tmp_path / LEDGER_FILE


def test_copy_is_written_only_if_something_changed(path: Path) -> None:
    copy = path.with_name(COPY_FILE)
    first = copy.stat()
    assert first.st_mode & 0o777 == 0o600
    with VectorLedger(path) as ledger:
        write_copy(ledger)
        assert copy.stat().st_ino == first.st_ino
        ledger.add(MODEL, {}, 7)
        write_copy(ledger)
        assert copy.stat().st_ino != first.st_ino
        assert not copy.with_suffix(".part").exists()


@pytest.mark.parametrize("loss", ["missing", "empty"])
def test_lost_ledger_is_restored_with_its_entries(path: Path, loss: str) -> None:
    """A journal of the lost file is not taken for one of the restored file."""
    path.write_bytes(b"")
    if loss == "missing":
        path.unlink()
    path.with_name(f"{LEDGER_FILE}-wal").write_bytes(b"of another file")
    restore_ledger(path)
    with VectorLedger(path, create=False) as ledger:
        assert len(SearchEntries(ledger).hashes()) == 5
        assert len(ledger.known(MODEL, [item(number).content_hash for number in range(9)])) == 5


def test_existing_ledger_is_not_restored(path: Path) -> None:
    with VectorLedger(path) as ledger:
        add(ledger, [7])
    restore_ledger(path)
    with VectorLedger(path) as ledger:
        assert "table:7" in SearchEntries(ledger).hashes()


def test_deleted_vectors_are_in_no_file(path: Path) -> None:
    """Neither vector nor hash, also in the copy; what was kept is in both files."""
    with VectorLedger(path) as ledger:
        ledger.keep_only([item(1).content_hash])
        write_copy(ledger)
        assert SearchEntries(ledger).hashes() == {"table:1": item(1).content_hash}
        content = {each.name: each.read_bytes() for each in path.parent.iterdir()}
    assert [name for name, held in content.items() if vector_of(1).tobytes() in held] == [
        name for name in content if name in (LEDGER_FILE, COPY_FILE)
    ]
    for number in (0, 2, 3, 4):
        for erased in (vector_of(number).tobytes(), bytes.fromhex(item(number).content_hash)):
            assert not [name for name, held in content.items() if erased in held]


def test_copy_that_cannot_be_written_is_an_error(path: Path) -> None:
    with VectorLedger(path) as ledger:
        add(ledger, [9])
        path.with_name(COPY_FILE).with_suffix(".part").mkdir()
        with pytest.raises(StateDirectoryError, match="free space or fix the permissions"):
            write_copy(ledger)

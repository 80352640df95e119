"""An index that the version before wrote (format 1: entries in ChromaDB's files only) is picked up without a call."""

from __future__ import annotations

import json
import sqlite3
import tarfile
from contextlib import closing
from pathlib import Path

import pytest

from config.index_settings import IndexSettings, load_index_settings
from database_docs.documentation_store import DocumentationStore
from database_docs.items import Kind
from embedding_index.batch_indexing import Mending
from embedding_index.providers.contract import ModelIdentity
from embedding_index.search_entries import Hit, SearchEntries
from embedding_index.vector_ledger import LEDGER_FILE, VectorLedger
from embedding_index.vector_search import VectorSearch, query_vector
from embedding_index.vector_store import SQLVectorStore
from tests.embedding_index.test_vector_store import Words, tables

# Three tables and two conversations are indexed, t4 is pending; vectors of ``Words``, 8 numbers.
FILES = Path(__file__).with_name("index_of_format_1.tar.gz")
FOUND = {"table:t1", "table:t2", "table:t3", 'conversation:"q-1"', 'conversation:"q-2"'}


@pytest.fixture
def settings(tmp_path: Path) -> IndexSettings:
    with tarfile.open(FILES) as files:
        files.extraction_filter = getattr(tarfile, "data_filter", None)  # Python 3.11.3 and older have no filters
        files.extractall(tmp_path / "index")
    return load_index_settings(None, index_dir=tmp_path / "index")


def search(settings: IndexSettings, text: str, kind: Kind) -> list[Hit]:
    """Return the hits of a reader; no writer has opened the index."""
    with VectorLedger(settings.index_dir / LEDGER_FILE, create=False) as ledger:
        return VectorSearch(settings.index_dir).search(ledger, query_vector(Words(), text), [kind], 5)


def test_reader_finds_everything_at_once(settings: IndexSettings) -> None:
    """Also a second one; nothing but the ledger is changed."""
    before = sorted(path.name for path in settings.index_dir.iterdir())
    for _ in range(2):
        hits = search(settings, "Table number 2.", Kind.TABLE)
        assert (hits[0].name, hits[0].text, hits[0].metadata) == ("t2", "Table number 2.", {"number": 2})
        assert len(hits) == 3
    (first, _) = search(settings, "My parcel 1 is late.", Kind.CONVERSATION)
    assert (first.name, first.text, first.metadata["categorization"]) == ('"q-1"', None, "Late.")
    assert sorted(path.name for path in settings.index_dir.iterdir()) == before


def test_writer_upgrades_without_a_call_and_removes_the_old_files(settings: IndexSettings) -> None:
    provider = Words()
    with (
        SQLVectorStore(settings, provider=provider) as store,
        DocumentationStore(settings.index_dir / "index.sqlite3") as states,
    ):
        mending = Mending(store, states, rebuild=False)
        assert not mending.lost
        mending.mend()
        assert store.ids() == FOUND
        assert states.get_pending_tables() == ["t4"]
        store.index(tables(1, 2, 3), lambda _: None)
    assert provider.calls == []
    left = {path.name for path in settings.index_dir.iterdir()}
    assert left == {".lock", "index.sqlite3", "vectors.sqlite3", "vectors.copy.sqlite3"}


@pytest.mark.parametrize("loss", ["generation", "generation of another model", "index.sqlite3"])
def test_entries_missing_after_the_upgrade_are_added_by_the_next_run(settings: IndexSettings, loss: str) -> None:
    """The file that names the model is gone, damaged, or the states are not there: no call is made for any of it."""
    folder = settings.index_dir
    if loss.startswith("generation"):
        other = {"identity": {"provider": "openai", "model": "other", "dimensions": 8}}
        (folder / "generation").write_text(json.dumps(other) if "other" in loss else "?")
    else:
        (folder / loss).rename(folder / "away")
    assert search(settings, "Table number 2.", Kind.TABLE) == []
    if loss == "index.sqlite3":
        (folder / "away").rename(folder / loss)
    provider = Words()
    with SQLVectorStore(settings, provider=provider) as store, DocumentationStore(folder / "index.sqlite3") as states:
        Mending(store, states, rebuild=False).mend()
        assert store.ids() == FOUND
    assert provider.calls == []


def test_vectors_and_their_price_are_kept(settings: IndexSettings) -> None:
    with closing(sqlite3.connect(settings.index_dir / LEDGER_FILE)) as before:
        vectors = before.execute("SELECT hash, vector FROM vectors ORDER BY hash").fetchall()
    with VectorLedger(settings.index_dir / LEDGER_FILE) as ledger:
        assert SearchEntries(ledger).identity() == ModelIdentity("openai", "text-embedding-3-small", 8)
        assert ledger.totals(ModelIdentity("openai", "text-embedding-3-small")).tokens == 19
        with ledger.reading() as db:
            now = [tuple(row) for row in db.execute("SELECT hash, vector FROM vectors ORDER BY hash")]
    assert now == vectors

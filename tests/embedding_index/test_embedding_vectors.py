"""Invalid vectors are refused, and a long text gets the mean of the vectors of its pieces."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedding_index.providers.contract import checked_vectors, weighted_mean
from error_handler import MixedIndexError, UnusableVectorsError

GOOD = [0.6, 0.8, 0.0]


@pytest.mark.parametrize(
    ("bad", "problem"),
    [
        ([0.1, float("nan"), 0.2], "not finite"),
        ([0.1, float("inf"), 0.2], "not finite"),
        ([0.0, 0.0, 0.0], "all zeros"),
        ([1e-9, 0.0, 0.0], "implausible length"),
        ([1e30, 0.0, 1e30], "implausible length"),
        ([1e300, 1e300, 1e300], "implausible length"),
        ([0.1, 0.2], "2 dimensions instead of 3"),
        ([0.1, 0.2, 0.3, 0.4], "4 dimensions instead of 3"),
        ([], "not a list"),
        ([[0.1, 0.2, 0.3]], "not a list"),
        (0.5, "not a list"),
        ([0.1, None, 0.2], "not finite"),
        ([0.1, "x", 0.2], "not consist of numbers"),
        ([0.1, [0.2], 0.3], "not consist of numbers"),
        (None, "not a list"),
        ("0.1", "not a list"),
    ],
)
@pytest.mark.parametrize("dimensions", [3, None])
def test_a_bad_vector_is_named_and_the_others_are_kept(bad: Any, problem: str, dimensions: int | None) -> None:
    checked = checked_vectors([GOOD, bad, GOOD], 3, dimensions)
    assert sorted(checked.good) == [0, 2]
    assert list(checked.problems) == [1]
    assert problem in checked.problems[1]
    assert checked.dimensions == 3


@pytest.mark.parametrize("count", [1, 3])
def test_another_count_distrusts_the_whole_answer(count: int) -> None:
    with pytest.raises(UnusableVectorsError, match=f"2 vectors for {count} texts"):
        checked_vectors([GOOD, GOOD], count, 3)


def test_another_dimension_throughout_is_another_model() -> None:
    with pytest.raises(MixedIndexError, match=r"3 dimensions, and the stored ones have 4.*--rebuild"):
        checked_vectors([GOOD, GOOD], 2, 4)
    assert "3 dimensions instead of 4" in checked_vectors([GOOD], 1, 4).problems[0]


def test_nothing_good_tells_no_dimension() -> None:
    assert checked_vectors([[0.0, 0.0]], 1, None).dimensions is None


@given(st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=50).filter(lambda v: sum(x * x for x in v) > 1e-3))
def test_vectors_keep_their_direction_at_length_one(vector: list[float]) -> None:
    kept = checked_vectors([vector], 1, None).good[0]
    assert kept.dtype == np.float32
    assert np.linalg.norm(kept) == pytest.approx(1.0, abs=1e-5)
    assert float(kept @ np.array(vector)) == pytest.approx(float(np.linalg.norm(vector)), rel=1e-4)


def test_the_mean_weighs_by_length() -> None:
    x, y = np.array([1, 0], np.float32), np.array([0, 1], np.float32)
    assert weighted_mean([x, y], [3, 4]) == pytest.approx([0.6, 0.8])
    assert weighted_mean([x, -x], [1, 1]) is None

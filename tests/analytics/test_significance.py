"""Intervals and tests, compared with published values and with other implementations."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from analytics.figures import Counts
from analytics.label_report import changes_between, counted_shares, gold_shares
from analytics.significance import LEAST, holm, two_proportions
from evaluation.wilson import wilson


def test_wilson_interval_of_published_values() -> None:
    """Newcombe (1998), table I, method 3: 81 of 263, 15 of 148, 0 of 20, 1 of 29."""
    published = {
        (81, 263): (0.2553, 0.3662),
        (15, 148): (0.0624, 0.1605),
        (0, 20): (0, 0.1611),
        (1, 29): (0.0061, 0.1718),
    }
    for (hits, n), interval in published.items():
        assert wilson(hits, n) == pytest.approx(interval, abs=5e-5)
    assert wilson(0, 0) == (0.0, 1.0)


@given(st.integers(1, 5000), st.data())
def test_wilson_interval_contains_the_share(n: int, data: st.DataObject) -> None:
    hits = data.draw(st.integers(0, n))
    low, high = wilson(hits, n)
    assert 0 <= low <= hits / n <= high <= 1


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        ((40, 200, 70, 210), 0.0023207860810501887),
        ((12, 5000, 30, 4000), 0.0004193849533447038),
        ((150, 151, 140, 160), 3.209837280636092e-05),
        ((50, 100, 50, 100), 1.0),
    ],
    ids=str,
)
def test_two_proportions_agree_with_the_chi_square_test(table: tuple[int, int, int, int], expected: float) -> None:
    """scipy 1.17.1: chi2_contingency([[hits, n - hits], [earlier, n_earlier - earlier]], correction=False).pvalue."""
    assert two_proportions(*table) == pytest.approx(expected, rel=1e-9)


def test_rare_labels_are_not_tested() -> None:
    """The normal approximation would call 6 against 0 significant."""
    assert two_proportions(LEAST - 1, 1000, 0, 1000) is None
    assert two_proportions(1000, 1000, 1000 - LEAST + 1, 1000) is None
    assert two_proportions(5, 0, 50, 100) is None
    assert two_proportions(LEAST, 1000, 0, 1000) is not None


def test_holm_correction_of_a_published_example() -> None:
    """R: p.adjust(c(0.01, 0.04, 0.03, 0.005), "holm")."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([]) == []


def test_one_of_many_labels_is_not_significant_by_chance() -> None:
    """A change with p = 0.02 is significant alone, and not among 20 labels."""
    now, before = Counter({"A": 130}), Counter({"A": 100})
    alone = changes_between({"f": Counts(1000, now)}, {"f": Counts(1000, before)})
    assert [one.is_significant for one in alone] == [True]
    others = Counter({f"B{number}": 40 for number in range(20)})
    among = changes_between({"f": Counts(1000, now + others)}, {"f": Counts(1000, before + others)})
    assert not any(one.is_significant for one in among)
    assert among[0].label == "A"


def test_counted_shares_are_ordered_and_escaped_by_nobody() -> None:
    found = counted_shares(Counts(10, Counter({"B": 3, "A": 3, "<b>": 4})))
    assert [(one.label, one.value) for one in found] == [("<b>", 0.4), ("A", 0.3), ("B", 0.3)]
    assert counted_shares(Counts()) == []


def test_gold_shares_correct_the_bias_of_the_model() -> None:
    """The model says A for a tenth of the Bs; the control sample shows it."""
    pytest.importorskip("scipy")
    a, b = ("A",), ("B",)
    gold = Counter({(a, a): 50, (b, a): 5, (b, b): 45})
    of_model = Counts(10_000, Counter({"A": 5500, "B": 4500}))
    shares = {one.label: one for one in gold_shares(of_model, of_model, gold)}
    assert shares["A"].low < 0.5 < shares["A"].high < 0.55
    assert shares["A"].value == pytest.approx(0.5, abs=0.01)
    assert shares["A"].hits == 5500


def test_gold_shares_of_a_collection_that_is_all_gold_are_those_of_gold() -> None:
    pytest.importorskip("scipy")
    gold = Counter({(("A",), ("A",)): 30, (("B",), ("A",)): 10})
    shares = {
        one.label: one.value
        for one in gold_shares(Counts(40, Counter({"A": 30, "B": 10})), Counts(40, Counter({"A": 40})), gold)
    }
    assert shares == {"A": 0.75, "B": 0.25}

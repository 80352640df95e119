"""Shares of labels: PPI++ against its reference implementation, and coverage in simulated corpora."""

from __future__ import annotations

from collections import Counter

import numpy
import pytest

from evaluation.intervals import proportion
from evaluation.shares import ADDED, Agreement, field_shares, prediction_powered
from evaluation.values import Estimate
from tests.evaluation.made_rows import FIELD, rows_of

UNLABELLED = 20_000

# Agreement, hits among 1,000 conversations without gold, and ppi_py.ppi_mean_ci(..., alpha=0.05) of ppi-python 0.2.3.
REFERENCE = [
    (Agreement(40, 10, 5, 245), 150, (0.13714, 0.19619)),
    (Agreement(3, 7, 20, 270), 60, (0.01162, 0.05185)),
    (Agreement(100, 0, 0, 100), 480, (0.45506, 0.5116)),
    (Agreement(20, 0, 30, 50), 700, (0.21478, 0.35269)),
]


def width(estimate: Estimate) -> float:
    assert estimate.low is not None
    assert estimate.high is not None
    return estimate.high - estimate.low


def simulated(share: float, sensitivity: float, specificity: float, n_gold: int) -> list[tuple[Agreement, int]]:
    """Return 400 corpora with a label of *share*: the gold conversations, and the model's hits among the others."""
    rng = numpy.random.default_rng(4)
    cells = [share * sensitivity, share * (1 - sensitivity)]
    cells += [(1 - share) * (1 - specificity), (1 - share) * specificity]
    tables = rng.multinomial(n_gold, cells, 400).tolist()
    hits = rng.binomial(UNLABELLED, cells[0] + cells[2], 400).tolist()
    return [(Agreement(*table), count) for table, count in zip(tables, hits, strict=True)]


def coverage(corpora: list[tuple[Agreement, int]], share: float, added: int = ADDED) -> float:
    """Return how often the interval contains *share*."""
    estimates = [prediction_powered(table, hits, UNLABELLED, added) for table, hits in corpora]
    return sum(each.low <= share <= each.high for each in estimates) / len(estimates)  # type: ignore[operator]


@pytest.mark.parametrize(("agreement", "hits", "expected"), REFERENCE)
def test_without_added_conversations_it_is_the_published_estimator(
    agreement: Agreement, hits: int, expected: tuple[float, float]
) -> None:
    """Five decimals."""
    estimate = prediction_powered(agreement, hits, 1000, added=0)
    assert (estimate.low, estimate.high) == pytest.approx(expected, abs=1e-5)


@pytest.mark.thorough
@pytest.mark.parametrize("added", [0, 1])
def test_estimator_agrees_with_ppi_python(added: int) -> None:
    """The added conversations are two more rows for the reference implementation."""
    ppi_py = pytest.importorskip("ppi_py", reason="ppi-python, the reference implementation, is not installed")
    for agreement, hits, _ in REFERENCE:
        cells = [agreement.both, agreement.only_gold + added, agreement.only_model + added, agreement.neither]
        gold = numpy.repeat([1.0, 1.0, 0.0, 0.0], cells)
        model = numpy.repeat([1.0, 0.0, 1.0, 0.0], cells)
        rest = numpy.repeat([1.0, 0.0], [hits, 1000 - hits])
        low, high = ppi_py.ppi_mean_ci(gold, model, rest, alpha=0.05)
        estimate = prediction_powered(agreement, hits, 1000, added)
        assert (estimate.low, estimate.high) == pytest.approx((max(0, low.item()), min(1, high.item())), abs=1e-9)


@pytest.mark.parametrize(
    ("share", "sensitivity", "specificity"),
    [(0.2, 0.9, 0.97), (0.05, 0.6, 0.95), (0.03, 0.99, 0.999), (0.5, 0.95, 0.99)],
)
@pytest.mark.parametrize("n_gold", [100, 300])
def test_intervals_cover_the_share(share: float, sensitivity: float, specificity: float, n_gold: int) -> None:
    """400 corpora for each kind of model; 95 % are promised, and chance takes at most 3 points."""
    assert coverage(simulated(share, sensitivity, specificity, n_gold), share) >= 0.92


def test_without_the_added_conversations_the_promise_of_a_rare_label_is_broken() -> None:
    """This is why they are added: 100 gold labels, a share of 3 %."""
    corpora = simulated(0.03, 0.99, 0.999, 100)
    assert coverage(corpora, 0.03, added=0) < 0.87
    assert coverage(corpora, 0.03) >= 0.92


def test_interval_is_narrower_than_that_of_gold_alone() -> None:
    """A share of 20 %, 300 gold labels, a model that is right in 95 %."""
    corpora = simulated(0.2, 0.9, 0.97, 300)
    combined = numpy.mean([width(prediction_powered(table, hits, UNLABELLED)) for table, hits in corpora])
    gold = numpy.mean([width(proportion(table.both + table.only_gold, 300)) for table, _ in corpora[:100]])
    assert combined < 0.65 * gold


def test_a_biased_model_is_corrected() -> None:
    """The model says 30 %, gold 20 %: the estimate is near 20 %."""
    estimate = prediction_powered(Agreement(60, 0, 30, 210), 6000, UNLABELLED)
    assert estimate.value == pytest.approx(0.2, abs=0.01)


def test_field_shares_counts_gold_conversations_once() -> None:
    """Ten results, four of them with gold: the other six are the unlabelled ones."""
    rows = rows_of([("A", "A"), ("A", "B"), ("B", "B"), ("B", "B")])
    shares = field_shares(FIELD, rows, Counter({("A",): 4, ("B",): 6}), ("A", "B", "C"))
    assert (shares.n_gold, shares.n_model) == (4, 10)
    assert [(each.label, each.model, each.gold.value) for each in shares.labels] == [("A", 0.4, 0.5), ("B", 0.6, 0.5)]
    assert shares.labels[0].combined == prediction_powered(Agreement(1, 1, 0, 2), 3, 6)


@pytest.mark.parametrize("left", [{("A",): 1, ("B",): 5}, {("A",): 6}, {}])
def test_results_that_are_deleted_meanwhile_leave_shares(left: dict[tuple[str], int]) -> None:
    """The gold conversations were read before, with results that are not there any more."""
    rows = rows_of([("A", "A"), ("A", "A"), ("B", "A"), ("B", "B")])
    for each in field_shares(FIELD, rows, Counter(left), ("A", "B")).labels:
        low, value, high = each.combined.low, each.combined.value, each.combined.high
        assert low is not None
        assert value is not None
        assert high is not None
        assert 0 <= low <= value <= high <= 1


def test_field_shares_of_a_corpus_with_gold_alone_are_those_of_gold() -> None:
    """There is nothing to predict."""
    shares = field_shares(FIELD, rows_of([("A", "A"), ("B", "A")]), Counter({("A",): 2}), ("A", "B"))
    assert [each.combined for each in shares.labels] == [each.gold for each in shares.labels]

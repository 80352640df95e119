"""Intervals: known values, and coverage in simulations."""

from __future__ import annotations

import numpy
import pytest

from evaluation.intervals import bootstrap, f1_score, lower_bound, macro_f1, mcnemar, proportion, share_of
from evaluation.values import Estimate

# Label shares 1/2, 1/4, ... and a model that is right in 60 %: gold label x model label.
LABELS = 5


def contains(estimate: Estimate, truth: float) -> bool:
    assert estimate.low is not None
    assert estimate.high is not None
    return estimate.low <= truth <= estimate.high


def test_wilson_interval_of_a_textbook_example() -> None:
    """Newcombe 1998, table 1: 81 of 263 gives 0.2553 to 0.3662."""
    estimate = proportion(81, 263)
    assert (estimate.low, estimate.high) == (pytest.approx(0.2553, abs=5e-5), pytest.approx(0.3662, abs=5e-5))
    assert proportion(0, 0) == Estimate(None, None, None, 0)


def test_few_conversations_give_a_wide_interval() -> None:
    """Three of three are no proof of perfection, neither for a proportion nor for F1."""
    assert proportion(3, 3).low == pytest.approx(0.4385, abs=5e-5)
    perfect = f1_score(3, 0, 0, 3)
    assert perfect.value == 1
    assert perfect.low is not None
    assert perfect.low < 0.65


def test_exact_mcnemar_test() -> None:
    """1 against 9: 2 x (1 + 10) / 1024."""
    assert mcnemar(1, 9) == pytest.approx(22 / 1024)
    assert mcnemar(0, 0) == mcnemar(4, 4) == 1.0


def test_exact_lower_bound_of_binomial_shares() -> None:
    """Clopper-Pearson: 0.05 to the power of 1/3 for three of three; scipy's binomtest for nine of ten."""
    assert lower_bound(3, 3) == pytest.approx(0.05 ** (1 / 3))
    assert lower_bound(9, 10) == pytest.approx(0.6058366975634953)
    assert lower_bound(0, 10) == 0.0


def test_bootstrap_is_reproducible_and_agrees_with_the_normal_interval() -> None:
    """The share 0.3 of 1,000 has a standard error of 0.0145."""
    counts, statistic = [300, 700], share_of([1, 0])
    estimate = bootstrap(counts, statistic)
    assert estimate == bootstrap(counts, statistic)
    assert (estimate.value, estimate.n) == (0.3, 1000)
    assert (estimate.low, estimate.high) == (pytest.approx(0.2716, abs=0.003), pytest.approx(0.3284, abs=0.003))


def test_interval_of_a_single_conversation_is_wide() -> None:
    """Resamples of it are all the same, so it has no width."""
    estimate = bootstrap([1], macro_f1([(frozenset("A"), frozenset("A"))]))
    assert (estimate.value, estimate.high) == (1, 1)
    assert estimate.low == pytest.approx(proportion(1, 1).low)


def cells() -> tuple[list[tuple[int, int]], list[float]]:
    """Return the combinations of gold and model label, and their probabilities."""
    pairs = [(gold, model) for gold in range(LABELS) for model in range(LABELS)]
    shares = [0.4, 0.25, 0.15, 0.12, 0.08]
    return pairs, [shares[gold] * (0.6 if gold == model else 0.1) for gold, model in pairs]


@pytest.mark.thorough
def test_intervals_of_macro_f1_cover_the_truth() -> None:
    """300 samples of 96 conversations with 14 labels; the percentile interval covers in 85 %."""
    names = [str(number) for number in range(14)]
    sets = [(frozenset([gold]), frozenset([model])) for gold in names for model in names]
    probabilities = [(0.4 if gold == model else 0.6 / 13) / 14 for gold, model in sets]
    statistic = macro_f1(sets)
    truth = float(statistic(numpy.array([probabilities]))[0])
    covered = 0
    for sample in numpy.random.default_rng(1).multinomial(96, probabilities, 300):
        seen = numpy.flatnonzero(sample)
        covered += contains(bootstrap(sample[seen].tolist(), macro_f1([sets[number] for number in seen])), truth)
    assert covered / 300 >= 0.9


def test_intervals_of_the_f1_of_a_rare_label_cover_the_truth() -> None:
    """8 % of 100 conversations: about eight gold labels."""
    pairs, probabilities = cells()
    label, share = LABELS - 1, 0.08
    model = sum(one for (_, name), one in zip(pairs, probabilities, strict=True) if name == label)
    truth = 2 * share * 0.6 / (share + model)
    covered = 0
    for sample in numpy.random.default_rng(2).multinomial(100, probabilities, 300).tolist():
        by_pair = dict(zip(pairs, sample, strict=True))
        both = by_pair[label, label]
        in_gold = sum(count for (name, _), count in by_pair.items() if name == label)
        in_model = sum(count for (_, name), count in by_pair.items() if name == label)
        covered += contains(f1_score(both, in_model - both, in_gold - both, in_gold), truth)
    assert covered / 300 >= 0.92

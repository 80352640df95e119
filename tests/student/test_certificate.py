"""The certificate of a student, by simulation and against published numbers."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from student.certificate import Certificate, certify, feasibility, labels_needed
from tests.cases import mostly_thorough


def draw(size: int, rate: float, seed: int = 1) -> tuple[list[float], list[bool]]:
    """Scores that mean nothing, and agreement at *rate*."""
    rng = np.random.default_rng(seed)
    return rng.random(size).tolist(), (rng.random(size) < rate).tolist()


@pytest.mark.parametrize("promise", mostly_thorough([0.9, 0.95, 0.98], 3, first=1))
@pytest.mark.parametrize("slope", [0.0, 0.1, 1.0])
def test_certificate_is_wrong_in_at_most_5_percent(promise: float, slope: float) -> None:
    """Worst cases: agreement that crosses the promise at half of the conversations, or is just below it everywhere."""
    rng = np.random.default_rng(20261130)
    runs, wrong = 300, 0
    for _ in range(runs):
        scores = rng.random(300)
        # P(agree | score) = promise + slope (1 - promise) (2 score - 1) - a hair: the mean above a threshold t is the promise at t = 0
        agreed = rng.random(300) < promise + slope * (1 - promise) * (2 * scores - 1) - 1e-6
        threshold = certify(scores.tolist(), agreed.tolist(), promise).threshold
        if threshold is not None:
            wrong += promise + slope * (1 - promise) * threshold - 1e-6 < promise
    assert wrong <= 0.05 * runs + 2 * (0.05 * 0.95 * runs) ** 0.5


@pytest.mark.parametrize(("promise", "needed"), [(0.9, 29), (0.95, 59), (0.99, 299)])
def test_labels_needed_without_a_disagreement_are_the_published_ones(promise: float, needed: int) -> None:
    """Log(0.05) / log(promise), rounded up, for a single test."""
    assert labels_needed(promise, error=0.05) == needed


def test_few_labels_are_refused_and_the_number_is_named() -> None:
    """A share of 1 of 10 shares has a tenth of the error, so 104 conversations that all agree are the least."""
    refused = certify([0.9] * 100, [True] * 100, 0.95)
    assert refused.threshold is None
    assert (refused.taken, refused.share, refused.lower_bound) == (0, 0.0, None)
    assert "needs at least 104 that all agree" in refused.reason
    assert certify([0.9] * 104, [True] * 104, 0.95).threshold == 0.9


def test_empty_sample_is_refused() -> None:
    """No conversation, no certificate."""
    assert certify([], [], 0.95).threshold is None


def test_student_that_agrees_too_rarely_is_refused_without_a_number() -> None:
    """No sample is large enough."""
    reason = certify(*draw(1000, 0.7), 0.95).reason
    assert "no evidence for a promise of 0.95: train with more results, or use a lower promise" in reason


def test_certificate_leaves_room_for_a_drift() -> None:
    """Of 5,000 conversations, 96 % pass the test of 95 %, but 4 of the 5 that are tolerated in 100 would be used up already.

    Of 500 they do not pass, and more of them would not help.
    """
    for size in (5000, 500):
        refused = certify([0.5] * size, [place % 25 != 0 for place in range(size)], 0.95)
        assert refused.threshold is None
        assert (
            "needs 96.5 % in the sample, because a drift adds wrong labels: train with more results" in refused.reason
        )
    assert certify([0.5] * 5000, [place % 30 != 0 for place in range(5000)], 0.95).threshold == 0.5


def test_student_that_agrees_often_enough_learns_the_size_of_the_sample_that_certifies_it() -> None:
    """97 % of 200 are too few for 95 %; with the named number and the same rate, the promise is certified."""
    agreed = [place % 33 != 0 for place in range(200)]
    scores = [0.5] * 200
    refused = certify(scores, agreed, 0.95)
    size = int(refused.reason.split("about ")[1].split()[0])
    assert refused.threshold is None
    assert size > 200
    again = [place % 33 != 0 for place in range(size)]
    assert certify([0.5] * size, again, 0.95).threshold == 0.5


def test_sure_share_is_certified_and_described() -> None:
    """The surest half always agrees, the rest seldom: the threshold lies between them."""
    rng = np.random.default_rng(3)
    scores = rng.random(1000)
    agreed = (scores > 0.5) | (rng.random(1000) < 0.5)
    certificate = certify(scores.tolist(), agreed.tolist(), 0.95)
    assert certificate.threshold is not None
    assert 0.4 < certificate.threshold < 0.6
    taken = scores >= certificate.threshold
    assert certificate.taken == taken.sum()
    assert certificate.agreed == agreed[taken].sum()
    assert certificate.share == certificate.taken / 1000
    assert certificate.lower_bound is not None
    assert 0.95 <= certificate.lower_bound < certificate.agreed / certificate.taken


def samples() -> st.SearchStrategy[list[tuple[float, bool]]]:
    """Samples with ties, in which sure conversations agree more often."""
    score = st.sampled_from([0.1, 0.5, 0.9, 0.99, 1.0])
    one = score.flatmap(lambda s: st.tuples(st.just(s), st.just(True) if s > 0.5 else st.booleans()))
    return st.lists(one, max_size=60).map(lambda part: part * 10)


def certificate_of(sample: list[tuple[float, bool]], promise: float) -> Certificate:
    """The certificate of pairs."""
    return certify([score for score, _ in sample], [agreed for _, agreed in sample], promise)


@given(samples(), st.floats(0.5, 0.98), st.floats(0.001, 0.1))
def test_lower_promise_takes_at_least_as_much(sample: list[tuple[float, bool]], promise: float, less: float) -> None:
    """Monotone in the promise, with ties."""
    assert certificate_of(sample, promise - less).taken >= certificate_of(sample, promise).taken


@given(samples(), st.randoms(use_true_random=False))
def test_order_of_the_sample_does_not_matter(sample: list[tuple[float, bool]], random: object) -> None:
    """A tie is taken completely or not at all."""
    mixed = list(sample)
    random.shuffle(mixed)  # type: ignore[attr-defined]
    assert certificate_of(mixed, 0.9) == certificate_of(sample, 0.9)


@pytest.mark.parametrize(
    ("scores", "agreed", "promise"), [([0.5], [], 0.9), ([float("nan")], [True], 0.9), ([0.5], [True], 1.0)]
)
def test_nonsense_is_an_error(scores: list[float], agreed: list[bool], promise: float) -> None:
    """Unequal lengths, a score that is no number, a promise that nothing can keep."""
    with pytest.raises(ValueError, match=r"scores|number|promise"):
        certify(scores, agreed, promise)


def test_feasibility_bounds_the_share() -> None:
    """The mixed corpus of the reference: 0.683 right on all, so at most 0.72 can be taken with a promise of 0.95."""
    found = feasibility(1 - 0.683, 1000, 0.95)
    assert found.most == pytest.approx(0.683 / 0.95)
    assert 1 - found.most == pytest.approx((0.317 - 0.05) / (1 - 0.05))
    assert found.possible
    assert "at most 72 % of the conversations" in found.sentence


def test_feasibility_says_how_many_conversations_are_needed() -> None:
    """A sample that no student can be certified with."""
    found = feasibility(0.1, 60, 0.95)
    assert not found.possible
    assert "the certificate has 60 held-out conversations and needs at least 110, better 504" in found.sentence


def test_no_certificate_is_likely_for_a_student_that_is_never_right() -> None:
    """There is no size to name."""
    found = feasibility(1.0, 10_000, 0.9)
    assert not found.possible
    assert found.needed is None

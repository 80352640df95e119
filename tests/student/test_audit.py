"""The running audit of a student."""

from __future__ import annotations

import numpy as np
import pytest

from student.audit import DRIFT_ERROR, LEAST_SHARE, LIMIT, MOST_SHARE, Audit


def test_disagreement_sends_everything_to_the_model_until_it_is_outweighed() -> None:
    """One disagreement raises the share to 1; a dozen agreements lower it again."""
    audit = Audit(0.95)
    audit.record(False)
    assert audit.share == 1
    assert "after a disagreement" in audit.sentence()
    for _ in range(13):
        audit.record(True)
    assert audit.share == MOST_SHARE
    assert audit.sentence() == "13 of 14 audited conversations agree with the model; the promise of 0.95 holds"


def test_share_falls_to_the_least_with_the_room_that_the_promise_has() -> None:
    """A drift uses up the room with a probability of DRIFT_ERROR, unless the least or the most share applies."""
    audit = Audit(0.95, sampled=1000, sampled_wrong=20)
    shares = []
    while audit.share > LEAST_SHARE:
        shares.append(audit.share)
        if audit.share < MOST_SHARE:
            assert (1 - audit.share) ** audit.room == pytest.approx(DRIFT_ERROR)
        audit.record(True)
    assert shares[0] == MOST_SHARE
    assert shares == sorted(shares, reverse=True)
    assert len(shares) < 1000
    assert LEAST_SHARE >= 0.02


def test_student_whose_promise_is_nearly_used_up_is_audited_most() -> None:
    """4.9 % of the sample disagree, so there is hardly any room however many are taken."""
    audit = Audit(0.95, sampled=1000, sampled_wrong=49)
    for _ in range(100):
        audit.record(True)
        assert audit.share == MOST_SHARE


def test_stricter_promise_is_audited_more_at_first() -> None:
    """It gains room more slowly, and some conversations are always taken."""
    shares = [Audit(promise).share for promise in (0.9, 0.95, 0.98, 0.99)]
    assert shares == pytest.approx([0.2, 0.2, 0.5, 0.5])


def test_comparison_stands_for_the_conversations_taken_beside_it() -> None:
    """One that was drawn with 20 % stands for 4 others; one under suspicion for none."""
    audit = Audit(0.95, sampled=1000)
    audit.record(False)
    assert audit.taken == audit.taken_wrong == pytest.approx(1 / MOST_SHARE - 1)
    audit.record(False)
    assert audit.taken == audit.taken_wrong == pytest.approx(1 / MOST_SHARE - 1)


@pytest.mark.parametrize("promise", [0.8, 0.9, 0.95, 0.99])
def test_disagreements_withdraw_the_student_for_ever(promise: float) -> None:
    """After a long time without any; agreement afterwards does not bring it back."""
    audit = Audit(promise)
    for _ in range(10_000):
        audit.record(True)
    disagreements = 0
    while not audit.is_broken:
        audit.record(False)
        disagreements += 1
    assert 3 <= disagreements <= 13
    for _ in range(1000):
        audit.record(True)
    assert audit.is_broken
    assert audit.share == 1
    assert "the student takes no more conversations; train it again on recent results" in audit.sentence()


@pytest.mark.parametrize("promise", [0.9, 0.95, 0.98])
def test_promise_that_is_just_kept_is_not_withdrawn(promise: float) -> None:
    """Average run length: the evidence errs once in at least LIMIT comparisons, here at the boundary itself."""
    rng = np.random.default_rng(20261130)
    broken = 0
    for _ in range(40):
        audit = Audit(promise)
        for agreed in rng.random(500) < promise:
            audit.record(bool(agreed))
        broken += audit.is_broken
    assert broken <= 40 * 500 / LIMIT + 3  # two are expected at most


@pytest.mark.parametrize("promise", [0.9, 0.95, 0.98])
def test_no_bet_has_a_gain_while_the_promise_is_kept(promise: float) -> None:
    """The expected factor of one comparison is 1 at the promise, less above."""
    kept, lost = Audit(promise, evidence=[1000.0] * 2), Audit(promise, evidence=[1000.0] * 2)
    kept.record(True)
    lost.record(False)
    for better, worse in zip(kept.evidence, lost.evidence, strict=True):
        assert promise * better + (1 - promise) * worse == pytest.approx(1000)
        assert better < 1000 < worse

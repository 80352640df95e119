"""200 simulated corpora: the promise is kept, calls are saved, and a drift is found."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest

from tests.student.simulated_corpora import KINDS, Outcome, simulate

PROMISE = 0.95


@cache
def outcomes(promise: float = PROMISE, count: int = 200, conversations: int = 10_000) -> list[Outcome]:
    """The corpora, a third of each kind."""
    rng = np.random.default_rng(20261130)
    return [simulate(KINDS[place % 3], promise, rng, conversations) for place in range(count)]


def of_kind(kind: str, corpora: list[Outcome]) -> list[Outcome]:
    """Those of one kind."""
    return [corpus for corpus in corpora if corpus.kind == kind]


def broken(corpora: list[Outcome], promise: float) -> float:
    """The share of the corpora whose taken labels agree less often than promised."""
    return float(np.mean([corpus.is_broken(promise) for corpus in corpora]))


def found_within(conversations: int, corpora: list[Outcome]) -> float:
    """The share of the drifts after which the student withdrew within so many *conversations*."""
    drifting = [corpus for corpus in of_kind("drifting", corpora) if corpus.certified]
    return float(
        np.mean([each.withdrawal is not None and each.withdrawal - each.drift <= conversations for each in drifting])
    )


def withdrawn_without_cause(corpora: list[Outcome]) -> float:
    """The share of the corpora whose student withdrew before any drift."""
    return float(np.mean([corpus.withdrawal is not None and corpus.withdrawal < corpus.drift for corpus in corpora]))


@pytest.mark.slow
def test_promise_is_broken_in_at_most_5_percent_of_the_corpora() -> None:
    """Over the whole run, with the labels that were taken after a drift."""
    assert broken(outcomes(), PROMISE) <= 0.05


@pytest.mark.slow
def test_half_of_the_calls_are_saved_on_repetitive_corpora() -> None:
    """Audit and refused students included."""
    assert np.mean([corpus.saved for corpus in of_kind("repetitive", outcomes())]) >= 0.5


def test_student_of_mixed_corpora_is_refused() -> None:
    """With 2,000 labels, the expected answer."""
    assert np.mean([corpus.certified for corpus in of_kind("mixed", outcomes())]) <= 0.05


def test_drift_withdraws_the_student_within_500_conversations() -> None:
    """Agreement falls to at most 0.73 in mid-run."""
    assert found_within(500, outcomes()) >= 0.98


def test_student_does_not_withdraw_without_cause() -> None:
    """False alarms are rarer than false certificates."""
    assert withdrawn_without_cause(outcomes()) <= 0.01


@pytest.mark.thorough
@pytest.mark.parametrize("promise", [0.9, 0.95, 0.98])
@pytest.mark.parametrize("conversations", [5_000, 20_000])
def test_all_of_it_for_other_promises_and_sizes(promise: float, conversations: int) -> None:
    """1,000 corpora each."""
    corpora = outcomes(promise, 1000, conversations)
    assert broken(corpora, promise) <= 0.05
    assert found_within(500, corpora) >= 0.98
    assert withdrawn_without_cause(corpora) <= 0.01

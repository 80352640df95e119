"""Labels read together with corrections, worth of a look, keys, and kappa: pure functions."""

from __future__ import annotations

import random
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from review.agreement import agreement, cohens_kappa
from review.label_keys import NOTE, QUIT, SKIP, UNDO, label_keys
from review.labels import Correction, correction_of, read_labels, same_label
from review.ranking import confidence_of, is_control_turn, is_double, label_shares, worth_of_a_look
from tests.review.review_site import AGREED, result

AT = datetime(2026, 11, 29, 12, tzinfo=UTC)


def correction(field: str = "intent", to: Any = "Order Status", minute: int = 0, **changes: Any) -> Correction:
    fields: dict[str, Any] = {
        "source_conversation_id": 1,
        "conversation_number": "1",
        "field": field,
        "label_from": AGREED.get(field),
        "label_to": to,
        "reviewer": "anna",
        "at": AT + timedelta(minutes=minute),
        "source": "confidence",
        "result_fingerprint": "fp-1",
    }
    return Correction(**{**fields, **changes})


def test_corrections_win_over_the_model() -> None:
    """The latest one counts, and the result is not changed."""
    stored = result(1)
    read = read_labels(stored, [correction(to="Refund Request", minute=5, reviewer="ben"), correction()])
    assert read.labels == {**stored["classification"], "intent": "Refund Request"}
    assert (read.label_source, read.human_fields, read.outdated) == ("human", ("intent",), ())
    assert stored["classification"]["intent"] == "Complaint"
    alone = read_labels(stored, [])
    assert (alone.labels, alone.label_source) == (stored["classification"], "model")


def test_correction_of_an_earlier_result_applies_and_is_named() -> None:
    read = read_labels(result(1), [correction(result_fingerprint="fp-old"), correction("topic", "Other")])
    assert read.labels["intent"] == "Order Status"
    assert read.outdated == ("intent",)


def test_correction_survives_the_round_trip_through_a_document() -> None:
    for one in (correction(), correction(sampling_probability=0.01, note="n", to=["A", "B"], source="random")):
        assert correction_of(one.as_document()) == one
    assert correction(to="Complaint").is_accepted
    assert same_label(["A", "B"], ["B", "A"])
    assert not same_label("A", None)


def test_correction_of_another_program_has_defaults_or_is_none() -> None:
    """Written by hand: who, when and why may be missing, and it is older than any of ours. The label may not."""
    found = correction_of({"source_conversation_id": 1, "field": "intent", "to": "Other"})
    assert found is not None
    assert (found.reviewer, found.source, found.label_from) == ("unknown", "confidence", None)
    assert read_labels(result(1), [found]).labels["intent"] == "Other"
    assert read_labels(result(1), [correction(), found]).labels["intent"] == "Order Status"
    whole = correction().as_document()
    for change in ({"field": None}, {"to": None}, {"to": 7}, {"to": ["A", 7]}, {"field": 7}):
        assert correction_of({**whole, **change}) is None
    assert correction_of({name: value for name, value in whole.items() if name != "source_conversation_id"}) is None
    for at in (None, "2026-11-29", 7):
        assert correction_of({**whole, "at": at}) is not None


def test_worth_of_a_look_names_its_reason() -> None:
    """Also with an odd or missing confidence."""
    results = [result(number, 0.9) for number in range(40)]
    shares = label_shares([*results, result(50, intent="Order Status")], AGREED)
    sizes = {"intent": 14, "topic": 14, "sentiment": 3}
    plain = worth_of_a_look(result(1, 0.95), shares, sizes, AGREED)
    doubtful = worth_of_a_look(result(1, 0.2), shares, sizes, AGREED)
    other = worth_of_a_look(result(1, 0.95), shares, sizes, {**AGREED, "sentiment": "Neutral", "topic": "Other"})
    rare = worth_of_a_look(result(1, 0.95, intent="Order Status"), shares, sizes, None)
    assert [one.source for one in (doubtful, other, rare)] == ["confidence", "disagreement", "rare"]
    assert plain.value < min(doubtful.value, other.value, rare.value)
    assert doubtful.value == pytest.approx(0.8)
    odd = {"processing_metadata": {"confidence": {"intent": float("nan"), "topic": 7.0, "sentiment": "x"}}}
    assert confidence_of(odd) == {"topic": 1.0}
    assert confidence_of({"processing_metadata": None}) == {}


def test_shares_of_turns_and_of_conversations() -> None:
    """The control sample gets exactly its share; double is a property of the id alone."""
    assert [is_control_turn(served, 0.25) for served in range(8)] == [False, False, False, True] * 2
    assert not any(is_control_turn(served, 0.0) for served in range(50))
    assert all(is_control_turn(served, 1.0) for served in range(50))
    keys = [str(number).encode() for number in range(2000)]
    assert 150 < sum(is_double(key, 0.1) for key in keys) < 250
    assert not any(is_double(key, 0.0) for key in keys)
    assert all(is_double(key, 1.0) for key in keys)


def test_keys_of_labels_are_no_keys_of_actions() -> None:
    names = [f"label {number}" for number in range(70)]
    keys = label_keys(names)
    assert list(keys.values()) == names[:54]
    assert not keys.keys() & {NOTE, QUIT, SKIP, UNDO}


def test_kappa_of_a_known_table() -> None:
    """Fleiss, Cohen and Everitt: 25 and 15 times both agree, 15 times they do not."""
    pairs = [("yes", "yes")] * 20 + [("yes", "no")] * 5 + [("no", "yes")] * 10 + [("no", "no")] * 15
    kappa = cohens_kappa(pairs)
    assert (kappa.n, kappa.agreed) == (50, 0.7)
    assert kappa.value == pytest.approx(0.4)
    assert kappa.interval is not None
    assert kappa.interval == pytest.approx((0.1510, 0.6490), abs=0.002)


def test_kappa_without_disagreement_or_without_choice() -> None:
    """No interval is claimed if the variance would be 0, and no value if both use a single label."""
    agreed = cohens_kappa([("a", "a"), ("b", "b")])
    assert (agreed.value, agreed.interval) == (1.0, None)
    one_label = cohens_kappa([("a", "a")] * 4 + [("b", "a")] * 2)
    assert (one_label.value, one_label.interval) == (pytest.approx(0.0), None)
    opposite = cohens_kappa([("a", "b"), ("b", "a")] * 5)
    assert (opposite.value, opposite.interval) == (pytest.approx(-1.0), None)
    single = cohens_kappa([("a", "a")] * 3)
    assert (single.agreed, single.value, single.interval) == (1.0, None, None)


@pytest.mark.thorough
def test_kappa_matches_statsmodels() -> None:
    """On random tables of three labels."""
    inter_rater = pytest.importorskip("statsmodels.stats.inter_rater")
    source = random.Random(4)
    for _ in range(20):
        table = [[source.randint(1, 20) for _ in range(3)] for _ in range(3)]
        pairs = [(row, column) for row in range(3) for column in range(3) for _ in range(table[row][column])]
        ours, theirs = cohens_kappa(pairs), inter_rater.cohens_kappa(table)
        assert ours.value == pytest.approx(theirs.kappa)
        assert ours.interval == pytest.approx((theirs.kappa_low, theirs.kappa_upp), abs=1e-5)


async def test_agreement_pairs_reviewers_by_conversation_and_field() -> None:
    async def stored() -> Any:
        for number, (anna, ben) in enumerate([("A", "A"), ("A", "B"), ("B", "B")]):
            yield correction(to=anna, source_conversation_id=number)
            yield correction(to=ben, source_conversation_id=number, reviewer="ben")
        yield correction("topic", "Other")
        yield correction(to="A", source_conversation_id=0, reviewer="carl")

    found = {(one.field, one.reviewers): one.kappa.n for one in await agreement(stored())}
    assert found == {("intent", ("anna", "ben")): 3, ("intent", ("anna", "carl")): 1, ("intent", ("ben", "carl")): 1}

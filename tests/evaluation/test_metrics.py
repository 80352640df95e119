"""The figures of one field, against values worked out by hand."""

from __future__ import annotations

import math

import pytest

from evaluation.metrics import confused, field_figures
from evaluation.values import labelled_of
from tests.evaluation.made_rows import FIELD, rows_of

A, B, OTHER = "Complaint", "Refund", "Other"
KNOWN = (A, B, OTHER)
# gold, model: 4 x A-A, 2 x A-Other, 3 x B-B, 1 x B-A
PAIRS = [(A, A)] * 4 + [(A, OTHER)] * 2 + [(B, B)] * 3 + [(B, A)]


def test_accuracy_and_f1_of_labels() -> None:
    """7 of 10 are right."""
    figures = field_figures(FIELD, rows_of(PAIRS), KNOWN)
    assert (figures.n, figures.accuracy.value, figures.majority) == (10, 0.7, 0.6)
    by_label = {each.label: each for each in figures.labels}
    assert list(by_label) == [A, B, OTHER]
    assert by_label[A].precision.value == pytest.approx(4 / 5)
    assert by_label[A].recall.value == pytest.approx(4 / 6)
    assert by_label[A].f1.value == pytest.approx(8 / 11)
    assert (by_label[A].gold, by_label[A].model) == (6, 5)
    assert by_label[OTHER].recall.value is None  # no gold: there is nothing to find
    assert by_label[OTHER].f1.value == 0
    assert figures.macro_f1.value == pytest.approx((8 / 11 + 6 / 7 + 0) / 3)


def test_confusions_are_sorted_by_size_and_name_conversations() -> None:
    """Each has the ids to look at; the matrix has the same counts."""
    figures = field_figures(FIELD, rows_of(PAIRS), KNOWN)
    found = [(each.gold, each.model, each.n, each.ids) for each in figures.confusions]
    assert found == [(A, OTHER, 2, ["4", "5"]), (B, A, 1, ["9"])]
    assert figures.matrix == [[4, 0, 2], [1, 3, 0], [0, 0, 0]]


def test_share_of_other_in_gold_and_model() -> None:
    """A model that falls back on Other is seen at once."""
    figures = field_figures(FIELD, rows_of(PAIRS), KNOWN)
    assert figures.other is not None
    assert (figures.other.gold.value, figures.other.model.value) == (0, 0.2)
    assert field_figures(FIELD, rows_of(PAIRS), (A, B)).other is None


def test_labels_outside_the_taxonomy_are_judged_as_well() -> None:
    """Results of an older taxonomy keep their labels."""
    figures = field_figures(FIELD, rows_of([(A, "Old label"), (A, A)]), KNOWN)
    assert [each.label for each in figures.labels] == [A, "Old label"]
    assert figures.accuracy.value == 0.5


def test_multi_valued_field_judges_each_label_as_present_or_absent() -> None:
    """Accuracy counts exact matches of all labels."""
    figures = field_figures(FIELD, rows_of([([A, B], [A, B]), ([A, B], [A]), ([], [OTHER]), ([A], [A])]), KNOWN)
    assert figures.is_multi
    assert figures.accuracy.value == 0.5
    by_label = {each.label: each for each in figures.labels}
    assert by_label[B].recall.value == 0.5
    assert by_label[A].f1.value == 1
    assert [(each.gold, each.model) for each in figures.confusions] == [(B, "–"), ("–", OTHER)]
    assert figures.matrix == []


def test_confused_names_both_labels_of_a_single_valued_field() -> None:
    """Two sets of labels are compared label by label."""
    assert confused(((A,), (B,))) == [(A, B)]
    assert confused(((A,), (A,))) == []
    assert confused(((A, B), (B, OTHER))) == [(A, "–"), ("–", OTHER)]


def test_calibration_compares_confidence_with_accuracy() -> None:
    """Two bins: .95 of which all are right, .55 of which half are; ECE = 1/2 x .05 + 1/2 x .05."""
    pairs = [(A, A), (A, A), (A, A), (A, B)]
    figures = field_figures(FIELD, rows_of(pairs, [0.95, 0.95, 0.55, 0.55]), KNOWN)
    assert figures.calibration is not None
    bins = [(each.low, each.accuracy.n, each.accuracy.value) for each in figures.calibration.bins]
    assert bins == [(0.5, 2, 0.5), (0.9, 2, 1.0)]
    assert figures.calibration.ece == pytest.approx(0.05)


def test_confidence_of_one_is_in_the_last_bin() -> None:
    """1.0 is the upper end of the last bin, not the start of another."""
    figures = field_figures(FIELD, rows_of([(A, A)], [1.0]), KNOWN)
    assert figures.calibration is not None
    assert [each.low for each in figures.calibration.bins] == [0.9]


def test_results_without_confidence_have_no_calibration() -> None:
    """Not every model server returns log probabilities."""
    assert field_figures(FIELD, rows_of(PAIRS), KNOWN).calibration is None
    odd = labelled_of({"processing_metadata": {"confidence": {FIELD: math.nan, "topic": 0.5}}}, (FIELD,))
    assert odd.confidence == {"topic": 0.5}  # what is no number is none


def test_no_rows_give_no_figures() -> None:
    """Without data there are no numbers, rather than zeros."""
    figures = field_figures(FIELD, [], KNOWN)
    assert (figures.n, figures.accuracy.value, figures.macro_f1.value, figures.majority) == (0, None, None, None)

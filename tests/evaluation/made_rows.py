"""Rows of gold and model labels for the tests of figures."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from evaluation.values import Labelled, Labels, Row

FIELD = "intent"


def rows_of(pairs: Iterable[tuple[Sequence[str], Sequence[str]]], confidence: Sequence[float] = ()) -> list[Row]:
    """Return one row for each (gold, model) of *pairs*; a text is one label. Ids count from 0."""
    rows = []
    for number, (gold, model) in enumerate(pairs):
        sure = {FIELD: confidence[number]} if confidence else {}
        labelled = Labelled(number, str(number), {FIELD: labels(model)}, sure, "model", "")
        rows.append(Row({FIELD: labels(gold)}, labelled))
    return rows


def labels(given: Sequence[str]) -> Labels:
    """Return *given*, a text or several, as labels."""
    return (given,) if isinstance(given, str) else tuple(sorted(given))

"""The report of one ``evaluate``: what was compared, the figures, and its JSON form."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any

from domain.text import counted
from evaluation.comparison import Comparison
from evaluation.intervals import SAMPLES, SEED
from evaluation.metrics import FieldFigures
from evaluation.shares import FieldShares
from evaluation.values import PROBLEMS, Estimate, Problem, Row
from evaluation.wilson import LEVEL

NOTHING = "–"
RANDOM_GOLD = "The intervals of shares hold if the gold conversations were drawn at random from the results."

METHODS = {
    "majority": "accuracy of always answering the most frequent gold label",
    "interval_level": LEVEL,
    "proportions": "Wilson score interval",
    "label_f1": "Wilson score interval of TP / (TP + FP + FN), transformed",
    "macro_f1_and_differences": f"normal bootstrap over conversations, corrected for bias, {SAMPLES} samples, seed {SEED}",
    "paired_test": "McNemar, exact, two-sided",
    "shares": "PPI++ (arXiv 2311.01453) with one added conversation per kind of error",
}


@dataclass(slots=True)
class Report:
    """The figures of one evaluation.

    *results* names the results that were judged. *gold_source* is empty without gold. *lines* counts the gold lines
    that were read with a usable label, *rows* are the conversations that have gold and a result. *failures* are the
    sentences of ``--fail-under``.
    """

    results: str
    gold_source: str = ""
    gold_note: str = ""
    lines: int = 0
    problems: list[Problem] = field(default_factory=list)
    rows: Sequence[Row] = ()
    fields: list[FieldFigures] = field(default_factory=list)
    comparison: Comparison | None = None
    shares: list[FieldShares] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    created_at: datetime = field(default_factory=lambda: datetime.now(UTC))

    @property
    def models(self) -> Counter[str]:
        """The number of conversations that each model has labelled."""
        return Counter(row.labelled.model or "unknown model" for row in self.rows)

    @property
    def problem_counts(self) -> dict[str, int]:
        """The number of problems of each kind, in the order of PROBLEMS."""
        counts = Counter(problem.kind for problem in self.problems)
        return {kind: counts[kind] for kind in PROBLEMS if counts[kind]}

    def summary(self) -> list[str]:
        """Return what was compared as sentences."""
        if self.comparison is not None:
            pair = self.comparison
            sentences = [
                f"A: {pair.a.source} ({models_text(pair.a.models)}). B: {pair.b.source} ({models_text(pair.b.models)}).",
                f"{counted(pair.n, 'conversation')} in both, {pair.missing:,} only in A. "
                f"{pair.same_fingerprint:,} were labelled with the same model, prompt and options.",
            ]
        else:
            sentences = [
                f"{counted(len(self.rows), 'conversation')} with gold labels and a result in {self.results} "
                f"({models_text(self.models)})."
            ]
        if self.gold_source:
            sentences.append(f"Gold: {self.gold_source}, {counted(self.lines, 'usable line')}.")
        if self.gold_note:
            sentences.append(self.gold_note)
        return sentences

    def as_dict(self) -> dict[str, Any]:
        """Return the report for JSON. It has ids and labels, and no conversation text."""
        return {
            "created_at": self.created_at.isoformat(timespec="seconds"),
            "results": self.results,
            "models": [{"model": name, "n": n} for name, n in self.models.most_common()],
            "gold": {
                "source": self.gold_source,
                "lines": self.lines,
                "conversations": len(self.rows),
                "problems": [asdict(problem) for problem in self.problems],
                "problem_counts": self.problem_counts,
            },
            "fields": [asdict(figures) for figures in self.fields],
            "comparison": None if self.comparison is None else _comparison_dict(self.comparison),
            "shares": [asdict(shares) for shares in self.shares],
            "failures": self.failures,
            "methods": METHODS,
            "conversations": [_row_dict(row) for row in self.rows],
        }


def models_text(models: Mapping[str, int]) -> str:
    """Return the models with their counts, the most frequent first."""
    return ", ".join(f"{name or 'unknown model'} {n:,}" for name, n in Counter(models).most_common()) or "no results"


def _comparison_dict(comparison: Comparison) -> dict[str, Any]:
    fields = asdict(comparison)
    for name, side in (("a", comparison.a), ("b", comparison.b)):
        models = [{"model": model, "n": n} for model, n in side.models.most_common()]
        fields[name] = {"source": side.source, "models": models}
    return fields


def _row_dict(row: Row) -> dict[str, Any]:
    labelled = row.labelled
    return {
        "_id": labelled.document_id,
        "conversation_number": labelled.number,
        "gold": {name: list(labels) for name, labels in row.gold.items()},
        "labels": {name: list(labels) for name, labels in labelled.labels.items()},
        "confidence": dict(labelled.confidence),
        "model": labelled.model,
        "fingerprint": labelled.fingerprint,
    }


def interval_text(estimate: Estimate | None) -> str:
    """Return *estimate*, from 0 to 1, with its interval, such as ``.81 (.74–.87)``; a dash if there is none."""
    if estimate is None or estimate.value is None or estimate.low is None or estimate.high is None:
        return NOTHING
    return f"{decimal_text(estimate.value)} ({decimal_text(estimate.low)}–{decimal_text(estimate.high)})"


def decimal_text(value: float | None) -> str:
    """Return *value*, from 0 to 1, with two decimals and without the leading zero: ``.05``, ``1.0``."""
    if value is None:
        return NOTHING
    text = f"{value:.2f}"
    return text[1:] if text.startswith("0") else "1.0"


def percent_text(estimate: Estimate | None) -> str:
    """Return *estimate*, a share, as a percentage with its interval."""
    if estimate is None or estimate.value is None or estimate.low is None or estimate.high is None:
        return NOTHING
    return f"{100 * estimate.value:.1f} % ({100 * estimate.low:.1f}–{100 * estimate.high:.1f})"


def change_text(estimate: Estimate | None) -> str:
    """Return *estimate*, a difference, with its sign and its interval."""
    if estimate is None or estimate.value is None or estimate.low is None or estimate.high is None:
        return NOTHING
    return f"{estimate.value:+.2f} ({estimate.low:+.2f} to {estimate.high:+.2f})"


def p_text(p_value: float | None) -> str:
    """Return *p_value* for people."""
    if p_value is None:
        return NOTHING
    return "< .001" if p_value < 0.001 else f"{p_value:.3f}"

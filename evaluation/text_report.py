"""Prints a report on the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from domain.text import counted, one_line
from evaluation.comparison import Comparison
from evaluation.metrics import FieldFigures
from evaluation.report import (
    NOTHING,
    RANDOM_GOLD,
    Report,
    change_text,
    decimal_text,
    interval_text,
    p_text,
    percent_text,
)
from evaluation.shares import FieldShares
from evaluation.values import PROBLEMS, Problem, shown

LINES_SHOWN = 20  # problems and differences; the files have all
CONFUSIONS_SHOWN, IDS_SHOWN = 10, 3


def print_report(console: Console, report: Report) -> None:
    """Print *report*: what was compared, problems, then the tables of each part."""
    for sentence in report.summary():
        _print(console, sentence)
    if report.problems:
        _print_problems(console, report)
    if report.fields:
        _print_overview(console, report.fields)
    for figures in report.fields:
        _print_field(console, figures)
    if report.comparison is not None:
        _print_comparison(console, report.comparison)
    for shares in report.shares:
        _print_shares(console, shares)
    if report.shares:
        console.print()
        _print(console, RANDOM_GOLD)
    for sentence in report.failures:
        console.print(f"[bold red]{escape(sentence)}[/]", highlight=False)


def _print(console: Console, sentence: str) -> None:
    console.print(sentence, markup=False, highlight=False, soft_wrap=True)


def _table(console: Console, title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], ids: int = 0) -> None:
    """Print a table; the last *ids* columns are texts of any width, the columns between them and the first are numbers."""
    table = Table(title=escape(title), title_justify="left", title_style="bold", box=None, padding=(0, 2, 0, 0))
    for number, heading in enumerate(columns):
        is_text = number == 0 or number >= len(columns) - ids
        table.add_column(heading, justify="left" if is_text else "right", no_wrap=not is_text, overflow="fold")
    for row in rows:
        table.add_row(*map(escape, row))
    if table.row_count:
        console.print()
        console.print(table, highlight=False)


def _print_problems(console: Console, report: Report) -> None:
    counts = ", ".join(f"{count:,} {PROBLEMS[kind]}" for kind, count in report.problem_counts.items())
    _print(console, f"Not used: {counts}.")
    for problem in report.problems[:LINES_SHOWN]:
        _print(console, f"  {problem_text(problem)}")
    if len(report.problems) > LINES_SHOWN:
        _print(console, f"  and {len(report.problems) - LINES_SHOWN:,} more; --output FILE.json lists them all")


def problem_text(problem: Problem) -> str:
    """Return *problem* as one line."""
    detail = f": {problem.detail}" if problem.detail else ""
    return one_line(f"{problem.place}: {PROBLEMS[problem.kind]}{detail}", 300)


def _print_overview(console: Console, fields: Sequence[FieldFigures]) -> None:
    rows = [
        (
            each.field,
            f"{each.n:,}",
            interval_text(each.accuracy),
            decimal_text(each.majority),
            interval_text(each.macro_f1),
            NOTHING if each.calibration is None else f"{each.calibration.ece:.3f}",
        )
        for each in fields
    ]
    _table(console, "Fields", ("field", "n", "accuracy", "majority", "macro-F1", "ECE"), rows)
    others = [
        (each.field, percent_text(each.other.gold), percent_text(each.other.model))
        for each in fields
        if each.other is not None
    ]
    _table(console, "Share of Other", ("field", "gold", "model"), others)


def _print_field(console: Console, figures: FieldFigures) -> None:
    labels = [
        (
            each.label,
            f"{each.gold:,}",
            f"{each.model:,}",
            *map(interval_text, (each.precision, each.recall, each.f1)),
        )
        for each in figures.labels
    ]
    name = figures.field
    _table(console, f"{name}: labels", ("label", "gold", "model", "precision", "recall", "F1"), labels)
    confusions = [
        (each.gold, each.model, f"{each.n:,}", " ".join(each.ids[:IDS_SHOWN]))
        for each in figures.confusions[:CONFUSIONS_SHOWN]
    ]
    _table(console, f"{name}: largest confusions", ("gold", "model", "n", "ids"), confusions, ids=1)
    if figures.calibration is not None:
        bins = [
            (
                f"{each.low:.1f} to {each.high:.1f}",
                f"{each.accuracy.n:,}",
                f"{each.confidence:.2f}",
                interval_text(each.accuracy),
            )
            for each in figures.calibration.bins
        ]
        _table(console, f"{name}: confidence and accuracy", ("confidence", "n", "mean", "accuracy"), bins)


def _print_comparison(console: Console, comparison: Comparison) -> None:
    rows = [(each.field, f"{each.agreement.n:,}", interval_text(each.agreement)) for each in comparison.fields]
    _table(console, "Agreement of A and B", ("field", "n", "agreement"), rows)
    judged = [each for each in comparison.fields if each.accuracy_a is not None]
    accuracies = [
        (
            each.field,
            f"{each.accuracy_n:,}",
            *map(interval_text, (each.accuracy_a, each.accuracy_b)),
            change_text(each.accuracy_change),
        )
        for each in judged
    ]
    _table(console, "Accuracy", ("field", "n", "A", "B", "B - A"), accuracies)
    tests = [
        (each.field, f"{each.only_a}", f"{each.only_b}", p_text(each.p_value), change_text(each.macro_f1_change))
        for each in judged
    ]
    _table(console, "Paired test", ("field", "only A right", "only B right", "p (McNemar)", "macro-F1 B - A"), tests)
    console.print()
    listed = comparison.differences[:LINES_SHOWN]
    more = f"; the first {len(listed)} differences:" if len(comparison.differences) > len(listed) else ":"
    _print(console, f"{counted(comparison.differing, 'conversation')} with different labels{more if listed else ''}")
    for each in listed:
        gold = "" if each.gold is None else f" (gold: {shown(each.gold)})"
        _print(console, f"  {each.id}  {each.field}: {shown(each.a)} | {shown(each.b)}{gold}")


def _print_shares(console: Console, shares: FieldShares) -> None:
    rows = [
        (each.label, f"{100 * each.model:.1f} %", percent_text(each.gold), percent_text(each.combined))
        for each in shares.labels
    ]
    title = f"{shares.field}: shares among {shares.n_model:,} results, with {shares.n_gold:,} gold labels"
    _table(console, title, ("label", "model", "gold only", "model corrected by gold"), rows)

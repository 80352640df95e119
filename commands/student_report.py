"""The report of a student: whether it can pay, how often it agrees with the model, its certificates and audits."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from domain.text import counted
from evaluation.intervals import proportion
from student.certificate import Certificate, feasibility
from student.first_answer import open_log
from student.model import Student
from student.places import audit_path

BINS = (0.0, 0.5, 0.7, 0.8, 0.9, 0.95, 0.99, 1.01)  # of confidence; the last one is past its end


def print_report(console: Console, student: Student, directory: Path) -> None:
    """Print the report of *student*; its audits are in the state directory *directory*."""

    def line(text: str) -> None:
        console.print(text, markup=False, soft_wrap=True)

    about, sample = student.provenance, student.sample
    line(f"{student.name}, trained {about.trained_at}, imitates {about.model}")
    line(
        f"  {counted(about.trained, 'conversation')} learned ({about.corrected} with corrections), {about.held_out} held out"
    )
    for reason, count in about.left_out.items():
        line(f"  {counted(count, 'result')} left out: {reason}")
    agreed = np.column_stack([sample.agreed, sample.agreed.all(axis=1)])
    line("\nCan it pay?")
    risk = 1 - float(agreed[:, -1].mean())
    for one in about.certificates:
        line(f"  {feasibility(risk, about.held_out, one.promise).sentence}")
    line("\nAgreement with the model on the held-out conversations")
    console.print(_agreement(student, agreed, np.column_stack([sample.probability, sample.scores])))
    line("\nCertificates")
    for one in about.certificates:
        line(f"  --student {one.promise:g}: {_certificate(one)}")
        if one.threshold is not None and audit_path(directory).is_file():
            with open_log(directory, student, one.promise) as log:
                line(f"    audit: {log.audit.sentence()}")


def _agreement(student: Student, agreed: NDArray[Any], sure: NDArray[Any]) -> Table:
    """Return a row for each field and bin of confidence that has conversations; the last column of both is all fields."""
    table = Table("labels", "confidence", "agreed", "95 % interval", "n", box=None)
    for place, name in enumerate((*student.heads, "all fields")):
        bins = [(0.0, 1.01), *itertools.pairwise(BINS)]
        for number, (low, high) in enumerate(bins):
            inside = (sure[:, place] >= low) & (sure[:, place] < high)
            found = proportion(int(agreed[inside, place].sum()), int(inside.sum()))
            if found.value is None or found.low is None or found.high is None:
                continue
            confidence = f"{low:g} to {min(high, 1):g}" if number else "any"
            interval = f"{found.low:.3f} to {found.high:.3f}"
            table.add_row("" if number else name, confidence, f"{found.value:.3f}", interval, str(found.n))
    return table


def _certificate(one: Certificate) -> str:
    if one.threshold is None or one.lower_bound is None:
        return f"refused, because {one.reason}"
    return f"takes {one.share:.0%} of the conversations, of which at least {one.lower_bound:.1%} agree; {one.reason}"

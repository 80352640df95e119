"""The table of simulated corpora in docs/student.md."""

from __future__ import annotations

import numpy as np
from rich.progress import track

from tests.student.simulated_corpora import KINDS, Outcome, simulate

CORPORA = 600  # for each row of the first two columns, a third of each kind
CASES = ((0.95, 20_000), (0.95, 5_000), (0.90, 20_000), (0.98, 20_000))


def table() -> list[str]:
    """Return a Markdown table: broken promises, saved calls and withdrawals."""
    lines = [
        "| promise | conversations | kind | corpora | certified | broken | calls saved | withdrawn within 500 of the drift "
        "| median, last | withdrawn without cause |",
        "|---:|---:|---|---:|---:|---:|---:|---:|---|---:|",
    ]
    for promise, conversations in track(CASES, "simulating", transient=True):
        rng = np.random.default_rng(20261130)
        corpora = [simulate(KINDS[place % 3], promise, rng, conversations) for place in range(CORPORA)]
        lines += [
            f"| {promise:.2f} | {conversations:,} | {kind} {row([one for one in corpora if one.kind == kind], promise)}"
            for kind in KINDS
        ]
    return lines


def row(corpora: list[Outcome], promise: float) -> str:
    """Return the cells of one kind."""
    certified = [one for one in corpora if one.certified]
    delays = sorted(
        one.withdrawal - one.drift
        for one in certified
        if one.drift < one.conversations and one.withdrawal is not None and one.withdrawal >= one.drift
    )
    drifts = sum(one.drift < one.conversations for one in certified)
    early = sum(one.withdrawal is not None and one.withdrawal < one.drift for one in certified)
    return (
        f"| {len(corpora)} | {len(certified)} | {sum(one.is_broken(promise) for one in corpora)} "
        f"| {100 * np.mean([one.saved for one in corpora]):.0f} % "
        f"| {f'{sum(delay <= 500 for delay in delays)} of {drifts}' if drifts else '–'} "
        f"| {f'{np.median(delays):.0f}, {delays[-1]}' if delays else '–'} | {early} |"
    )

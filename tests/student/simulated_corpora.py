"""Simulated corpora: certificate on stored results, then a run with its audit, as the worker does it.

Easy conversations have high scores and nearly always the model's labels; hard ones have neither. Their shares and rates differ from corpus
to corpus, around the figures that were measured on labelled files (docs/student.md).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from student.audit import Audit
from student.certificate import certify

CERTIFIED, CONVERSATIONS = 2000, 20_000
KINDS = ("repetitive", "mixed", "drifting")


@dataclass(frozen=True)
class Traffic:
    """The share of easy conversations, and the agreement of easy and hard ones."""

    easy: float
    easy_agreement: float
    hard_agreement: float

    def drawn(self, size: int, rng: np.random.Generator) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
        """Scores, and whether the student agrees with the model."""
        easy = rng.random(size) < self.easy
        scores = rng.random(size) ** np.where(easy, 0.05, 1.0)
        return scores, rng.random(size) < np.where(easy, self.easy_agreement, self.hard_agreement)


@dataclass(frozen=True)
class Outcome:
    """What became of one corpus; *drift* and *withdrawal* are numbers of conversations from the start."""

    kind: str
    conversations: int
    certified: bool
    taken: int
    wrong: int
    drift: int
    withdrawal: int | None
    audit_share: float = 1.0
    """At the end of the run."""

    def is_broken(self, promise: float) -> bool:
        """Whether fewer of the taken labels agreed than promised, drift included."""
        return self.taken > 0 and self.wrong > (1 - promise) * self.taken

    @property
    def saved(self) -> float:
        """Share of the calls that were not made."""
        return self.taken / self.conversations


def traffic(kind: str, rng: np.random.Generator) -> Traffic:
    """Draw the traffic of a corpus before any drift."""
    if kind == "mixed":
        return Traffic(rng.uniform(0, 0.25), rng.uniform(0.93, 0.99), rng.uniform(0.4, 0.75))
    return Traffic(rng.uniform(0.7, 0.95), rng.uniform(0.97, 0.999), rng.uniform(0.4, 0.8))


def drifted(before: Traffic, rng: np.random.Generator) -> Traffic:
    """Other traffic: fewer easy conversations or not, and at most the agreement of a student on a corpus that it does not know (0.73)."""
    agreement = rng.uniform(0, 0.73)
    return Traffic(before.easy * rng.uniform(0.5, 1), agreement, min(agreement, before.hard_agreement))


def simulate(kind: str, promise: float, rng: np.random.Generator, conversations: int = CONVERSATIONS) -> Outcome:
    """Certify a student and run it; a drift comes between 30 and 70 % of the run."""
    before = traffic(kind, rng)
    sample, agreement = before.drawn(CERTIFIED, rng)
    certificate = certify(sample.tolist(), agreement.tolist(), promise)
    drift = int(rng.uniform(0.3, 0.7) * conversations) if kind == "drifting" else conversations
    first, second = before.drawn(drift, rng), drifted(before, rng).drawn(conversations - drift, rng)
    if certificate.threshold is None:
        return Outcome(kind, conversations, False, 0, 0, drift, None)
    scores, agreed = (np.concatenate(pair) for pair in zip(first, second, strict=True))
    sure = np.flatnonzero(scores >= certificate.threshold)
    audit = Audit(promise, certificate.taken, certificate.taken - certificate.agreed)
    taken, wrong, withdrawn = run(audit, agreed[sure], rng)
    withdrawal = None if withdrawn is None else int(sure[withdrawn])
    return Outcome(kind, conversations, True, taken, wrong, drift, withdrawal, audit.share)


def run(audit: Audit, agreed: NDArray[np.bool_], rng: np.random.Generator) -> tuple[int, int, int | None]:
    """Pass sure conversations through *audit*: how many were taken and wrong, and the place at which the student withdrew."""
    wrong_before = np.concatenate([[0], np.cumsum(~agreed)])
    taken = wrong = place = 0
    while place < len(agreed):
        # The share changes only with a comparison, so the number of conversations until the next one is geometric.
        drawn = min(place + int(rng.geometric(audit.share)) - 1, len(agreed))
        taken += drawn - place
        wrong += int(wrong_before[drawn] - wrong_before[place])
        if drawn == len(agreed):
            break
        audit.record(bool(agreed[drawn]))
        if audit.is_broken:
            return taken, wrong, drawn
        place = drawn + 1
    return taken, wrong, None

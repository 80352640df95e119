"""The running test of a student's promise.

A random share of the conversations that the student could take still goes to the model. Each comparison is a bet against the
promise, and the capital of the bets is the evidence that it is broken: an e-detector (Shin, Ramdas and Rinaldo,
arXiv 2203.03532).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Self

AUDIT_SHARE = 0.05
LIMIT = 1000.0  # evidence that withdraws the student
POWERS = (0.5, 0.75)  # each bet expects disagreement at (1 - promise) ** power


@dataclass(slots=True)
class Audit:
    """The comparisons of a student with the model, for one *promise* above 0 and below 1."""

    promise: float
    audited: int = 0
    disagreed: int = 0
    evidence: list[float] = field(default_factory=lambda: [1.0] * len(POWERS))
    is_broken: bool = False

    @property
    def share(self) -> float:
        """The share of the sure conversations that goes to the model, 0 to 1: all of them while there is evidence."""
        return 1.0 if self.is_broken or max(self.evidence) > 1 else AUDIT_SHARE

    def record(self, agreed: bool) -> None:
        """Record whether all labels of one audited conversation are the model's."""
        self.audited += 1
        self.disagreed += not agreed
        tolerated = 1 - self.promise
        for place, power in enumerate(POWERS):
            expected = tolerated**power
            factor = (1 - expected) / self.promise if agreed else expected / tolerated
            self.evidence[place] = max(1.0, self.evidence[place] * factor)
        self.is_broken = self.is_broken or sum(self.evidence) / len(POWERS) >= LIMIT

    def sentence(self) -> str:
        """Return the state of the test as one sentence."""
        return f"{self.disagreed} of {self.audited} audited conversations disagree with the model."

    def state(self) -> dict[str, Any]:
        """Return the state as numbers that JSON can hold."""
        return {
            "promise": self.promise,
            "audited": self.audited,
            "disagreed": self.disagreed,
            "evidence": list(self.evidence),
            "is_broken": self.is_broken,
        }

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Self:
        """Return the audit of a stored *state*."""
        return cls(**state)

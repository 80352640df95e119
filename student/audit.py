"""The running test of a student's promise.

A random share of the conversations that the student could take goes to the model as well. Each comparison pays into bets that the
promise is broken, or out of them; the mean capital is the evidence. This is an e-detector (Shin, Ramdas and Rinaldo,
arXiv 2203.03532, CUSUM form): with the promise kept, it takes at least ``LIMIT`` comparisons on average until it errs.
"""

from __future__ import annotations

from dataclasses import dataclass, field

LEAST_SHARE, MOST_SHARE = 0.04, 0.2  # less than 0.04 finds fewer than 98 % of the drifts within 500 conversations
DRIFT_ERROR = 0.01  # the probability that a sudden drift uses up the room
LIMIT = 10_000.0  # evidence at which the student withdraws
# Of the evidence against a student, the most that its successor begins with: if it keeps the promise, it is then withdrawn
# with a probability of at most 1 %, MOST_INHERITED / LIMIT, before it is cleared.
MOST_INHERITED = 100.0
# A bet expects disagreement of (1 - promise) ** power: 0.22 and 0.11 for a promise of 0.95. The first finds collapses, the second
# small breaches.
POWERS = (0.5, 0.75)


@dataclass(slots=True)
class Audit:
    """Comparisons of a student with the model, and whether they still allow its *promise* (above 0 and below 1).

    Draw each conversation that the student could take with the probability ``share``. Give those that are drawn to the model, store
    the model's labels, and record whether the student's were the same. Read ``share`` again for each conversation. *sampled* is the
    number of conversations that the certificate would take of its sample, *sampled_wrong* those of them that disagree.
    """

    promise: float
    sampled: int = 0
    sampled_wrong: int = 0
    audited: int = 0
    disagreed: int = 0
    taken: float = 0.0
    """Estimate: one that was drawn with the probability s is one of 1 / s, so it stands for (1 - s) / s that were taken."""
    taken_wrong: float = 0.0
    """The same for those that disagree."""
    evidence: list[float] = field(default_factory=lambda: [1.0] * len(POWERS))
    is_broken: bool = False
    """True for ever as soon as the evidence reaches ``LIMIT``; the student then takes nothing."""

    def succeed(self, evidence: list[float]) -> None:
        """Begin with the *evidence* against the student before this one: a training changes the student, not the traffic."""
        self.evidence = [min(MOST_INHERITED, one) for one in evidence]

    @property
    def room(self) -> float:
        """The number of further wrong labels that the promise allows among those taken so far; below 0 if it is broken.

        The share of wrong labels is estimated from the sample of the certificate and the audits, with one disagreement more.
        """
        wrong = (self.sampled_wrong + self.taken_wrong + 1) / (self.sampled + self.taken + 1)
        return (1 - self.promise - wrong) * self.taken

    @property
    def is_suspicious(self) -> bool:
        """Whether the latest comparisons speak against the promise."""
        return max(self.evidence) > 1

    @property
    def share(self) -> float:
        """The share of what the student could take that goes to the model.

        After a drift, k wrong labels are taken before the first that is audited with the probability (1 - share) ** k. The share
        makes this DRIFT_ERROR for all of ``room``. It is 1 under suspicion: a single disagreement suspends the student for
        about a dozen conversations, which either clear it or add to the evidence.
        """
        if self.is_broken or self.is_suspicious:
            return 1.0
        # A promise stricter than 0.95 gains room more slowly by as much.
        most = MOST_SHARE * min(2.5, max(1.0, 0.05 / (1 - self.promise)))
        if self.room <= 1:
            return most
        needed: float = 1 - DRIFT_ERROR ** (1 / self.room)
        return min(most, max(LEAST_SHARE, needed))

    def record(self, agreed: bool, share: float | None = None) -> None:
        """Record one comparison: whether all labels of a conversation that was drawn with *share* (now, if None) are the model's."""
        beside = 1 / (self.share if share is None else share) - 1
        self.taken += beside
        self.taken_wrong += 0 if agreed else beside
        self.audited += 1
        self.disagreed += not agreed
        tolerated = 1 - self.promise
        for place, power in enumerate(POWERS):
            expected = tolerated**power
            factor = (1 - expected) / self.promise if agreed else expected / tolerated
            self.evidence[place] = min(LIMIT * len(POWERS), max(1.0, self.evidence[place] * factor))
        self.is_broken = self.is_broken or sum(self.evidence) / len(POWERS) >= LIMIT

    def sentence(self) -> str:
        """Return the result so far and what follows from it, as one sentence without a full stop."""
        counts = f"{self.audited - self.disagreed} of {self.audited} audited conversations agree with the model"
        if self.is_broken:
            return (
                f"{counts}, and the latest ones break the promise of {self.promise:g}: the student takes no more conversations; "
                "train it again on recent results"
            )
        if self.is_suspicious:
            cause = "a disagreement" if self.disagreed else "disagreements of the student before"
            return f"{counts}; after {cause}, the model gets every conversation until the promise of {self.promise:g} is confirmed"
        return f"{counts}; the promise of {self.promise:g} holds"

"""Chooses corrected conversations as examples for the prompt, and measures what they change.

The reviewed conversations are split in two halves. Candidates come from the development half, and each is kept if the
model, with the examples kept so far and this one, labels more of that half as the reviewers did. The other half is used
only once, for the gain that is reported.
"""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from config.taxonomy import Example
from domain.conversation import Classification, Conversation
from review.labels import Correction, Label, label_key, same_label

MAX_EXAMPLES = 8
MAX_CANDIDATES = 12
MAX_EXAMPLE_CHARACTERS = 1500  # of a transcript; each example is part of every prompt
_RESAMPLES, _SEED = 2000, 20261129

# Returns what the model says about conversations if the prompt has these examples; None for one without an answer.
Ask = Callable[[Sequence[Example], Sequence[Conversation]], Awaitable[list[Classification | None]]]


@dataclass(frozen=True, slots=True)
class Reviewed:
    """A conversation with the *labels* that reviewers found right, by field; *was* holds those of the model."""

    source_id: Any
    conversation: Conversation
    labels: dict[str, Label]
    was: dict[str, Label | None]

    @property
    def corrected(self) -> list[tuple[str, Any, Any]]:
        """The wrong labels: field, label of the model, right label (see ``label_key``)."""
        return [
            (name, label_key(self.was.get(name)), label_key(label))
            for name, label in self.labels.items()
            if not same_label(self.was.get(name), label)
        ]


@dataclass(slots=True)
class Gain:
    """The effect of examples on *conversations* that took no part in their choice, with *labels* labels.

    *right_before* and *right_after* count labels; *fixed* and *broken* count those that became right and wrong.
    *interval* is the 95 % interval of the change of the share of right labels, by a paired bootstrap of conversations.
    """

    conversations: int = 0
    labels: int = 0
    right_before: int = 0
    right_after: int = 0
    fixed: int = 0
    broken: int = 0
    interval: tuple[float, float] = (0.0, 0.0)

    @property
    def change(self) -> float:
        """The change of the share of right labels, -1 to 1."""
        return (self.right_after - self.right_before) / max(1, self.labels)


@dataclass(slots=True)
class Suggestion:
    """The *chosen* examples, the number of right labels of the development half, and the gain on the other half."""

    chosen: list[Example] = field(default_factory=list)
    right_without: int = 0
    right_with: int = 0
    development_labels: int = 0
    gain: Gain = field(default_factory=Gain)


def latest_decisions(corrections: Sequence[Correction]) -> tuple[dict[str, Label], dict[str, Label | None]]:
    """Return the labels of the latest of *corrections* of one conversation for each field, and those of the model."""
    latest = {one.field: one for one in sorted(corrections, key=lambda one: one.at)}
    return {name: one.label_to for name, one in latest.items()}, {name: one.label_from for name, one in latest.items()}


def halves(reviewed: Sequence[Reviewed], limit: int) -> tuple[list[Reviewed], list[Reviewed]]:
    """Return the development half and the other half of at most *limit* conversations.

    A hash of the transcript decides both, so a conversation stays in its half while others are reviewed. Identical
    conversations count once: an example would be measured on itself.
    """
    by_hash = {hashlib.sha256(f"half {one.conversation.transcript_sha256}".encode()).digest(): one for one in reviewed}
    kept = sorted(by_hash)[:limit]
    return [by_hash[one] for one in kept if one[-1] % 2], [by_hash[one] for one in kept if not one[-1] % 2]


def candidates_of(development: Sequence[Reviewed]) -> list[Reviewed]:
    """Return at most MAX_CANDIDATES corrected conversations: of the most frequent mistakes first, then the shortest.

    Each mistake gives one before any gives a second one.
    """
    usable = [one for one in development if len(one.conversation.transcript) <= MAX_EXAMPLE_CHARACTERS]
    counts = Counter(mistake for one in usable for mistake in one.corrected)
    by_mistake: dict[Any, list[Reviewed]] = {}
    for one in sorted(usable, key=lambda one: len(one.conversation.transcript)):
        if one.corrected:
            by_mistake.setdefault(max(one.corrected, key=lambda mistake: counts[mistake]), []).append(one)
    groups = sorted(by_mistake.values(), key=lambda group: -len(group))
    rounds = range(max(map(len, groups), default=0))
    return [group[number] for number in rounds for group in groups if number < len(group)][:MAX_CANDIDATES]


def most_calls(development: Sequence[Reviewed], others: Sequence[Reviewed], candidates: Sequence[Reviewed]) -> int:
    """Return the greatest number of conversations that ``suggest`` asks the model about."""
    return len(development) * (1 + len(candidates)) + 2 * len(others)


async def suggest(
    development: Sequence[Reviewed],
    others: Sequence[Reviewed],
    candidates: Sequence[Reviewed],
    ask: Ask,
    example_of: Callable[[Reviewed, Classification | None], Example],
) -> Suggestion:
    """Choose at most MAX_EXAMPLES of *candidates* and measure their gain on *others*.

    *example_of* makes an example from a candidate and from what the model says about it without examples.
    """
    answers = await ask([], [one.conversation for one in development])
    right = {id(one): _right(one, answer) for one, answer in zip(development, answers, strict=True)}
    first = dict(zip(map(id, development), answers, strict=True))
    before = dict(right)
    found = Suggestion()
    used: set[int] = set()
    for candidate in candidates:
        if len(found.chosen) == MAX_EXAMPLES:
            break
        example = example_of(candidate, first[id(candidate)])
        # A conversation that is in the prompt says nothing about the prompt.
        asked = [one for one in development if id(one) not in used and one is not candidate]
        answers = await ask([*found.chosen, example], [one.conversation for one in asked])
        now = {id(one): _right(one, answer) for one, answer in zip(asked, answers, strict=True)}
        if sum(map(sum, now.values())) > sum(sum(right[key]) for key in now):
            found.chosen.append(example)
            used.add(id(candidate))
            right |= now
    counted = [one for one in development if id(one) not in used]
    found.development_labels = sum(len(one.labels) for one in counted)
    found.right_without = sum(sum(before[id(one)]) for one in counted)
    found.right_with = sum(sum(right[id(one)]) for one in counted)
    if found.chosen:
        found.gain = await _gain(found.chosen, others, ask)
    return found


async def _gain(chosen: Sequence[Example], others: Sequence[Reviewed], ask: Ask) -> Gain:
    conversations = [one.conversation for one in others]
    rows = [
        (_right(one, before), _right(one, after))
        for one, before, after in zip(
            others, await ask([], conversations), await ask(chosen, conversations), strict=True
        )
    ]
    pairs = [pair for before, after in rows for pair in zip(before, after, strict=True)]
    return Gain(
        conversations=len(others),
        labels=len(pairs),
        right_before=sum(before for before, _ in pairs),
        right_after=sum(after for _, after in pairs),
        fixed=sum(after and not before for before, after in pairs),
        broken=sum(before and not after for before, after in pairs),
        interval=_interval([(sum(after) - sum(before), len(before)) for before, after in rows]),
    )


def _right(one: Reviewed, answer: Classification | None) -> list[bool]:
    """Return for each label of *one* whether *answer* has it; an answer that is missing has none."""
    said: Mapping[str, Any] = {} if answer is None else answer.as_dict()
    return [name in said and same_label(said[name], label) for name, label in one.labels.items()]


def _interval(changes: Sequence[tuple[int, int]]) -> tuple[float, float]:
    """Return the 2.5 and 97.5 % points of the change of a share; *changes* has the change and the labels of each row."""
    source = random.Random(_SEED)
    means = []
    for _ in range(_RESAMPLES if changes else 0):
        drawn = source.choices(changes, k=len(changes))
        means.append(sum(change for change, _ in drawn) / max(1, sum(labels for _, labels in drawn)))
    means.sort()
    return (means[_RESAMPLES // 40], means[-_RESAMPLES // 40 - 1]) if means else (0.0, 0.0)

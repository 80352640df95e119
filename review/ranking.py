"""Ranks results by the worth of a review, and assigns them to shares. Pure."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from review.labels import Label, Source, label_key, same_label

Shares = Mapping[str, Mapping[Any, float]]


@dataclass(frozen=True, slots=True)
class Worth:
    """The worth of a look, 0 to 3, and its largest part as the reason."""

    value: float
    source: Source


def label_shares(results: Sequence[Mapping[str, Any]], fields: Iterable[str]) -> dict[str, dict[Any, float]]:
    """Return the share of each label (see ``label_key``) of each of *fields* among *results*, 0 to 1."""
    shares = {}
    for field in fields:
        counts = Counter(label_key(result["classification"].get(field)) for result in results)
        shares[field] = {key: count / max(1, len(results)) for key, count in counts.items()}
    return shares


@dataclass(frozen=True, slots=True)
class StudentOpinion:
    """What a student says about a conversation: its labels by field, and the probability of each, 0 to 1."""

    labels: Mapping[str, Label]
    probability: Mapping[str, float]


def worth_of_a_look(
    result: Mapping[str, Any],
    shares: Shares,
    sizes: Mapping[str, int],
    second: Mapping[str, Label] | None,
    student: StudentOpinion | None = None,
) -> Worth:
    """Return the worth of a look at *result*: the sum of three parts, each from 0 to 1.

    * confidence: 1 minus the lowest confidence of a label; 0 if the result has none;
    * disagreement: the highest probability of a label of *student* that differs; without a student, the share of the fields
      on which *second*, the labels of the embedded classifier, differs; 0 if both are None;
    * rare: 1 minus the share of the rarest label in *shares* times the number of labels of its field (*sizes*), at
      least 0.
    """
    labels = result["classification"]
    rarity = [1 - shares[field].get(label_key(labels.get(field)), 0.0) * sizes[field] for field in shares]
    parts: dict[Source, float] = {
        "disagreement": _disagreement(labels, shares, second) if student is None else _contradiction(labels, student),
        "confidence": 1 - min(confidence_of(result).values(), default=1.0),
        "rare": max(0.0, *rarity),
    }
    return Worth(sum(parts.values()), max(parts, key=lambda name: parts[name]))


def _disagreement(labels: Mapping[str, Any], fields: Iterable[str], second: Mapping[str, Label] | None) -> float:
    """Return the share of *fields* on which *second* differs from *labels*, 0 to 1."""
    disagreed = [not same_label(labels.get(field), second[field]) for field in fields if second and field in second]
    return sum(disagreed) / len(disagreed) if disagreed else 0.0


def _contradiction(labels: Mapping[str, Any], student: StudentOpinion) -> float:
    """Return how sure *student* is of a label that is not among *labels*, 0 to 1."""
    different = [name for name, label in student.labels.items() if not same_label(labels.get(name), label)]
    return max((student.probability[name] for name in different), default=0.0)


def confidence_of(result: Mapping[str, Any]) -> dict[str, float]:
    """Return the confidence of each label of *result*, 0 to 1; empty if it has none."""
    metadata = result.get("processing_metadata")
    found = metadata.get("confidence") if isinstance(metadata, Mapping) else None
    if not isinstance(found, Mapping):
        return {}
    return {
        name: min(1.0, max(0.0, value))
        for name, value in found.items()
        if isinstance(value, float) and math.isfinite(value)
    }


def is_double(id_key: bytes, share: float) -> bool:
    """Return whether two reviewers decide the conversation with *id_key*; true for *share*, 0 to 1, of all ids.

    It depends on nothing else, so all processes agree without a record of it.
    """
    return int.from_bytes(hashlib.sha256(b"double" + id_key).digest()[:8]) < share * 2**64


def is_control_turn(served: int, share: float) -> bool:
    """Return whether the next conversation, after *served* ones, is one of the control sample.

    Spreads *share*, 0 to 1, of the turns evenly.
    """
    return math.floor((served + 1) * share) > math.floor(served * share)

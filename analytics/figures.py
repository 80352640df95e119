"""Counts of labels: figures of fields, confidence and models, and examples. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal

from storage.extended_json import id_text

Labels = tuple[str, ...]  # of one field of a result, sorted


@dataclass(slots=True)
class Counts:
    """The count of each label, and of the results: *n* have a label of the field.

    With a field of several labels, the labels of a result are counted each, so their shares can add up to more than 1.
    """

    n: int = 0
    labels: Counter[str] = field(default_factory=Counter)

    def add(self, labels: Sequence[str], n: int) -> None:
        """Count *n* results with *labels*."""
        self.n += n
        for label in labels:
            self.labels[label] += n


@dataclass(slots=True)
class FieldCounts:
    """The labels of the field *name*: in *total*, by period in order of time, and by channel, the most frequent first.

    Results without a readable time are in no period. Those without a channel are under NO_CHANNEL. *is_cut* is True if
    there are more than MAX_GROUPS combinations, of which the rarest are not counted.
    """

    name: str
    total: Counts = field(default_factory=Counts)
    periods: dict[str, Counts] = field(default_factory=dict)
    channels: dict[str, Counts] = field(default_factory=dict)
    is_cut: bool = False


@dataclass(frozen=True, slots=True)
class Confidences:
    """The confidence of the model: *bins* are counts of the lowest confidence in a result, from 0 to 1 in BINS steps.

    *means* has the mean confidence of each field that has any. *without* counts results without confidence.
    """

    bins: tuple[int, ...]
    means: Mapping[str, float]
    without: int


@dataclass(frozen=True, slots=True)
class ModelUse:
    """*n* results of one *model* with one prompt. Times are of the conversations, None if they have none."""

    model: str
    digest: str
    prompt: str
    n: int
    first: datetime | None
    last: datetime | None


@dataclass(frozen=True, slots=True)
class Example:
    """A result to look at: ids, labels with corrections, and no text. *confidence* is its lowest, None if it has none."""

    document_id: Any
    conversation_number: str
    labels: Mapping[str, tuple[str, ...]]
    confidence: float | None
    model: str
    at: datetime | None
    label_source: Literal["model", "human"]

    @property
    def name(self) -> str:
        """The id for people."""
        return id_text(self.document_id)

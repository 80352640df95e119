"""Which results an export selects. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

from config.taxonomy import Taxonomy, fold_label
from error_handler import ConfigurationError
from storage.extended_json import Document


@dataclass(frozen=True, slots=True)
class Filter:
    """Conditions on results; a result must meet all of them.

    *labels* maps a field to labels, one of which the result must have. *since* and *until* (aware; the latter is exclusive)
    limit the time of the last message, or of the result if that is unknown. *below* and *above* (0 to 1; the latter is
    inclusive) limit the lowest confidence of a label; a result without confidence meets neither. None sets no limit.
    """

    labels: Mapping[str, frozenset[str]] = field(default_factory=dict)
    since: datetime | None = None
    until: datetime | None = None
    model: str | None = None
    below: float | None = None
    above: float | None = None

    def query(self, fields: Sequence[str]) -> Document:
        """Return the query for all conditions but that on labels, which corrections decide; *fields* are the taxonomy's."""
        limits = {"$gte": self.since, "$lt": self.until}
        span = {name: at for name, at in limits.items() if at is not None}
        paths = [f"processing_metadata.confidence.{name}" for name in fields]
        parts: list[Document] = []
        if span:
            last = "conversation.last_message_at"
            parts.append({"$or": [{last: span}, {last: None, "created_at": span}]})
        if self.model is not None:
            parts.append({"processing_metadata.model_used": self.model})
        if self.below is not None:
            parts.append({"$or": [{path: {"$lt": self.below}} for path in paths]})
        if self.above is not None:
            parts.append({"$nor": [{path: {"$lt": self.above}} for path in paths]})
            parts.append({"$or": [{path: {"$gte": self.above}} for path in paths]})
        return {"$and": parts} if parts else {}

    def takes(self, labels: Mapping[str, Any]) -> bool:
        """Return whether *labels* (by field, corrections applied) meet the condition on labels."""
        for name, wanted in self.labels.items():
            value = labels.get(name)
            held = value if isinstance(value, list) else [value]
            if not any(type(one) is str and one in wanted for one in held):  # another program may store anything
                return False
        return True


def label_filter(given: Iterable[tuple[str, str]], taxonomy: Taxonomy) -> dict[str, frozenset[str]]:
    """Return ``Filter.labels`` for pairs of a field and a label, compared without regard to case and spacing.

    Raise ConfigurationError if *taxonomy* does not have one of them.
    """
    found: dict[str, set[str]] = {}
    for name, label in given:
        if name not in taxonomy.field_names:
            raise ConfigurationError(f"--label {name}: the fields are {', '.join(taxonomy.field_names)}.")
        known = {fold_label(each): each for each in taxonomy.names(name)}
        if fold_label(label) not in known:
            raise ConfigurationError(f"--label {name}={label}: the labels are {', '.join(known.values())}.")
        found.setdefault(name, set()).add(known[fold_label(label)])
    return {name: frozenset(labels) for name, labels in found.items()}


def start_of(text: str) -> datetime:
    """Return the time *text* (ISO 8601; UTC if it has no zone); of a date, its start. Raise ValueError if it is no time."""
    if "W" in text:
        raise ValueError("a week, which Python takes for its Monday")
    at = datetime.fromisoformat(text)
    return at if at.tzinfo else at.replace(tzinfo=UTC)


def end_of(text: str) -> datetime:
    """Return the time *text* as ``start_of`` does; of a date, its end."""
    at = start_of(text)
    return at + timedelta(days=1) if len(text) <= len("2026-11-30") else at

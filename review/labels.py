"""Decisions of reviewers, and labels read together with them. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal

from storage.extended_json import Document

Label = str | list[str]  # a list if the field can have several labels
Source = Literal["disagreement", "confidence", "rare", "random"]
UNKNOWN = "unknown"  # the reviewer of a correction that names none


@dataclass(frozen=True, slots=True)
class Correction:
    """The decision of one reviewer on one field; *label_from* is what the model said, and equal to *label_to* if accepted.

    *source* is why the conversation was shown. *sampling_probability* is None unless the conversation belongs to the
    random control sample; it is then the chance, 0 to 1, that one draw takes it. *result_fingerprint* identifies the
    result that the reviewer saw (None: it has none).
    """

    source_conversation_id: Any
    conversation_number: str | None
    field: str
    label_from: Label | None
    label_to: Label
    reviewer: str
    at: datetime
    source: Source
    sampling_probability: float | None = None
    result_fingerprint: str | None = None
    note: str = ""

    @property
    def is_accepted(self) -> bool:
        """True if the reviewer kept the label of the model."""
        return same_label(self.label_from, self.label_to)

    def as_document(self) -> Document:
        """Return the document of the collection ``<results>_corrections``, without an ``_id``."""
        document = {
            "source_conversation_id": self.source_conversation_id,
            "conversation_number": self.conversation_number,
            "field": self.field,
            "from": self.label_from,
            "to": self.label_to,
            "reviewer": self.reviewer,
            "at": self.at,
            "source": self.source,
            "result_fingerprint": self.result_fingerprint,
        }
        if self.sampling_probability is not None:
            document["sampling_probability"] = self.sampling_probability
        if self.note:
            document["note"] = self.note
        return document


def correction_of(document: Mapping[str, Any]) -> Correction | None:
    """Return the correction in *document*; see ``Correction.as_document``.

    Another program may have written it: without a conversation, field or label it is None, without a date the oldest of all.
    """
    at, field_name, label = document.get("at"), document.get("field"), _label(document.get("to"))
    if "source_conversation_id" not in document or not isinstance(field_name, str) or label is None:
        return None
    at = at if isinstance(at, datetime) else datetime.fromtimestamp(0, UTC)
    return Correction(
        source_conversation_id=document["source_conversation_id"],
        conversation_number=document.get("conversation_number"),
        field=field_name,
        label_from=_label(document.get("from")),
        label_to=label,
        reviewer=str(document.get("reviewer") or UNKNOWN),
        at=at if at.tzinfo else at.replace(tzinfo=UTC),
        source=document.get("source", "confidence"),
        sampling_probability=document.get("sampling_probability"),
        result_fingerprint=document.get("result_fingerprint"),
        note=document.get("note", ""),
    )


def _label(value: Any) -> Label | None:
    """Return *value* if it is a label, or a list of labels."""
    parts = value if isinstance(value, list) else [value]
    return value if all(isinstance(part, str) for part in parts) else None


@dataclass(frozen=True, slots=True)
class ReadLabels:
    """The labels of a conversation, with corrections applied, and where they come from.

    *label_source* is ``human`` if a person decided at least one field, else ``student`` or ``model``. *human_fields* are
    those fields, and *outdated* is those of them whose decision was about an earlier result of the same conversation.
    *decisions* has the decision that counts, by field.
    """

    labels: dict[str, Any]
    label_source: Literal["model", "student", "human"]
    human_fields: tuple[str, ...] = ()
    outdated: tuple[str, ...] = ()
    decisions: Mapping[str, Correction] = field(default_factory=dict)


def read_labels(result: Mapping[str, Any], corrections: Iterable[Correction]) -> ReadLabels:
    """Return the ``classification`` of *result* with *corrections* of its conversation; *result* is not changed.

    For each field, the latest decision counts, whoever made it.
    """
    latest: dict[str, Correction] = {}
    for correction in corrections:
        known = latest.get(correction.field)
        if known is None or correction.at >= known.at:
            latest[correction.field] = correction
    labels = {**result["classification"], **{name: one.label_to for name, one in latest.items()}}
    fingerprint = fingerprint_of(result)
    outdated = tuple(name for name, one in latest.items() if one.result_fingerprint != fingerprint)
    return ReadLabels(labels, "human" if latest else _maker_of(result), tuple(latest), outdated, latest)


def _maker_of(result: Mapping[str, Any]) -> Literal["model", "student"]:
    metadata = result.get("processing_metadata")
    is_by_student = isinstance(metadata, Mapping) and metadata.get("label_source") == "student"
    return "student" if is_by_student else "model"


def fingerprint_of(result: Mapping[str, Any]) -> str | None:
    """Return the fingerprint of *result*, None if it has none."""
    metadata = result.get("processing_metadata")
    value = metadata.get("fingerprint") if isinstance(metadata, Mapping) else None
    return value if isinstance(value, str) else None


def same_label(one: Label | None, other: Label | None) -> bool:
    """Return whether two labels are equal; the order of several labels has no meaning."""
    return label_key(one) == label_key(other)


def label_key(label: Label | None) -> tuple[str, ...] | str | None:
    """Return a hashable form of *label*; see ``same_label``."""
    return tuple(sorted(label)) if isinstance(label, list) else label

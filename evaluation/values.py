"""The values that the modules of this package pass on: labels of one conversation, gold labels, problems, estimates."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from config.taxonomy import Taxonomy, fold_label
from domain.text import one_line
from storage.extended_json import Document, id_key, id_text

Labels = tuple[str, ...]  # of one field, sorted; one label if the field is single-valued
Pair = tuple[Labels, Labels]  # gold and model


@dataclass(frozen=True, slots=True)
class Labelled:
    """The labels of one conversation in a results collection or in a report.

    *labels* and *confidence* (0 to 1) have the fields that are stored. *model*, *fingerprint* and *input_sha256* are empty if unknown.
    """

    document_id: Any
    number: str | None
    labels: Mapping[str, Labels]
    confidence: Mapping[str, float] = field(default_factory=dict)
    model: str = ""
    fingerprint: str = ""
    input_sha256: str = ""

    @property
    def key(self) -> bytes:
        """The ``id_key`` of the conversation."""
        return id_key(self.document_id)

    @property
    def name(self) -> str:
        """The id for people."""
        return id_text(self.document_id)


@dataclass(frozen=True, slots=True)
class GoldEntry:
    """One line of gold labels; *place* names it for people.

    *ids* are the ids that it may mean: several if the file holds only a text. If they name no conversation, *number*, the
    conversation_number, does.
    """

    place: str
    ids: tuple[Any, ...]
    number: str | None
    labels: Mapping[str, Labels]


@dataclass(frozen=True, slots=True)
class Problem:
    """A gold label that was not used. *kind* is one of PROBLEMS."""

    kind: str
    place: str
    detail: str = ""


PROBLEMS = {
    "unreadable": "not a JSON object",
    "no_key": "without _id, source_conversation_id or conversation_number",
    "no_label": "without a label of a field of the taxonomy",
    "outside": "label outside the taxonomy",
    "not_one": "not exactly one label of a field that takes one",
    "duplicate": "repeated, same label",
    "conflict": "repeated with another label; the first one is used",
    "superseded": "corrected again later; the latest correction is used",
    "example": "an example in the prompt",
    "unknown": "unknown conversation",
    "ambiguous": "names several conversations",
    "no_result": "no result yet",
    "no_field": "the result has no label of this field",
    "skipped": "nothing to classify",
    "failed": "could not be classified",
}


@dataclass(frozen=True, slots=True)
class Row:
    """A conversation with gold labels and the labels of a model."""

    gold: Mapping[str, Labels]
    labelled: Labelled


@dataclass(frozen=True, slots=True)
class Estimate:
    """A number with its 95 % interval, from *n* conversations. All three are None if *n* is 0."""

    value: float | None
    low: float | None
    high: float | None
    n: int


def labels_of(value: Any) -> Labels | None:
    """Return the labels in *value*, a text or a list of texts; None if it is neither."""
    if isinstance(value, str):
        return (value,)
    if isinstance(value, list | tuple) and all(isinstance(label, str) for label in value):
        return tuple(sorted(set(value)))
    return None


def labelled_of(result: Document, fields: Sequence[str]) -> Labelled:
    """Return the labels in *result*, a document of a results collection."""
    metadata = _mapping(result.get("processing_metadata"))
    confidence = _mapping(metadata.get("confidence"))
    stored = _mapping(result.get("classification"))
    number = result.get("conversation_number")
    labels = {name: labels_of(stored.get(name)) for name in fields}
    return Labelled(
        result.get("source_conversation_id"),
        None if number is None else str(number),
        {name: found for name, found in labels.items() if found is not None},
        {
            name: float(value)
            for name, value in confidence.items()
            if isinstance(value, int | float) and math.isfinite(value)
        },
        str(metadata.get("model_used") or ""),
        str(metadata.get("fingerprint") or ""),
        str(metadata.get("input_sha256") or ""),
    )


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


class Spelling:
    """The labels of a taxonomy by their folded form, to read labels as the parser of model replies does."""

    def __init__(self, taxonomy: Taxonomy) -> None:
        self.fields = taxonomy.field_names
        self.single = {field.name for field in taxonomy.fields if not field.is_multiple}
        self._known = {name: {fold_label(label): label for label in taxonomy.names(name)} for name in self.fields}

    def read(self, name: str, value: Any) -> Labels | None:
        """Return *value* as labels of the field *name*; None if one of them is not in the taxonomy.

        A text may hold several labels separated by ``|``.
        """
        known = self._known[name]
        if isinstance(value, bool):
            value = next(
                (word for word in (("yes", "true") if value else ("no", "false")) if word in known), str(value)
            )
        if isinstance(value, str) and fold_label(value) not in known:
            value = [part for part in value.split("|") if part.strip()]
        given = labels_of(value)
        if given is None:
            return None
        found = [known.get(fold_label(label)) for label in given]
        return None if None in found else tuple(sorted({label for label in found if label is not None}))


def shown(labels: Labels) -> str:
    """Return *labels* for people; an empty list is shown as a dash."""
    return one_line(", ".join(labels), 200) or "–"

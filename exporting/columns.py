"""The columns of an export, and a result as a row of them. Pure."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

from config.taxonomy import Taxonomy
from review.labels import ReadLabels
from storage import extended_json
from storage.extended_json import Document, whole_id_text

Kind = Literal["text", "labels", "integer", "number", "flag", "time", "object"]

# Fixed columns: name, kind, key in the part of a result that holds them.
_Group = tuple[tuple[str, Kind, str], ...]
_CONVERSATION: _Group = (
    ("started_at", "time", "started_at"),
    ("last_message_at", "time", "last_message_at"),
    ("turns", "integer", "turns"),
    ("channel", "text", "channel"),
    ("metadata", "object", "metadata"),
)
_CATEGORIZATION: _Group = (("categorization", "text", "categorization"),)
_PROCESSING: _Group = (
    ("needs_review", "flag", "needs_review"),
    ("model", "text", "model_used"),
    ("fingerprint", "text", "fingerprint"),
    ("plan", "text", "plan"),
    ("processed_at", "time", "processed_at"),
    ("model_digest", "text", "model_digest"),
    ("processor_version", "text", "processor_version"),
    ("batch_job_id", "text", "batch_job_id"),
    ("processing_duration_ms", "integer", "processing_duration_ms"),
    ("attempts", "integer", "attempts"),
    ("prompt_tokens", "integer", "prompt_tokens"),
    ("reply_tokens", "integer", "reply_tokens"),
    ("input_complete", "flag", "input_complete"),
    ("turns_used", "integer", "turns_used"),
    ("turns_total", "integer", "turns_total"),
    ("turn_order", "text", "turn_order"),
    ("input_sha256", "text", "input_sha256"),
    ("described_by", "text", "described_by"),
    ("described_at", "time", "described_at"),
)
_CREATED: _Group = (("created_at", "time", "created_at"),)
_IDS = ("result_id", "source_conversation_id", "conversation_number", "query_id")
_LAST = ("copied_from", "other_fields")
_TYPES: dict[Kind, Any] = {
    "text": str,
    "integer": int,
    "number": (int, float),
    "flag": bool,
    "time": datetime,
    "object": dict,
}
ORIGINAL = "original_conversation"  # the field of a result that holds customer text


@dataclass(frozen=True, slots=True)
class Column:
    """One column of an export. A cell holds None, or a value of its *kind*:

    str, list[str], int, float, bool, datetime (aware), or a dict that JSON can hold.
    """

    name: str
    kind: Kind


@dataclass(frozen=True, slots=True)
class Entry:
    """A result with what belongs to it. *transcript* is None if it was not asked for, or if there is none."""

    result: Document
    labels: ReadLabels
    transcript: str | None = None


class Table:
    """The columns for results with the fields of *taxonomy*, and rows of them; *with_text* adds the transcript.

    Column names are unique without regard to case: a field that is named like a fixed column gets ``_label`` added.
    What of a result has no column, or another type than its column, is in the column ``other_fields``, and its path is
    counted in ``other``.
    """

    def __init__(self, taxonomy: Taxonomy, *, with_text: bool = False) -> None:
        self.other: Counter[str] = Counter()
        self._fields = taxonomy.field_names
        self._with_text = with_text
        label_kinds: list[Kind] = ["labels" if field.is_multiple else "text" for field in taxonomy.fields]
        self._label_kinds = dict(zip(self._fields, label_kinds, strict=True))
        self._confidences: _Group = tuple((name, "number", name) for name in self._fields)
        fixed = (*_CONVERSATION, *_CATEGORIZATION, *_PROCESSING, *_CREATED)
        self._taken = {*_IDS, *_LAST, "label_source", "outdated_fields", "transcript", *(name for name, _, _ in fixed)}
        labels = [Column(self._free(name), self._label_kinds[name]) for name in self._fields]
        self.columns = (
            *(Column(name, "text") for name in _IDS),
            *(Column(name, kind) for name, kind, _ in _CONVERSATION),
            *labels,
            Column("categorization", "text"),
            *(Column(self._free(f"confidence_{name}"), "number") for name in self._fields),
            Column("label_source", "text"),
            *(Column(self._free(f"model_label_{name}"), self._label_kinds[name]) for name in self._fields),
            *(Column(self._free(f"reviewer_{name}"), "text") for name in self._fields),
            *(Column(self._free(f"reviewed_at_{name}"), "time") for name in self._fields),
            Column("outdated_fields", "labels"),
            *(Column(name, kind) for name, kind, _ in (*_PROCESSING, *_CREATED)),
            Column("copied_from", "text"),
            Column("other_fields", "object"),
            *([Column("transcript", "text")] if with_text else []),
        )

    def _free(self, name: str) -> str:
        while name.casefold() in self._taken:
            name += "_label"
        self._taken.add(name.casefold())
        return name

    def row(self, entry: Entry) -> list[Any]:
        """Return the cells of *entry* in the order of ``columns``."""
        read, rest = entry.labels, _copy(entry.result)
        rest.pop(ORIGINAL, None)
        own = _part(rest, "classification")
        labels = {**own, **read.labels}
        if own or not rest.get("classification"):  # else it is no document, and stays as it is
            rest["classification"] = labels
        metadata = _part(rest, "processing_metadata")
        if metadata.get("label_source") == read.label_source:
            del metadata["label_source"]
        counting = [read.decisions.get(name) for name in self._fields]
        cells = [
            *(_id(rest, name) for name in ("_id", *_IDS[1:])),
            *_taken(_part(rest, "conversation"), _CONVERSATION),
            *(self._label(labels, name) for name in self._fields),
            *_taken(labels, _CATEGORIZATION),
            *_taken(_part(metadata, "confidence"), self._confidences),
            read.label_source,
            *(
                _fitted(own.get(name), self._label_kinds[name]) if decision else None
                for name, decision in zip(self._fields, counting, strict=True)
            ),
            *(decision.reviewer if decision else None for decision in counting),
            *(decision.at if decision else None for decision in counting),
            [name for name in read.outdated if name in self._fields] or None,
            *_taken(metadata, _PROCESSING),
            *_taken(rest, _CREATED),
            _id(metadata, "copied_from"),
            self._other(rest, read),
        ]
        return [*cells, entry.transcript] if self._with_text else cells

    def _label(self, labels: Document, name: str) -> Any:
        if labels.get(name) is None:
            labels.pop(name, None)
            return None
        fitted = _fitted(labels[name], self._label_kinds[name])
        if fitted is not None:
            del labels[name]
        return fitted

    def _other(self, rest: Document, read: ReadLabels) -> Document | None:
        """Return what of *rest* is left, and decisions on fields that the taxonomy does not have."""
        foreign = {name: one for name, one in read.decisions.items() if name not in self._fields}
        if foreign:
            rest["corrections"] = {name: {"reviewer": one.reviewer, "at": one.at} for name, one in foreign.items()}
        left = _pruned(rest)
        if not left:
            return None
        self.other.update(_paths(left))
        found: Document = json.loads(extended_json.dumps(left))
        return found


def _copy(document: Mapping[str, Any]) -> Document:
    """Return *document* with copies of the documents in it, of which values can be removed."""
    return {name: _copy(value) if isinstance(value, dict) else value for name, value in document.items()}


def _part(document: Document, name: str) -> Document:
    """Return the document in the field *name*; an empty one if there is none."""
    part = document.get(name)
    return part if isinstance(part, dict) else {}


def _taken(holder: Document, group: _Group) -> list[Any]:
    """Remove the values of *group* from *holder* and return them; one of another type stays there, and its cell is None."""
    cells: list[Any] = []
    for _, kind, name in group:
        value = holder.get(name)
        fits = isinstance(value, _TYPES[kind]) and (kind == "flag" or not isinstance(value, bool))
        cells.append(extended_json.plain(value) if kind == "object" and fits else value if fits else None)
        if fits or value is None:
            holder.pop(name, None)
    return cells


def _id(holder: Document, name: str) -> str | None:
    value = holder.pop(name, None)
    return None if value is None else whole_id_text(value)


def _fitted(value: Any, kind: Kind) -> Any:
    """Return the label or labels *value* as a cell of *kind*, text or labels; None if it is neither."""
    if isinstance(value, str):
        return [value] if kind == "labels" else value
    if isinstance(value, list) and all(isinstance(one, str) for one in value):
        return value if kind == "labels" else joined(value)
    return None


def joined(labels: list[str]) -> str:
    """Return several labels as one text."""
    return "; ".join(labels)


def _pruned(document: Document) -> Document:
    kept = {name: _pruned(value) if isinstance(value, dict) else value for name, value in document.items()}
    return {name: value for name, value in kept.items() if value != {}}


def _paths(document: Document) -> list[str]:
    """Return the paths of the values in *document*, at most two levels deep."""
    return [
        path
        for name, value in document.items()
        for path in ([f"{name}.{inner}" for inner in value] if isinstance(value, dict) else [name])
    ]

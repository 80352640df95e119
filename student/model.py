"""A trained student: its heads, where they come from, and what it said about conversations that it had not seen.

One file holds all of it, so no part can be newer than another.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from config import Taxonomy
from domain.conversation import Classification, Conversation, Outcome, result_fingerprint, student_plan
from embedded.minilm import Encoder
from error_handler import ConfigurationError, StateDirectoryError
from storage.files import explained, replace_file
from student.certificate import Certificate
from student.features import FEATURES, KIND, Numbers, features_of
from student.heads import Head
from student.places import create_folder, student_path

TRAIN = "train one: python cli.py student train"
FORMAT = 1
NAME_DIGITS = 12


@dataclass(frozen=True, slots=True)
class Provenance:
    """What a student imitates, and what it was made from.

    *plan* is the plan_fingerprint of the results that it learned: model, prompt, taxonomy and options. *fields* maps each
    field to its labels, *multiple* names those with several labels at once. *trained* and *held_out* count conversations,
    *corrected* those of *trained* with a correction, *left_out* the other results by reason. *trained_at* is ISO 8601, UTC.
    """

    model: str
    model_digest: str | None
    plan: str
    fields: dict[str, tuple[str, ...]]
    multiple: tuple[str, ...]
    trained: int
    held_out: int
    corrected: int
    left_out: dict[str, int]
    trained_at: str
    certificates: tuple[Certificate, ...] = ()


@dataclass(frozen=True, slots=True)
class Sample:
    """What the student said about each of n held-out conversations.

    *scores*: the probability that all its labels are the model's, shape (n,). *probability* and *agreed*: that of each field
    and whether it was so, shape (n, fields).
    """

    scores: Numbers
    probability: Numbers
    agreed: Numbers


@dataclass(frozen=True, slots=True)
class Judgement:
    """The labels of one conversation, with the probability of each, 0 to 1; *joint* is that all of them are right."""

    labels: dict[str, str | list[str]]
    probability: dict[str, float]
    joint: float

    def agrees_with(self, classification: Classification) -> bool:
        """Return whether every label is that of *classification*."""
        return all(agree(label, classification.labels.get(name)) for name, label in self.labels.items())


@dataclass(frozen=True, slots=True)
class Student:
    """Heads by field, in the order of the results. *name* is ``model_used`` of its results."""

    provenance: Provenance
    heads: dict[str, Head]
    sample: Sample
    name: str = field(default="")

    def judge(self, features: Numbers) -> list[Judgement]:
        """Return what it says about each row of *features*; see ``features_of``."""
        by_field = {name: head.probabilities(features) for name, head in self.heads.items()}
        return [
            self._judgement({name: rows[place] for name, rows in by_field.items()}) for place in range(len(features))
        ]

    def answer(self, encoder: Encoder, conversation: Conversation) -> Judgement:
        """Return what it says about *conversation*."""
        return self.judge(features_of(encoder, [conversation]))[0]

    def certificate(self, promise: float) -> Certificate | None:
        """Return the certificate for *promise*, which may be a refusal; None if training asked for none."""
        return next((one for one in self.provenance.certificates if abs(one.promise - promise) < 1e-9), None)

    def outcome(self, judgement: Judgement, conversation: Conversation, duration_ms: int) -> Outcome:
        """Return the outcome of *conversation* with the labels of *judgement*."""
        plan = student_plan(self.provenance.plan, self.name)
        return Outcome(
            Classification(categorization=None, **judgement.labels),
            model_used=self.name,
            model_digest=None,
            input_sha256=conversation.transcript_sha256,
            fingerprint=result_fingerprint(plan, conversation.transcript_sha256),
            plan=plan,
            attempts=0,
            duration_ms=duration_ms,
            confidence={name: round(value, 4) for name, value in judgement.probability.items()},
        )

    def require_fields(self, taxonomy: Taxonomy) -> None:
        """Raise ConfigurationError if *taxonomy* has other fields or labels than those that the student knows."""
        if fields_of(taxonomy) != (self.provenance.fields, self.provenance.multiple):
            raise ConfigurationError(
                f"The student of {self.provenance.trained_at[:10]} knows other fields or labels than the taxonomy; "
                "train it again: python cli.py student train"
            )

    def _judgement(self, rows: Mapping[str, Numbers]) -> Judgement:
        labels: dict[str, str | list[str]] = {}
        probability: dict[str, float] = {}
        for name, row in rows.items():
            head, best = self.heads[name], int(row.argmax())
            if head.is_multiple:
                chosen = [place for place in range(len(row)) if row[place] >= 0.5] or [best]
                labels[name] = [head.names[place] for place in chosen]
                probability[name] = float(np.prod([p if place in chosen else 1 - p for place, p in enumerate(row)]))
            else:
                labels[name], probability[name] = head.names[best], float(row[best])
        # In the precision of the certificate's sample: a threshold is one of its scores.
        return Judgement(labels, probability, float(np.float32(np.prod(list(probability.values())))))


def agree(one: str | Sequence[str], other: str | Sequence[str] | None) -> bool:
    """Return whether two labels, or two sets of labels in any order, are equal."""
    parts = [{label} if isinstance(label, str) else set(label or ()) for label in (one, other)]
    return parts[0] == parts[1]


def fields_of(taxonomy: Taxonomy) -> tuple[dict[str, tuple[str, ...]], tuple[str, ...]]:
    """Return the labels of each field of *taxonomy*, and the fields with several labels at once."""
    fields = {one.name: one.names for one in taxonomy.fields}
    return fields, tuple(one.name for one in taxonomy.fields if one.is_multiple)


def save_student(directory: Path, student: Student) -> Student:
    """Store *student* durably in the state directory in place of an earlier one; return it with its name.

    Raises:
        StateDirectoryError: The file cannot be written.
    """
    tensors = {f"sample.{name}": value for name, value in asdict(student.sample).items()}
    for name, head in student.heads.items():
        tensors |= {f"weights.{name}": head.weights, f"bias.{name}": head.bias}
    about = json.dumps({"format": FORMAT, "features": KIND, **asdict(student.provenance)})
    content = save(tensors, {"student": about})
    path = student_path(directory)
    create_folder(directory)
    replace_file(path, content)
    return Student(student.provenance, student.heads, student.sample, _name(content))


def load_student(directory: Path) -> Student | None:
    """Return the student of the state directory *directory*; None if there is none.

    Raises:
        ConfigurationError: The file is damaged, or of another version.
        StateDirectoryError: It cannot be read.
    """
    path = student_path(directory)
    try:
        with explained(f"{path} cannot be read"):
            content = path.read_bytes()
    except StateDirectoryError as exc:
        if isinstance(exc.__cause__, FileNotFoundError):
            return None
        raise
    try:
        tensors = load(content)
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])  # ``load`` leaves the metadata out
        return _student(json.loads(header["__metadata__"]["student"]), tensors, _name(content))
    except (SafetensorError, ValueError, KeyError, TypeError) as exc:
        raise _unusable(path) from exc


def _student(about: dict[str, Any], tensors: dict[str, Numbers], name: str) -> Student:
    """Return the student in a file; raise ValueError, KeyError or TypeError if it is not as ``save_student`` makes it."""
    if (about.pop("format"), about.pop("features")) != (FORMAT, KIND):
        raise ValueError("of another version")
    about["fields"] = {field: tuple(labels) for field, labels in about["fields"].items()}
    about["multiple"] = tuple(about["multiple"])
    about["certificates"] = tuple(Certificate(**one) for one in about["certificates"])
    provenance = Provenance(**about)
    heads = {}
    for field_name, labels in provenance.fields.items():
        weights, bias = tensors[f"weights.{field_name}"], tensors[f"bias.{field_name}"]
        if weights.shape != (FEATURES, len(labels)) or bias.shape != (len(labels),):
            raise ValueError("of another shape")
        heads[field_name] = Head(labels, field_name in provenance.multiple, weights, bias)
    sample = Sample(*(tensors[f"sample.{part}"] for part in ("scores", "probability", "agreed")))
    return Student(provenance, heads, sample, name)


def _name(content: bytes) -> str:
    return f"student-{hashlib.sha256(content).hexdigest()[:NAME_DIGITS]}"


def _unusable(path: Path) -> ConfigurationError:
    return ConfigurationError(f"{path} is damaged or of another version; {TRAIN}")

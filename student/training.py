"""Trains a student on labels of the model, and certifies it on labels that it has not seen."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

import numpy as np

from config import Taxonomy
from config.taxonomy import Field
from error_handler import ConfigurationError
from student.certificate import certify
from student.features import Numbers
from student.heads import Head, fit
from student.model import Provenance, Sample, Student, agree, fields_of

PROMISES = (0.90, 0.95, 0.98)
HELD_OUT_SHARE, MOST_HELD_OUT = 0.5, 3000
LEAST_EXAMPLES = 40
CORRECTION_WEIGHT = 5.0

Labels = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Example:
    """A conversation that the model has labelled.

    *labels* are those of the model, *confidence* is the probability of each where it is known, 0 to 1. *corrected* holds what
    a person decided instead, or confirmed; it is learned, but it takes no part in the certificate: the promise is about
    the model.
    """

    input_sha256: str
    labels: Labels
    confidence: Mapping[str, float]
    corrected: Labels


def train(
    examples: Sequence[Example],
    features: Numbers,
    taxonomy: Taxonomy,
    imitated: tuple[str, str | None, str],
    left_out: Mapping[str, int],
    on_step: Callable[[str, int], None],
) -> Student:
    """Return a student of *examples*, distinct conversations; *features* has a row for each.

    A hash of the conversation puts it into the half that is learned or into the held-out half (at most MOST_HELD_OUT). It is
    the same at each training, so that nobody gets a certificate by training until a lucky split. *imitated* is the model
    of the labels, its digest and the plan. *on_step* gets the field and the number of each iteration, in a thread for
    each field.

    Raises:
        ConfigurationError: There are too few examples.
    """
    if len(examples) < LEAST_EXAMPLES:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in left_out.items())
        left = f" Results left out: {reasons}." if reasons else ""
        raise ConfigurationError(
            f"A student needs at least {LEAST_EXAMPLES} different conversations with a result of the current model, prompt "
            f"and taxonomy, and there are {len(examples)}.{left} Run the worker first: python cli.py, or with --only stale for "
            "results of another model, prompt or taxonomy."
        )
    held_out = _held_out([one.input_sha256 for one in examples])
    learned = ~held_out
    known = [one for one, is_held_out in zip(examples, held_out, strict=True) if not is_held_out]
    seen = features[learned]

    def fitted(field: Field) -> Head:
        targets, weights = _targets(known, field.name, field.names)
        steps = _Steps(field.name, on_step)
        return fit(field.names, seen, targets, weights, is_multiple=field.is_multiple, on_step=steps)

    # The fields are independent, and numpy's products let other threads of Python run.
    with ThreadPoolExecutor(os.cpu_count() or 1) as threads:
        heads = dict(zip(taxonomy.field_names, threads.map(fitted, taxonomy.fields), strict=True))
    fields, multiple = fields_of(taxonomy)
    model, digest, plan = imitated
    provenance = Provenance(
        model=model,
        model_digest=digest,
        plan=plan,
        fields=fields,
        multiple=multiple,
        trained=len(known),
        held_out=int(held_out.sum()),
        corrected=sum(bool(one.corrected) for one in known),
        left_out=dict(left_out),
        trained_at=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    others = [one for one, is_held_out in zip(examples, held_out, strict=True) if is_held_out]
    sample = _sample(heads, provenance, others, features[held_out])
    scores: list[float] = sample.scores.tolist()
    is_right = [bool(row.all()) for row in sample.agreed]
    certificates = tuple(certify(scores, is_right, promise) for promise in PROMISES)
    return Student(replace(provenance, certificates=certificates), heads, sample)


class _Steps:
    def __init__(self, field: str, on_step: Callable[[str, int], None]) -> None:
        self._field, self._on_step, self._number = field, on_step, 0

    def __call__(self) -> None:
        self._number += 1
        self._on_step(self._field, self._number)


def _held_out(hashes: Sequence[str]) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Return which of the conversations with these ``transcript_sha256`` are held out."""
    drawn = [hashlib.sha256(f"held out {one}".encode()).digest() for one in hashes]
    order = sorted(range(len(hashes)), key=lambda place: drawn[place])
    chosen = order[: min(int(len(hashes) * HELD_OUT_SHARE), MOST_HELD_OUT)]
    mask = np.zeros(len(hashes), np.bool_)
    mask[chosen] = True
    return mask


def _targets(examples: Sequence[Example], field: str, names: Sequence[str]) -> tuple[Numbers, Numbers]:
    """Return the probability of each label of *field* for each example, and the weight of the example.

    What the model left of a probability is shared by the other labels. A correction is certain.
    """
    place_of = {name: place for place, name in enumerate(names)}
    targets = np.zeros((len(examples), len(names)), np.float32)
    weights = np.ones(len(examples), np.float32)
    for row, one in enumerate(examples):
        label = one.corrected.get(field, one.labels[field])
        sure = 1.0
        if field in one.corrected:
            weights[row] = CORRECTION_WEIGHT
        else:
            sure = max(one.confidence.get(field, 1.0), 1 / len(names))
        if isinstance(label, str):
            targets[row] = (1 - sure) / max(1, len(names) - 1)
            targets[row, place_of[label]] = sure
        else:
            targets[row, [place_of[each] for each in label]] = sure
    return targets, weights


def _sample(heads: dict[str, Head], provenance: Provenance, examples: Sequence[Example], features: Numbers) -> Sample:
    empty = np.zeros((0, 0), np.float32)
    judged = Student(provenance, heads, Sample(empty, empty, empty)).judge(features)
    scores = [one.joint for one in judged]
    probability = [[one.probability[name] for name in heads] for one in judged]
    agreed = [
        [agree(one.labels[name], example.labels[name]) for name in heads]
        for one, example in zip(judged, examples, strict=True)
    ]
    return Sample(*(np.array(rows, np.float32) for rows in (scores, probability, agreed)))

"""Training on features without an encoder: soft targets, corrections, several labels, the split, and the stored file."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from config.taxonomy import Field, Label, Taxonomy
from error_handler import ConfigurationError
from student.features import FEATURES, Numbers
from student.heads import fit
from student.model import Student, load_student, save_student
from student.training import Example, train

ROOT = Path(__file__).parents[2]
NAMES = ("One", "Two", "Three")
TAXONOMY = Taxonomy((Field("kind", tuple(Label(name, "") for name in NAMES)),))
WITH_LIST = Taxonomy(
    (*TAXONOMY.fields, Field("parts", tuple(Label(name, "") for name in ("A", "B")), is_multiple=True))
)
COUNT = 240
SOURCE = np.random.default_rng(5)


def features_of_kinds(kinds: list[int], noise: float = 0.3) -> Numbers:
    """Return a row for each of *kinds*, near a corner of its own."""
    rows = SOURCE.normal(0, noise / 28, (len(kinds), FEATURES))
    rows[range(len(kinds)), kinds] += 1.0
    return rows.astype(np.float32)


def examples(labels: list[dict[str, Any]], **changes: Any) -> list[Example]:
    base = Example("", {}, {}, {})
    hashes = [hashlib.sha256(str(number).encode()).hexdigest() for number in range(len(labels))]
    return [replace(base, input_sha256=key, labels=label, **changes) for key, label in zip(hashes, labels, strict=True)]


def trained(given: list[Example], features: Numbers, taxonomy: Taxonomy = TAXONOMY) -> Student:
    return train(given, features, taxonomy, ("llama3.2", None, "plan"), {"of another model": 3}, lambda *_: None)


@pytest.fixture(scope="module")
def kinds() -> list[int]:
    return [number % 3 for number in range(COUNT)]


@pytest.fixture(scope="module")
def features(kinds: list[int]) -> Numbers:
    return features_of_kinds(kinds)


def test_student_of_a_clear_corpus_is_certified(kinds: list[int], features: Numbers) -> None:
    """Half is held out; what it says about other conversations is right and sure."""
    student = trained(examples([{"kind": NAMES[kind]} for kind in kinds]), features)
    about = student.provenance
    assert (about.trained, about.held_out) == (COUNT // 2, COUNT // 2)
    certificate = student.certificate(0.95)
    assert certificate is not None
    assert certificate.share > 0.9
    assert student.certificate(0.93) is None
    (judgement,) = student.judge(features_of_kinds([1]))
    assert judgement.labels == {"kind": "Two"}
    assert judgement.joint > 0.8


def test_random_labels_are_not_certified(features: Numbers) -> None:
    """There is nothing to learn, so every promise is refused with a reason."""
    labels = [{"kind": NAMES[place]} for place in SOURCE.integers(0, 3, COUNT)]
    for certificate in trained(examples(labels), features).provenance.certificates:
        assert certificate.threshold is None
        assert certificate.reason


def test_split_is_the_same_for_the_same_conversations(kinds: list[int], features: Numbers) -> None:
    """In any order: training again cannot draw a luckier sample."""
    given = examples([{"kind": NAMES[kind]} for kind in kinds])
    first, again = trained(given, features), trained(given[::-1], features[::-1])
    assert np.allclose(sorted(first.sample.scores), sorted(again.sample.scores), atol=1e-3)


def test_confidence_of_the_model_is_learned(kinds: list[int], features: Numbers) -> None:
    """A label that the model gave 0.6 makes the student less sure than one it gave 1.0."""
    labels = [{"kind": NAMES[kind]} for kind in kinds]
    sure = trained(examples(labels), features)
    unsure = trained(examples(labels, confidence={"kind": 0.6}), features)
    assert unsure.sample.scores.mean() < sure.sample.scores.mean() - 0.1


def test_corrections_weigh_more_than_the_model(kinds: list[int], features: Numbers) -> None:
    """A third of a kind is corrected; the student learns the correction, and the certificate still compares with the model."""
    given = examples([{"kind": NAMES[kind]} for kind in kinds])
    mixed = [
        replace(one, corrected={"kind": "Three"}) if kinds[place] == 0 and place % 9 in (0, 3) else one
        for place, one in enumerate(given)
    ]
    student = trained(mixed, features)
    assert student.judge(features_of_kinds([0]))[0].labels == {"kind": "Three"}
    assert student.provenance.corrected > 0
    assert student.sample.agreed.mean() < 0.8  # the model says One
    assert trained(given, features).judge(features_of_kinds([0]))[0].labels == {"kind": "One"}


def test_field_with_several_labels(kinds: list[int], features: Numbers) -> None:
    """Each label is judged alone; without a probable one, the most probable is taken. Their order has no meaning."""
    parts = (["A"], ["B"], ["B", "A"])
    given = examples([{"kind": NAMES[kind], "parts": parts[kind]} for kind in kinds])
    student = trained(given, features, WITH_LIST)
    found = student.judge(features_of_kinds([0, 1, 2]))
    assert [one.labels["parts"] for one in found] == [["A"], ["B"], ["A", "B"]]
    assert student.sample.agreed.mean() > 0.95
    assert all(one.joint <= min(one.probability.values()) for one in found)


def test_stored_student_is_the_same(kinds: list[int], features: Numbers, tmp_path: Path) -> None:
    made = save_student(tmp_path, trained(examples([{"kind": NAMES[kind]} for kind in kinds]), features))
    read = load_student(tmp_path)
    assert read is not None
    assert read.name == made.name
    assert read.provenance == made.provenance
    assert np.array_equal(read.sample.scores, made.sample.scores)
    assert read.judge(features) == made.judge(features)
    assert read.provenance.left_out == {"of another model": 3}
    with pytest.raises(ConfigurationError, match="other fields or labels"):
        read.require_fields(WITH_LIST)


def test_too_few_results_are_refused_with_what_was_left_out(kinds: list[int], features: Numbers) -> None:
    """All results may be of another model; a run without --only stale changes nothing then."""
    with pytest.raises(
        ConfigurationError, match=r"there are 3\. Results left out: 3 of another model\. .* --only stale"
    ):
        trained(examples([{"kind": NAMES[kind]} for kind in kinds[:3]]), features[:3])


def test_there_is_no_student_before_the_first_training(tmp_path: Path) -> None:
    assert load_student(tmp_path) is None


def test_gradient_is_that_of_the_loss() -> None:
    """Heads of both kinds reach the optimum that is known: the log odds of the shares."""
    features = np.zeros((400, 4), np.float32)
    targets = np.zeros((400, 2), np.float32)
    targets[:300, 0] = targets[300:, 1] = 1.0
    weights = np.ones(400, np.float32)
    for is_multiple in (False, True):
        head = fit(("a", "b"), features, targets, weights, is_multiple=is_multiple, on_step=lambda: None)
        assert np.allclose(head.probabilities(features[:1]), [[0.75, 0.25]], atol=1e-3)


@pytest.mark.slow
def test_fit_uses_one_thread_of_each_blas() -> None:
    """In a new process: a limit that is set before scipy is loaded does not reach scipy's own BLAS."""
    code = (
        "from threadpoolctl import threadpool_info\n"
        "from student.heads import one_thread\n"
        "with one_thread():\n"
        "    import scipy.optimize\n"
        "    found = [each['num_threads'] for each in threadpool_info() if each['user_api'] == 'blas']\n"
        "assert set(found) == {1}, found"
    )
    environment = os.environ | {"OPENBLAS_NUM_THREADS": "2"}
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, check=True)

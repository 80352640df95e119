"""``--student P``: the student answers where it is sure, a sample goes to the model, and drift makes it withdraw."""

from __future__ import annotations

import importlib.util
import json
import signal
import sqlite3
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import student.audit
from aggregator import aggregate_conversation
from config.taxonomy import DEFAULT_TAXONOMY
from embedded.bfloat16 import bfloat16_if_fast
from embedded.minilm import FLOAT32
from student.audit_log import AuditLog
from tests.student.student_site import ConsistentModel, by_student, conversation, fill
from tests.worker.site import Site, check_directory, until

School = tuple[Site, ConsistentModel]
COUNT = 24
NEW = 1000  # the number of the first conversation that the student has not seen
PROMISE = ("--student", "0.9")


def audited(site: Site) -> list[tuple[Any, ...]]:
    with sqlite3.connect(site.directory / "student/audit.sqlite") as db:
        return db.execute("SELECT hex(input_sha256), agreed FROM comparisons ORDER BY number").fetchall()


@pytest.fixture
def audit_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw every conversation for the audit."""
    for name in ("LEAST_SHARE", "MOST_SHARE"):
        monkeypatch.setattr(student.audit, name, 1.0)


@pytest.fixture
def audit_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw no conversation for the audit."""
    for name in ("LEAST_SHARE", "MOST_SHARE"):
        monkeypatch.setattr(student.audit, name, 0.0)


def test_training_certifies_a_repetitive_corpus(trained_directory: Path) -> None:
    """The report says whether it can pay, how often it agrees, and what is certified; the files are private."""
    out = (trained_directory / "trained.txt").read_text()
    assert "imitates llama3.2" in out
    assert "65 conversations learned (0 with corrections), 65 held out" in out
    assert out.index("Can it pay?") < out.index("Agreement with the model") < out.index("Certificates")
    assert "--student 0.9: takes" in out
    assert "--student 0.98: refused, because" in out
    for name in ("student.safetensors", "vectors.sqlite"):
        assert stat.S_IMODE((trained_directory / "batch_files/student" / name).stat().st_mode) == 0o600
    arithmetic = bfloat16_if_fast() or FLOAT32
    assert f"to embed 130 conversations in {arithmetic.name} (" in (trained_directory / "trained.err").read_text()


@pytest.mark.usefixtures("audit_none")
def test_student_saves_calls_and_its_results_name_it(school: School) -> None:
    """The model is asked about the other conversations only; summary, statistics and results tell the two apart."""
    site, model = school
    fill(site, NEW, COUNT)
    ended = site.run(*PROMISE, "--output", str(site.folder / "run.json"))
    assert ended.code == 0, ended.err
    taken = by_student(site)
    assert len(taken) > COUNT / 2
    assert sorted([*taken, *model.asked]) == list(range(NEW, NEW + COUNT))
    result = site.results.find_one({"source_conversation_id": taken[0]})
    assert result is not None
    made = result["processing_metadata"]
    assert made["model_used"].startswith("student-")
    assert made["attempts"] == 0
    assert set(made["confidence"]) == {"intent", "topic", "sentiment"}
    assert json.loads((site.folder / "run.json").read_text())["by_student"] == len(taken)
    assert f"The student labelled {len(taken)}, and the model was asked about {len(model.asked)}" in ended.out
    assert f"{len(taken)} of them by the student" in ended.err
    assert audited(site) == []


@pytest.mark.usefixtures("audit_none")
def test_only_student_lets_the_model_redo_them(school: School) -> None:
    """``plan`` and the dry run count them; afterwards all results are the model's, also if STUDENT is set."""
    site, model = school
    fill(site, NEW, 6)
    site.settings["STUDENT"] = "0.9"
    assert site.run().code == 0
    taken = by_student(site)
    assert taken
    assert json.loads(site.run("plan", "--json").out)["student"] == len(taken)
    assert json.loads(site.run("--only", "student", "--dry-run").out)["to_classify"] == len(taken)
    model.asked.clear()
    assert site.run("--only", "student").code == 0
    assert sorted(model.asked) == taken
    assert by_student(site) == []
    report = json.loads(site.run("plan", "--json").out)
    assert (report["student"], report["done"]) == (0, 6)


@pytest.mark.thorough
@pytest.mark.usefixtures("audit_all")
def test_audited_conversations_have_the_labels_of_the_model(school: School) -> None:
    site, model = school
    fill(site, NEW, 10)
    ended = site.run(*PROMISE)
    assert ended.code == 0, ended.err
    assert len(model.asked) == 10
    assert by_student(site) == []
    rows = audited(site)
    assert rows
    assert all(agreed for _, agreed in rows)
    assert f"audit: {len(rows)} of {len(rows)} audited conversations agree" in site.run("student", "report").out


@pytest.mark.usefixtures("audit_all")
def test_drift_withdraws_the_student_for_good(school: School) -> None:
    """The run ends with exit code 0 and prints a sentence; the next run asks only the model and prints the reason."""
    site, model = school
    model.has_drifted = True
    fill(site, NEW, 20)
    ended = site.run(*PROMISE, "--max-concurrent", "1")
    assert ended.code == 0, ended.err
    assert "has withdrawn" in ended.err
    seen = audited(site)
    before = student.audit.Audit(0.9)
    for _, agreed in seen[:-1]:
        before.record(bool(agreed))
    assert not before.is_broken  # the last comparison broke the promise, and none came after it
    fill(site, NEW + 500, 3)
    again = site.run(*PROMISE)
    assert again.code == 0
    assert "has withdrawn" in again.err
    assert by_student(site) == []
    assert audited(site) == seen
    assert "takes no more conversations" in site.run("student", "report").out


@pytest.mark.usefixtures("audit_none")
def test_student_trained_after_a_withdrawal_takes_nothing_until_it_is_cleared(school: School) -> None:
    """The traffic that broke the promise of the one before is still there."""
    site, model = school
    with AuditLog(site.directory / "student/audit.sqlite", "student-000000000000", student.audit.Audit(0.9)) as log:
        while not log.audit.is_broken:
            log.record(f"{log.audit.audited:064x}", 1.0, agreed=False)
    fill(site, NEW, 3)
    model.has_drifted = True
    ended = site.run(*PROMISE)
    assert ended.code == 0, ended.err
    assert "disagreements of the student before" in ended.err
    assert by_student(site) == []


def test_mixed_models_have_no_student(school: School) -> None:
    """One of several servers may have another model, which the student does not imitate."""
    site, model = school
    fill(site, NEW, 2)
    mixed = {"OLLAMA_ENDPOINT": f"{model.server.url},http://127.0.0.1:1", "ALLOW_MIXED_MODELS": "true"}
    for command in (PROMISE, ("student", "train")):
        ended = site.run(*command, **mixed)
        assert ended.code == 2
        assert "--allow-mixed-models" in ended.err
    assert model.asked == []


@pytest.mark.slow
def test_withdrawn_student_labels_no_identical_conversation(school: School, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its answers from before the drift are not copied: the model labels the rest of the run."""
    site, model = school
    model.has_drifted = True
    fill(site, NEW, 20)
    site.source.insert_one({**conversation(NEW), "_id": NEW + 500})
    first = aggregate_conversation(conversation(NEW)).transcript_sha256
    monkeypatch.setattr(AuditLog, "drawn", lambda _, key: None if key == first else 1.0)
    ended = site.run(*PROMISE, "--max-concurrent", "1")
    assert "has withdrawn" in ended.err
    assert by_student(site) == [NEW]


@pytest.mark.usefixtures("audit_all")
def test_conversation_that_is_asked_again_counts_once(school: School) -> None:
    """As after a crash between the audit and the journal."""
    site, _ = school
    fill(site, NEW, 6)
    assert site.run(*PROMISE).code == 0
    before = audited(site)
    assert before
    assert site.run(*PROMISE, "--reprocess").code == 0
    assert audited(site) == before


@pytest.mark.thorough
def test_killed_run_loses_nothing_and_counts_nothing_twice(school: School) -> None:
    """``kill -9`` in the middle; the next run finishes, and each conversation has one result."""
    site, _ = school
    fill(site, NEW, COUNT)
    with site.start(*PROMISE) as worker:
        until(lambda: site.results.count_documents({}) >= 5)
        worker.send(signal.SIGKILL)
        worker.ended()
    assert site.run(*PROMISE).code == 0
    ids = sorted(one["source_conversation_id"] for one in site.results.find())
    assert ids == list(range(NEW, NEW + COUNT))
    rows = [key for key, _ in audited(site)]
    assert len(rows) == len(set(rows))
    check_directory(site)


def test_no_student_or_no_certificate_is_refused_at_the_start(school: School, place: School) -> None:
    """Each refusal is one sentence that says what to do, before any document is touched."""
    site, model = school
    fill(site, NEW, 2)
    for promise, words in (("0.98", "is refused"), ("0.93", "training certifies only 0.9, 0.95, 0.98")):
        ended = site.run("--student", promise)
        assert ended.code == 2
        assert words in ended.err
        assert "Use --student 0.9, or leave it out" in ended.err
    empty = site.sibling("elsewhere").run(*PROMISE)
    assert empty.code == 2
    assert "train one: python cli.py student train" in empty.err
    assert model.asked == []
    assert site.source.count_documents({"status": "pending"}) == 2


def test_another_model_or_taxonomy_is_refused(school: School, tmp_path: Path) -> None:
    site, model = school
    fill(site, NEW, 2)
    other = site.run(*PROMISE, "--model", "qwen3:8b")
    assert other.code == 2
    assert "was trained to imitate llama3.2" in other.err
    changed = tmp_path / "labels.yaml"
    changed.write_text(DEFAULT_TAXONOMY.read_text(encoding="utf-8").replace("Refund Request", "Refunds"))
    fields = site.run(*PROMISE, TAXONOMY_FILE=str(changed))
    assert fields.code == 2
    assert "other fields or labels" in fields.err
    assert model.asked == []


def test_damaged_student_is_refused(school: School) -> None:
    site, _ = school
    fill(site, NEW, 1)
    path = site.directory / "student/student.safetensors"
    for content in (path.read_bytes()[:1000], b"", b"\xff" * 100):
        path.write_bytes(content)
        ended = site.run(*PROMISE)
        assert ended.code == 2, ended.err
        assert "is damaged" in ended.err


@pytest.mark.thorough
def test_too_few_results_train_no_student(place: School) -> None:
    site, _ = place
    fill(site, NEW, 3)
    assert site.run().code == 0
    ended = site.run("student", "train")
    assert ended.code == 2
    assert "needs at least 40 different conversations" in ended.err
    assert "there are 3" in ended.err
    assert site.run("student", "report").code == 2
    assert conversation(NEW)["status"] == "pending"


@pytest.mark.thorough
def test_missing_packages_are_named_with_their_file(school: School, monkeypatch: pytest.MonkeyPatch) -> None:
    """To train needs scipy; to answer does not."""
    site, _ = school
    found: Callable[[str], Any] = importlib.util.find_spec
    for name, code in (("scipy", 0), ("tokenizers", 2)):
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda wanted, name=name: None if wanted == name else found(wanted)
        )
        ended = site.run("student", "report")
        assert ended.code == 2
        assert f"not installed ({name}): run {sys.executable} -m pip install -r requirements-student.txt" in ended.err
        assert site.run(*PROMISE).code == code

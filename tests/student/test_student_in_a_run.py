"""``--student P``: the student answers where it is sure, a sample goes to the model, and drift makes it withdraw."""

from __future__ import annotations

import json
import stat
from pathlib import Path

from tests.student.student_site import ConsistentModel, by_student, fill
from tests.worker.site import Site

School = tuple[Site, ConsistentModel]
COUNT = 120
NEW = 1000  # the number of the first conversation that the student has not seen


def test_training_certifies_a_repetitive_corpus(trained_directory: Path) -> None:
    out = (trained_directory / "trained.txt").read_text()
    print(out, (trained_directory / "trained.err").read_text())
    assert "to imitate llama3.2" in out
    assert "--student 0.95: it takes" in out
    for name in ("student.safetensors", "vectors.sqlite"):
        assert stat.S_IMODE((trained_directory / "batch_files/student" / name).stat().st_mode) == 0o600


def test_student_saves_calls_and_says_what_it_did(school: School) -> None:
    site, model = school
    fill(site, NEW, COUNT)
    ended = site.run("--student", "0.95", "--output", str(site.folder / "run.json"))
    assert ended.code == 0, ended.err
    print(ended.out, ended.err)
    taken = by_student(site)
    assert len(taken) > COUNT / 2
    assert sorted([*taken, *model.asked]) == list(range(NEW, NEW + COUNT))
    result = site.results.find_one({"source_conversation_id": taken[0]})
    assert result is not None
    made = result["processing_metadata"]
    assert made["model_used"].startswith("student-")
    assert made["attempts"] == 0
    assert set(made["confidence"]) == {"intent", "topic", "sentiment"}
    stats = json.loads((site.folder / "run.json").read_text())
    assert stats["by_student"] == len(taken)
    assert f"The student labelled {len(taken)}, and the model was asked about {len(model.asked)}" in ended.out

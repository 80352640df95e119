"""The worker is killed with SIGKILL, at random moments and at each named point; nothing is lost, nothing twice."""

from __future__ import annotations

import json
import os
import random
import signal
import stat
import time
from pathlib import Path

import pytest

from storage import files as atomic_file
from tests.crash.faulty_worker import SEAMS
from tests.worker.site import (
    Document,
    Site,
    calls,
    check_calls,
    check_directory,
    check_exactly_once,
    check_results,
    check_statuses,
    documents_of_all_shapes,
    user_message,
)

CONCURRENCY = 6


def askable(documents: list[Document]) -> list[Document]:
    return [document for document in documents if user_message(document) is not None]


def faults_of(documents: list[Document]) -> list[dict[str, object]]:
    """Let each 9th document need a repair turn, and each 14th fail its first round."""
    entries: list[dict[str, object]] = []
    for place, document in enumerate(askable(documents)):
        times = 2 if place % 14 == 3 else 1 if place % 9 == 4 else 0
        if times:
            entries.append({"kind": "wrong_label", "when": {"text": f"Case {document['_id']:05d}"}, "times": times})
    return entries


@pytest.mark.slow
def test_random_kills(site: Site, request: pytest.FixtureRequest) -> None:
    """``kill -9`` at random moments: each document has one result, and few calls are repeated."""
    kills = request.config.getoption("--kills")
    seed = request.config.getoption("--seed")
    seed = random.randrange(1_000_000) if seed is None else seed
    print(f"seed {seed}, {kills} kills")
    moments = random.Random(seed)
    documents = documents_of_all_shapes(60 + 30 * kills)
    site.source.insert_many(documents)
    assert site.model is not None
    site.model.configure(latency_s=0.15, faults=faults_of(documents))
    killed = 0
    for _ in range(kills):
        with site.start("--logs") as worker:
            # From before it has read anything to the middle of its work; it starts within some tenths of a second.
            time.sleep(moments.choice([moments.uniform(0.0, 0.4), moments.uniform(0.3, 1.2)]))
            worker.send(signal.SIGKILL)
            killed += worker.ended().code == -signal.SIGKILL
    ended = site.run("--logs")
    assert ended.code == 0, ended.err
    assert killed > kills // 2, "most runs ended before they were killed: this proves little"
    check_exactly_once(site, documents)
    check_calls(site, documents, repeated=CONCURRENCY * killed)


# The chain of kills below certainly reaches these, so they need no test of their own in every run. Whether it reaches the
# seams of retry files depends on which documents had failed before each kill.
CHAINED = {
    *("failure_noted", "started", "released", "answer_received", "state_written", "completed_written", "torn_line"),
    *("pending_removed", "before_mark", "marked", "before_rename"),
}
# Of the others, those between the steps that decide whether a document is stored twice; whether it is asked twice, is below.
USUAL = {"results_written", "renamed"}


@pytest.mark.parametrize(
    "seam", [pytest.param(seam, marks=() if seam in USUAL else pytest.mark.thorough) for seam in SEAMS]
)
def test_a_kill_at_each_point(site: Site, seam: str) -> None:
    """The same command finishes the work, whichever step was the last."""
    documents = documents_of_all_shapes(20)
    site.source.insert_many(documents)
    assert site.model is not None
    # Each batch has a document that fails once: there is a retry file per batch, and a round for it.
    faults = [{"kind": "wrong_label", "when": {"text": f"Case {number:05d}"}, "times": 2} for number in (4, 12, 18)]
    site.model.configure(faults=faults)
    killed = site.run("--logs", "--batch-size", "6", plan={"seam": seam})
    assert killed.code == -signal.SIGKILL, killed.err
    ended = site.run("--logs", "--batch-size", "6")
    assert ended.code == 0, ended.err
    check_exactly_once(site, documents)
    check_calls(site, documents, repeated=CONCURRENCY)


@pytest.mark.thorough
def test_a_chain_of_kills_at_all_points(site: Site) -> None:
    """Each start dies at another point, some way into the mess that the one before left."""
    documents = documents_of_all_shapes(320)
    site.source.insert_many(documents)
    assert site.model is not None
    site.model.configure(faults=faults_of(documents))
    seams = list(SEAMS)
    random.Random(7).shuffle(seams)
    died_at = set()
    for place, seam in enumerate(seams):
        ended = site.run("--logs", "--batch-size", "8", plan={"seam": seam, "passage": 2 + place % 3})
        if ended.code == -signal.SIGKILL:
            died_at.add(seam)
        assert ended.code in (0, -signal.SIGKILL), ended.err
    ended = site.run("--logs")
    assert ended.code == 0, ended.err
    assert died_at >= CHAINED
    check_exactly_once(site, documents)
    check_calls(site, documents, repeated=CONCURRENCY * len(died_at))


def test_answers_in_the_journal_are_not_asked_for_again(site: Site) -> None:
    """Answers that were not yet written when the process died are written from the journal."""
    documents = [document for document in documents_of_all_shapes(30) if user_message(document) is not None]
    site.source.insert_many(documents)
    assert site.run(plan={"seam": "before_write", "passage": 3}).code == -signal.SIGKILL
    stored = set(site.results.distinct("source_conversation_id"))
    events = [json.loads(line) for path in site.files("pending/*.journal") for line in path.read_text().splitlines()]
    kept = {event["id"] for event in events if event["e"] == "answered"} - stored
    assert kept, "every answer had been written: this proves nothing"
    assert site.run().code == 0
    check_exactly_once(site, documents)
    assert {
        document["_id"]: calls(site, document) for document in documents if document["_id"] in kept
    } == dict.fromkeys(kept, 1)


def test_what_failed_before_a_crash_is_not_asked_again_in_the_same_round(site: Site) -> None:
    """A failure in the journal counts: a crash gives no document a free round."""
    documents = documents_of_all_shapes(12)
    site.source.insert_many(documents)
    assert site.model is not None
    hopeless = [documents[0], documents[3]]
    faults = [{"kind": "wrong_label", "when": {"text": f"Case {document['_id']:05d}"}} for document in hopeless]
    site.model.configure(latency_s=0.05, faults=faults)
    assert site.run(plan={"seam": "failure_noted", "passage": 2}).code == -signal.SIGKILL
    ended = site.run("--logs")
    assert ended.code == 1, ended.err
    assert [calls(site, document) for document in hopeless] == [8, 8]  # a call and a repair turn, four rounds
    failed = [document["_id"] for document in hopeless]
    assert sorted(entry["conversation_id"] for entry in site.entries("quarantine")) == failed
    check_results(site, [document for document in askable(documents) if document["_id"] not in failed])
    check_statuses(site, documents, failed)
    check_directory(site)


def test_a_file_is_on_disk_before_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The order that saves a file from a power cut, which no kill can show: fsync, rename, fsync of the folder."""
    steps: list[str] = []

    class Recorder:
        def __getattr__(self, name: str) -> object:
            return getattr(os, name)

        def fsync(self, handle: int) -> None:
            steps.append("fsync of the folder" if stat.S_ISDIR(os.fstat(handle).st_mode) else "fsync of the file")
            os.fsync(handle)

        def replace(self, old: Path, new: Path) -> None:
            steps.append("rename")
            os.replace(old, new)

    monkeypatch.setattr(atomic_file, "os", Recorder())
    atomic_file.replace_file(tmp_path / "checkpoint.json", b"{}")
    assert steps == ["fsync of the file", "rename", "fsync of the folder"]

"""Of several identical conversations one is asked in a run; each has its own result, which names the one that was."""

from __future__ import annotations

import json
import random
import signal
import stat
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.crash.faulty_worker import SEAMS
from tests.worker.site import Document, Site, check_directory, check_exactly_once, conversation, requests, sha
from worker.dedupe import FILE_NAME

CONCURRENCY = 6


def same(number: int, text_number: int, **extra: Any) -> Document:
    """Return the conversation *number* with the text of the conversation *text_number*."""
    return conversation(text_number) | {"_id": number, "conversation_number": str(number)} | extra


def filled(site: Site, count: int, distinct: int) -> list[Document]:
    """Store *count* conversations with *distinct* texts, each text again and again over the whole collection."""
    documents = [same(number, number % distinct) for number in range(count)]
    site.source.insert_many(documents)
    return documents


def made(site: Site) -> dict[Any, dict[str, Any]]:
    """Return how each result was made, by the source id."""
    return {result["source_conversation_id"]: result["processing_metadata"] for result in site.results.find()}


def check_origins(site: Site, documents: list[Document]) -> None:
    """Assert that each copy names a document with the same text whose result is no copy."""
    metadata = made(site)
    texts = {document["_id"]: sha(document) for document in documents}
    for document_id, how in metadata.items():
        origin = how.get("copied_from", document_id)
        assert texts[origin] == texts[document_id]
        assert "copied_from" not in metadata[origin], "a copy of a copy"
        assert how["input_sha256"] == metadata[origin]["input_sha256"]
        assert (how["fingerprint"], how["plan"]) == (metadata[origin]["fingerprint"], metadata[origin]["plan"])
        assert how["plan"] != how["fingerprint"]
        is_copy = "copied_from" in how
        assert (how["attempts"] == 0) is is_copy
        assert (how["prompt_tokens"] is None) is is_copy


def test_identical_conversations_are_asked_once(site: Site, tmp_path: Path) -> None:
    """In flight and long after; every document has its own result and its own status."""
    documents = filled(site, 60, distinct=10)
    ended = site.run("--batch-size", "30", "--output", str(tmp_path / "run.json"))
    assert ended.code == 0, ended.err
    check_exactly_once(site, documents)
    check_origins(site, documents)
    assert requests(site) == 10
    run = json.loads((tmp_path / "run.json").read_text())
    assert (run["successful"], run["copied"]) == (60, 50)
    assert "50 reused the result of an identical conversation" in ended.out
    assert site.files(f"{FILE_NAME}*") == [], "it goes with the run"


def test_waiting_duplicates_hold_no_slot(site: Site) -> None:
    """While the first of many is in flight, the others of other texts are asked beside it."""
    assert site.model is not None
    documents = [same(number, 0) for number in range(50)] + [same(number, number) for number in range(50, 50 + 5)]
    site.source.insert_many(documents)
    site.model.configure(latency_s=60.0)
    with site.start("--batch-size", "100") as worker:
        site.model.wait_for("in_flight", equals=CONCURRENCY, timeout_s=30)  # one of the 50, and the five
        worker.send(signal.SIGKILL)
        worker.ended()
    assert requests(site) == CONCURRENCY


def test_no_dedupe_asks_each_document(site: Site) -> None:
    """The flag turns it off."""
    documents = filled(site, 24, distinct=4)
    assert site.run("--no-dedupe").code == 0
    check_exactly_once(site, documents)
    assert requests(site) == 24
    assert not any("copied_from" in how for how in made(site).values())


def test_next_run_does_not_reuse_answers(site: Site) -> None:
    """Nothing is kept beyond a run: another run may have another prompt or model."""
    filled(site, 12, distinct=3)
    assert site.run().code == 0
    late = [same(number, number % 3) for number in range(100, 112)]
    site.source.insert_many(late)
    assert site.run().code == 0
    assert requests(site) == 3 + 3
    assert {how["copied_from"] for number, how in made(site).items() if number >= 100 and "copied_from" in how} <= {
        document["_id"] for document in late
    }


@pytest.mark.thorough
def test_reprocess_asks_each_text_once(site: Site) -> None:
    """All results are of the new job, and the copies name documents of it."""
    documents = filled(site, 30, distinct=5)
    assert site.run().code == 0
    assert site.run("--reprocess").code == 0
    check_exactly_once(site, documents)
    check_origins(site, documents)
    assert requests(site) == 5 + 5
    assert len({how["batch_job_id"] for how in made(site).values()}) == 1


def test_failure_of_the_asked_document_does_not_fail_its_duplicates(site: Site) -> None:
    """The next of the same text is asked itself; the one that failed gets its retry round."""
    assert site.model is not None
    documents = filled(site, 40, distinct=1)
    # Two calls, the repair turn included, are the first document's; its round comes after all the others.
    site.model.configure(latency_s=0.2, faults=[{"kind": "wrong_label", "when": {"indexes": [0, 1]}}])
    ended = site.run("--logs", "--batch-size", "40")
    assert ended.code == 0, ended.err
    assert ended.err.count("queued for retry") == 1
    check_exactly_once(site, documents)
    check_origins(site, documents)
    assert requests(site) == 2 + 1 + 1
    assert Counter(how["attempts"] for how in made(site).values()) == {0: 38, 1: 2}


@pytest.mark.thorough
def test_duplicates_that_all_fail_get_their_own_rounds(site: Site) -> None:
    """Nobody is failed by the failure of another: every one has had its own calls."""
    assert site.model is not None
    hopeless = [same(number, 0) for number in range(3)]
    documents = hopeless + [same(number, number) for number in range(3, 20)]
    site.source.insert_many(documents)
    site.model.configure(faults=[{"kind": "wrong_label", "when": {"text": "Case 00000"}}])
    ended = site.run()
    assert ended.code == 1, ended.err
    assert sorted(entry["conversation_id"] for entry in site.entries("quarantine")) == [0, 1, 2]
    assert site.model.stats()["calls_by_sha"][sha(hopeless[0])] == 3 * 8  # a call and a repair turn, four rounds each
    check_directory(site)


def test_resumed_run_reuses_earlier_answers(site: Site) -> None:
    """Conversations asked before the crash are not asked again after it, although their batch was settled long ago."""
    documents = filled(site, 160, distinct=8)
    killed = site.run("--batch-size", "20", plan={"seam": "completed", "passage": 5})
    assert killed.code == -signal.SIGKILL, killed.err
    assert requests(site) == 8
    (kept,) = site.files(FILE_NAME)  # it waits for the run that goes on
    assert stat.S_IMODE(kept.stat().st_mode) == 0o600
    ended = site.run("--batch-size", "20")
    assert ended.code == 0, ended.err
    assert requests(site) == 8
    check_exactly_once(site, documents)
    check_origins(site, documents)


@pytest.mark.thorough
@pytest.mark.parametrize(
    "content",
    [None, *(pytest.param(content, marks=pytest.mark.thorough) for content in (b"not a database", b""))],
    ids=["lost", "corrupt", "empty"],
)
def test_lost_reply_cache_costs_only_calls(site: Site, content: bytes | None) -> None:
    """Then the texts are asked once more, and nothing else is different."""
    documents = filled(site, 100, distinct=8)
    assert site.run("--batch-size", "20", plan={"seam": "completed", "passage": 3}).code == -signal.SIGKILL
    for path in site.files(f"{FILE_NAME}*"):
        path.unlink()
    if content is not None:
        (site.directory / FILE_NAME).write_bytes(content)
    ended = site.run("--batch-size", "20")
    assert ended.code == 0, ended.err
    check_exactly_once(site, documents)
    check_origins(site, documents)
    assert requests(site) <= 2 * 8


def test_other_model_does_not_reuse_answers(site: Site) -> None:
    """A run that goes on with another model asks that one."""
    documents = filled(site, 80, distinct=8)
    assert site.run("--batch-size", "20", plan={"seam": "completed", "passage": 3}).code == -signal.SIGKILL
    late = [same(number, number % 8) for number in range(100, 116)]
    site.source.insert_many(late)
    assert site.run("--batch-size", "20", OLLAMA_MODEL="qwen3:8b").code == 0
    check_exactly_once(site, documents + late)
    assert {how["model_used"] for number, how in made(site).items() if number >= 100} == {"qwen3:8b"}


@pytest.mark.thorough
@pytest.mark.parametrize(
    "seam", ["answered", "asked", "answer_received", "before_write", "results_written", "released"]
)
def test_a_kill_at_each_point(site: Site, seam: str) -> None:
    """With copies in every batch; the same command finishes the work."""
    assert seam in SEAMS
    documents = filled(site, 60, distinct=7)
    killed = site.run("--batch-size", "10", plan={"seam": seam, "passage": 2})
    assert killed.code == -signal.SIGKILL, killed.err
    ended = site.run("--batch-size", "10")
    assert ended.code == 0, ended.err
    check_exactly_once(site, documents)
    check_origins(site, documents)
    assert requests(site) <= 7 + CONCURRENCY


@pytest.mark.thorough
def test_random_kills(site: Site) -> None:
    """``kill -9`` at random moments of a run with many copies: one result each, no copy of a copy, few calls repeated."""
    assert site.model is not None
    seed = random.randrange(1_000_000)
    print(f"seed {seed}")
    moments = random.Random(seed)
    distinct = 150
    documents = filled(site, 1500, distinct)
    site.model.configure(latency_s=0.1)
    killed = 0
    for _ in range(8):
        with site.start("--batch-size", "25") as worker:
            time.sleep(moments.uniform(0.2, 0.9))
            worker.send(signal.SIGKILL)
            killed += worker.ended().code == -signal.SIGKILL
    ended = site.run("--batch-size", "25")
    assert ended.code == 0, ended.err
    assert killed >= 4, "most runs ended before they were killed: this proves little"
    check_exactly_once(site, documents)
    check_origins(site, documents)
    assert requests(site) <= distinct + CONCURRENCY * killed


@pytest.mark.thorough
def test_document_is_never_a_copy_of_itself(site: Site) -> None:
    """A power cut may take the journal with the answer and leave the file that says it was asked: it is asked again."""
    documents = filled(site, 30, distinct=30)
    assert site.run("--batch-size", "30", plan={"seam": "before_write", "passage": 3}).code == -signal.SIGKILL
    for path in site.files("pending/*.journal"):
        path.unlink()
    assert site.run().code == 0
    check_exactly_once(site, documents)
    assert not any("copied_from" in how for how in made(site).values())

"""After each kind of end: the last sentence, ``quarantine list``, ``plan``, the metrics and the exit code tell the same."""

from __future__ import annotations

import json
import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest

from embedded.mongod import EmbeddedMongod
from tests.forked_process import Ended, ForkedProcess
from tests.worker.site import (
    ROOT,
    Document,
    Site,
    check_exactly_once,
    conversation,
    filled,
    model_of,
    open_site,
    requests,
    until,
)
from utils.batch_file_manager import BatchFiles
from utils.failed_documents import FailedDocument

REFUSED: dict[str, Any] = {"kind": "status", "status": 400, "body": '{"error": "bad request"}'}
UNLABELLED: dict[str, Any] = {"kind": "wrong_label"}


def listed(site: Site, *flags: str) -> list[dict[str, Any]]:
    ended = site.run("quarantine", "list", "--json", *flags)
    assert ended.code == 0, ended.err
    return list(json.loads(ended.out)["documents"])


def check_agreement(site: Site, *, retry: int, quarantine: int, ended: Ended | None = None) -> None:
    """Assert that every report counts *retry* and *quarantine* documents; *ended* is the run whose metrics are compared."""
    assert (len(listed(site, "--retry")), len(listed(site))) == (retry, quarantine)
    assert json.loads(site.run("plan", "--json").out)["failed"] == retry + quarantine
    if ended is None:
        return
    metrics = (site.directory / "progress/metrics.prom").read_text()
    gauges = re.findall(r"^triad_(retry_queue|quarantine)_documents{.*} ([\d.]+)$", metrics, re.MULTILINE)
    assert dict(gauges) == {"retry_queue": f"{retry}.0", "quarantine": f"{quarantine}.0"}
    said = ended.out + ended.err
    if retry:
        assert re.search(rf"\b{retry} in the retry queue|Retry queue: {retry}\b", said), said
    if quarantine:
        assert re.search(rf"\b{quarantine} in quarantine|Quarantine: {quarantine}\b", said), said
        assert "--retry-failed" in said


def strike(site: Site, fault: dict[str, Any], *numbers: int) -> list[dict[str, Any]]:
    """Return the faults that strike these conversations."""
    return [{**fault, "when": {"text": f"Case {number:05d}"}} for number in numbers]


def test_done(site: Site) -> None:
    filled(site, 5)
    ended = site.run()
    assert ended.code == 0
    check_agreement(site, retry=0, quarantine=0, ended=ended)


@pytest.mark.parametrize(
    "is_refused", [pytest.param(False, id="success", marks=pytest.mark.thorough), pytest.param(True, id="failure")]
)
def test_run_goes_on_if_nobody_reads_its_output(site: Site, is_refused: bool) -> None:
    """Both pipes are closed before the first line. The exit code is that of the work."""
    documents = filled(site, 5)
    model_of(site).configure(faults=[*strike(site, REFUSED, 1)] if is_refused else [])
    assert unread_exit_code(site, "cli.py") == int(is_refused)
    model_of(site).configure(faults=[])
    assert site.run("--retry-failed").code == 0
    check_exactly_once(site, documents)


@pytest.mark.thorough
@pytest.mark.parametrize("least", ["0", "1"])
def test_evaluation_goes_on_if_nobody_reads_its_output(site: Site, tmp_path: Path, least: str) -> None:
    """All gold labels but those of one conversation differ from the stored ones."""
    documents = filled(site, 5)
    assert site.run().code == 0
    gold = tmp_path / "gold.jsonl"
    gold.write_text("".join(f'{{"_id": {document["_id"]}, "intent": "Complaint"}}\n' for document in documents))
    command = ("cli.py", "evaluate", "--gold", str(gold), "--fail-under", f"intent={least}")
    assert unread_exit_code(site, *command) == int(least)


def unread_exit_code(site: Site, *command: str) -> int:
    """Run *command* with stdout and stderr as pipes that are closed at once; return its exit code."""
    script, *flags = command
    (out, write_out), (err, write_err) = os.pipe(), os.pipe()
    with open(os.devnull, "rb") as nothing:
        streams = [nothing.fileno(), write_out, write_err]
        process = ForkedProcess([str(ROOT / script), *flags], site.environment(), site.folder, None, streams=streams)
    for handle in (out, err, write_out, write_err):
        os.close(handle)
    with process:
        return process.wait(60)


def test_incomplete(site: Site) -> None:
    """The next run says the same, and ends with 1 as long as documents are in quarantine."""
    documents = filled(site, 8)
    model_of(site).configure(faults=[*strike(site, REFUSED, 1), *strike(site, UNLABELLED, 2)])
    for _ in range(2):
        ended = site.run()
        assert ended.code == 1
        check_agreement(site, retry=0, quarantine=2, ended=ended)
    model_of(site).configure(faults=[])
    ended = site.run("--retry-failed")
    assert ended.code == 0
    check_agreement(site, retry=0, quarantine=0, ended=ended)
    check_exactly_once(site, documents)


@pytest.mark.parametrize("batch_size", [pytest.param("20", marks=pytest.mark.thorough), "100"])
def test_threshold(site: Site, batch_size: str) -> None:
    """Also of a batch that is not finished; the flag that the sentence names processes all."""
    documents = filled(site, 65)
    model_of(site).configure(faults=[REFUSED])
    ended = site.run(BATCH_SIZE=batch_size)
    assert ended.code == 4
    number = len(listed(site))
    assert number >= 50
    assert ended.err.splitlines()[-1].endswith("Fix the cause, then run the same command again with --retry-failed.")
    check_agreement(site, retry=0, quarantine=number, ended=ended)
    model_of(site).configure(faults=[])
    ended = site.run("--retry-failed", BATCH_SIZE=batch_size)
    assert ended.code == 0, ended.err
    check_agreement(site, retry=0, quarantine=0, ended=ended)
    check_exactly_once(site, documents)


@pytest.mark.thorough
def test_threshold_with_documents_in_the_retry_queue(site: Site) -> None:
    """The same command retries them, and no flag is named."""
    documents = filled(site, 80)
    model_of(site).configure(faults=[UNLABELLED])
    ended = site.run(BATCH_SIZE="100")
    assert ended.code == 4
    assert ended.err.splitlines()[-1].endswith("then run the same command again.")
    check_agreement(site, retry=len(listed(site, "--retry")), quarantine=0, ended=ended)
    model_of(site).configure(faults=[])
    assert site.run(BATCH_SIZE="100").code == 0
    check_agreement(site, retry=0, quarantine=0)
    check_exactly_once(site, documents)


@pytest.mark.thorough
def test_outage(site: Site) -> None:
    """Of the model server: what failed before is named, what waited is not."""
    filled(site, 60)
    faults = [*strike(site, REFUSED, 1, 2), *strike(site, UNLABELLED, 3)]
    model_of(site).configure(faults=faults, latency_s=0.05)
    with site.start("--batch-size", "60", OUTAGE_LIMIT_S="1") as worker:
        until(lambda: worker.err_so_far().count("quarantined") == 2 and "queued for retry" in worker.err_so_far())
        model_of(site).kill()
        ended = worker.ended()
    assert ended.code == 3, ended.err
    model_of(site).start()
    check_agreement(site, retry=1, quarantine=2, ended=ended)


def test_interrupted(site: Site) -> None:
    """In the middle of a batch, whose failures are only in its journal."""
    documents = filled(site, 60)
    faults = [*strike(site, REFUSED, 1, 2), *strike(site, UNLABELLED, 3)]
    model_of(site).configure(faults=faults, latency_s=0.1)
    with site.start("--batch-size", "60") as worker:
        until(lambda: worker.err_so_far().count("quarantined") == 2 and "queued for retry" in worker.err_so_far())
        worker.send(signal.SIGTERM)
        ended = worker.ended()
    assert ended.code == 130
    check_agreement(site, retry=1, quarantine=2, ended=ended)
    assert {row["reason"] for row in listed(site)} == {"refused"}
    shown = site.run("quarantine", "show", "1")
    assert "Case 00001" in shown.out
    replayed = site.run("quarantine", "replay", "--all")
    assert "2 documents stayed in quarantine because the batch is not finished" in replayed.out
    model_of(site).configure(faults=[], latency_s=0.0)
    ended = site.run()
    assert ended.code == 1
    check_agreement(site, retry=0, quarantine=2, ended=ended)
    assert site.run("--retry-failed").code == 0
    check_exactly_once(site, documents)


@pytest.mark.thorough
def test_interrupted_in_a_retry_round(site: Site) -> None:
    """A document with an answer has not failed any more; one that failed for good has left the retry queue."""
    filled(site, 3)
    faults = [*strike(site, UNLABELLED, 0, 1, 2)]
    model_of(site).configure(faults=faults)
    killed = site.run(plan={"seam": "retry_saved"})
    assert killed.code == -signal.SIGKILL
    check_agreement(site, retry=3, quarantine=0)
    model_of(site).configure(faults=strike(site, REFUSED, 0, 1, 2))
    killed = site.run(plan={"seam": "failure_noted", "passage": 2}, MAX_CONCURRENT="1")
    assert killed.code == -signal.SIGKILL
    check_agreement(site, retry=1, quarantine=2)
    model_of(site).configure(faults=[])
    ended = site.run()
    assert ended.code == 1
    check_agreement(site, retry=0, quarantine=2, ended=ended)


@pytest.mark.thorough
def test_locked(site: Site) -> None:
    """The second run ends with 5 and changes nothing; the reports need no lock."""
    filled(site, 30)
    model_of(site).configure(faults=strike(site, REFUSED, 1), latency_s=0.2)
    with site.start() as worker:
        until(lambda: "quarantined" in worker.err_so_far())
        locked = site.run()
        assert (locked.code, "another worker is using" in locked.err) == (5, True)
        assert len(listed(site)) == 1
        ended = worker.ended()
    assert ended.code == 1
    check_agreement(site, retry=0, quarantine=1, ended=ended)


def killed_after_three_failures(site: Site) -> list[Document]:
    """Kill a run when the journal has two documents for quarantine and one to retry; return all documents."""
    documents = filled(site, 30)
    model_of(site).configure(faults=[*strike(site, REFUSED, 1, 2), *strike(site, UNLABELLED, 3)])
    assert site.run(plan={"seam": "failure_noted", "passage": 3}).code == -signal.SIGKILL
    model_of(site).configure(faults=[])
    return documents


@pytest.mark.thorough
def test_killed_and_resumed(site: Site) -> None:
    """Before the run is resumed the journal has the failures, afterwards the files have them."""
    documents = killed_after_three_failures(site)
    check_agreement(site, retry=1, quarantine=2)
    ended = site.run()
    assert ended.code == 1
    check_agreement(site, retry=0, quarantine=2, ended=ended)
    assert site.run("--retry-failed").code == 0
    check_exactly_once(site, documents)


def test_killed_run_is_resumed_with_fresh_attempts(site: Site) -> None:
    """--retry-failed repeats in the same run what failed before the kill."""
    documents = killed_after_three_failures(site)
    assert site.run("--retry-failed").code == 0
    check_agreement(site, retry=0, quarantine=0)
    check_exactly_once(site, documents)


def test_rejected_result_of_an_unfinished_batch(site: Site) -> None:
    """The answer is known and MongoDB refuses it: the document is in quarantine, with its labels."""
    site.source.insert_many([conversation(number) for number in range(20)])
    validator = {"source_conversation_id": {"$ne": 4}}
    site.database.create_collection(site.results.name, validator=validator)
    killed = site.run(plan={"seam": "failure_noted"})
    assert killed.code == -signal.SIGKILL
    check_agreement(site, retry=0, quarantine=1)
    assert listed(site)[0]["status"] == "write_failed"
    ended = site.run()
    assert ended.code == 1
    check_agreement(site, retry=0, quarantine=1, ended=ended)


@pytest.mark.thorough
def test_limit(site: Site) -> None:
    """Documents beyond the limit are new, neither failed nor waiting; the next run takes them."""
    documents = filled(site, 30)
    faults = [*strike(site, REFUSED, 1), *strike(site, UNLABELLED, 2), *strike(site, REFUSED, 20)]
    model_of(site).configure(faults=faults)
    ended = site.run("--limit", "10", BATCH_SIZE="4")
    assert ended.code == 1
    check_agreement(site, retry=0, quarantine=2, ended=ended)
    assert json.loads(site.run("plan", "--json").out)["new"] == 20
    ended = site.run()
    assert ended.code == 1
    check_agreement(site, retry=0, quarantine=3, ended=ended)
    model_of(site).configure(faults=[])
    assert site.run("--retry-failed").code == 0
    check_agreement(site, retry=0, quarantine=0)
    check_exactly_once(site, documents)


@pytest.mark.thorough
@pytest.mark.parametrize("batch_size", ["2", "100"])
def test_model_that_disappears(site: Site, batch_size: str) -> None:
    """Five such answers end the run; the documents that got them wait for the next one, and no flag is needed."""
    documents = filled(site, 20)
    gone = {
        "kind": "status",
        "status": 404,
        "body": '{"error": "model \\"llama3.2\\" not found, try pulling it first"}',
    }
    model_of(site).configure(faults=[*strike(site, REFUSED, 0), gone])
    ended = site.run(BATCH_SIZE=batch_size, MAX_CONCURRENT="1")
    assert ended.code == 3, ended.err
    waiting = len(listed(site, "--retry"))
    assert waiting == 4  # the fifth ended the run, and is asked again
    check_agreement(site, retry=waiting, quarantine=1, ended=ended)
    model_of(site).configure(faults=[])
    ended = site.run(BATCH_SIZE=batch_size)
    assert ended.code == 1
    check_agreement(site, retry=0, quarantine=1, ended=ended)
    assert site.run("--retry-failed").code == 0
    check_exactly_once(site, documents)


@pytest.mark.thorough
def test_outage_of_mongodb(site: Site, tmp_path: Path) -> None:
    """The answers that were not stored wait in files; the reports agree as soon as MongoDB is back."""
    with EmbeddedMongod(tmp_path / "db") as server, open_site(server.uri, "ends", site.model, tmp_path) as own:
        filled(own, 30)
        model_of(own).configure(faults=[*strike(own, REFUSED, 1), *strike(own, UNLABELLED, 2)], latency_s=0.1)
        with own.start("--batch-size", "30", MONGODB_TIMEOUT_MS="300", MONGODB_MAX_RETRIES="1") as worker:
            until(lambda: "quarantined" in worker.err_so_far() and "queued for retry" in worker.err_so_far())
            server.kill()
            ended = worker.ended()
        server.start()
        assert ended.code == 3, ended.err
        waiting = len(listed(own, "--retry"))
        check_agreement(own, retry=waiting, quarantine=1, ended=ended)
        model_of(own).configure(faults=[], latency_s=0.0)
        assert own.run().code == 1
        assert own.run("--retry-failed").code == 0
        check_agreement(own, retry=0, quarantine=0)
        assert own.results.count_documents({}) == 30


def test_limit_counts_what_failed_before(site: Site) -> None:
    """Of the quarantine, ``--retry-failed`` takes no more either."""
    docs = filled(site, 8)
    failed = [FailedDocument(one["_id"], "llm_failed", one, 0, "timeout", "late") for one in docs[:4]]
    files = BatchFiles(site.directory)
    files.save_failed("quarantine", 1, failed[:3])
    files.save_failed("retry", 2, failed[3:])
    site.source.update_many({"_id": {"$lt": 4}}, {"$set": {"status": "failed", "status_reason": "timeout"}})
    ended = site.run("--limit", "2")
    assert ended.code == 1
    assert "completed: 2/2 done" in ended.err
    assert requests(site) == 2
    assert site.run("--retry-failed", "--limit", "2").code == 1
    assert requests(site) == 4
    assert site.run("--retry-failed").code == 0
    check_exactly_once(site, docs)

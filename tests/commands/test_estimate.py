"""``cli.py estimate`` as a process, with a real MongoDB and a fake model server with realistic times."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from bson import ObjectId
from pydantic import SecretStr

from batch_processor import BatchProcessor
from config import Settings, load_settings
from tests.fakes.fake_ollama import FakeOllama
from tests.worker.site import Site, conversation, documents_of_all_shapes, open_site, until

SAMPLE = 40


def settings_of(site: Site, calls: int) -> Settings:
    assert site.model is not None
    return load_settings(
        mongodb_uri=SecretStr(site.uri),
        db_name=site.database.name,
        ollama_endpoint=site.model.url,
        ollama_model="llama3.2",
        max_concurrent=calls,
        batch_files_dir=site.directory,
    )


def estimated(site: Site, *flags: str, code: int = 0) -> dict[str, Any]:
    ended = site.run("estimate", "--json", *flags)
    assert ended.code == code, ended.said
    answer: dict[str, Any] = json.loads(ended.out)
    return answer


async def run_timed(site: Site, calls: int) -> tuple[dict[str, Any], float]:
    async with BatchProcessor(settings_of(site, calls)) as processor:
        start_s = time.monotonic()
        stats = await processor.run()
        return stats, time.monotonic() - start_s


@pytest.mark.timeout(120)
@pytest.mark.parametrize(("calls", "slots"), [(10, 4), (5, 16)], ids=["busy server", "free slots"])
@pytest.mark.thorough
def test_estimated_time_matches_the_following_run(
    calls: int, slots: int, mongodb_uri: str, db_name: str, tmp_path: Path
) -> None:
    """The tolerance covers the sampling error of a few percent, and a busy machine."""
    timing = {"latency": "lognormal", "mean_s": 0.15, "sigma": 0.3, "latency_key": "text", "seed": 4}
    with (
        FakeOllama(slots=slots, load_delay_s=1.5, user_message=0, **timing) as model,
        open_site(mongodb_uri, db_name, model, tmp_path) as site,
    ):
        site.source.insert_many([conversation(number) for number in range(200)])
        answer = estimated(site, "--sample", str(SAMPLE), "--max-concurrent", str(calls))
        assert site.results.count_documents({}) == SAMPLE
        assert answer["left"] == answer["to_classify"] == 200 - SAMPLE
        stats, truth_s = asyncio.run(run_timed(site, calls))
        assert stats["successful"] == 200 - SAMPLE
    quote = answer["time"]
    assert 0.7 <= quote["expected_s"] / truth_s <= 1.4, (quote, truth_s)
    assert quote["low_s"] < quote["expected_s"] < quote["high_s"]
    assert answer["server"]["is_busy"] is (calls > slots)
    assert answer["server"]["slots"] == (slots if calls > slots else None)
    more = answer["concurrency"][1]
    assert more["is_at_best"] is (calls < slots)
    assert more["expected_s"] / quote["expected_s"] == pytest.approx(1.0 if calls > slots else 0.5, abs=0.1)
    assert 1.2 <= answer["sample"]["load_s"] <= 5.0


def test_estimate_prints_a_table_and_keeps_a_random_sample(site: Site) -> None:
    """Ids of several types, documents of all shapes, some without text."""
    documents = documents_of_all_shapes(130)
    documents += [conversation(1000 + number, _id=f"text-{number:04}") for number in range(60)]
    documents += [conversation(2000 + number, _id=ObjectId()) for number in range(60)]
    site.source.insert_many(documents)
    ended = site.run("estimate", "--sample", "60", "--concurrent", "4")
    assert ended.code == 0, ended.said
    for word in ("time", "90 % confidence", "tokens", "concurrency", "genai-prices", "leave your network", "at best"):
        assert word in " ".join(ended.out.split()), ended.out
    assert "60/60 done" in ended.err
    kept = [result["source_conversation_id"] for result in site.results.find()]
    assert {type(value) for value in kept} == {int, str, ObjectId}
    assert kept != sorted(kept, key=str)
    skipped = site.source.count_documents({"status": "skipped"})
    assert len(kept) + skipped == 60
    assert site.files("pending/*") == []
    assert site.run().code == 0
    assert site.results.count_documents({}) == 240


@pytest.mark.thorough
def test_documents_with_a_result_or_without_text_are_excluded(site: Site) -> None:
    """Of 200 documents, 40 have a result but a reset status, and 80 have no text of the customer."""
    silent = [{"sender": "agent", "text": "Anything else?"}]
    site.source.insert_many([conversation(number) for number in range(120)])
    assert site.run("--limit", "40").code == 0
    site.source.update_many({}, {"$set": {"status": "pending"}})
    site.source.insert_many([conversation(500 + number, messages=silent) for number in range(80)])
    answer = estimated(site, "--sample", "80")
    assert answer["is_left_exact"]
    assert answer["left"] == 160 - 80
    assert answer["sample"]["classified"] + answer["sample"]["skipped"] == 80
    assert answer["to_classify"] == 80 - answer["sample"]["classified"]
    assert site.results.count_documents({}) == 40 + answer["sample"]["classified"]


def test_sample_of_all_remaining_documents_reports_completion(site: Site) -> None:
    """A second estimate reports that nothing is left."""
    site.source.insert_many([conversation(number) for number in range(7)])
    ended = site.run("estimate")
    assert (ended.code, site.results.count_documents({})) == (0, 7)
    assert "all that was left: 7 documents are done now" in ended.out
    report = estimated(site)
    assert report.pop("not_selected")["done"] == 7
    assert report == {"left": 0, "sample": None, "message": "Nothing is left to classify."}


@pytest.mark.slow
def test_interrupted_sample_keeps_its_results(site: Site) -> None:
    """The message after Ctrl-C has the number of results."""
    assert site.model is not None
    site.model.configure(latency_s=0.2)
    site.source.insert_many([conversation(number) for number in range(100)])
    with site.start("estimate", "--sample", "60", "--max-concurrent", "2") as worker:
        until(lambda: site.results.count_documents({}) >= 3)
        worker.send(signal.SIGINT)
        ended = worker.ended()
    assert ended.code == 130
    kept = site.results.count_documents({})
    assert 3 <= kept < 60
    assert f"Stopped after {kept} of 60 documents of the sample. Their results are kept" in ended.err
    assert site.run().code == 0
    assert site.results.count_documents({}) == 100


def test_documents_leased_by_another_worker_are_not_classified(site: Site) -> None:
    """The report counts them."""
    site.source.insert_many([conversation(number) for number in range(30)])
    leases = site.database.get_collection("conversation_set_leases")
    until_then = datetime.now(UTC) + timedelta(minutes=10)
    leases.insert_many([{"_id": number, "worker": "other", "expires_at": until_then} for number in range(15)])
    answer = estimated(site, "--sample", "30")
    assert answer["sample"]["leased_elsewhere"] == 15
    assert answer["left"] == 15
    assert sorted(result["source_conversation_id"] for result in site.results.find()) == list(range(15, 30))


def test_failed_documents_in_the_sample_exit_with_1(site: Site) -> None:
    """There is an estimate if some failed, and none if all failed."""
    assert site.model is not None
    site.model.configure(faults=[{"kind": "unconstrained"}])
    site.source.insert_many([conversation(number) for number in range(30)])
    answer = estimated(site, "--sample", "10", code=1)
    assert "no estimate" in answer["message"]
    site.model.configure(faults=[{"kind": "unconstrained", "when": {"text": "Case 0001"}}])
    answer = estimated(site, "--sample", "18", code=1)
    assert answer["sample"]["failed"] > 0
    assert answer["in_retry_queue"] >= 10
    assert answer["time"]["expected_s"] > 0


@pytest.mark.thorough
def test_report_names_the_place_of_failed_documents(site: Site) -> None:
    """The quarantine, not the retry queue, for documents that the server refuses."""
    assert site.model is not None
    site.source.insert_many([conversation(number) for number in range(8)])
    site.model.configure(
        faults=[{"kind": "status", "status": 400, "when": {"text": f"Case 0000{number}"}} for number in range(3)]
    )
    ended = site.run("estimate", "--sample", "7")  # two or all of the three
    assert ended.code == 1
    assert re.search(r"([23]) failed, quarantine: \1 \(--retry-failed\)", " ".join(ended.out.split()))
    site.run()
    site.source.insert_one(conversation(3000, "Case 00001"))
    ended = site.run("estimate")
    assert "Only failed documents are left: 0 documents are done now, retry queue: 0, quarantine: 4." in ended.out


@pytest.mark.thorough
def test_estimate_keeps_the_checkpoint_of_an_interrupted_reprocess(site: Site) -> None:
    assert site.model is not None
    site.source.insert_many([conversation(number) for number in range(90)])
    assert site.run("--limit", "60").code == 0
    site.model.configure(latency_s=0.1)
    with site.start("--reprocess", "--batch-size", "5", MAX_CONCURRENT="2") as worker:
        until(lambda: len(site.files("completed/*")) > 6)
        worker.send(signal.SIGINT)
        assert worker.ended().code == 130
    before = (site.directory / "checkpoint.json").read_bytes()
    assert estimated(site, "--sample", "10")["left"] == 20
    assert (site.directory / "checkpoint.json").read_bytes() == before


def test_unreachable_model_server_exits_with_3(site: Site) -> None:
    assert site.model is not None
    site.source.insert_one(conversation(1))
    site.model.stop()
    ended = site.run("estimate")
    assert ended.code == 3
    assert "ollama serve" in ended.err
    assert site.results.count_documents({}) == 0

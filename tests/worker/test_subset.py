"""``--filter``, ``--since`` and ``--until`` select a part of the source, and nothing outside of it is changed or lost."""

from __future__ import annotations

import csv
import importlib.util
import json
from datetime import UTC, datetime
from typing import Any

import pytest
from bson import ObjectId
from pydantic import SecretStr
from pymongo.database import Database

from config import load_settings
from error_handler import ConfigurationError
from mongo_client import DocumentStore
from storage import extended_json
from storage.subset import Subset, parsed_query
from tests.worker.site import Document, Site, check_results, conversation, requests
from utils.batch_file_manager import BatchFiles
from utils.failed_documents import FailedDocument

EMAIL = ("--filter", '{"channel": "email"}')
NOVEMBER = datetime(2026, 11, 1, tzinfo=UTC)


def by_channel(site: Site, count: int, first: int = 0) -> tuple[list[Document], list[Document]]:
    """Store *count* conversations, every second one by phone and by email; return both."""
    documents = [
        conversation(number, channel="email" if number % 2 else "phone", created_at=NOVEMBER)
        for number in range(first, first + count)
    ]
    site.source.insert_many(documents)
    return documents[1::2], documents[::2]


def test_run_plan_estimate_and_doctor_see_the_subset(site: Site) -> None:
    """Each says what is outside; a run without the flags takes the rest, and asks nothing twice."""
    emails, calls = by_channel(site, 20)
    report = json.loads(site.run("--dry-run", *EMAIL).out)
    assert (report["selected"], report["not_selected"]["filtered"]) == (10, 10)
    planned = json.loads(site.run("plan", "--offline", "--json", *EMAIL).out)
    assert (planned["documents"], planned["new"], planned["outside"]) == (10, 10, 10)
    found = site.run("doctor", "--no-probe", *EMAIL).out
    assert "Of 20 pending documents, 10 are in the subset." in found
    estimated = site.run("estimate", "--sample", "2", "--json", *EMAIL, "--until", "2026-11-01")
    assert json.loads(estimated.out)["left"] == 8, estimated.said
    ended = site.run(*EMAIL, "--since", "2026-11-01")
    assert ended.code == 0, ended.err
    assert "10 documents wait outside --filter, --since and --until." in " ".join(ended.out.split())
    check_results(site, emails)
    assert site.source.count_documents({"status": "pending", "channel": "phone"}) == 10
    ended = site.run(*EMAIL, "--until", "2026-10-31")  # nothing is there, which is no failure
    assert (ended.code, requests(site)) == (0, 10)
    assert site.run().code == 0
    check_results(site, [*emails, *calls])
    assert requests(site) == 20


def test_mark_of_a_subset_hides_nothing_from_a_whole_run(site: Site) -> None:
    """An interrupted run of a part has passed documents that it did not look at."""
    emails, calls = by_channel(site, 12)
    assert site.run("--reprocess", *EMAIL).code == 0
    path = site.directory / "checkpoint.json"
    saved = extended_json.loads(path.read_bytes())
    assert (saved["finished"], saved["low_water_mark"]) == (True, 11)
    path.write_bytes(extended_json.dumps(saved | {"finished": False}))
    site.source.update_many({"channel": "phone"}, {"$set": {"status": "processed"}})  # as in a second run of everything
    assert site.run("--reprocess").code == 0
    check_results(site, [*emails, *calls])


def test_retry_files_outside_the_subset_are_left_alone(site: Site) -> None:
    """A run of a part asks the model about no other document, not even one that failed before."""
    emails, calls = by_channel(site, 6)
    failure = FailedDocument(2, "llm_failed", calls[1], 0, "timeout", "late")
    BatchFiles(site.directory).save_failed("retry", 1, [failure])
    site.source.update_one({"_id": 2}, {"$set": {"status": "failed", "status_reason": "timeout"}})
    assert site.run(*EMAIL).code == 1  # the other one is still in the retry queue
    assert [entry["conversation_id"] for entry in site.entries("retry")] == [2]
    assert requests(site) == len(emails)
    assert site.run("--filter", '{"channel": "phone"}').code == 0
    check_results(site, [*emails, *calls])


def test_quarantine_outside_the_subset_is_left_alone(site: Site) -> None:
    """``--retry-failed`` asks only about the quarantined documents of the part."""
    emails, calls = by_channel(site, 2)
    failures = [FailedDocument(one["_id"], "llm_failed", one, 0, "timeout", "late") for one in (*emails, *calls)]
    BatchFiles(site.directory).save_failed("quarantine", 1, failures)
    site.source.update_many({}, {"$set": {"status": "failed", "status_reason": "timeout"}})
    assert site.run(*EMAIL, "--retry-failed").code == 1  # the other one is still in quarantine
    assert [entry["conversation_id"] for entry in site.entries("quarantine")] == [0]
    check_results(site, emails)
    # A failure of another directory is told, although as many documents outside the part are in quarantine here.
    site.source.update_one({"_id": 1}, {"$set": {"status": "failed", "status_reason": "timeout"}})
    for flags in (("--dry-run",), ("--output", "report.json")):
        ended = site.run(*EMAIL, *flags)
        report = ended.out if flags == ("--dry-run",) else (site.folder / "report.json").read_text()
        assert json.loads(report)["not_selected"]["failed"] == 1


@pytest.mark.parametrize(
    ("given", "wrong"),
    [
        ("channel=email", "is not JSON"),
        ("[]", "must be a JSON object"),
        ("{}", "if it is empty"),
        ('{"$where": "sleep(1000)"}', "$where"),
        ('{"$or": [{"$$where": "sleep(1000)"}]}', "$where"),
        ('{"$or": [{"a": 1}, {"$expr": {"$function": {"body": "", "args": [], "lang": "js"}}}]}', "$function"),
        ('{"$expr": {"a": {"$accumulator": {}}}}', "$accumulator"),
        ('{"$text": {"$search": "late"}}', "$text"),
        ('{"at": {"$date": "yesterday"}}', "not Extended JSON"),
        ('{"a":' * 100_000, "nested too deeply"),
    ],
)
def test_unusable_filter_is_named(given: str, wrong: str) -> None:
    """What would run JavaScript, select everything, or is no query."""
    with pytest.raises(ConfigurationError, match=r"^--filter") as refused:
        parsed_query(given, "--filter")
    assert wrong in str(refused.value)


def test_unknown_operator_and_empty_span_end_the_command(site: Site) -> None:
    """MongoDB judges the operators; the message names the flag."""
    ended = site.run("plan", "--offline", "--filter", '{"channel": {"$is": "email"}}')
    assert (ended.code, "--filter is not a query for MongoDB" in ended.err) == (2, True), ended.err
    ended = site.run("--since", "2026-11-02", "--until", "2026-11-01")
    assert (ended.code, "exchange them" in ended.err) == (2, True), ended.err


async def test_time_is_a_date_a_text_or_that_of_an_object_id(mongodb_uri: str, database: Database[Any]) -> None:
    """A document without a readable time is outside."""
    old, new = datetime(2026, 10, 31, 23, 59, tzinfo=UTC), datetime(2026, 11, 1, 12, tzinfo=UTC)
    times = [old, new, "2026-10-31T10:00:00Z", "2026-11-01T09:30:00+01:00", "today", None, 7]
    made = [ObjectId.from_datetime(moment) for moment in (old, new)]
    sources = database["conversation_set"]
    sources.insert_many([conversation(number, created_at=at) for number, at in enumerate(times)])
    sources.insert_many([conversation(9, _id=value) for value in made])
    settings = load_settings(None, mongodb_uri=SecretStr(mongodb_uri), db_name=database.name)

    async def found(**subset: Any) -> list[Any]:
        store = DocumentStore(settings, subset=Subset(**subset))
        try:
            page = await store.read_page("pending", [], [], 100)
            assert await store.count("pending") == len(page)
        finally:
            await store.close()
        return [document["_id"] for document in page]

    assert await found(since=NOVEMBER) == [1, 3]
    assert await found(until=NOVEMBER) == [0, 2]
    assert await found(since=NOVEMBER, until=datetime(2026, 11, 1, 10, tzinfo=UTC)) == [3]
    assert await found(since=NOVEMBER, time_field="_id") == [made[1]]
    assert len(await found()) == len(times) + len(made)


def test_export_follows_the_source(site: Site) -> None:
    """It judges the conversation of a result by its document, and says how many it left out."""
    emails, _ = by_channel(site, 6)
    assert site.run().code == 0
    output = site.folder / "emails.csv"
    ended = site.run("export", "--output", str(output), *EMAIL)
    with output.open(encoding="utf-8-sig", newline="") as rows:
        assert {row["conversation_number"] for row in csv.DictReader(rows)} == {str(one["_id"]) for one in emails}
    assert "3 results left out by --filter" in ended.err


@pytest.mark.thorough
@pytest.mark.skipif(importlib.util.find_spec("scipy") is None, reason="requirements-evaluation.txt is not installed")
def test_evaluate_follows_the_source(site: Site) -> None:
    """Gold conversations outside the part are counted, and not judged."""
    by_channel(site, 6)
    assert site.run().code == 0
    gold = site.folder / "gold.jsonl"
    gold.write_text("".join(json.dumps({"_id": number, "sentiment": "Negative"}) + "\n" for number in range(6)))
    ended = site.run("evaluate", "--gold", str(gold), *EMAIL)
    assert ended.out.startswith("3 conversations with gold labels"), ended.said
    assert "3 conversations are outside --filter" in " ".join(ended.out.split())
    ended = site.run("evaluate", "--gold", "control", "--shares", *EMAIL)
    assert (ended.code, "--shares reads all results" in ended.err) == (2, True)

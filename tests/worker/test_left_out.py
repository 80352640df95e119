"""Documents that a run does not select: counted and named, and the same ones for run, plan, dry run, estimate and doctor."""

from __future__ import annotations

import json
import signal
from typing import Any

import pytest

from tests.worker.site import Site, check_results, conversation, filled, requests, until
from worker.left_out import LeftOut, is_fruitless


def planned(site: Site, **settings: str) -> dict[str, Any]:
    return dict(json.loads(site.run("plan", "--json", **settings).out))


def test_statuses_of_another_program_are_named_by_every_command(site: Site) -> None:
    """Nothing can be selected, which is a problem: exit code 1."""
    assert "No documents found in" in site.run("--dry-run").err
    statuses = ["closed", "closed", "Pending", "", 7]
    site.source.insert_many([conversation(number, status=status) for number, status in enumerate(statuses)])
    ended = site.run()
    assert ended.code == 1
    assert "No document could be selected" in ended.out
    sentence = "5 documents have an unrecognised status and are not selected: closed (2), 7 (1), '' (1), Pending (1)."
    assert sentence in ended.out
    plan = planned(site)
    assert (plan["foreign"], plan["new"]) == (5, 0)
    assert plan["foreign_statuses"] == {"closed": 2, "Pending": 1, "''": 1, "7": 1}
    dry = site.run("--dry-run")
    assert json.loads(dry.out)["selected"] == 0
    assert json.loads(dry.out)["not_selected"]["foreign"] == 5
    assert "closed (2)" in dry.err
    estimate = site.run("estimate")
    assert (estimate.code, "closed (2)" in estimate.out) == (1, True)
    doctor = site.run("doctor", "--no-probe", "--json")
    (finding,) = [row for row in json.loads(doctor.out)["findings"] if "unrecognised" in row["sentence"]]
    assert "closed (2)" in finding["sentence"]
    assert site.results.count_documents({}) == 0


@pytest.mark.thorough
def test_marks_of_another_program_are_named(site: Site) -> None:
    """``processed: true`` without a status, and without a result here."""
    site.source.insert_many(
        [
            {"_id": 1, "messages": conversation(1)["messages"], "processed": True},
            {"_id": 2, "text": "where is my parcel", "processed": True},
        ]
    )
    ended = site.run()
    assert ended.code == 1
    assert "2 documents are marked processed and without a result in sentimental_analysis" in ended.out
    plan = planned(site)
    assert (plan["elsewhere"], plan["new"]) == (2, 0)
    assert site.run("--only", "elsewhere").code == 0
    assert site.results.count_documents({}) == 2
    assert planned(site)["done"] == 2
    assert site.run().code == 0


def test_second_results_collection(site: Site) -> None:
    """Two models are compared: the run names the flag, and the flag fills the second collection."""
    documents = filled(site, 3)
    assert site.run().code == 0
    other = {"MONGODB_RESULTS_COLLECTION": "labels_b"}
    ended = site.run(**other)
    assert ended.code == 1
    assert "3 documents are marked processed and without a result in labels_b" in ended.out
    assert "--only elsewhere" in ended.out
    assert (planned(site, **other)["elsewhere"], planned(site)["elsewhere"]) == (3, 0)
    site.database["labels_b"].insert_one(site.results.find_one({"source_conversation_id": 0}))
    partly = site.run(**other)
    assert partly.code == 0, "one has a result, so documents can be selected here"
    assert "2 documents are marked processed" in partly.out
    assert site.run("--only", "elsewhere", **other).code == 0
    assert site.database["labels_b"].count_documents({}) == 3
    assert planned(site, **other)["done"] == 3
    check_results(site, documents)


def test_new_documents_beside_foreign_ones_end_with_0(site: Site) -> None:
    """The run names the documents that it leaves out; --reprocess leaves them out as well."""
    documents = filled(site, 4)
    foreign = conversation(9, status="archived")
    site.source.insert_one(foreign)
    ended = site.run()
    assert ended.code == 0
    assert "1 document has an unrecognised status and is not selected: archived (1)." in ended.out
    assert site.run("--reprocess").code == 0
    assert site.source.find_one({"_id": 9}) == foreign
    check_results(site, documents)


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([{"who": "guest", "say": "Where is my parcel?"}], "skipped_no_text"),
        pytest.param([{"sender": "agent", "text": "On its way."}], "skipped_no_customer", marks=pytest.mark.thorough),
    ],
)
def test_run_that_skips_all_documents_for_their_shape_ends_with_1(
    site: Site, messages: list[dict[str, str]], reason: str
) -> None:
    """The next run finds none to select, and ends with 1 as well."""
    site.source.insert_many([conversation(number, messages=messages) for number in range(2)])
    ended = site.run()
    assert ended.code == 1
    assert f"2 x {reason}" in ended.out
    assert "All documents were skipped for their shape" in ended.out
    again = site.run()
    assert again.code == 1
    assert "2 documents were skipped by an earlier run" in again.out
    site.source.insert_one(conversation(5))
    assert site.run().code == 0
    assert site.run().code == 0


def test_failed_documents_of_another_directory_are_named(site: Site) -> None:
    """They are in no queue of this directory; plan counts them as failed."""
    filled(site, 3)
    site.source.insert_one(conversation(9, status="failed"))
    ended = site.run()
    assert "1 document has the status failed and is in no queue of this directory. --retry-failed" in ended.out
    assert planned(site)["failed"] == 1
    retried = site.run("--dry-run", "--retry-failed")
    assert json.loads(retried.out)["to_classify"] == 1
    assert site.run("--retry-failed").code == 0
    assert planned(site)["done"] == 4


@pytest.mark.thorough
def test_continuous_run_goes_on_without_documents_to_select(site: Site) -> None:
    """Exit code 1 is for one pass in batch mode: a document that arrives later is classified."""
    site.source.insert_one(conversation(1, status="closed"))
    with site.start("--mode", "continuous", "--poll-interval", "1") as worker:
        until(lambda: "completed" in worker.err_so_far())
        site.source.insert_one(conversation(2))
        until(lambda: site.results.count_documents({}) == 1)
        worker.send(signal.SIGTERM)
        assert worker.ended().code == 130
    assert requests(site) == 1


STATS: dict[str, Any] = {
    **dict.fromkeys(("successful", "failed", "skipped", "already_done", "leased_elsewhere"), 0),
    "reasons": {},
    "not_selected": None,
}
NONE = {"foreign": 0, "statuses": {}, "elsewhere": 0, "failed": 0, "skipped": 0, "done": 0}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, False),
        ({"not_selected": NONE}, False),
        ({"not_selected": NONE | {"foreign": 5}}, True),
        ({"not_selected": NONE | {"foreign": 5, "done": 1}}, False),
        ({"not_selected": NONE | {"foreign": 5}, "leased_elsewhere": 1}, False),
        ({"skipped": 2, "reasons": {"skipped_no_text": 2}, "not_selected": NONE | {"done": 7}}, True),
        ({"skipped": 2, "reasons": {"context_overflow": 1, "skipped_no_text": 1}}, False),
        ({"skipped": 2, "successful": 1, "reasons": {"skipped_no_text": 2}}, False),
    ],
)
def test_fruitless_runs(changes: dict[str, Any], expected: bool) -> None:
    assert is_fruitless(STATS | changes) is expected


def test_sentences_name_the_collection_and_use_the_singular() -> None:
    sentences = [sentence for sentence, _ in LeftOut(1, {"closed": 1}, 1, 1, 1).problems("labels")]
    assert [sentence.split(" and ")[0] for sentence in sentences[:3]] == [
        "1 document has an unrecognised status",
        "1 document is marked processed",
        "1 document has the status failed",
    ]
    assert "labels" in sentences[1]
    many = LeftOut(20, {"closed": 1}).problems("labels")[0][0]
    assert many.endswith("closed (1), and others.")

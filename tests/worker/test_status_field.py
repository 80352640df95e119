"""STATUS_FIELD: a status of another program neither hides a document nor is overwritten."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

import pytest
from pymongo.database import Database

from config import load_settings
from error_handler import ConfigurationError
from mongo_client import DocumentStore
from storage.selection import STATUSES, Selection, State, StateFields
from tests.worker.site import Site, conversation, requests

OWN = "triad_status"
FIELDS = (OWN, f"{OWN}_reason", f"{OWN}_processed_at")
STATE_OF: list[tuple[dict[str, Any], State]] = [
    ({"status": "closed"}, "pending"),
    ({"status": "processed", "processed": True, "status_reason": "x"}, "pending"),
    ({OWN: None}, "pending"),
    ({OWN: "pending", "status": "open"}, "pending"),
    ({OWN: "processing"}, "processing"),
    ({OWN: "processed", "text": "x"}, "processed"),
    ({OWN: "failed", "status": "pending"}, "failed"),
    ({OWN: "skipped"}, "skipped"),
    ({OWN: "closed"}, "foreign"),
    ({OWN: ["vip", "pending"]}, "pending"),
]


def helpdesk(site: Site) -> list[dict[str, Any]]:
    """Fill the collection with conversations and single queries that another program keeps; return them."""
    documents = [
        conversation(1, status="open", status_reason="waits for us", last_processed_at="2026-03-01"),
        conversation(2, status="closed", channel="e-mail", metadata={"priority": "high", "notes": "x" * 500}),
        {"_id": 3, "text": "where is my order", "status": "solved", "processed": True, "created_at": "2026-03-02"},
        {"_id": 4, "text": "where is my parcel", "processed": True, "processing_attempts": 7},
        conversation(5, messages=[{"sender": "agent", "text": "Hello?"}], status="open"),
    ]
    site.source.insert_many(documents)
    return documents


def others(document: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in document.items() if name not in FIELDS}


async def test_queries_aggregation_and_python_agree(mongodb_uri: str, database: Database[dict[str, Any]]) -> None:
    documents = [{"_id": number, **document} for number, (document, _) in enumerate(STATE_OF)]
    database["conversation_set"].insert_many(documents)
    states = StateFields(OWN)
    selected: dict[Selection, set[State]] = {name: {name} for name in ("pending", "failed", "processed", "skipped")}
    selected |= {"sweep": {"pending", "processing"}, "known": set(STATUSES), "foreign": {"foreign"}}
    store = DocumentStore(load_settings(None, mongodb_uri=mongodb_uri, db_name=database.name, status_field=OWN))
    try:
        for selection, wanted in selected.items():
            page = await store.read_page(selection, [], [], 100)
            expected = [number for number, (_, state) in enumerate(STATE_OF) if state in wanted]
            assert [document["_id"] for document in page] == expected, selection
        rows = await store.aggregate("read", [{"$sort": {"_id": 1}}, {"$project": {"state": states.state_expression}}])
    finally:
        await store.close()
    found = [row["state"] if row["state"] in STATUSES else "foreign" for row in rows[:-1]]
    assert found == [state for _, state in STATE_OF[:-1]]
    assert [states.state_of(document) for document, _ in STATE_OF] == [state for _, state in STATE_OF]
    assert not any(states.is_query(document) for document, _ in STATE_OF)


def test_documents_of_a_help_desk_are_classified_and_keep_their_status(site: Site) -> None:
    """Each gets the state of this product in fields of its own; a second run asks nothing."""
    documents = helpdesk(site)
    ended = site.run("--status-field", OWN, RESULT_METADATA="channel,priority,notes")
    assert ended.code == 0, ended.err
    after = list(site.source.find().sort("_id", 1))
    assert [others(document) for document in after] == documents
    assert [document[OWN] for document in after] == ["processed"] * 4 + ["skipped"]
    assert after[4][f"{OWN}_reason"].startswith("skipped_no_customer")
    assert all(isinstance(document[f"{OWN}_processed_at"], datetime) for document in after)
    facts = {result["source_conversation_id"]: result["conversation"] for result in site.results.find()}
    assert (facts[2]["channel"], facts[2]["metadata"]) == ("e-mail", {"priority": "high"})
    assert facts[3]["started_at"] == facts[3]["last_message_at"] == datetime(2026, 3, 2, tzinfo=UTC)
    assert site.results.count_documents({}) == 4
    asked = requests(site)
    assert site.run("--status-field", OWN).code == 0
    assert site.run("--status-field", OWN, "--only", "stale").code == 0
    assert requests(site) == asked
    plan = json.loads(site.run("plan", "--status-field", OWN, "--json").out)
    assert {name: count for name, count in plan.items() if isinstance(count, int) and count} == {
        "documents": 5,
        "done": 4,
        "skipped": 1,
        "model_asked": True,
    }
    assert {index["key"][0][0] for index in site.source.index_information().values()} >= {OWN, f"{OWN}_processed_at"}


def test_results_of_the_default_fields_are_not_asked_for_again(site: Site) -> None:
    """Who changes the setting later pays nothing: documents with a result only get their state."""
    site.source.insert_many([conversation(1), conversation(2, status="closed")])
    assert site.run().code == 0
    before = site.source.find_one({"_id": 1})
    assert requests(site) == 1
    assert site.run(STATUS_FIELD=OWN).code == 0
    after = list(site.source.find().sort("_id", 1))
    assert (requests(site), [document[OWN] for document in after]) == (2, ["processed", "processed"])
    assert others(after[0]) == before


def test_every_report_names_the_setting(site: Site) -> None:
    """A run with nothing to do, plan, the dry run and doctor say how many documents were left aside, why, and what to do."""
    site.source.insert_many([conversation(1, status="open"), conversation(2, status="closed")])
    outputs = {
        "run": site.run(),
        "dry": site.run("--dry-run"),
        "plan": site.run("plan"),
        "doctor": site.run("doctor", "--no-probe"),
    }
    for name, ended in outputs.items():
        shown = " ".join((ended.out + ended.err).split())
        assert "closed (1)" in shown, name
        assert "open (1)" in shown, name
        assert "STATUS_FIELD=triad_status" in shown, name
    assert outputs["run"].code == 1
    again = site.run("doctor", "--no-probe", "--json", STATUS_FIELD=OWN)
    findings = json.loads(again.out)["findings"]
    assert not [row for row in findings if "unrecognised" in row["sentence"]]
    assert [row for row in findings if row["numbers"].get("pending") == 2]


@pytest.mark.parametrize("name", ["", "a.b", "$x", "text", "messages", "processed", "status_reason", "_id"])
def test_unusable_names_are_refused(name: str) -> None:
    with pytest.raises(ConfigurationError, match="STATUS_FIELD"):
        load_settings(None, status_field=name)

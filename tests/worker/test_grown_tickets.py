"""A newer export of the same tickets: its turns are added, and the worker labels what has grown again."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from storage.selection import StateFields
from tests.in_process import run_script
from tests.worker.site import ROOT, Document, Site, check_exactly_once, model_of, requests
from tests.worker.stream_site import following, has_result, until
from utils import mongodb_import

HEADER = "Case number,Role,Body,Created\n"
ROWS = [
    "1,user,Where is parcel 1?,2026-03-02 09:00:00",
    "2,user,Where is parcel 2?,2026-03-02 09:01:00",
    "1,agent,We look.,2026-03-02 10:00:00",
]
LATER = ["1,user,It is broken.,2026-03-04 09:00:00", "3,user,Where is parcel 3?,2026-03-04 09:30:00"]


def imported(site: Site, path: Path, *flags: str, **settings: str) -> subprocess.CompletedProcess[str]:
    script = ROOT / "utils/mongodb_import.py"
    done = run_script(
        mongodb_import.main, script, ["--file", str(path), *flags], site.environment(**settings), site.folder
    )
    assert done.returncode == 0, done.stderr
    return done


def table(site: Site, rows: list[str]) -> Path:
    path = site.folder / "export.csv"
    path.write_text(HEADER + "\n".join(rows))
    return path


def tickets(site: Site, *comments: list[str]) -> Path:
    """Write a Zendesk export: one ticket for each list of texts, by the customer and an agent in turn."""
    records = []
    for number, texts in enumerate(comments, 1):
        said = [
            {
                "id": 10 * number + n,
                "author_id": 7 if n % 2 == 0 else 8,
                "body": text,
                "created_at": f"2026-03-0{n + 1}",
            }
            for n, text in enumerate(texts)
        ]
        records.append({"id": number, "requester_id": 7, "via": {"channel": "web"}, "status": "open", "comments": said})
    path = site.folder / "tickets.jsonl"
    path.write_text("\n".join(map(json.dumps, records)))
    return path


def stored(site: Site) -> list[Document]:
    return list(site.source.find(sort=[("conversation_number", 1)]))


def hashes(site: Site) -> dict[Any, str]:
    return {one["source_conversation_id"]: one["processing_metadata"]["input_sha256"] for one in site.results.find()}


@pytest.mark.parametrize(
    "desk", [pytest.param(False, id="table"), pytest.param(True, id="zendesk", marks=pytest.mark.thorough)]
)
def test_new_turns_are_added_and_only_grown_tickets_are_labelled_again(site: Site, desk: bool) -> None:
    """By number, because the id of a table's conversation comes from its content, or by id."""
    first = tickets(site, ["Where is parcel 1?", "We look."], ["Where is parcel 2?"]) if desk else table(site, ROWS)
    assert "Read 2 documents: 2 new" in imported(site, first).stdout
    assert site.run().code == 0
    labelled, asked, before = hashes(site), requests(site), stored(site)

    texts = ["Where is parcel 1?", "We look.", "It is broken."]
    later = tickets(site, texts, ["Where is parcel 2?"], ["Where is parcel 3?"]) if desk else table(site, ROWS + LATER)
    done = imported(site, later, "--update", "--count", "2")
    assert "Read 2 documents: 0 new, 1 grown (1 turn added), 1 unchanged, in " in done.stdout
    assert done.stderr == ""
    grown, other = stored(site)
    assert other == before[1]
    assert [one["text"] for one in grown["messages"]] == texts
    assert (grown["status"], "status_reason" in grown) == ("pending", False)
    unchanged = {name: value for name, value in before[0].items() if name not in ("messages", "status")}
    assert {name: value for name, value in grown.items() if name in unchanged} == unchanged

    again = imported(site, later, "--update")
    assert "1 new, 0 grown (0 turns added), 2 unchanged" in again.stdout
    assert stored(site)[:2] == [grown, other]

    ended = site.run()
    assert (ended.code, requests(site)) == (0, asked + 2)
    now = hashes(site)
    assert now[grown["_id"]] != labelled[grown["_id"]]
    assert now[other["_id"]] == labelled[other["_id"]]
    check_exactly_once(site, stored(site))
    (earlier,) = site.results.find_one({"source_conversation_id": grown["_id"]})["history"]
    assert earlier["input_sha256"] == labelled[grown["_id"]]
    assert "0 new, 0 grown (0 turns added), 3 unchanged" in imported(site, later, "--update").stdout
    assert site.run().code == 0
    assert requests(site) == asked + 2


@pytest.mark.thorough
@pytest.mark.parametrize("seam", ["asked", "answered", "before_write", "results_written", "marked"])
def test_killed_run_labels_a_grown_ticket_once(site: Site, seam: str) -> None:
    """The answer is in the journal, or already in MongoDB."""
    imported(site, table(site, ROWS))
    assert site.run().code == 0
    imported(site, table(site, ROWS + LATER[:1]), "--update")
    asked = requests(site)
    assert site.run(plan={"seam": seam}).code == -signal.SIGKILL
    assert site.run().code == 0
    assert requests(site) == asked + 1
    check_exactly_once(site, stored(site))
    assert [len(one.get("history", [])) for one in site.results.find(sort=[("conversation_number", 1)])] == [1, 0]


def test_ticket_that_grew_in_the_retry_queue_is_labelled_as_it_is_now(site: Site) -> None:
    """The file of the queue has the text that it had when it failed."""
    imported(site, table(site, ROWS))
    model_of(site).configure(faults=[{"kind": "invalid_json", "when": {"text": "parcel 1"}}])
    assert site.run("--limit", "2").code == 1
    assert len(site.entries("quarantine") + site.entries("retry")) == 1
    model_of(site).configure(faults=[])
    imported(site, table(site, ROWS + LATER[:1]), "--update")
    assert site.run("--retry-failed").code == 0
    check_exactly_once(site, stored(site))


@pytest.mark.thorough
@pytest.mark.parametrize("seam", ["answered", "results_written"])
def test_ticket_that_grew_after_a_kill_is_labelled_as_it_is_now(site: Site, seam: str) -> None:
    """The saved batch has the text, and the journal the answer, of before."""
    imported(site, table(site, ROWS))
    assert site.run(plan={"seam": seam, "passage": 2 if seam == "answered" else 1}).code == -signal.SIGKILL
    imported(site, table(site, ROWS + LATER[:1]), "--update")
    assert site.run().code == 0
    check_exactly_once(site, stored(site))


@pytest.mark.thorough
def test_stream_labels_a_grown_ticket_again(site: Site) -> None:
    imported(site, table(site, ROWS))
    assert site.run().code == 0
    imported(site, table(site, ROWS + LATER[:1]), "--update")
    asked, grown = requests(site), stored(site)[0]["_id"]

    async def follow() -> None:
        async with following(site, run=False):
            await until(lambda: has_result(site, grown, earlier=1))

    asyncio.run(follow())
    assert requests(site) == asked + 1
    check_exactly_once(site, stored(site))


def test_without_the_flag_the_summary_names_it_and_nothing_changes(site: Site) -> None:
    imported(site, table(site, ROWS))
    before = stored(site)
    done = imported(site, table(site, ROWS + LATER[:1]))
    assert "0 new, 2 already there, of which 1 has grown (--update adds 1 new turn), in " in done.stdout
    assert stored(site) == before


def test_state_of_the_product_is_set_where_it_is(site: Site) -> None:
    """With STATUS_FIELD, the status of another program stays; without it, such a document is named."""
    path = site.folder / "a.jsonl"
    turns = [{"sender": "customer", "text": "Where is it?"}, {"sender": "agent", "text": "We look."}]
    path.write_text(json.dumps({"_id": 1, "messages": turns}))
    site.source.insert_one({"_id": 1, "messages": turns[:1], "status": "solved"})
    named = imported(site, path, "--update").stderr
    assert "1 document with new turns and a status of another program, which no run selects;" in named
    site.source.update_one({"_id": 1}, {"$set": {"messages": turns[:1], "triad": "failed", "triad_reason": "timeout"}})
    assert imported(site, path, "--update", STATUS_FIELD="triad").stderr == ""
    document = site.source.find_one({"_id": 1})
    assert (document["status"], document["triad"], "triad_reason" in document) == ("solved", "pending", False)
    assert document["messages"] == turns
    assert StateFields("triad").state_of(document) == "pending"


def test_ticket_of_a_table_is_found_in_an_export_as_json(site: Site) -> None:
    imported(site, table(site, ["1,user,Where is it?,2026-03-01", "1,agent,We look.,2026-03-02"]))
    path = tickets(site, ["Where is it?", "We look.", "It is here."])
    assert "0 new, 1 grown (1 turn added), 0 unchanged" in imported(site, path, "--update").stdout
    assert "0 new, 0 grown (0 turns added), 1 unchanged" in imported(site, path, "--update").stdout
    (ticket,) = stored(site)
    assert str(ticket["_id"]).startswith("sha256-")
    assert [one["text"] for one in ticket["messages"]] == ["Where is it?", "We look.", "It is here."]


def test_newer_lines_of_one_file_are_added_in_turn(site: Site) -> None:
    """An incremental export holds a ticket once for each time it changed."""
    path = tickets(site, ["Where is it?"])
    lines = [path.read_text()]
    for texts in (["Where is it?", "We look."], ["Where is it?", "We look.", "It is here."]):
        lines.append(tickets(site, texts).read_text())
    path.write_text("\n".join(lines))
    assert "Read 3 documents: 1 new, 2 grown (2 turns added), 0 unchanged" in imported(site, path, "--update").stdout
    assert [one["text"] for one in stored(site)[0]["messages"]] == ["Where is it?", "We look.", "It is here."]


@pytest.mark.thorough
def test_turns_that_do_not_fit_into_a_document_are_named(site: Site) -> None:
    """Those of other documents are added all the same."""
    long = "word " * 1_800_000
    imported(site, tickets(site, ["hi"], ["hi"], ["hi"]))
    site.source.update_one({"_id": "zendesk-2"}, {"$push": {"messages": {"sender": "customer", "text": long}}})
    path = tickets(site, ["hi", "ho"], ["hi", f"{long} again"], ["hi", "ho"])
    script, command = ROOT / "utils/mongodb_import.py", ["--file", str(path), "--update"]
    done = run_script(mongodb_import.main, script, command, site.environment(), site.folder)
    assert done.returncode == 2
    assert "The new turns of document 2 cannot be stored in MongoDB (too large," in done.stderr
    assert [len(one["messages"]) for one in stored(site)] == [2, 2, 2]
    assert "word" not in done.stderr


def test_ticket_of_another_shop_with_the_same_number_is_a_new_one(site: Site) -> None:
    imported(site, table(site, ROWS))
    site.source.insert_one({"_id": 1, "conversation_number": ["1", "2"], "messages": []})  # $in finds lists, too
    other = [row.replace("parcel", "order") for row in ROWS]
    assert "2 new, 0 grown" in imported(site, table(site, other), "--update").stdout
    assert site.source.count_documents({}) == 5


def test_ticket_that_a_worker_has_in_work_is_named(site: Site) -> None:
    imported(site, table(site, ROWS))
    document = stored(site)[0]
    site.database["conversation_set_leases"].insert_one(
        {"_id": document["_id"], "worker": "other", "expires_at": datetime.now(UTC) + timedelta(minutes=1)}
    )
    done = imported(site, table(site, ROWS + LATER[:1]), "--update")
    assert "1 document that a worker had in work: the worker may label the text that it has read" in done.stderr
    assert len(stored(site)[0]["messages"]) == 3

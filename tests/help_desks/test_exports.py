"""Exports of help desks, hand-made in the shapes that docs/import.md names, become conversations."""

from __future__ import annotations

import gzip
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from aggregator import aggregate_conversation
from error_handler import ConfigurationError
from help_desks.columns import Options, parsed_maps
from help_desks.reader import Export

EXPORTS = Path(__file__).parent / "exports"


def read(path: Path, **options: Any) -> tuple[list[dict[str, Any]], list[str]]:
    """Return the documents of *path* and the notes about it."""
    maps = parsed_maps(options.pop("maps", ()))
    export = Export(path, Options(maps=maps, **options))
    return list(export.documents()), export.findings.note_lines()


def transcript(document: dict[str, Any]) -> list[str]:
    return aggregate_conversation(document).transcript.splitlines()


EXPECTED: dict[str, list[Any]] = {
    "zendesk.jsonl": [
        (
            "zendesk-35436",
            "email",
            "solved",
            ["Customer: My parcel should have arrived on Monday.", "Agent: It arrives tomorrow."],
        ),
        ("zendesk-35437", "web", "open", ["Customer: You charged my card twice.", "Agent: We refund one payment."]),
        ("zendesk-35438", "api", "closed", ["Customer: How do I change my address?"]),
    ],
    "zendesk_page.json": [
        (
            *("zendesk-1", "email", "pending"),
            [
                "Customer: Where is my order?",
                "Customer: I am his wife, please answer me as well.",
                "Agent: It is on its way.",
            ],
        )
    ],
    "zendesk_account.jsonl": [
        (
            *("zendesk-501", "email", "closed"),
            [
                "Customer: My parcel should have arrived on Monday.",
                "Agent: Your request was received.",
                "Agent: It arrives tomorrow.",
            ],
        ),
        (
            *("zendesk-502", "web", "open"),
            ["Customer: Please refund me.", "Agent: This ticket was merged.", "Agent: We refund one payment."],
        ),
        ("zendesk-503", "web", "open", ["Customer: When do you call?"]),
    ],
    "intercom_parts.jsonl": [
        (
            *("intercom-301", "conversation", None),
            [
                "Customer: Where is my parcel?",
                "Agent: We look.",
                "    Best, Kim",
                "Customer: Thanks",
                "Agent: It is there, I close this.",
            ],
        ),
        ("intercom-302", None, None, ["Customer: I want my money back."]),
    ],
    "freshdesk_account.json": [
        (
            *("freshdesk-31", "Email", "Closed"),
            ["Customer: My parcel is late.", "Agent: Please send the number.", "Customer: It is 4711."],
        ),
        (
            *("freshdesk-32", "Portal", "Open"),
            ["Customer: Please refund me.", "Agent: We do.", "Customer: Thank you."],
        ),
    ],
    "chatwoot_account.json": [
        (
            *("chatwoot-40", "Channel::Email", "resolved"),
            ["Customer: Where is my parcel?", "Agent: We look.", "Agent: Please rate us"],
        )
    ],
    "intercom.csv": [
        (
            *("intercom-147", None, None),
            ["Customer: Where is my parcel?", "Agent: We send a new one, it arrives on Friday."],
        ),
        ("intercom-148", None, None, ["Customer: I want my money back."]),
    ],
    "freshdesk.json": [
        (
            *("freshdesk-20", "Email", "Closed"),
            ["Customer: My parcel is late.", "Agent: Please send the number.", "Customer: It is 4711."],
        ),
        ("freshdesk-21", "Outbound Email", "Open", ["Agent: Your invoice is due.", "Customer: I paid it."]),
    ],
    "freshdesk.csv": [
        ("freshdesk-20", "Email", "Closed", ["Customer: Parcel is late"]),
        ("freshdesk-21", "Portal", "Open", ["Customer: Refund for order 4711"]),
    ],
    "chatwoot.json": [
        (
            *("chatwoot-10", "Channel::WebWidget", "resolved"),
            ["Customer: Where is my parcel?", "Agent: We send a new one.", "Agent: Rate us!"],
        )
    ],
    "chatwoot_messages.jsonl": [
        ("chatwoot-10", None, None, ["Customer: Where is my parcel?", "Agent: We send a new one."]),
        ("chatwoot-11", None, None, ["Customer: I want my money back."]),
    ],
}


@pytest.mark.parametrize("name", EXPECTED)
def test_export_becomes_conversations_with_channel_and_status(name: str) -> None:
    documents, _ = read(EXPORTS / name)
    for document, (document_id, channel, status, turns) in zip(documents, EXPECTED[name], strict=True):
        assert document["_id"] == document_id
        assert document.get("channel") == channel
        assert document["metadata"].get("status") == status
        assert document["status"] == "pending"
        assert transcript(document) == turns
        assert isinstance(document["created_at"], datetime)


ACCOUNTS = ["zendesk_account.jsonl", "freshdesk_account.json", "intercom_parts.jsonl", "chatwoot_account.json"]


@pytest.mark.parametrize("name", ACCOUNTS)
def test_private_notes_deleted_messages_and_events_are_nowhere_in_the_document(name: str) -> None:
    """Neither as a turn nor in the metadata; the description of a ticket can repeat a private note."""
    documents, notes = read(EXPORTS / name)
    assert "SECRET" in (EXPORTS / name).read_text()
    assert "SECRET" not in str(documents)
    assert "This message was deleted" not in str(documents)
    assert any("private note" in note for note in notes)


@pytest.mark.parametrize("name", ACCOUNTS)
def test_private_notes_of_an_account_export_are_the_agents(name: str) -> None:
    for document in read(EXPORTS / name, private_notes=True)[0]:
        for turn in aggregate_conversation(document).turns:
            assert turn.sender == "agent" or "SECRET" not in turn.text


def test_deleted_message_of_chatwoot_is_left_out_of_lists_of_messages(tmp_path: Path) -> None:
    row = {"conversation_id": 10, "message_type": 0, "content": "hi"}
    gone = {**row, "content": "This message was deleted", "content_attributes": {"deleted": True}}
    (document,), notes = read(write(tmp_path / "a.jsonl", f"{json.dumps(row)}\n{json.dumps(gone)}"))
    assert transcript(document) == ["Customer: hi"]
    assert notes == ["1 message left out: deleted (line 2)"]


@pytest.mark.parametrize(
    "name",
    ["zendesk.jsonl", "intercom.csv", "intercom.json", "freshdesk.json", "chatwoot.json", "chatwoot_messages.jsonl"],
)
def test_compressed_export_gives_the_same_documents(name: str, tmp_path: Path) -> None:
    path = tmp_path / f"{name}.gz"
    path.write_bytes(gzip.compress((EXPORTS / name).read_bytes()))
    assert read(path)[0] == read(EXPORTS / name)[0]


def test_zendesk_table_has_a_ticket_in_each_row() -> None:
    documents, notes = read(EXPORTS / "zendesk_tickets.csv")
    assert documents[0] == {
        "_id": "zendesk-1001",
        "conversation_number": "1001",
        "messages": [
            {
                "sender": "customer",
                "timestamp": "2026-03-02 09:14:05",
                "text": "Hello,\n\nmy parcel should have arrived on Monday. Where is it?",
            }
        ],
        "status": "pending",
        "channel": "Mail",
        "subject": "Parcel is late",
        "created_at": datetime(2026, 3, 2, 9, 14, 5, tzinfo=UTC),
        "metadata": {
            "requester": "Ann Example",
            "requester_email": "ann@example.com",
            "status": "Solved",
            "priority": "High",
            "tags": "delivery late",
            "updated_at": "2026-03-03 16:20:11",
            "satisfaction_score": "Good",
        },
    }
    assert transcript(documents[2]) == ["Customer: How do I change my address?"]
    assert notes == ["1 conversation without a text; the subject is the text (line 6)"]


def test_intercom_conversation_keeps_html_and_names_what_is_left_out() -> None:
    documents, notes = read(EXPORTS / "intercom.json")
    sent = [(each["sender"], each["text"]) for each in documents[0]["messages"]]
    assert sent == [
        ("user", "<p>Where is my parcel?</p>"),
        ("bot", "<p>Hi, I am the bot. What is your order number?</p>"),
        ("admin", "<p>We send a new one.</p>"),
    ]
    assert [turn.sender for turn in aggregate_conversation(documents[0]).turns] == ["customer", "agent", "agent"]
    assert documents[0]["messages"][0]["timestamp"] == 1772442845
    assert documents[0]["created_at"] == datetime(2026, 3, 2, 9, 14, 5, tzinfo=UTC)
    assert documents[0]["metadata"]["state"] == "closed"
    assert documents[1]["channel"] == "email"
    assert sorted(notes) == [
        "1 event left out: no text, such as an assignment (line 1, conversations 1)",
        "1 private note left out; --private-notes imports private notes as turns of the agent (line 1, conversations 1)",
    ]


def test_private_notes_are_turns_of_the_agent_on_request() -> None:
    for name in ("zendesk.jsonl", "intercom.json", "intercom.csv", "freshdesk.json", "chatwoot.json"):
        (document, *_), _ = read(EXPORTS / name)
        (with_notes, *_), _ = read(EXPORTS / name, private_notes=True)
        more = aggregate_conversation(with_notes).turns
        assert len(more) == len(aggregate_conversation(document).turns) + 1, name
        assert sum(turn.sender == "agent" for turn in more) > 1, name


def test_truncated_intercom_conversation_is_named(tmp_path: Path) -> None:
    record = json.loads((EXPORTS / "intercom.json").read_text())["conversations"][0]
    record["conversation_parts"]["total_count"] = 700
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(record))
    assert "1 conversation with fewer parts than total_count; Intercom exports 500 (line 1)" in read(path)[1]


# Every other file


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_columns_are_mapped_by_flags_and_the_rest_becomes_metadata(tmp_path: Path) -> None:
    path = write(
        tmp_path / "a.csv", "Case,When,Who,Words,Store\n7,2026-03-02,punter,hi,Oslo\n7,2026-03-03,shop,hello,Oslo\n"
    )
    maps = ["text=Words", "created_at=when", "conversation_number=Case", "sender=Who"]
    (document,), notes = read(path, maps=maps, customer_roles=frozenset({"punter"}))
    assert document["messages"] == [
        {"sender": "customer", "timestamp": "2026-03-02", "text": "hi"},
        {"sender": "shop", "timestamp": "2026-03-03", "text": "hello"},
    ]
    assert document["metadata"] == {"store": "Oslo"}
    assert notes == ["1 row with a sender that is not recognised; --customer-role NAME makes NAME a customer (line 3)"]


def test_rows_of_a_ticket_are_joined_in_the_order_of_time(tmp_path: Path) -> None:
    rows = ["8,agent,1772443100,later,open", "9,user,1772443000,other,new", "8,visitor,1772442845000,first,open"]
    path = write(tmp_path / "a.csv", "ticket_id,role,sent_at,body,state\n" + "\n".join(rows))
    first, second = read(path)[0]
    assert transcript(first) == ["Customer: first", "Agent: later"]
    assert first["created_at"] == datetime(2026, 3, 2, 9, 14, 5, tzinfo=UTC)
    assert first["metadata"] == {"state": "open"}
    assert second["conversation_number"] == "9"


def test_values_that_differ_between_rows_stay_with_their_message(tmp_path: Path) -> None:
    path = write(
        tmp_path / "a.csv", "ticket_id,role,body,agent_name,plan\n8,user,hi,,pro\n8,agent,ho,Kim,pro\n8,agent,hu,Lee,\n"
    )
    (document,), _ = read(path)
    assert document["metadata"] == {"plan": "pro"}
    assert [each.get("metadata") for each in document["messages"]] == [
        None,
        {"agent_name": "Kim"},
        {"agent_name": "Lee"},
    ]


def test_json_fields_are_mapped_with_dots_through_lists(tmp_path: Path) -> None:
    record = {
        "case": {"no": 5, "lang": "en"},
        "thread": [
            {"by": {"kind": "requester"}, "body": {"raw": "hi"}, "at": 1772442845},
            {"by": {"kind": "agent"}, "body": {"raw": "ho"}, "at": 1772442945},
        ],
    }
    maps = ["text=thread.body.raw", "sender=thread.by.kind", "created_at=thread.at", "conversation_number=case.no"]
    (document,), _ = read(write(tmp_path / "a.jsonl", json.dumps(record)), maps=maps)
    assert transcript(document) == ["Customer: hi", "Agent: ho"]
    assert document["conversation_number"] == "5"
    assert document["metadata"] == {"case": {"lang": "en"}}


def test_senders_that_are_objects_are_read(tmp_path: Path) -> None:
    rows = [
        {"ticket_id": 1, "body": "hi", "author": {"type": "end-user"}},
        {"ticket_id": 1, "body": "ho", "author": {"type": "bot"}},
    ]
    path = write(tmp_path / "a.json", json.dumps(rows))
    assert transcript(read(path)[0][0]) == ["Customer: hi", "Agent: ho"]


def test_text_without_a_sender_is_the_customers(tmp_path: Path) -> None:
    (document,), _ = read(write(tmp_path / "a.csv", "ticket_id,message\n1,hi\n"))
    assert transcript(document) == ["Customer: hi"]
    (query,), _ = read(write(tmp_path / "b.csv", "Feedback,Created,Status\nhi,2026-03-02,closed\n"))
    assert query == {
        "text": "hi",
        "metadata": {"status": "closed"},
        "processed": False,
        "processing_attempts": 0,
        "created_at": datetime(2026, 3, 2, tzinfo=UTC),
    }


@pytest.mark.parametrize("column", ["incoming", "direction"])
def test_direction_names_the_side(tmp_path: Path, column: str) -> None:
    values = ("1", "0") if column == "incoming" else ("inbound", "outbound")
    path = write(tmp_path / "a.csv", f"ticket_id,{column},message\n1,{values[0]},hi\n1,{values[1]},ho\n")
    assert transcript(read(path)[0][0]) == ["Customer: hi", "Agent: ho"]


def test_row_without_a_number_is_named_by_its_line(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", 'ticket_id,message\n1,"a\nb"\n,lost\n,"lost\nas well"\n2,c\n')
    documents, notes = read(path)
    assert len(documents) == 2
    assert notes == ["2 rows left out: no value in the column ticket_id (line 4, line 5)"]


def test_dropped_columns_are_nowhere_in_the_documents(tmp_path: Path) -> None:
    text = "ticket_id,message,Customer e-mail\n1,hi,ann@example.com\n"
    documents, _ = read(write(tmp_path / "a.csv", text), dropped=["customer e-mail"])
    assert "ann@example.com" not in str(documents)
    with pytest.raises(
        ConfigurationError, match="there is no column E-mail; the columns are ticket_id, message, Customer e-mail"
    ):
        read(tmp_path / "a.csv", dropped=["E-mail"])
    documents, notes = read(
        EXPORTS / "intercom.json", dropped=["source.author.email", "conversation_parts.conversation_parts.id", "x"]
    )
    assert "ann@example.com" not in str(documents)
    assert "assignment" not in str(documents)
    assert "1 --drop-column found no x" in notes


@pytest.mark.parametrize(
    ("maps", "expected"),
    [
        (["words=Body"], "expected FIELD=COLUMN with a FIELD of text, sender,"),
        (["text"], "expected FIELD=COLUMN"),
        (["text=Boddy"], "there is no column Boddy; the columns are ticket_id, Body"),
    ],
)
def test_wrong_map_is_named_with_what_there_is(tmp_path: Path, maps: list[str], expected: str) -> None:
    with pytest.raises(ConfigurationError, match=expected):
        read(write(tmp_path / "a.csv", "ticket_id,Body\n1,hi\n"), maps=maps)


def test_an_empty_map_leaves_a_field_out(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "ticket_id,message,via\n1,hi,phone\n")
    (document,), _ = read(path, maps=["channel="])
    assert "channel" not in document
    assert document["metadata"] == {"via": "phone"}


def test_json_messages_of_one_conversation_are_joined(tmp_path: Path) -> None:
    rows = [{"conversation_id": 1, "role": role, "text": text} for role, text in (("user", "hi"), ("assistant", "ho"))]
    (document,), _ = read(write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, rows))))
    assert transcript(document) == ["Customer: hi", "Agent: ho"]


def test_map_wins_over_the_shape_of_a_help_desk() -> None:
    documents, _ = read(
        EXPORTS / "zendesk.jsonl", maps=["text=raw_subject", "conversation_number=id"], layout="zendesk"
    )
    assert [document["messages"][0]["text"] for document in documents] == ["Parcel is late", "Charged twice", "Address"]


def test_table_format_does_not_fit_json() -> None:
    with pytest.raises(ConfigurationError, match="--format twcs is a table, and this is JSON"):
        read(EXPORTS / "zendesk.jsonl", layout="twcs")


def test_record_of_another_shape_is_named(tmp_path: Path) -> None:
    lines = (EXPORTS / "zendesk.jsonl").read_text().splitlines()
    documents, notes = read(write(tmp_path / "a.jsonl", "\n".join([lines[2], "[1]", '{"id": 5}'])))
    assert len(documents) == 1
    assert notes == [
        "1 record left out: no conversation of zendesk (line 2)",
        "1 conversation left out: neither a message nor a subject (line 3)",
    ]

"""Files that people really have: other encodings, nested JSON, missing values, two columns for one time."""

from __future__ import annotations

import codecs
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from error_handler import ConfigurationError
from tests.help_desks.test_exports import read, transcript
from tests.help_desks.test_exports import write as written


def write(path: Path, records: Any) -> Path:
    return written(path, json.dumps(records))


@pytest.mark.parametrize("byte_order", ["le", "be"])
@pytest.mark.parametrize("encoding", ["utf-16", "utf-32"])
@pytest.mark.parametrize("has_mark", [True, False], ids=["mark", "no mark"])
def test_named_encoding_reads_files_with_and_without_a_byte_order_mark(
    tmp_path: Path, encoding: str, byte_order: str, has_mark: bool
) -> None:
    codec = f"{encoding}-{byte_order}"
    mark = "\ufeff".encode(codec) if has_mark else b""
    path = tmp_path / "a.csv"
    path.write_bytes(mark + "id;text\n1;Größe\n".encode(codec))
    (document,), _ = read(path, encoding=encoding if has_mark else codec)
    assert document["text"] == "Größe"


@pytest.mark.parametrize("content", ['[{"text": "Größe"}]', '{"text": "Größe"}\n{"text": "b"}\n'])
def test_named_encoding_counts_for_json(tmp_path: Path, content: str) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(content.encode("cp1252"))
    documents, _ = read(path, encoding="cp1252")
    assert documents[0]["text"] == "Größe"
    with pytest.raises(ConfigurationError, match=r"line 1: expected UTF-8; .* or name its encoding with --encoding"):
        read(path)


def test_wrong_encoding_is_named_with_the_line(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b"text\nok\n\x81\n")
    with pytest.raises(ConfigurationError, match="line 3: expected cp1252"):
        read(path, encoding="cp1252")
    with pytest.raises(ConfigurationError, match="--encoding hex is unknown"):
        read(path, encoding="hex")


def test_vertical_tab_of_filemaker_ends_no_row(tmp_path: Path) -> None:
    (document,), _ = read(written(tmp_path / "a.tab", "case id\tsender\tmessage\r1\tcustomer\ta\x0bb\r1\tagent\tc\r"))
    assert transcript(document) == ["Customer: a", "    b", "Agent: c"]


def test_old_workbook_and_empty_file_are_named(tmp_path: Path) -> None:
    path = tmp_path / "a.xls"
    path.write_bytes(bytes.fromhex("d0cf11e0a1b11ae1") + bytes(range(256)))
    with pytest.raises(ConfigurationError, match="is an Excel workbook; save the sheet as CSV"):
        read(path)
    path.write_bytes(codecs.BOM_UTF8)
    with pytest.raises(ConfigurationError, match="line 1: the file is empty"):
        read(path)


def test_dropped_column_of_tweets_is_nowhere_in_the_documents(tmp_path: Path) -> None:
    text = "tweet_id,author_id,inbound,created_at,text,in_response_to_tweet_id,email\n1,ann,True,,hi,,ann@example.com\n"
    (document,), _ = read(written(tmp_path / "a.csv", text), dropped=["E-mail", "author_id"])
    assert "ann" not in str(document)
    assert transcript(document) == ["Customer: hi"]
    with pytest.raises(ConfigurationError, match="there is no column mail"):
        read(tmp_path / "a.csv", dropped=["mail"])


def test_messages_are_found_in_a_list_at_any_depth(tmp_path: Path) -> None:
    """Help Scout has them in ``_embedded.threads``."""
    threads = [{"body": "hi", "by": {"type": "customer"}}, {"body": "ho", "by": {"type": "agent"}}]
    records = [
        {"id": 1, "_embedded": {"threads": threads, "page": 1}, "subject": "Late"},
        {"id": 2, "_embedded": {"threads": []}, "subject": "Lost parcel"},
    ]
    maps = ["text=_embedded.threads.body", "sender=_embedded.threads.by.type", "conversation_number=id"]
    documents, notes = read(write(tmp_path / "a.json", records), maps=maps)
    assert list(map(transcript, documents)) == [["Customer: hi", "Agent: ho"], ["Customer: Lost parcel"]]
    assert documents[0]["metadata"] == {"embedded": {"page": 1}}
    assert notes == ["1 conversation without a text; the subject is the text (element 2)"]


def test_dates_behind_a_path_decide_about_day_and_month(tmp_path: Path) -> None:
    records = [
        {"id": number, "thread": [{"body": "hi", "at": f"{day}/04/2026"}]} for number, day in enumerate(("03", "13"))
    ]
    maps = ["text=thread.body", "created_at=thread.at", "conversation_number=id"]
    documents, notes = read(write(tmp_path / "a.json", records), maps=maps)
    assert [document["created_at"] for document in documents] == [
        datetime(2026, 4, 3, tzinfo=UTC),
        datetime(2026, 4, 13, tzinfo=UTC),
    ]
    assert notes == []


def test_date_and_time_of_two_columns_are_one_time(tmp_path: Path) -> None:
    rows = ["1,02.03.2026,10:05,agent,second", "1,02.03.2026,10:00,customer,first", "2,02.03.2026,n/a,customer,third"]
    (one, other), _ = read(written(tmp_path / "a.csv", "\n".join(["chat id,date,time,sender,message", *rows])))
    assert transcript(one) == ["Customer: first", "Agent: second"]
    assert one["created_at"] == datetime(2026, 3, 2, 10, tzinfo=UTC)
    assert other["created_at"] == datetime(2026, 3, 2, tzinfo=UTC)
    assert other["metadata"] == {"time": "n/a"}


@pytest.mark.parametrize("field", ["sender", "speaker", "from"])
def test_customer_role_counts_for_every_field_of_senders(tmp_path: Path, field: str) -> None:
    said = [{field: "Käufer ", "text": "hi"}, {field: "agent", "text": "ho"}, {field: "Bote", "text": "da"}]
    (document,), _ = read(write(tmp_path / "a.json", {"messages": said}), customer_roles=frozenset({"käufer"}))
    assert transcript(document) == ["Customer: hi", "Agent: ho", "Unknown: da"]


def test_order_of_dates_counts_for_messages_in_json(tmp_path: Path) -> None:
    said = [
        {"role": "agent", "text": "ho", "date": "04/03/2026", "time": "10:00"},
        {"role": "user", "text": "hi", "date": "03/03/2026"},
    ]
    (document,), _ = read(write(tmp_path / "a.json", {"messages": said}), is_day_first=True)
    assert transcript(document) == ["Customer: hi", "Agent: ho"]
    assert document["messages"][0]["date"] == datetime(2026, 3, 4, 10, tzinfo=UTC)


def test_rows_without_a_number_are_not_joined_under_the_name_of_a_missing_value(tmp_path: Path) -> None:
    names = ["NULL", "\\N", "nan", "None", "<NA>", " "]
    rows = [f"{name},customer,hi" for name in ["7", *names]]
    (document,), notes = read(written(tmp_path / "a.csv", "\n".join(["ticket_id,sender,message", *rows])))
    assert document["conversation_number"] == "7"
    assert notes == ["6 rows left out: no value in the column ticket_id (line 3, line 4, line 5, line 6, line 7, ...)"]


def test_subject_and_channel_of_later_rows_stay_with_their_messages(tmp_path: Path) -> None:
    rows = ["7,Late,mail,a,x", "7,Re: Late,mail,b,y", "7,Late,chat,c,z"]
    (document,), _ = read(written(tmp_path / "a.csv", "\n".join(["ticket_id,subject,channel,text,created", *rows])))
    assert (document["subject"], document["channel"]) == ("Late", "mail")
    kept = [message.get("metadata") for message in document["messages"]]
    assert kept == [None, {"subject": "Re: Late"}, {"channel": "chat"}]


def test_missing_values_of_pandas_are_missing(tmp_path: Path) -> None:
    nan = float("nan")
    records = [
        {"ticket_id": 1, "message": "hi", "created_at": nan, "sender": "customer"},
        {"ticket_id": 1, "message": nan, "created_at": nan, "sender": "customer"},
        {"ticket_id": nan, "message": "of nobody", "created_at": nan, "sender": "customer"},
    ]
    documents, notes = read(write(tmp_path / "a.json", records))
    assert list(map(transcript, documents)) == [["Customer: hi"]]
    assert notes == ["1 row left out: no value in the column ticket_id (element 3)"]


@pytest.mark.parametrize("text", [{"type": "text", "body": "hi"}, ["hi"], [{"text": "hi"}]])
def test_text_inside_an_object_or_a_list_is_no_python_code(tmp_path: Path, text: Any) -> None:
    (document,), _ = read(write(tmp_path / "a.json", [{"ticket_id": 1, "role": "user", "message": text}]))
    assert transcript(document) == ["Customer: hi"]


@pytest.mark.parametrize(
    "record", [{"ticket_id": "a\ud800", "sender": "user", "body": "b"}, {"id": "\ud800", "query": "q"}]
)
def test_id_that_cannot_be_stored_is_an_error(tmp_path: Path, record: dict[str, str]) -> None:
    with pytest.raises(ConfigurationError, match="an id contains half of a surrogate pair"):
        read(write(tmp_path / "a.json", [record]))


def test_html_of_a_private_zendesk_comment_is_no_turn_of_the_customer(tmp_path: Path) -> None:
    note = {"plain_body": "a&nbsp;vip\n \n", "html_body": "<p>a vip</p>", "public": False, "author_id": 2}
    for description in ("<p>a vip</p>", "a vip"):
        ticket = {"id": 1, "subject": "Late", "description": description, "requester_id": 4, "comments": [note]}
        (document,), _ = read(write(tmp_path / "a.json", ticket))
        assert "vip" not in str(document)


def test_entities_in_the_plain_body_of_zendesk_are_characters(tmp_path: Path) -> None:
    comment = {"plain_body": "I&#39;m late&nbsp;&amp; <b>cold</b>", "html_body": "<p>&lt;b&gt;</p>", "author_id": 4}
    only_html = {"html_body": "<p>a &lt;b&gt; c</p>", "author_id": 4}
    ticket = {"id": 1, "requester_id": 4, "comments": [comment, only_html]}
    (document,), _ = read(write(tmp_path / "a.json", ticket))
    assert transcript(document) == ["Customer: I'm late & <b>cold</b>", "Customer: a <b> c"]


@pytest.mark.parametrize("value", ["Internal note", "private_comment", "note_and_close", "Internal", "1.0", "WAHR"])
def test_private_notes_in_a_table_are_recognised_by_their_first_word(tmp_path: Path, value: str) -> None:
    rows = f"ticket_id,sender,message,visibility\n1,customer,hi,public\n1,agent,vip,{value}\n"
    (document,), _ = read(written(tmp_path / "a.csv", rows), maps=["private=visibility"])
    assert transcript(document) == ["Customer: hi"]
    (document,), notes = read(written(tmp_path / "a.csv", rows.replace(value, "staff")), maps=["private=visibility"])
    assert transcript(document) == ["Customer: hi", "Agent: vip"]
    assert notes == ["1 message of which it is not clear whether it is a private note; imported as a turn (line 3)"]


def test_users_beside_a_single_zendesk_ticket_give_the_roles(tmp_path: Path) -> None:
    comments = [{"body": "hi", "author_id": 4}, {"body": "me too", "author_id": 5}, {"body": "ho", "author_id": 6}]
    users = [{"id": 5, "role": "end-user", "email": "bob@example.com"}, {"id": 6, "role": "agent"}]
    page = {"ticket": {"id": 1, "requester_id": 4, "comments": comments}, "users": users}
    (document,), _ = read(write(tmp_path / "a.json", page))
    assert transcript(document) == ["Customer: hi", "Customer: me too", "Agent: ho"]
    assert "bob@example.com" not in str(document)

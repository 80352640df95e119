"""Files of every accepted kind become documents; what is wrong in one is named by its line, never quoted."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from bson import Int64, ObjectId

from aggregator import aggregate_conversation
from error_handler import ConfigurationError
from help_desks import files as document_files
from help_desks.reader import read_documents

Write = Callable[..., Path]
SAMPLES = Path(__file__).parents[2] / "data" / "sample_conversations.jsonl"
SECRET = "my card is 4242"
TWCS_HEADER = "tweet_id,author_id,inbound,created_at,text,response_tweet_id,in_response_to_tweet_id"

# As the data set has it: an answer has a smaller id than what it answers, and comes before it.
TWCS = f"""{TWCS_HEADER}
1,Shop,False,Tue Oct 31 22:10:47 +0000 2017,@9 Which one?,2,3
2,9,True,Tue Oct 31 22:11:45 +0000 2017,@Shop The blue one,,1
3,9,True,Tue Oct 31 22:08:27 +0000 2017,"@Shop my ""parcel"" is late,
again",1,
5,Shop,False,Tue Oct 31 21:00:00 +0000 2017,Sale today!,6,
6,7,True,Tue Oct 31 21:05:00 +0000 2017,@Shop nice,,5
8,Shop,False,Tue Oct 31 20:01:00 +0000 2017,@4 Sorry,,9
9,4,True,Tue Oct 31 20:00:00 +0000 2017,@Shop broken,"8,10",400
10,4,True,Tue Oct 31 20:02:00 +0000 2017,@Shop hello?,,9
"""


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write_file(name: str, content: str | bytes) -> Path:
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write_file


def message(number: str, text: str = "hello") -> dict[str, Any]:
    return {"conversation_number": number, "messages": [{"sender": "customer", "text": text}]}


def error_of(path: Path) -> str:
    with pytest.raises(ConfigurationError) as caught:
        list(read_documents(path))
    sentence = str(caught.value)
    assert str(path) in sentence
    assert SECRET not in sentence
    return sentence


# JSON and JSONL


def test_samples_are_read_as_they_are_shipped() -> None:
    documents = list(read_documents(SAMPLES))
    assert len(documents) == 96
    assert all("_id" in document for document in documents)
    assert all(document.get("status") == "pending" or document.get("processed") is False for document in documents)


@pytest.mark.parametrize("line_end", ["\n", "\r\n"], ids=["lf", "crlf"])
@pytest.mark.parametrize("bom", ["", "\ufeff"], ids=["plain", "bom"])
def test_jsonl_with_blank_lines_and_any_line_end(write: Write, bom: str, line_end: str) -> None:
    lines = ["", json.dumps(message("1")), "", json.dumps(message("2")), ""]
    path = write("a.jsonl", bom + line_end.join(lines))
    assert [document["conversation_number"] for document in read_documents(path)] == ["1", "2"]


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(json.dumps([message("1"), message("2")]), id="array on one line"),
        pytest.param("\ufeff\n" + json.dumps([message("1"), message("2")], indent=2), id="indented array, bom"),
        pytest.param(f"[{json.dumps(message('1'))},\n{json.dumps(message('2'))}]\n", id="mongoexport --jsonArray"),
        pytest.param(f"{json.dumps(message('1'))}\n{json.dumps(message('2'))}\n", id="mongoexport"),
    ],
)
@pytest.mark.parametrize("name", ["a.json", "a.export"])
def test_json_of_every_layout(write: Write, name: str, content: str) -> None:
    assert [document["conversation_number"] for document in read_documents(write(name, content))] == ["1", "2"]


@pytest.mark.parametrize("indent", [None, 2])
def test_one_object(write: Write, indent: int | None) -> None:
    assert list(read_documents(write("a.json", json.dumps(message("1"), indent=indent)))) == [
        message("1") | {"status": "pending"}
    ]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_extended_json_keeps_its_types(write: Write, name: str) -> None:
    path = write(
        name,
        '{"_id": {"$oid": "67fab3c83bf051d4f16758b3"}, "text": "hi", "n": {"$numberLong": "7"}, '
        '"at": {"$date": "2025-01-02T03:04:05Z"}}',
    )
    (document,) = read_documents(path)
    assert document["_id"] == ObjectId("67fab3c83bf051d4f16758b3")
    assert isinstance(document["n"], Int64)
    assert document["at"] == datetime(2025, 1, 2, 3, 4, 5, tzinfo=UTC)


def test_a_status_that_is_there_is_kept_and_a_missing_one_is_pending(write: Write) -> None:
    documents = [
        message("1"),
        message("2") | {"status": "processed"},
        {"tweets": []},
        {"text": "a"},
        {"text": "b", "processed": True},
    ]
    conversation, processed, tweets, query, done = read_documents(write("a.json", json.dumps(documents)))
    assert conversation["status"] == "pending"
    assert processed["status"] == "processed"
    assert tweets == {"tweets": [], "status": "pending"}
    assert query == {"text": "a", "processed": False, "processing_attempts": 0}
    assert done == {"text": "b", "processed": True}


def test_labelled_data_sets_lose_what_is_not_of_the_shape(write: Write) -> None:
    extra = {"gold": {"intent": "x"}, "source": "s", "license": "MIT", "meta": {}}
    documents = [message("1") | extra, {"_id": "q", "text": "a", "metadata": {"source": "web"}, "gold": {}}]
    conversation, query = read_documents(write("a.json", json.dumps(documents)))
    assert conversation == message("1") | {"status": "pending"}
    assert query == {
        "_id": "q",
        "text": "a",
        "metadata": {"source": "web"},
        "processed": False,
        "processing_attempts": 0,
    }


def test_fields_of_documents_that_are_not_labelled_stay(write: Write) -> None:
    (document,) = read_documents(write("a.json", json.dumps(message("1") | {"source": "web", "region": "EU"})))
    assert document["source"] == "web"
    assert document["region"] == "EU"


# TWCS


def test_twcs_tweets_become_threads(write: Write, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        first, second = read_documents(write("twcs.csv", TWCS))
    assert first == {
        "conversation_number": "1",
        "tweets": [
            {
                "tweet_id": 3,
                "author_id": "9",
                "inbound": True,
                "created_at": "Tue Oct 31 22:08:27 +0000 2017",
                "text": '@Shop my "parcel" is late,\nagain',
            },
            {
                "tweet_id": 1,
                "author_id": "Shop",
                "inbound": False,
                "created_at": "Tue Oct 31 22:10:47 +0000 2017",
                "text": "@9 Which one?",
            },
            {
                "tweet_id": 2,
                "author_id": "9",
                "inbound": True,
                "created_at": "Tue Oct 31 22:11:45 +0000 2017",
                "text": "@Shop The blue one",
            },
        ],
        "status": "pending",
    }
    # What it answers is not in the file, so this tweet of a customer starts a conversation; it has two answers.
    assert [tweet["tweet_id"] for tweet in second["tweets"]] == [9, 8, 10]
    assert second["conversation_number"] == "2"
    assert "2 tweets left out: in no thread that a customer started (line 6, line 7)" in caplog.text


def test_an_answer_follows_what_it_answers(write: Write) -> None:
    rows = ["3,s,False,,b,,1", "2,s,False,,d,,1", "5,c,True,,e,,2", "4,c,True,,c,,3", "1,c,True,,a,,"]
    (document,) = read_documents(write("twcs.csv", "\n".join([TWCS_HEADER, *rows])))
    assert [tweet["tweet_id"] for tweet in document["tweets"]] == [1, 3, 4, 2, 5]


def test_odd_tweet_files(write: Write) -> None:
    rows = [
        "1,c,true,,a,,",
        "2,s,FALSE,,b,,1.0",  # went through pandas
        "2,s,False,,twice,,1",
        "7,c,True,,in a circle,,8",
        "8,c,True,,in a circle,,7",
        "9,c,True,,answers itself,,9",
        "123456789012345678901,c,True,,too long a number for MongoDB,,",
    ]
    first, second = read_documents(write("twcs.csv", "\n".join([TWCS_HEADER, *rows])))
    assert [tweet["text"] for tweet in first["tweets"]] == ["a", "b", "twice"]
    assert second["tweets"][0]["tweet_id"] == "123456789012345678901"


def test_rows_with_equal_ids_are_merged_only_if_their_text_is_equal(
    write: Write, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [
        "1,c,True,,first,,",
        "1,c,True,,first,,",
        "1,d,True,,second,,",
        "2,s,False,,answer,,1",
        "1,d,True,,second,,",
    ]
    documents = list(read_documents(write("twcs.csv", "\n".join([TWCS_HEADER, *rows]))))
    texts = [[tweet["text"] for tweet in document["tweets"]] for document in documents]
    assert texts == [["first", "answer"], ["second"]]
    assert "2 rows left out: tweet_id and text as in an earlier row (line 3, line 6)" in caplog.text
    assert "1 row kept with the tweet_id of an earlier row but another text" in caplog.text
    assert "answers go to the earlier row (line 4)" in caplog.text


def test_rounded_tweet_ids_are_named_and_join_nothing(write: Write, caplog: pytest.LogCaptureFixture) -> None:
    rows = [
        "1.23457E+17,c,True,,first,,",
        '"1,23457e+17",d,True,,second,,',
        "1.23457E+17,c,True,,first,,",
        "5,s,False,,to whom?,,1.23457E+17",
    ]
    documents = list(read_documents(write("twcs.csv", "\n".join([TWCS_HEADER, *rows]))))
    assert [[tweet["text"] for tweet in document["tweets"]] for document in documents] == [
        ["first"],
        ["second"],
        ["first"],
    ]
    assert "4 ids rounded by a spreadsheet" in caplog.text
    assert "(line 2, 1.23457E+17, line 3, 1,23457e+17, " in caplog.text
    assert "1 tweet left out" in caplog.text


def test_threads_are_readable_by_the_aggregator(write: Write) -> None:
    first, _ = read_documents(write("twcs.csv", TWCS))
    conversation = aggregate_conversation(first)
    assert [turn.sender for turn in conversation.turns] == ["customer", "agent", "customer"]


# Messages and queries


def test_messages_are_grouped_by_number_wherever_they_lie(write: Write) -> None:
    path = write(
        "m.csv",
        "\ufeffConversation_Number;Sender;Timestamp;Text\r\n"
        "10;customer;2025-01-02T10:00:00Z;hello\r\n"
        "2;customer;;one\r\n"
        '10;agent;2025-01-02T10:01:00Z;"two\r\nlines; and more"\r\n'
        "\r\n"
        "2;agent;;\r\n",
    )
    first, second = read_documents(path)
    assert first == {
        "conversation_number": "10",
        "messages": [
            {"sender": "customer", "timestamp": "2025-01-02T10:00:00Z", "text": "hello"},
            {"sender": "agent", "timestamp": "2025-01-02T10:01:00Z", "text": "two\r\nlines; and more"},
        ],
        "status": "pending",
    }
    assert second["messages"] == [{"sender": "customer", "text": "one"}, {"sender": "agent", "text": ""}]


@pytest.mark.parametrize("name", ["q.csv", "q.txt"])
@pytest.mark.parametrize("id_column", ["id", "_id"])
def test_single_queries(write: Write, id_column: str, name: str) -> None:
    path = write(name, f"{id_column},text,source,timestamp\ndoc0,hello,web,2024-01-01T00:00:00Z\n,bye,,\n")
    assert list(read_documents(path)) == [
        {
            "_id": "doc0",
            "text": "hello",
            "metadata": {"source": "web", "timestamp": "2024-01-01T00:00:00Z"},
            "processed": False,
            "processing_attempts": 0,
        },
        {"text": "bye", "metadata": {}, "processed": False, "processing_attempts": 0},
    ]


def test_queries_with_equal_or_rounded_ids_are_kept_apart(write: Write, caplog: pytest.LogCaptureFixture) -> None:
    rows = ["7,first", "7,second", "7,first", "4.5E+11,third", "4.5E+11,fourth"]
    documents = list(read_documents(write("q.csv", "\n".join(["id,text", *rows]))))
    assert [(document.get("_id"), document["text"]) for document in documents] == [
        *(("7", "first"), (None, "second"), ("7", "first"), (None, "third"), (None, "fourth")),
    ]
    assert (
        "1 row with the id of an earlier row but another text; the id is replaced by one of the content (line 3)"
        in (caplog.text)
    )
    assert (
        "2 ids rounded by a spreadsheet and replaced by one of the content (line 5, 4.5E+11, line 6, 4.5E+11)"
        in caplog.text
    )


def test_a_file_can_be_read_in_part_and_by_several_threads(write: Write) -> None:
    rows = "".join(f"{number},customer,hi\n" for number in range(50))
    documents = iter(read_documents(write("m.csv", f"conversation_number,sender,text\n{rows}")))
    read: list[str] = []
    for _ in range(3):
        thread = threading.Thread(target=lambda: read.append(next(documents)["conversation_number"]))
        thread.start()
        thread.join()
    documents.close()  # type: ignore[attr-defined]
    assert read == ["0", "1", "2"]


# Errors


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.jsonl", f'{{"text": "ok"}}\n{{"text": "{SECRET}"\n', "line 2: expected (Extended) JSON"),
        ("a.json", f'[{{"text": "ok"}},\n{{"text": "{SECRET}"\n]', "line 3: expected (Extended) JSON"),
        ("a.jsonl", f'{{"text": "ok"}}\n["{SECRET}"]\n', "line 2: expected an object with tweets"),
        ("a.json", f'[{{"text": "ok"}}, {{"body": "{SECRET}"}}]', "element 2: expected an object with tweets"),
        ("a.json", f'"{SECRET}"', "line 1: expected an object with tweets"),
        ("a.jsonl", f'{{"text": "ok"}}\n{{"_id": {{"$oid": "{SECRET}"}}, "text": "a"}}', "line 2: expected (Extended)"),
        ("a.jsonl", b'{"text": "ok"}\n{"text": "\xff"}', "line 2: expected UTF-8"),
        ("a.json", b'[\n{"text": "ok"},\n{"text": "\xff"}]', "line 3: expected UTF-8"),
        ("a.csv", b"\xef\xbb\xbftext\nok\n\xff\n", "line 3: expected UTF-8"),
        ("a.csv", f"text\nok\n{SECRET},b\n", "line 3: expected 1 values as in the header, found 2"),
        ("a.csv", f'text\n"a\nb"\n"{SECRET}', "line 4: expected CSV with texts in double quotes"),
        ("a.csv", f'text\n"{SECRET}" b\n', "line 2: expected CSV with texts in double quotes"),
        ("a.csv", "flavour,size\nok,1\n", "line 1: the column text is missing, and no other column is known to hold"),
        ("a.csv", "flavour,size\nok,1\n", "Name it with --map text=COLUMN; the columns are flavour, size."),
        ("a.csv", f'"I paid, {SECRET}",customer\nok,agent\n', "Name it with --map text=COLUMN; a table needs a header"),
        ("a.csv", f"{SECRET} again,2026-01-02\nok,2026-01-03\n", "so add one if it starts with a row."),
        ("a.csv", f"{SECRET} again\nok\n", "so add one if it starts with a row."),
        ("a.csv", "", "line 1: the file is empty; expected a header"),
        ("a.jsonl", "", "line 1: the file is empty; export it again as (Extended) JSON: one array, one object, or one"),
        ("a.json", "\n \n", "line 1: the file is empty; export it again as (Extended) JSON: one array"),
        ("a.csv", "tweet_id,text\n1,ok\n", "line 1: the column author_id, inbound, created_at, in_response_to_tweet"),
        (
            "a.csv",
            f"conversation_number,sender,text\n1.2E+15,c,{SECRET}\n",
            "line 2: a spreadsheet has rounded the conv",
        ),
        ("a.csv", f"{TWCS_HEADER}\n1,c,{SECRET},,a,,\n", "line 2: expected True or False in the column inbound"),
        ("a.csv", f"{TWCS_HEADER}\n,c,True,,{SECRET},,\n", "line 2: expected a number in the column tweet_id"),
    ],
)
def test_what_is_wrong_is_named_by_its_line(write: Write, name: str, content: str | bytes, expected: str) -> None:
    assert expected in error_of(write(name, content))


@pytest.mark.parametrize(
    "content",
    [
        'text\n"{0}"\n',
        'conversation_number,sender,text\n1,customer,"{0}"\n',
        TWCS_HEADER + "\n1,c,True,,{0},,\n",
        'id;text\n1;"\n{0}"\n',
    ],
)
def test_long_csv_value_is_read_whole(write: Write, content: str) -> None:
    """Python's own limit is 131,072 characters."""
    (document,) = read_documents(write("a.csv", content.format("ab" * 200_000)))
    assert "ab" * 200_000 in aggregate_conversation(document).turns[0].text


def test_csv_value_above_the_limit_names_both_causes(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    """A missing quote makes one value of the rest of the file."""
    monkeypatch.setattr(document_files, "MOST_CHARACTERS", 200_000)
    said = error_of(write("a.csv", f'text\nok\n"{SECRET}\n' + "more\n" * 50_000))
    assert "the row from line 3: a value has more than 200,000 characters" in said
    assert "closing quote" in said


def test_documents_before_the_wrong_line_were_yielded(write: Write) -> None:
    documents = iter(read_documents(write("a.jsonl", '{"text": "ok"}\n{"text"\n')))
    assert next(documents)["text"] == "ok"
    with pytest.raises(ConfigurationError, match="line 2"):
        next(documents)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    assert "No such file" in error_of(tmp_path / "missing.jsonl")
    assert "No such file" in error_of(tmp_path / "missing")
    assert "directory" in error_of(tmp_path)

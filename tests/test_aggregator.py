"""Documents of every accepted shape become conversations; whatever else comes is skipped with a reason."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest
from bson import Code, Int64, ObjectId
from bson.datetime_ms import DatetimeMS
from hypothesis import given
from hypothesis import strategies as st

from aggregator import aggregate_conversation, document_shape, parse_time
from domain.conversation import Conversation
from domain.text import one_line, prompt_text, visible_text
from error_handler import Reason, SkippedDocumentError

TWEETS: dict[str, Any] = {
    "_id": ObjectId(),
    "conversation_number": "1",
    "tweets": [
        {
            "tweet_id": 3,
            "author_id": "7",
            "inbound": True,
            "created_at": "Tue Oct 31 21:45:10 +0000 2017",
            "text": "Late!",
        },
        {
            "tweet_id": 2,
            "author_id": "S",
            "inbound": False,
            "created_at": "Tue Oct 31 21:49:59 +0000 2017",
            "text": "Sorry",
        },
    ],
    "status": "pending",
}


def messages(*turns: tuple[Any, Any] | tuple[Any, Any, Any], **fields: Any) -> dict[str, Any]:
    """A document of messages from (sender, text) or (sender, text, timestamp)."""
    listed = [dict(zip(("sender", "text", "timestamp"), turn, strict=False)) for turn in turns]
    return {"conversation_number": "7", "messages": listed, **fields}


def texts(document: dict[str, Any]) -> list[str]:
    return [turn.text for turn in aggregate_conversation(document).turns]


def skipped(document: dict[str, Any]) -> SkippedDocumentError:
    with pytest.raises(SkippedDocumentError) as caught:
        aggregate_conversation(document)
    return caught.value


def test_tweets() -> None:
    """``inbound: true`` is the customer; times are read with their zone."""
    conversation = aggregate_conversation(TWEETS)
    assert conversation.shape == "tweets"
    assert conversation.conversation_number == "1"
    assert conversation.transcript == "Customer: Late!\nAgent: Sorry"
    assert conversation.customer_texts == ["Late!"]
    assert conversation.turns[0].at == datetime(2017, 10, 31, 21, 45, 10, tzinfo=UTC)
    assert conversation.turns_total == 2


def test_messages() -> None:
    """Senders are recognised by name."""
    conversation = aggregate_conversation(messages(("agent", "Hello, how can I help?"), ("customer", "Where is it?")))
    assert conversation.shape == "messages"
    assert conversation.transcript == "Agent: Hello, how can I help?\nCustomer: Where is it?"


def test_single_query() -> None:
    """A query is one turn of the customer and has no number."""
    document = {
        "_id": "doc0",
        "text": "Reset my password",
        "metadata": {},
        "processed": False,
        "processing_attempts": 0,
    }
    conversation = aggregate_conversation(document)
    assert (conversation.shape, conversation.conversation_number) == ("query", None)
    assert conversation.transcript == "Customer: Reset my password"
    assert (len(conversation.turns), conversation.turns_total) == (1, 1)


@pytest.mark.parametrize(
    ("document", "shape"),
    [
        pytest.param({"tweets": [], "messages": [], "text": ""}, "tweets", id="tweets-first"),
        pytest.param({"tweets": None, "messages": [], "text": ""}, "messages", id="no-list-of-tweets"),
        pytest.param({"tweets": {}, "messages": "x", "text": None}, "query", id="text-of-any-type"),
        pytest.param({"tweets": [], "messages": [{"text": "x"}]}, "messages", id="empty-list-first"),
        pytest.param({"messages": [], "text": "x"}, "query", id="empty-list-beside-text"),
        pytest.param({"tweets": [None, {"text": " "}], "messages": [], "text": "x"}, "query", id="list-without-text"),
        pytest.param({"messages": [{"text": "x"}], "text": "x"}, "messages", id="list-before-text"),
        pytest.param({"_id": 1, "body": "x"}, None, id="none"),
    ],
)
def test_shape(document: dict[str, Any], shape: str | None) -> None:
    """The first shape with a text counts, else the first list that is there, else the text."""
    assert document_shape(document) == shape


def test_turns_are_sorted_by_time() -> None:
    """If every turn has a readable time, the listed order does not matter; equal times keep it."""
    document = messages(
        ("customer", "third", "2024-05-01T12:00:00+02:00"),
        ("agent", "second", "2024-05-01T09:30:00Z"),
        ("customer", "first", "2024-05-01T09:00:00"),
        ("agent", "fourth", datetime(2024, 5, 1, 10, 0, tzinfo=UTC)),
    )
    assert texts(document) == ["first", "second", "third", "fourth"]


@pytest.mark.parametrize(
    "time", [None, "yesterday", "", 17, "05/04/2024", "Tue Oct 99 21:45:10 +0000 2017", DatetimeMS(2**60)]
)
def test_one_unreadable_time_keeps_the_listed_order(time: Any) -> None:
    """Sorting some turns and not others would tear questions from their answers."""
    document = messages(
        ("customer", "second", "2024-05-02"), ("agent", "unknown", time), ("customer", "first", "2024-05-01")
    )
    assert texts(document) == ["second", "unknown", "first"]
    assert not aggregate_conversation(document).is_ordered


def test_times_of_turns_without_text_do_not_count() -> None:
    """A turn that is left out cannot spoil the order of the others."""
    document = messages(
        ("customer", "second", "2024-05-02"), ("agent", "", "never"), ("customer", "first", "2024-05-01")
    )
    assert texts(document) == ["first", "second"]
    assert aggregate_conversation(document).is_ordered


@pytest.mark.parametrize(
    ("later", "earlier"),
    [
        pytest.param(1714557600, 1714550000, id="seconds"),
        pytest.param(1714557600000, 1714550000000.0, id="milliseconds"),
        pytest.param("1714557600", "1714550000", id="seconds-as-text"),
        pytest.param("1714557600.000200", Int64(1714557600), id="slack-and-int64"),
        pytest.param("Wed, 01 May 2024 12:00:00 GMT", "Wed, 01 May 2024 10:00:00 GMT", id="rfc-2822"),
        pytest.param("2024-05-01 12:00:00 UTC", "2024-05-01 10:00:00 UTC", id="utc"),
        pytest.param("May 1, 2024 12:05 PM", "May 1, 2024 11:05 AM", id="twelve-hours"),
        pytest.param("2024-05-01T12:00:00+02:00", 1714550000, id="mixed"),
    ],
)
def test_times_in_any_form_order_the_turns(later: Any, earlier: Any) -> None:
    """Exports list turns newest first, with the times of their own system."""
    document = messages(("customer", "cancel it", later), ("customer", "where is it?", earlier))
    assert texts(document) == ["where is it?", "cancel it"]


@pytest.mark.parametrize("clock", ["12:00", "12:00 PM", "2024-05-01T12:00:00Z"])
def test_date_and_time_in_two_fields_are_one_time(clock: str) -> None:
    """The date alone would make all turns of a day equal."""
    document = messages(("customer", "second"), ("customer", "first"))
    document["messages"][0] |= {"date": "2024-05-01", "time": clock}
    document["messages"][1] |= {"date": "2024-05-01", "time": "09:30"}
    assert texts(document) == ["first", "second"]
    document["messages"][1]["time"] = "half past nine"
    assert texts(document) == ["second", "first"]
    assert not aggregate_conversation(document).is_ordered


def test_time_is_the_first_readable_field() -> None:
    """Chat programs have several, and the first may be empty."""
    document = {
        "messages": [
            {"sender": "customer", "text": "second", "timestamp": None, "createdAt": "2024-05-01T12:00:00Z"},
            {"sender": "customer", "text": "first", "sent_at": 1714550000},
        ]
    }
    assert texts(document) == ["first", "second"]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("Tue Oct 31 21:45:10 +0000 2017", datetime(2017, 10, 31, 21, 45, 10, tzinfo=UTC)),
        ("Tue Oct 31 21:45:10 +0530 2017", datetime(2017, 10, 31, 16, 15, 10, tzinfo=UTC)),
        ("Tue Oct 31 21:45:10 -0530 2017", datetime(2017, 11, 1, 3, 15, 10, tzinfo=UTC)),
        ("2024-05-01", datetime(2024, 5, 1, tzinfo=UTC)),
        ("2024-05-01T10:00:00.123Z", datetime(2024, 5, 1, 10, 0, 0, 123000, tzinfo=UTC)),
        ("2024-05-01 10:00:00-02:00", datetime(2024, 5, 1, 12, tzinfo=UTC)),
        (datetime(2024, 5, 1), datetime(2024, 5, 1, tzinfo=UTC)),
        (datetime(2024, 5, 1, tzinfo=timezone(timedelta(hours=1))), datetime(2024, 4, 30, 23, tzinfo=UTC)),
        ("Tue Okt 31 21:45:10 +0000 2017", None),
        ("Tue Oct 31 21:45:10 +9900 2017", None),
        ("Tue Oct 31 21:45:10 +0000 0000", None),
        ("2024-13-01", None),
        ("\ud83d", None),
        ("Wed May 01 2024 10:00:00 GMT+0200 (CEST)", datetime(2024, 5, 1, 8, tzinfo=UTC)),
        ("Wed May  1 10:00:00 2024", datetime(2024, 5, 1, 10, tzinfo=UTC)),
        ("1 May 2024 12:00 EST", datetime(2024, 5, 1, 17, tzinfo=UTC)),
        ("2024-05-01 10:00:00.5 +0000 UTC", datetime(2024, 5, 1, 10, 0, 0, 500000, tzinfo=UTC)),
        ("2024/05/01 12:30 AM", datetime(2024, 5, 1, 0, 30, tzinfo=UTC)),
        ("20240501103000", datetime(2024, 5, 1, 10, 30, tzinfo=UTC)),
        ("20240501", datetime(2024, 5, 1, tzinfo=UTC)),
        (1714557600123456789, datetime(2024, 5, 1, 10, 0, 0, 123457, tzinfo=UTC)),
        ("2024-05-01 12:00:00 CET", None),  # not a zone of RFC 2822
        ("01.05.2024 10:00", None),  # May or January
        ("1.71456E+12", None),  # rounded by a spreadsheet
        ("1 May 2024 12:00 +0500 -0300", None),
        ("10:00", None),
        ("9" * 50, None),
        (202405011030, None),
        (20240501, None),
        (10**400, None),
        (float("nan"), None),
        (float("inf"), None),
        (True, None),
    ],
)
def test_readable_times(value: Any, expected: datetime | None) -> None:
    """Datetimes, epochs, ISO 8601 and English dates are read; without a zone they are UTC; the rest is None."""
    read = parse_time(value)
    assert read == expected
    assert read is None or read.tzinfo is not None


@pytest.mark.parametrize(
    ("document", "reason"),
    [
        pytest.param({"_id": 1}, Reason.SKIPPED_NO_TEXT, id="no-shape"),
        pytest.param({"tweets": []}, Reason.SKIPPED_NO_TEXT, id="no-tweets"),
        pytest.param(messages(), Reason.SKIPPED_NO_TEXT, id="no-messages"),
        pytest.param({"text": None}, Reason.SKIPPED_NO_TEXT, id="null"),
        pytest.param({"text": 5}, Reason.SKIPPED_NO_TEXT, id="number"),
        pytest.param({"text": " \n\t\u200b\ufeff"}, Reason.SKIPPED_NO_TEXT, id="invisible"),
        pytest.param(
            {"messages": ["hello", None, 3, [], {"sender": "customer"}]}, Reason.SKIPPED_NO_TEXT, id="odd-turns"
        ),
        pytest.param({"tweets": [{"inbound": True, "text": ["a"]}]}, Reason.SKIPPED_NO_TEXT, id="list-for-text"),
        pytest.param(messages(("agent", "Hello?")), Reason.SKIPPED_NO_CUSTOMER, id="agent-alone"),
        pytest.param(messages(("bystander", "Hello?")), Reason.SKIPPED_NO_CUSTOMER, id="unknown-alone"),
        pytest.param(
            {"tweets": [{"inbound": "maybe", "text": "x"}]}, Reason.SKIPPED_NO_CUSTOMER, id="unknown-direction"
        ),
        pytest.param({"tweets": [{"inbound": 1, "text": "x"}]}, Reason.SKIPPED_NO_CUSTOMER, id="number-for-direction"),
    ],
)
def test_documents_with_nothing_to_classify_are_skipped(document: dict[str, Any], reason: Reason) -> None:
    """Each says why, and never quotes the document."""
    assert skipped(document).reason is reason


def test_bad_turns_among_good_ones_are_left_out_and_counted() -> None:
    """The conversation is what can be read; ``turns_total`` tells that there was more."""
    document = messages(("customer", "good"), ("agent", None), ("agent", "fine"))
    document["messages"] += [None, "text", {"text": "no sender"}, {"text": "odd", "sender": Code("agent")}]
    conversation = aggregate_conversation(document)
    assert conversation.transcript == "Customer: good\nAgent: fine\nUnknown: no sender\nUnknown: odd"
    assert conversation.turns_total == 7


@pytest.mark.parametrize(
    ("sender", "speaker"),
    [
        (" Customer ", "Customer"),
        ("USER", "Customer"),
        ("assistant", "Agent"),
        ("Bot", "Agent"),
        ("supervisor", "Unknown"),
        (None, "Unknown"),
        (True, "Unknown"),
        ("end_user", "Customer"),
        ("End-User 1", "Customer"),
        ("visitor", "Customer"),
        ("lead", "Customer"),
        ("requester", "Customer"),
        ("human", "Customer"),
        ("admin", "Agent"),
        ("system", "Agent"),
        ({"type": "contact"}, "Customer"),
        ({"role": "end-user", "name": "Support"}, "Customer"),
        ({"type": "person", "name": "Agent"}, "Agent"),
        ({"type": {"type": "contact"}}, "Unknown"),
        (["customer"], "Unknown"),
    ],
)
def test_senders(sender: Any, speaker: str) -> None:
    """Common names are known in any case; one that is not known is neither customer nor agent."""
    conversation = aggregate_conversation(messages(("customer", "hello"), (sender, "there")))
    assert conversation.transcript == f"Customer: hello\n{speaker}: there"


@pytest.mark.parametrize(
    ("customer", "agent"),
    [
        pytest.param({"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}, id="chat"),
        pytest.param(
            {"role": "user", "content": [{"type": "text", "text": "hi"}, {"type": "image_url"}]},
            {"role": "tool", "content": None, "body": "ho"},
            id="chat-parts",
        ),
        pytest.param(
            {"author": {"type": "user", "name": "Ann"}, "body": "hi"},
            {"author": {"type": "admin"}, "body": "ho"},
            id="help-desk",
        ),
        pytest.param(
            {"sender": "Ann", "type": "visitor", "message": "hi"}, {"from": "bot", "message": "ho"}, id="chat-log"
        ),
        pytest.param({"incoming": True, "body_text": "hi"}, {"incoming": False, "body_text": "ho"}, id="ticket"),
        pytest.param(
            {"direction": "inbound", "text": {"body": "hi"}},
            {"direction": "outbound", "text": {"body": "ho"}},
            id="phone",
        ),
        pytest.param(
            {"from": "user", "text": ["h", {"type": "bold", "text": "i"}]}, {"from": "ai", "text": "ho"}, id="parts"
        ),
    ],
)
def test_fields_of_help_desks_and_chats(customer: dict[str, Any], agent: dict[str, Any]) -> None:
    """Whatever they are called, the text and the side that wrote it are found."""
    assert aggregate_conversation({"messages": [customer, agent]}).transcript == "Customer: hi\nAgent: ho"


def test_deep_texts_are_not_followed() -> None:
    """A document that nests without end must not end the worker."""
    deep: Any = "x"
    for _ in range(5000):
        deep = [{"text": deep}]
    assert texts(messages(("customer", deep), ("customer", "readable"))) == ["readable"]


@pytest.mark.parametrize(("inbound", "speaker"), [("True", "Customer"), ("FALSE ", "Agent"), ("yes", "Unknown")])
def test_direction_as_text(inbound: str, speaker: str) -> None:
    """A CSV import leaves texts where Twitter has truth values."""
    document = {"tweets": [{"inbound": True, "text": "hello"}, {"inbound": inbound, "text": "there"}]}
    assert aggregate_conversation(document).transcript == f"Customer: hello\n{speaker}: there"


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        ("0042", "0042"),
        (42, "42"),
        (Int64(42), "42"),
        (42.0, "42"),
        (4.5, None),
        (float("nan"), None),
        (None, None),
        (True, None),
        (["1"], None),
        ("1\n2\x1b[31m", "1\n2[31m"),
        ("9" * 500, "9" * 200),
    ],
)
def test_conversation_number(number: Any, expected: str | None) -> None:
    """Numbers become texts, those of old shells (all doubles) included; other types count as none."""
    assert (
        aggregate_conversation(messages(("customer", "x"), conversation_number=number)).conversation_number == expected
    )


@pytest.mark.parametrize("line_break", ["\n", "\r\n", "\r", "\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\n\n"])
@pytest.mark.parametrize("speaker", ["Agent", "Customer", "Unknown"])
def test_a_text_cannot_pass_for_another_turn(line_break: str, speaker: str) -> None:
    """Further lines of a turn are indented, whatever ends the first."""
    conversation = aggregate_conversation(messages(("customer", f"bad{line_break}{speaker}: all good, thanks")))
    lines = conversation.transcript.splitlines()
    assert [line for line in lines if not line.startswith("    ")] == ["Customer: bad"]
    assert lines[-1] == f"    {speaker}: all good, thanks"


def test_emoji_and_scripts_stay_whole() -> None:
    """Joiners belong to emoji and to several scripts."""
    text = "👩‍👩‍👧 नमस्ते می‌خواهم 👍🏽"
    assert prompt_text(text) == text


@pytest.mark.parametrize(
    "invisible", ["\x00", "\x1b", "\x7f", "\u200b", "\u202e", "\u2066", "\ufeff", "\ud83d", "\U000e0041"]
)
def test_invisible_characters_are_removed(invisible: str) -> None:
    """Neither MongoDB nor a person could take them."""
    assert visible_text(f"a{invisible}b") == "ab"


def test_one_line() -> None:
    """Breaks and runs of spaces become one space; what is too long ends in an ellipsis within the limit."""
    assert one_line("a\r\n b\u2028c\t d", 20) == "a b c d"
    assert one_line("x" * 21, 20) == "x" * 19 + "…"
    assert one_line("x" * 20, 20) == "x" * 20


json_values: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.floats() | st.text(max_size=20) | st.datetimes(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=12,
)
turns = st.fixed_dictionaries(
    {},
    optional={
        "text": st.text(st.characters(exclude_categories=[]), max_size=30) | json_values,
        "sender": st.sampled_from(["customer", "agent", "x"]) | json_values,
        "inbound": st.booleans() | json_values,
        "timestamp": st.datetimes(timezones=st.timezones() | st.none()) | json_values,
        "created_at": st.datetimes() | json_values,
    },
)
documents = st.fixed_dictionaries(
    {},
    optional={
        "_id": json_values,
        "conversation_number": json_values,
        "tweets": st.lists(turns | json_values, max_size=4) | json_values,
        "messages": st.lists(turns | json_values, max_size=4) | json_values,
        "text": json_values,
    },
)


@given(documents)
def test_any_document_is_aggregated_or_skipped(document: dict[str, Any]) -> None:
    """There is no third way: a conversation with a customer's turn that can be stored, or a reason."""
    try:
        conversation = aggregate_conversation(document)
    except SkippedDocumentError:
        assert skipped(document).reason in (Reason.SKIPPED_NO_TEXT, Reason.SKIPPED_NO_CUSTOMER)
        return
    assert isinstance(conversation, Conversation)
    assert conversation.customer_texts
    assert all(turn.text.strip() for turn in conversation.turns)
    assert len(conversation.turns) <= conversation.turns_total
    conversation.transcript.encode()
    speakers = [line for line in conversation.transcript.split("\n") if not line.startswith("    ")]
    assert len(speakers) == len(conversation.turns)


@pytest.mark.thorough
def test_no_character_is_invisible_and_printable() -> None:
    """A text that Python calls printable is passed on unsearched: nothing that is to be taken out may be among it."""
    everything = "".join(map(chr, range(0x110000)))
    taken_out = set(everything) - set(visible_text("\x00" + everything))
    assert {"\x00", "\u200b", "\u202e", "\ufeff", "\ud800", "\U000e0041"} <= taken_out
    assert not [character for character in taken_out if character.isprintable()]

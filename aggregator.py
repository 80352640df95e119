"""Turns a document of any accepted shape into a Conversation. No I/O."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from domain.conversation import Conversation, Sender, Shape, Turn
from domain.text import prompt_text
from error_handler import Reason, SkippedDocumentError

_SENDERS: dict[str, Sender] = {
    **dict.fromkeys(("customer", "user", "client", "consumer", "inbound", "end_user", "end-user"), "customer"),
    **dict.fromkeys(("agent", "support", "assistant", "staff", "operator", "bot", "system", "outbound"), "agent"),
}
_MONTHS = {
    name: f"{number:02}" for number, name in enumerate("Jan Feb Mar Apr May Jun Jul Aug Sep Oct Nov Dec".split(), 1)
}


def document_shape(document: Mapping[str, Any]) -> Shape | None:
    """Return the shape of *document*; None if it has none of the accepted shapes."""
    if isinstance(document.get("tweets"), list):
        return "tweets"
    if isinstance(document.get("messages"), list):
        return "messages"
    return "query" if "text" in document else None


def aggregate_conversation(document: Mapping[str, Any]) -> Conversation:
    """Return the conversation in *document*, with safe texts.

    The turns are sorted by time if each usable turn has a readable time; otherwise they keep their order. Turns without
    text are left out. Raise SkippedDocumentError if there is no usable text, or no turn of the customer.
    """
    shape = document_shape(document)
    if shape is None:
        raise SkippedDocumentError("no tweets, messages or text in the document", Reason.SKIPPED_NO_TEXT)
    entries = [document] if shape == "query" else document[shape]
    turns = [turn for entry in entries if (turn := _turn(shape, entry)) is not None]
    if not turns:
        raise SkippedDocumentError("no turn with usable text", Reason.SKIPPED_NO_TEXT)
    if not any(turn.sender == "customer" for turn in turns):
        raise SkippedDocumentError("no turn of the customer", Reason.SKIPPED_NO_CUSTOMER)
    if len(turns) > 1:
        dated = [(turn.at, turn) for turn in turns if turn.at is not None]
        if len(dated) == len(turns):
            turns = [turn for _, turn in sorted(dated, key=lambda pair: pair[0])]
    return Conversation(shape, _number(document), tuple(turns), len(entries))


def _turn(shape: Shape, entry: Any) -> Turn | None:
    if not isinstance(entry, Mapping) or not isinstance(entry.get("text"), str):
        return None
    text = prompt_text(entry["text"])
    if not text:
        return None
    if shape == "query":
        return Turn("customer", text)
    if shape == "tweets":
        return Turn(_inbound(entry.get("inbound")), text, parse_time(entry.get("created_at")))
    return Turn(_sender(entry.get("sender")), text, parse_time(entry.get("timestamp")))


def _inbound(value: Any) -> Sender:
    if isinstance(value, str):  # a CSV import leaves strings
        value = {"true": True, "false": False}.get(value.strip().lower())
    return "customer" if value is True else "agent" if value is False else "unknown"


def _sender(value: Any) -> Sender:
    return _SENDERS.get(value.strip().lower(), "unknown") if isinstance(value, str) else "unknown"


def _number(document: Mapping[str, Any]) -> str | None:
    number = document.get("conversation_number")
    if isinstance(number, float) and number.is_integer():  # older MongoDB shells store every number as a double
        number = int(number)
    return prompt_text(str(number))[:200] if isinstance(number, str | int) and not isinstance(number, bool) else None


def parse_time(value: Any) -> datetime | None:
    """Return *value* as an aware time (UTC if it has no zone); None if it is not readable.

    Accepts datetimes, ISO 8601, and Twitter's ``Tue Oct 31 21:45:10 +0000 2017``.
    """
    if isinstance(value, datetime):
        return value if value.tzinfo else value.replace(tzinfo=UTC)
    if not isinstance(value, str):
        return None
    try:
        if len(value) == 30 and value[3] == " ":
            return _twitter_time(value)
        at = datetime.fromisoformat(value)
    except (ValueError, KeyError):
        return None
    return at if at.tzinfo else at.replace(tzinfo=UTC)


def _twitter_time(value: str) -> datetime:
    """Parse by position, because strptime takes ten times as long and this runs for each turn."""
    return datetime.fromisoformat(f"{value[26:30]}-{_MONTHS[value[4:7]]}-{value[8:10]}T{value[11:19]}{value[20:25]}")

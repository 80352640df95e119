"""Turns a document of any accepted shape into a Conversation. No I/O."""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from operator import attrgetter
from typing import Any

from domain.conversation import DOCUMENT_TIMES, Conversation, Sender, Shape, Turn
from domain.plain_text import plain_text
from domain.text import prompt_text
from error_handler import Reason, SkippedDocumentError, UnreadableDocumentError
from storage.selection import UNREADABLE

# Fields of a turn as help desks and chat programs name them. The first one with a usable value counts.
TEXT_FIELDS = ("text", "content", "body", "message", "body_text", "plain_body", "plainBody", "bodyText")
TIME_FIELDS = (
    *("timestamp", "created_at", "createdAt", "sent_at", "sentAt", "created", "date", "time", "datetime", "ts"),
    *("received_at", "receivedAt"),
)
DIRECTION_FIELDS = ("inbound", "incoming", "is_inbound", "isInbound", "is_incoming")
SENDER_FIELDS = (
    *("sender", "role", "author", "from", "sender_type", "senderType", "author_type", "authorType", "user_type"),
    *("sender_role", "author_role", "speaker", "participant", "direction", "user", "type"),
)
_SENDER_OBJECT_FIELDS = ("type", "role", "user_type", "kind", "name")

_SENDERS: dict[str, Sender] = {
    **dict.fromkeys(
        "customer user client consumer inbound incoming enduser visitor lead contact requester human guest buyer "
        "shopper caller subscriber member prospect reporter".split(),
        "customer",
    ),
    **dict.fromkeys(
        "agent support assistant staff operator bot system outbound outgoing admin administrator teammate employee "
        "representative rep supportagent humanagent supportrep customerservice customersupport customercare "
        "chatbot ai aiagent model tool function".split(),
        "agent",
    ),
}
_NOT_A_LETTER = re.compile(r"[\W\d_]+")

_MONTHS = {
    name: f"{number:02}" for number, name in enumerate("Jan Feb Mar Apr May Jun Jul Aug Sep Oct Nov Dec".split(), 1)
}
_WEEKDAYS = frozenset("mon tue wed thu fri sat sun".split())
_ZONES = {  # those of RFC 2822
    **dict.fromkeys(("utc", "gmt", "ut", "z"), "+00:00"),
    **dict.fromkeys(("edt",), "-04:00"),
    **dict.fromkeys(("est", "cdt"), "-05:00"),
    **dict.fromkeys(("cst", "mdt"), "-06:00"),
    **dict.fromkeys(("mst", "pdt"), "-07:00"),
    **dict.fromkeys(("pst",), "-08:00"),
}
_NUMBER = re.compile(r"\d{1,20}(?:\.\d{0,20})?", re.ASCII)
# Seconds from 1985 to 2286, and the same span in milliseconds, microseconds and nanoseconds. Smaller numbers count
# something else, and those between are dates without separators (20240501103000).
_EPOCH_FROM, _EPOCH_TO = 5e8, 1e10
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_TIME_TOKEN = re.compile(
    r"(?P<ymd>\d{4}[-/.]\d{1,2}[-/.]\d{1,2})(?=\D|$)|(?P<clock>\d{1,2}:\d\d(?::\d\d(?:[.,]\d{1,9})?)?)"
    r"|(?P<offset>[+-]\d\d:?\d\d)(?!\d)|(?P<number>\d+)|(?P<word>[a-z]+)|(?P<other>[^\s,.])",
    re.ASCII,
)


def document_shape(document: Mapping[str, Any]) -> Shape | None:
    """Return the shape of *document*: the first one with a text, else the first one; None if it has none."""
    shapes: list[Shape] = [name for name in ("tweets", "messages") if isinstance(document.get(name), list)]
    if "text" in document:
        shapes.append("query")
    if len(shapes) > 1:  # an empty list must not hide the text beside it
        for shape in shapes:
            if any(entry_text(entry) for entry in document_entries(document, shape)):
                return shape
    return shapes[0] if shapes else None


def document_entries(document: Mapping[str, Any], shape: Shape) -> list[Any]:
    """Return the entries of *document* that can become turns; of a single query, its text."""
    return [{"text": document["text"]}] if shape == "query" else document[shape]


def aggregate_conversation(document: Mapping[str, Any]) -> Conversation:
    """Return the conversation in *document*, with safe texts.

    The turns are sorted by time if each usable turn has a readable time; otherwise they keep their order, and
    ``is_ordered`` is False. Turns without text are left out. Raise SkippedDocumentError if there is no usable text, or
    no turn of the customer.
    """
    if UNREADABLE in document:
        raise UnreadableDocumentError
    shape = document_shape(document)
    if shape is None:
        raise SkippedDocumentError("no tweets, messages or text in the document", Reason.SKIPPED_NO_TEXT)
    entries = document_entries(document, shape)
    turns = [turn for entry in entries if (turn := _turn(shape, entry)) is not None]
    if not turns:
        raise SkippedDocumentError("no turn with usable text", Reason.SKIPPED_NO_TEXT)
    if not any(turn.sender == "customer" for turn in turns):
        raise SkippedDocumentError("no turn of the customer", Reason.SKIPPED_NO_CUSTOMER)
    dated = [turn.at for turn in turns if turn.at is not None]
    is_ordered = len(turns) in (1, len(dated))
    if is_ordered:
        turns.sort(key=attrgetter("at"))
    # Programs without a time write year 1 or 9999, which may not exist in UTC.
    is_dated = bool(dated) and dated[0].year not in (1, 9999)
    created_at = None if is_dated else _document_time(document)
    return Conversation(shape, _number(document), tuple(turns), len(entries), is_ordered, created_at)


def entry_text(entry: Any) -> str:
    """Return the text of one entry as it is written, or an empty string. Parts of a text are joined."""
    return _first_text(entry, 0) if isinstance(entry, dict) else ""


def _first_text(entry: Mapping[str, Any], depth: int) -> str:
    for name in TEXT_FIELDS:
        value = entry.get(name)
        if isinstance(value, str):
            if value and not value.isspace():
                return value
        elif value is not None and (text := _nested_text(value, depth + 1)):
            return text
    return ""


def _nested_text(value: Any, depth: int) -> str:
    """Return the text of an object (WhatsApp), or of a list of objects (OpenAI) with texts between them (Telegram)."""
    if isinstance(value, dict):
        return _first_text(value, depth) if depth <= 4 else ""
    if not isinstance(value, list) or depth > 4 or not any(isinstance(part, dict) for part in value):
        return ""
    is_running = any(isinstance(part, str) for part in value)
    parts = (part if isinstance(part, str) else _nested_text(part, depth + 1) for part in value)
    return ("" if is_running else "\n").join(part for part in parts if part)


def _turn(shape: Shape, entry: Any) -> Turn | None:
    written = _first_text(entry, 0) if isinstance(entry, dict) else ""
    may_have_history = "<" in written or "\n" in written  # or markup
    text = prompt_text(plain_text(written) if may_have_history else written)
    if not text:
        return None
    if shape == "query":
        return Turn("customer", text)
    return Turn(_inbound(entry) or _sender(entry, SENDER_FIELDS) or "unknown", text, _time(entry, TIME_FIELDS))


def _document_time(document: Mapping[str, Any]) -> datetime | None:
    metadata = document.get("metadata")
    at = _time(document, DOCUMENT_TIMES)
    return _time(metadata, DOCUMENT_TIMES) if at is None and isinstance(metadata, Mapping) else at


def _time(entry: Mapping[str, Any], names: tuple[str, ...]) -> datetime | None:
    for name in names:
        if (value := entry.get(name)) is None:
            continue
        if name == "date" and isinstance(value, str) and isinstance(clock := entry.get("time"), str):
            value = f"{value} {clock}"  # a spreadsheet has them in two columns
        if (at := parse_time(value)) is not None:
            return at
    return None


def _inbound(entry: Mapping[str, Any]) -> Sender | None:
    """Return the sender by a truth value such as Twitter's ``inbound``; a CSV import leaves it as text."""
    for name in DIRECTION_FIELDS:
        if name in entry:
            value = entry[name]
            if isinstance(value, str):
                value = {"true": True, "false": False}.get(value.strip().lower())
            if isinstance(value, bool):
                return "customer" if value else "agent"
    return None


def _sender(entry: Mapping[str, Any], fields: tuple[str, ...]) -> Sender | None:
    """Return the sender by the first field whose value is known; the value can be an object such as an author."""
    for name in fields:
        if (value := entry.get(name)) is None:
            continue
        known: Sender | None = None
        if type(value) is str:  # BSON's Code is a text that cannot be looked up
            known = _SENDERS.get(value) or _SENDERS.get(_NOT_A_LETTER.sub("", value[:80]).casefold())
        elif isinstance(value, dict) and fields is SENDER_FIELDS:
            known = _sender(value, _SENDER_OBJECT_FIELDS)
        if known:
            return known
    return None


def _number(document: Mapping[str, Any]) -> str | None:
    number = document.get("conversation_number")
    if isinstance(number, str):
        return prompt_text(number)[:200]
    if isinstance(number, float) and number.is_integer():  # older MongoDB shells store every number as a double
        number = int(number)
    return str(number)[:200] if isinstance(number, int) and not isinstance(number, bool) else None


def parse_time(value: Any) -> datetime | None:
    """Return *value* as an aware time (UTC if it has no zone); None if it is not readable.

    Accepts datetimes, epoch seconds to nanoseconds as number or text, ISO 8601, and English dates in any order with a
    four-digit year: RFC 2822, Twitter's ``Tue Oct 31 21:45:10 +0000 2017``, JavaScript's, ``May 1, 2024 10:00 PM``.
    A date such as 05/04/2024 is not readable, because it has two meanings.
    """
    if not isinstance(value, str):
        if isinstance(value, datetime):
            return value if value.tzinfo else value.replace(tzinfo=UTC)
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        return _epoch_time(value) if is_number and abs(value) < 1e20 else None
    if len(value) > 100:
        return None
    value = value.strip()
    try:
        if len(value) == 30 and value[3] == " " and value[4:7] in _MONTHS:
            return _twitter_time(value)
        if _NUMBER.fullmatch(value):
            compact = value[:8] + "T" + value[8:] if len(value) in (12, 14) else value if len(value) == 8 else ""
            at = _epoch_time(float(value)) or (datetime.fromisoformat(compact) if compact else None)
        else:
            at = _iso_time(value) or _written_time(value.lower())
    except (ValueError, KeyError):
        return None
    return at.replace(tzinfo=UTC) if at and not at.tzinfo else at


def _epoch_time(value: float) -> datetime | None:
    for _ in range(4):
        if value < _EPOCH_TO:
            return _EPOCH + timedelta(seconds=float(value)) if value >= _EPOCH_FROM else None
        value = value / 1000
    return None


def _iso_time(value: str) -> datetime | None:
    try:
        return datetime.fromisoformat(value)
    except ValueError:
        return None


def _twitter_time(value: str) -> datetime:
    """Parse by position, because strptime takes ten times as long and this runs for each turn."""
    return datetime.fromisoformat(f"{value[26:30]}-{_MONTHS[value[4:7]]}-{value[8:10]}T{value[11:19]}{value[20:25]}")


def _written_time(value: str) -> datetime | None:
    """Read a date in lower case by the kinds of its parts; return None if a part is missing, unknown or there twice."""
    found: dict[str, str] = {}
    for token in _TIME_TOKEN.finditer(value.partition("(")[0]):  # JavaScript adds the zone's name in brackets
        kind, text = str(token.lastgroup), token.group()
        if kind == "word":
            if text in ("t", "at") or text[:3] in _WEEKDAYS:
                continue
            month = _MONTHS.get(text[:3].capitalize())
            kind = "month" if month else "noon" if text in ("am", "pm") else "zone"
            text = month or _ZONES.get(text, text)
        elif kind == "number":
            kind = "year" if len(text) == 4 else "day"
        if kind == "offset" and found.get("zone") == "+00:00":  # GMT+0200, +0000 UTC
            del found["zone"]
        elif kind == "zone" and text == "+00:00" and "offset" in found:
            continue
        if kind in found or kind == "other":
            return None
        found[kind] = text
    if not ("ymd" in found) ^ ({"year", "month", "day"} <= found.keys()):
        return None
    year, month, day = (
        re.split("[-/.]", found["ymd"]) if "ymd" in found else (found[n] for n in ("year", "month", "day"))
    )
    hour, _, rest = found.get("clock", "0:00").partition(":")
    if noon := found.get("noon"):
        hour = str(int(hour) % 12 + (12 if noon == "pm" else 0))
    zone = found.get("offset") or found.get("zone", "")
    return datetime.fromisoformat(f"{year}-{int(month):02}-{int(day):02}T{int(hour):02}:{rest}{zone}")


def known_sender(value: Any) -> Sender | None:
    """Return the side that *value* names, a role or an object such as an author; None if it is unknown."""
    return _sender({"sender": value}, SENDER_FIELDS)

"""Which column of a file becomes which field of a document: given with ``--map``, or known by its name."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from domain.text import one_line
from error_handler import ConfigurationError

FORMATS = ("auto", "zendesk", "intercom", "freshdesk", "chatwoot", "twcs")
FIELDS = ("text", "sender", "created_at", "conversation_number", "subject", "channel", "private")

# Names as ``plain_name`` gives them; the first one that the file has counts. Names of a message are before those of the
# whole conversation.
_NAMES: dict[str, tuple[str, ...]] = {
    "text": tuple(
        "text plainbody bodytext body messagetext messagebody message commentbody commenttext comment content "
        "descriptiontext description question query inquiry customermessage details feedback review narrative "
        "htmlbody messagehtml descriptionhtml".split()
    ),
    "sender": tuple(
        "messageauthortype sendertype authortype senderrole authorrole usertype participanttype fromtype role inbound "
        "incoming isinbound isincoming direction sender author speaker participant from".split()
    ),
    "created_at": tuple(
        "messagecreatedat sentat senttime messagetime timestamp createdat createdtime createddate createdon created "
        "creationdate datecreated receivedat datereceived submittedat submissiondate openedat opened dateopened "
        "startedat conversationcreatedat ticketcreatedat datetime date time".split()
    ),
    "conversation_number": tuple(
        "conversationnumber conversationid ticketid ticketnumber ticketno caseid casenumber threadid chatid sessionid "
        "issueid dialogueid dialogid requestid ticket case conversation thread".split()
    ),
    "subject": ("subject", "ticketsubject", "emailsubject", "title", "conversationsubject", "sourcesubject"),
    "channel": tuple(
        "channel via viachannel sourcechannel sourcetype conversationchannel ticketchannel medium".split()
    ),
    "private": ("private", "isprivate", "internal", "isinternal", "public", "ispublic"),
}
# What names of a help desk mean beside, or before, the general ones.
_OF_DESKS: dict[str, dict[str, tuple[str, ...]]] = {
    "zendesk": {"conversation_number": ("ticketid", "id"), "created_at": ("createdat",)},
    "intercom": {"private": ("messagetype", "parttype"), "channel": ("conversationchannel", "sourcetype", "channel")},
    "freshdesk": {"channel": ("source",), "created_at": ("createdtime",)},
    "chatwoot": {"sender": ("messagetype", "sendertype"), "text": ("content",)},
}
# A table with all names of one of these sets is of that help desk.
_SIGNS: tuple[tuple[str, frozenset[str]], ...] = (
    ("twcs", frozenset({"tweetid"})),
    ("zendesk", frozenset({"summationcolumn"})),
    ("zendesk", frozenset({"id", "subject", "requester"})),
    ("intercom", frozenset({"conversationid", "messageauthortype"})),
    ("intercom", frozenset({"conversationid", "parttype"})),
    ("chatwoot", frozenset({"conversationid", "messagetype", "content"})),
    ("freshdesk", frozenset({"ticketid", "subject", "createdtime"})),
)
_NOT_PLAIN = re.compile(r"[\W_]+")
# A name of a column: at most three words. The first row of a table without a header has texts, numbers, dates or addresses.
_NAME = re.compile(r"[^\W\d][\w.()/#-]{0,30}( [\w.()/#-]{1,30}){0,2}(?<!\.)")


@dataclass(frozen=True, slots=True)
class Options:
    """How a file is read, as the flags of the import give it.

    *maps* maps a field to a column or a dotted path; an empty path leaves the field out. *is_day_first* settles dates such
    as 03/04/2026 (None: the column decides). With *private_notes*, notes of agents among themselves become turns. With
    *adds_status*, conversations without a status are pending.
    """

    layout: str = "auto"
    maps: Mapping[str, str] = field(default_factory=dict)
    dropped: Sequence[str] = ()
    customer_roles: frozenset[str] = frozenset()
    is_day_first: bool | None = None
    encoding: str | None = None
    private_notes: bool = False
    adds_status: bool = True


@dataclass(frozen=True, slots=True)
class Layout:
    """The columns of one file by field; *is_own* is True if it is the product's own layout of messages.

    *name* is a help desk, or ``table``. *clock* is the column with the time of day if ``created_at`` is a date alone, or empty.
    """

    name: str
    columns: dict[str, str]
    is_own: bool = False
    clock: str = ""


def plain_name(name: str) -> str:
    """Return *name* in lower case, letters and digits only: ``Created at``, ``created_at`` and ``createdAt`` are equal."""
    return _NOT_PLAIN.sub("", name).casefold()


@functools.lru_cache(10_000)
def key_name(name: str) -> str:
    """Return *name* as a key of ``metadata``: ``Ticket form`` becomes ``ticket_form``."""
    return _NOT_PLAIN.sub("_", name).strip("_").lower() or "column"


def parsed_maps(values: Iterable[str]) -> dict[str, str]:
    """Return the pairs of ``--map FIELD=COLUMN``."""
    maps = {}
    for value in values:
        name, sign, column = value.partition("=")
        name = name.strip().lower()
        if not sign or name not in FIELDS:
            raise ConfigurationError(
                f"--map {one_line(value, 60)}: expected FIELD=COLUMN with a FIELD of {', '.join(FIELDS)}."
            )
        maps[name] = column.strip()
    return maps


def desk_of(columns: Iterable[str]) -> str:
    """Return the help desk whose table has these *columns*, or ``table``."""
    names = {plain_name(name) for name in columns}
    return next((desk for desk, signs in _SIGNS if signs <= names), "table")


def is_message(columns: Iterable[str]) -> bool:
    """Return whether a record with these *columns* is one message of a conversation: it has a number and a sender."""
    names = {plain_name(name) for name in columns}
    return all(names.intersection(_NAMES[name]) for name in ("conversation_number", "sender"))


def layout_with(columns: Sequence[str], options: Options, desk: str, place: str) -> Layout:
    """Return the layout of a file of *desk* with these *columns*; *place* names it in errors.

    Raises:
        ConfigurationError: A column that a flag names does not exist, or none is known to hold the text.
    """
    by_name = {plain_name(name): name for name in reversed(columns)}
    chosen: dict[str, str] = {}
    for name, column in options.maps.items():
        if column:
            chosen[name] = column if "." in column and column not in columns else _existing(column, columns, place)
    taken = set(chosen.values())
    of_desk = _OF_DESKS.get(desk, {})
    for name in FIELDS:
        for candidate in (*of_desk.get(name, ()), *_NAMES[name]) if name not in options.maps else ():
            if candidate in by_name and by_name[candidate] not in taken:
                chosen[name] = by_name[candidate]
                taken.add(chosen[name])
                break
    has_ticket = "subject" in chosen or "sender" in chosen
    if "conversation_number" not in {*chosen, *options.maps} and has_ticket and "id" in by_name:
        chosen["conversation_number"] = by_name["id"]
    is_query = "text" in columns and not {"conversation_number", "sender"} & chosen.keys()
    if is_query and chosen.get("created_at", "").lower() == "timestamp" and "created_at" not in options.maps:
        del chosen["created_at"]  # metadata.timestamp is its place in the product's own layout of single queries
    if not {"text", "subject"} & chosen.keys():
        raise ConfigurationError(
            f"{place}: the column text is missing, and no other column is known to hold the text. Name it with --map "
            f"text=COLUMN; {_listed(columns)}."
        )
    is_own = {"conversation_number", "sender", "text"} <= {name.strip().lower() for name in columns}
    clock = by_name.get("time", "") if plain_name(chosen.get("created_at", "")) == "date" else ""
    return Layout(desk, chosen, is_own, "" if clock in taken else clock)


def named(columns: Sequence[str]) -> str:
    """Return *columns* for a message, at most 40 of them."""
    return ", ".join(one_line(column, 40) for column in columns[:40]) + (", ..." if len(columns) > 40 else "")


def _listed(columns: Sequence[str]) -> str:
    """Return *columns* for an error, unless they may be the first row of a table without a header: texts of customers."""
    if len(columns) > 1 and all(map(_NAME.fullmatch, columns)):
        return f"the columns are {named(columns)}"
    return "a table needs a header with the names of its columns, so add one if it starts with a row"


def require_columns(dropped: Iterable[str], columns: Sequence[str], place: str) -> list[str]:
    """Return the columns that ``--drop-column`` names, as the file spells them."""
    return [_existing(name, columns, place) for name in dropped]


def _existing(column: str, columns: Sequence[str], place: str) -> str:
    for name in columns:
        if name == column or plain_name(name) == plain_name(column):
            return name
    raise ConfigurationError(f"{place}: there is no column {one_line(column, 40)}; {_listed(columns)}.")


def take(record: dict[str, Any], path: str) -> Any:
    """Remove the value at *path* (names with dots between them) from *record* and return it; None if there is none."""
    if path in record:
        return record.pop(path)
    head, _, rest = path.partition(".")
    inner = record.get(head)
    if not rest or not isinstance(inner, dict):
        return None
    value = take(inner, rest)
    if not inner:
        del record[head]
    return value


def drop(record: Any, path: str) -> bool:
    """Remove the values at *path* from *record*, those inside lists included; return whether there was one."""
    if isinstance(record, list):
        return any([drop(item, path) for item in record])
    if not isinstance(record, dict):
        return False
    if path in record:
        del record[path]
        return True
    head, _, rest = path.partition(".")
    return bool(rest) and head in record and drop(record[head], rest)


def values_at(record: Any, path: str) -> Iterator[Any]:
    """Yield the values at *path* in *record*, those inside lists included."""
    if isinstance(record, list):
        for item in record:
            yield from values_at(item, path)
    elif isinstance(record, dict):
        head, _, rest = path.partition(".")
        if path in record:
            yield record[path]
        elif rest and head in record:
            yield from values_at(record[head], rest)


def without_empty(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of *record* that hold something, under names that MongoDB queries can use."""
    kept: dict[str, Any] = {}
    for name, value in record.items():
        if value is None or value in ("", [], {}):
            continue
        key = key_name(name)
        while key in kept:
            key += "_"
        kept[key] = value
    return kept

"""One conversation, or the part of it that one row holds, on its way to a document."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from aggregator import entry_text, known_sender, parse_time
from domain.conversation import Sender
from help_desks.columns import Options
from help_desks.findings import Findings
from help_desks.times import DateOrder, is_ambiguous
from storage.extended_json import Document

# What help desks write that has another meaning elsewhere, or none.
SENDERS: dict[str, dict[str, Sender | Literal["event"]]] = {
    "chatwoot": {
        **dict.fromkeys(("0", "incoming", "contact"), "customer"),
        **dict.fromkeys(("1", "3", "outgoing", "template", "user", "agentbot", "agent_bot"), "agent"),
        **dict.fromkeys(("2", "activity"), "event"),
    },
    "intercom": {"team": "agent"},
}
# pandas makes 1.0 of a truth value beside gaps, and spreadsheets write truth values in the language of their user.
TRUE = frozenset("true 1 1.0 yes t y wahr ja vrai oui verdadero sí vero verdadeiro sim waar prawda tak".split())
FALSE = frozenset("false 0 0.0 no f n falsch nein faux non falso não onwaar nee fałsz nie".split())
_PUBLIC = frozenset(("", "none", "public", "external"))


@dataclass(slots=True)
class Part:
    """Messages of one conversation; *fields* are those of the top level, *metadata* the others."""

    number: str | None
    messages: list[Document] = field(default_factory=list)
    fields: Document = field(default_factory=dict)
    metadata: Document = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Judge:
    """Decides about the values of one file, and notes what is special about them."""

    options: Options
    findings: Findings
    desk: str = "table"
    dates: DateOrder = field(default_factory=DateOrder)

    def sender(self, value: Any, place: str, direction: bool = False) -> Any:
        """Return ``customer`` or ``agent``, ``event``, or *value* itself if the aggregator reads it or nobody can.

        With *direction*, *value* is the truth value of a column such as ``incoming``.
        """
        name = str(value).strip().lower() if isinstance(value, str | int | bool) else ""
        if direction and name in TRUE | FALSE:
            return "customer" if name in TRUE else "agent"
        if name in self.options.customer_roles:
            return "customer"
        if side := SENDERS.get(self.desk, {}).get(name):
            return side
        if known_sender(value) is None:
            self.findings.note(
                "row", "with a sender that is not recognised; --customer-role NAME makes NAME a customer", place
            )
        return value

    def time(self, value: Any, place: str) -> Any:
        """Return *value* if it is a readable time, the date that it means, or the unreadable *value* with a note."""
        if value in (None, "") or parse_time(value) is not None:
            return value
        at = self.dates.numeric(value)
        if at is None:
            remedy = "; --dates day-first or month-first decides" if is_ambiguous(value) else ""
            what = "in which day and month could be exchanged" if remedy else "that cannot be read"
            self.findings.note("time", f"{what}, kept as text{remedy}", place)
        return value if at is None else at

    def is_note(self, value: Any, is_public: bool, place: str) -> bool:
        """Return whether *value* marks a private note that is left out; *is_public*: it is true for a public message."""
        name = str(value).strip().lower()
        is_private = name.startswith(("note", "private", "internal")) or name in (FALSE if is_public else TRUE)
        if not is_private and self.desk != "intercom" and name not in TRUE | FALSE | _PUBLIC:
            self.findings.note(
                "message", "of which it is not clear whether it is a private note; imported as a turn", place
            )
        if is_private and not self.options.private_notes:
            self.findings.note(
                "private note", "left out; --private-notes imports private notes as turns of the agent", place
            )
            return True
        return False


def is_deleted(record: Mapping[str, Any]) -> bool:
    """Return whether *record* is a message of Chatwoot whose text was replaced by a sentence that says it was deleted."""
    attributes = record.get("content_attributes")
    return isinstance(attributes, dict) and attributes.get("deleted") is True


def message(sender: Any, at: Any, text: Any, metadata: Mapping[str, Any] | None = None) -> Document:
    """Return a message without its empty fields; the text stays."""
    fields = {
        "sender": sender,
        "timestamp": at,
        "text": _text(text),
    }
    made = {name: value for name, value in fields.items() if name == "text" or value not in (None, "")}
    return {**made, "metadata": dict(metadata)} if metadata else made


def _text(value: Any) -> str:
    if value is None or isinstance(value, str):
        return value or ""
    if isinstance(value, list) and all(isinstance(part, str) for part in value):
        return "\n".join(value)
    return entry_text({"text": value}) or str(value)  # an object that holds the text, or a number


def joined(parts: Sequence[Part]) -> Part:
    """Return the conversation of *parts*.

    Metadata that is equal in all parts is that of the conversation; the rest stays with its message, as does a subject or
    channel that is not the first one.
    """
    whole = Part(parts[0].number)
    common: Document = {}
    for name in dict.fromkeys(name for part in parts for name in part.metadata):
        values = [part.metadata[name] for part in parts if name in part.metadata]
        if all(value == values[0] for value in values):
            common[name] = values[0]
    for part in parts:
        own = {name: value for name, value in part.metadata.items() if name not in common}
        for name, value in part.fields.items():
            if whole.fields.setdefault(name, value) != value and name != "created_at":  # which is in the message
                own[name] = value
        whole.messages += [
            {**each, "metadata": {**each.get("metadata", {}), **own}} if own else each for each in part.messages
        ]
    whole.metadata = common
    return whole


def ordered(messages: list[Document]) -> list[Document]:
    """Return *messages* in the order of time if each one has a readable time."""
    times = [parse_time(each.get("timestamp")) for each in messages]
    dated = [(at, place) for place, at in enumerate(times) if at is not None]
    return [messages[place] for _, place in sorted(dated)] if len(dated) == len(messages) else messages


def document_of(part: Part, desk: str, findings: Findings, place: str) -> Document:
    """Return the document of the conversation *part*; a conversation without a text has that of its subject."""
    subject = part.fields.get("subject")
    if subject and not any(str(each["text"]).strip() for each in part.messages):
        at = part.fields.get("created_at")
        rest = part.messages[0] if part.messages else message("customer", at, "")
        part.messages = [{"sender": "customer", **rest, "text": str(subject)}, *part.messages[1:]]
        findings.note("conversation", "without a text; the subject is the text", place)
    made: Document = {"conversation_number": part.number, "messages": ordered(part.messages)}
    if part.number is None:
        del made["conversation_number"]
    elif desk != "table":
        made = {"_id": f"{desk}-{part.number}", **made}
    return {**made, **top_level(part, made["messages"])}


def top_level(part: Part, messages: Iterable[Document]) -> Document:
    """Return channel, subject and created_at (a date, if it can be read), and the metadata, as far as they are there."""
    times = [at for each in messages if (at := parse_time(each.get("timestamp"))) is not None]
    created = part.fields.get("created_at")
    at = parse_time(created)
    if at is None and times:
        at = min(times)
    fields = {
        "channel": part.fields.get("channel"),
        "subject": part.fields.get("subject"),
        "created_at": created if at is None else at,
        "metadata": part.metadata,
    }
    return {name: value for name, value in fields.items() if value not in (None, "", {})}

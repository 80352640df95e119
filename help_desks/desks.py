"""JSON as Zendesk, Intercom, Freshdesk and Chatwoot export it: one record is one conversation.

Written from the documentation that docs/import.md lists. What no function here reads becomes metadata.
"""

from __future__ import annotations

import html
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from aggregator import document_shape, known_sender
from domain.plain_text import plain_text
from help_desks.columns import is_message, take, without_empty
from help_desks.findings import Findings
from help_desks.parts import Judge, Part, is_deleted, message
from storage.extended_json import Document

_FORM = "left out: another form of the text"
_FRESHDESK_CHANNELS = {
    1: "Email",
    2: "Portal",
    3: "Phone",
    7: "Chat",
    9: "Feedback Widget",
    10: "Outbound Email",
}
_FRESHDESK_STATUSES = {2: "Open", 3: "Pending", 4: "Resolved", 5: "Closed"}
_LISTS = ("tickets", "conversations", "results", "payload", "data", "items", "records")
_WRAPPERS = ("ticket", "conversation", "helpdesk_ticket")  # of one record; the last one is that of Freshdesk's exports
_BY_CUSTOMERS = ("comment", "open", "quick_reply")  # parts of Intercom; the other ones are events
_ZENDESK_TEXTS = ("plain_body", "body", "html_body")
_BY_PROGRAMS = ("rule", "system")  # channels of Zendesk


@dataclass(slots=True)
class Fields:
    """A record whose fields are taken one by one, and counted as ``prefix`` + name; the rest becomes metadata."""

    record: Document
    findings: Findings
    prefix: str = ""
    rest_target: str = "metadata"

    def take(self, path: str, target: str) -> Any:
        value = take(self.record, path)
        self.findings.became(self.prefix + path, target, value not in (None, "", [], {}))
        return value

    def text(self, names: tuple[str, ...], target: str) -> str:
        """Take all forms of one text and return the first one that is there."""
        found = ""
        for name in names:
            if name in self.record:
                form = self.take(name, _FORM if found else target)
                if not found and isinstance(form, str) and form.strip():
                    found = form
        return found

    def rest(self) -> Document:
        """Return what is left, and count the record as one that is read."""
        self.findings.totals[self.prefix] += 1
        for name, value in self.record.items():
            self.findings.became(self.prefix + name, f"{self.rest_target}.{name}", value not in (None, "", [], {}))
        return without_empty(self.record)


@dataclass(frozen=True, slots=True)
class Reader:
    """Reads the records of one file. *users* maps ids to roles, as far as the file lists its users."""

    judge: Judge
    users: Mapping[str, str] = field(default_factory=dict)

    def read(self, record: Document, place: str) -> Part:
        """Return the conversation of *record*."""
        ticket = Fields(record, self.judge.findings)
        return _READERS[self.judge.desk](self, ticket, place)

    def _messages(self, value: Any, prefix: str) -> Iterator[Fields]:
        for each in value if isinstance(value, list) else ():
            if isinstance(each, dict):
                yield Fields(dict(each), self.judge.findings, prefix, "messages.metadata")

    def _zendesk(self, ticket: Fields, place: str) -> Part:
        part = Part(_number(ticket.take("id", "conversation_number")))
        roles, asked = _people(ticket.record)
        part.fields = _top(ticket, channel="via.channel", subject="subject", created_at="created_at")
        comments = ticket.take("comments", "messages")
        if not comments and "audits" in ticket.record:
            comments = self._audit_comments(ticket.take("audits", "messages"), place)
        private: set[str] = set()
        for comment in self._messages(comments, "comments."):
            if self._is_note(comment, "public", place):
                private |= {_said(comment.record[name]) for name in _ZENDESK_TEXTS if name in comment.record}
                continue
            role = self._role(comment, asked, roles)
            at = self.judge.time(comment.take("created_at", "messages.timestamp"), place)
            if isinstance(plain := comment.record.get("plain_body"), str):  # Zendesk removes tags from it, not entities
                comment.record["plain_body"] = html.unescape(plain).replace("\xa0", " ")
            text = comment.text(_ZENDESK_TEXTS, "messages.text")
            part.messages.append(message(role, at, text, comment.rest()))
        first = _said(part.messages[0]["text"]) if part.messages else None
        description = ticket.record.get("description")
        if isinstance(description, str) and _said(description) in private:
            ticket.take("description", "left out: repeats a private comment")
        elif first is None or not isinstance(description, str) or _said(description) == first:
            target = "messages.text" if first is None else "left out: repeats the first comment"
            text = ticket.take("description", target)
            if first is None and text:
                at = self.judge.time(part.fields.get("created_at"), place)
                part.messages.append(message("customer", at, text))
        part.metadata = ticket.rest()
        return part

    def _audit_comments(self, audits: Any, place: str) -> list[Document]:
        found = []
        for audit in audits if isinstance(audits, list) else ():
            events = audit.get("events") if isinstance(audit, dict) else None
            for event in events if isinstance(events, list) else ():
                if isinstance(event, dict) and event.get("type") in ("Comment", "VoiceComment"):
                    found.append({"author_id": audit.get("author_id"), "created_at": audit.get("created_at"), **event})
                else:
                    self.judge.findings.note("audit event", "left out: only comments are imported", place)
        return found

    def _role(self, comment: Fields, requester: Any, roles: Mapping[str, str]) -> str:
        """Return the side of a comment: that of its author's role, else the requester is the customer.

        A comment without an author is the customer's unless a program wrote it.
        """
        author, via = comment.take("author_id", "messages.sender"), comment.record.get("via")
        named = comment.record.get("author")
        if author is None and named is not None:
            author = named.get("id") if isinstance(named, dict) else named
        role = self.users.get(str(author)) or roles.get(str(author))
        role = role or (named.get("role") if isinstance(named, dict) else None)
        if role:
            return "customer" if role == "end-user" else "agent"
        if author is None:
            return "agent" if isinstance(via, dict) and via.get("channel") in _BY_PROGRAMS else "customer"
        return "customer" if str(author) == str(requester) else "agent"

    def _intercom(self, talk: Fields, place: str) -> Part:
        part = Part(_number(talk.take("id", "conversation_number")))
        part.fields = _top(talk, channel="source.type", subject="source.subject", created_at="created_at")
        name = "conversation_message" if "conversation_message" in talk.record else "source"  # of API 1.x
        source, inner = talk.take(name, "messages"), talk.take("conversation_parts", "messages")
        parts = inner.get("conversation_parts") if isinstance(inner, dict) else inner
        total = inner.get("total_count") if isinstance(inner, dict) else None
        if isinstance(total, int) and isinstance(parts, list) and total > len(parts):
            self.judge.findings.note("conversation", "with fewer parts than total_count; Intercom exports 500", place)
        started = part.fields.get("created_at")
        first = [{"created_at": started, **source}] if isinstance(source, dict) else []
        for prefix, values in ((f"{name}.", first), ("conversation_parts.", parts)):
            for each in self._messages(values, prefix):
                if self._is_note(each, "part_type", place):
                    continue
                text = each.text(("body",), "messages.text")
                if not text:
                    self.judge.findings.note("event", "left out: no text, such as an assignment", place)
                    continue
                sender = self.judge.sender(each.take("author.type", "messages.sender"), place)
                if each.record.get("part_type", "comment") not in _BY_CUSTOMERS and known_sender(sender) != "agent":
                    self.judge.findings.note("event", "left out: no message of the customer", place)
                    continue
                at = self.judge.time(each.take("created_at", "messages.timestamp"), place)
                part.messages.append(message(sender, at, text, each.rest()))
        part.metadata = talk.rest()
        return part

    def _freshdesk(self, ticket: Fields, place: str) -> Part:
        """Read a ticket of the API v2, or of an account export, whose number is ``display_id`` and whose replies are ``notes``."""
        is_export = "display_id" in ticket.record
        part = Part(_number(ticket.take("display_id" if is_export else "id", "conversation_number")))
        source, requester = ticket.record.get("source"), ticket.record.get("requester_id")
        part.fields = _top(ticket, channel="source", subject="subject", created_at="created_at")
        if isinstance(source, int):
            part.fields["channel"] = _FRESHDESK_CHANNELS.get(source, str(source))
        status = ticket.record.get("status")
        if isinstance(status, int):
            ticket.record["status"] = _FRESHDESK_STATUSES.get(status, status)
        text = ticket.text(("description_text", "description", "description_html"), "messages.text")
        if text:
            at = self.judge.time(part.fields.get("created_at"), place)
            part.messages.append(message("agent" if source == 10 else "customer", at, text))  # 10: outbound e-mail
        name = "notes" if is_export and "conversations" not in ticket.record else "conversations"
        for each in self._messages(_unwrapped_notes(ticket.take(name, "messages")), f"{name}."):
            if self._is_note(each, "private", place):
                continue
            if each.record.get("deleted") is True:
                self.judge.findings.note("message", "left out: deleted", place)
                continue
            incoming = each.take("incoming", "messages.sender")
            if incoming is None and is_export:
                incoming = requester is not None and each.record.get("user_id") == requester
            at = self.judge.time(each.take("created_at", "messages.timestamp"), place)
            text = each.text(("body_text", "body", "body_html"), "messages.text")
            part.messages.append(message("customer" if incoming else "agent", at, text, each.rest()))
        part.metadata = ticket.rest()
        return part

    def _chatwoot(self, talk: Fields, place: str) -> Part:
        part = Part(_number(talk.take("id", "conversation_number")))
        channel = "channel" if talk.record.get("channel") else "meta.channel"
        created = "created_at" if talk.record.get("created_at") else "timestamp"
        part.fields = _top(talk, channel=channel, subject="additional_attributes.mail_subject", created_at=created)
        for each in self._messages(talk.take("messages", "messages"), "messages."):
            kind = each.record.get("message_type", each.record.get("sender_type"))
            sender = self.judge.sender(kind, place)
            if sender == "event":
                self.judge.findings.note("activity message", "left out: written by Chatwoot, not by a person", place)
                continue
            if self._is_note(each, "private", place):
                continue
            if is_deleted(each.record):
                self.judge.findings.note("message", "left out: deleted", place)
                continue
            each.take("message_type", "messages.sender")
            at = self.judge.time(each.take("created_at", "messages.timestamp"), place)
            text = each.text(("content", "processed_message_content"), "messages.text")
            part.messages.append(message(sender, at, text, each.rest()))
        part.metadata = talk.rest()
        return part

    def _is_note(self, each: Fields, name: str, place: str) -> bool:
        value = each.record.get(name)
        if name == "public":
            return self.judge.is_note(True if value is None else value, True, place)
        return self.judge.is_note(value, False, place)


_READERS: dict[str, Callable[[Reader, Fields, str], Part]] = {
    "zendesk": Reader._zendesk,
    "intercom": Reader._intercom,
    "freshdesk": Reader._freshdesk,
    "chatwoot": Reader._chatwoot,
}


def desk_of_record(record: Mapping[str, Any]) -> str:
    """Return the help desk that writes conversations such as *record*; ``own`` or ``table`` if none does."""
    keys = record.keys()
    if "conversation_parts" in record or (record.get("type") == "conversation" and "source" in record):
        return "intercom"
    if _has_items(record.get("messages"), "message_type"):
        return "chatwoot"
    is_export = "display_id" in record and bool(keys & {"notes", "description_html"})
    if is_export or "description_text" in record or _has_items(record.get("conversations"), "body_text"):
        return "freshdesk"
    has_comments = _has_items(record.get("comments"), "body", "plain_body", "html_body")
    if has_comments or "audits" in record or ("via" in record and keys & {"requester_id", "requester"}):
        return "zendesk"
    shape = document_shape(record)
    if shape in ("tweets", "messages"):
        return "own"
    return "own" if isinstance(record.get("text"), str) and not is_message(record) else "table"


def unwrapped(value: Any, place: str) -> Iterator[tuple[str, Any, dict[str, str]]]:
    """Yield the records in *value*, a page of an API or one record, with their places and the roles of listed users."""
    roles: dict[str, str] = {}
    if isinstance(value, dict) and "id" not in value and "_id" not in value and not document_shape(value):
        users = value.get("users")
        if isinstance(users, list):
            roles = {str(user.get("id")): str(user.get("role", "")) for user in users if isinstance(user, dict)}
        for name in _LISTS:
            inner = value.get(name)
            if isinstance(inner, dict):  # Chatwoot: data.payload
                yield from unwrapped(inner, place)
                return
            if isinstance(inner, list) and all(isinstance(each, dict) for each in inner):
                for number, each in enumerate(inner, 1):
                    yield f"{place}, {name} {number}", each, roles
                return
        for name in _WRAPPERS:
            if isinstance(value.get(name), dict):
                value = {**value.pop(name), **value}
                if roles:
                    value.pop("users")
                break
    yield place, value, roles


def _people(ticket: Mapping[str, Any]) -> tuple[dict[str, str], Any]:
    """Return the roles by id of the people whom a ticket of Zendesk holds as objects, and the id of its requester."""
    people = [person for name in ("requester", "submitter", "assignee") if isinstance(person := ticket.get(name), dict)]
    roles = {str(person.get("id")): str(person["role"]) for person in people if person.get("role")}
    requester = ticket.get("requester")
    inner = requester.get("id") if isinstance(requester, dict) else requester
    return roles, ticket.get("requester_id", inner)


def _unwrapped_notes(notes: Any) -> Any:
    """Return the notes of Freshdesk, of which API 1 gives each one as ``{"note": {...}}``."""
    if not isinstance(notes, list):
        return notes
    return [each["note"] if isinstance(each, dict) and isinstance(each.get("note"), dict) else each for each in notes]


def _top(record: Fields, **paths: str) -> Document:
    values = {name: record.take(path, name) for name, path in paths.items()}
    return {name: value for name, value in values.items() if value not in (None, "")}


def _said(text: Any) -> str:
    """Return what *text* says, for comparisons: its forms differ in white space, entities and tags."""
    return " ".join(plain_text(html.unescape(str(text))).split())


def _number(value: Any) -> str | None:
    return None if value in (None, "") else str(value)


def _has_items(value: Any, *names: str) -> bool:
    """Return whether *value* is a list with an object that has one of the fields *names*."""
    return isinstance(value, list) and any(
        isinstance(each, dict) and not each.keys().isdisjoint(names) for each in value
    )

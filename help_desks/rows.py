"""Rows, of a table or of JSON records without a known shape, become documents; rows of one conversation are joined."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aggregator import DIRECTION_FIELDS, parse_time
from error_handler import ConfigurationError
from help_desks.columns import Layout, drop, key_name, plain_name, take, without_empty
from help_desks.findings import Findings
from help_desks.parts import Judge, Part, document_of, is_deleted, joined, message, top_level
from help_desks.table import ROUNDED, temporary_table
from storage.extended_json import Document, bson_decode, bson_encode

Record = dict[str, Any]

_DIRECTIONS = frozenset(plain_name(name) for name in DIRECTION_FIELDS)
_NO_NUMBER = frozenset(("", "null", "none", "nan", "\\n", "<na>"))  # databases and pandas write a missing value so
_FIELDS = {
    "text": "messages.text",
    "sender": "messages.sender",
    "created_at": "messages.timestamp, created_at",
    "private": "marks private notes",
}


@dataclass(frozen=True, slots=True)
class RowReader:
    """Reads the rows of one file with one *layout*; *dropped* columns are left out."""

    path: Path
    layout: Layout
    judge: Judge
    dropped: tuple[str, ...] = ()

    @property
    def findings(self) -> Findings:
        return self.judge.findings

    def documents(self, rows: Iterable[tuple[str, Record]]) -> Iterator[Document]:
        """Yield the documents of *rows* (place, row): conversations if there is a number or a sender, else queries."""
        columns = self.layout.columns
        rows = itertools.chain.from_iterable(self._expanded(row, place) for place, row in rows)
        if not {"conversation_number", "sender"} & columns.keys():
            return self._queries(rows)
        return self._grouped(rows) if "conversation_number" in columns else self._single(rows)

    def _expanded(self, row: Record, place: str) -> Iterator[tuple[str, Record]]:
        """Yield *row*, or one row for each message if the path of the text goes through a list of objects."""
        *names, _ = self.layout.columns.get("text", "").split(".")
        inner: Any = row
        path: list[str] = []
        while names and isinstance(inner, dict):
            path.append(names.pop(0))
            inner = inner.get(path[-1])
        if not isinstance(inner, list):
            yield place, row
            return
        if "conversation_number" not in self.layout.columns:
            raise ConfigurationError(
                f"{self.path}: {'.'.join(path)} is a list of messages; add --map conversation_number=FIELD."
            )
        for each in inner or [{}]:
            yield place, _with(row, path, each)

    def _grouped(self, rows: Iterable[tuple[str, Record]]) -> Iterator[Document]:
        with temporary_table(self.path) as table:
            table.executemany("INSERT INTO entries (name, entry) VALUES (?, ?)", self._entries(rows))
            table.execute("CREATE INDEX names ON entries (name)")
            for (name,) in table.execute("SELECT name FROM entries GROUP BY name ORDER BY MIN(place)"):
                found = table.execute("SELECT entry FROM entries WHERE name = ? ORDER BY place", (name,))
                loaded = [bson_decode(entry) for (entry,) in found]
                parts = [Part(name, each["messages"], each["fields"], each["metadata"]) for each in loaded]
                yield self._document(joined(parts), loaded[0]["place"])

    def _entries(self, rows: Iterable[tuple[str, Record]]) -> Iterator[tuple[str, bytes]]:
        for place, row in rows:
            part = self._part(row, place)
            if part is None:
                continue
            if not part.number:
                column = self.layout.columns["conversation_number"]
                self.findings.note("row", f"left out: no value in the column {column}", place)
            elif ROUNDED.fullmatch(part.number):
                raise ConfigurationError(
                    f"{self.path}, {place}: a spreadsheet has rounded the conversation_number {part.number}, so several "
                    "conversations could have it; export the column as text."
                )
            else:
                entry = {"messages": part.messages, "fields": part.fields, "metadata": part.metadata, "place": place}
                try:
                    yield part.number, bson_encode(entry)
                except ValueError as exc:
                    raise ConfigurationError(
                        f"{self.path}, {place}: the row contains a value that MongoDB cannot store; correct or remove it."
                    ) from exc

    def _single(self, rows: Iterable[tuple[str, Record]]) -> Iterator[Document]:
        for place, row in rows:
            part = self._part(row, place)
            if part is not None:
                yield self._document(part, place)

    def _document(self, part: Part, place: str) -> Document:
        if self.layout.is_own and not part.metadata and not {"channel", "subject"} & part.fields.keys():
            # As every version has written it: the id of such a document is derived from its content.
            return {"conversation_number": part.number, "messages": part.messages}
        return document_of(part, self.layout.name, self.findings, place)

    def _part(self, row: Record, place: str) -> Part | None:
        """Return the part of a conversation in *row*; None if it is left out, with a note."""
        is_gone = is_deleted(row)
        taken, rest = self._taken(row), self._rest(row)
        columns = self.layout.columns
        if "private" in columns and self.judge.is_note(
            taken["private"], "public" in plain_name(columns["private"]), place
        ):
            return None
        sender: Any = "customer"
        if "sender" in columns:
            is_direction = plain_name(columns["sender"]) in _DIRECTIONS
            sender = (
                self.judge.sender(taken["sender"], place, is_direction) if taken["sender"] not in (None, "") else ""
            )
        if sender == "event":
            self.findings.note("activity message", "left out: written by the help desk, not by a person", place)
            return None
        if is_gone:
            self.findings.note("message", "left out: deleted", place)
            return None
        value = taken.get("conversation_number")
        number = "" if value is None else str(value).strip()
        part = Part(None if number.casefold() in _NO_NUMBER else number)
        at = self.judge.time(taken.get("created_at"), place)
        part.messages = [message(sender, at, taken.get("text"))]
        part.fields = {name: taken[name] for name in ("subject", "channel") if taken.get(name) not in (None, "")}
        if at not in (None, "") and parse_time(at) is None:
            part.fields["created_at"] = at
        part.metadata = rest
        return part

    def _queries(self, rows: Iterable[tuple[str, Record]]) -> Iterator[Document]:
        with temporary_table(self.path) as table:
            table.execute("CREATE UNIQUE INDEX names ON entries (name)")

            def is_first_text(name: str, text: str) -> bool:
                values = (name, hash(text))
                if table.execute("INSERT OR IGNORE INTO entries (name, entry) VALUES (?, ?)", values).rowcount:
                    return True
                found = table.execute("SELECT entry FROM entries WHERE name = ?", (name,)).fetchone()
                return bool(found[0] == values[1])

            for place, row in rows:
                yield self._query(row, place, is_first_text)

    def _query(self, row: Record, place: str, is_first_text: Callable[[str, str], bool]) -> Document:
        taken = self._taken(row)
        text = str(taken.get("text") or taken.get("subject") or "")
        document_id = next((str(take(row, name)) for name in ("_id", "id") if row.get(name)), "")
        if ROUNDED.fullmatch(document_id):
            what = "rounded by a spreadsheet and replaced by one of the content"
            self.findings.note("id", what, f"{place}, {document_id}")
            document_id = ""
        elif document_id and not is_first_text(document_id, text):
            what = "with the id of an earlier row but another text; the id is replaced by one of the content"
            self.findings.note("row", what, place)
            document_id = ""
        at = self.judge.time(taken.get("created_at"), place)
        part = Part(None, [], {**taken, "created_at": at}, self._rest(row))
        made: Document = {"_id": document_id} if document_id else {}
        return {**made, "text": text, "metadata": {}, **top_level(part, ())}

    def _taken(self, row: Record) -> dict[str, Any]:
        """Remove the mapped values from *row* and return them by field."""
        self.findings.totals[""] += 1
        for name in self.dropped:
            drop(row, name)
        taken = {}
        for name, column in self.layout.columns.items():
            value = take(row, column)
            if isinstance(value, float) and math.isnan(value):  # pandas writes it for a missing value
                value = None
            taken[name] = value
            self.findings.became(column, _FIELDS.get(name, name), value not in (None, ""))
        if ":" in str(clock := row.get(self.layout.clock)):
            at = f"{taken['created_at']} {clock}"
            if self.judge.dates.read(at) is not None:
                taken["created_at"] = at
                self.findings.became(self.layout.clock, _FIELDS["created_at"], True)
                del row[self.layout.clock]
        return taken

    def _rest(self, row: Record) -> Document:
        kept = without_empty(row)
        for name, value in row.items():
            self.findings.became(name, f"metadata.{key_name(name)}", value not in (None, "", [], {}))
        return kept


def _with(record: Record, names: Sequence[str], value: Any) -> Record:
    """Return a copy of *record* with *value* at the path of *names*; the old value there is not copied."""
    head, *rest = names
    new = _with(record[head], rest, value) if rest else value
    return {name: new if name == head else copy.deepcopy(item) for name, item in record.items()}

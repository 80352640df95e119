"""Source documents from files: tables, JSON and JSONL (Extended JSON), in any layout, also compressed with gzip.

Tables, JSONL and the elements of a JSON array are streamed; a page of an API, one JSON object, is read as a whole. The
rows of one conversation can be anywhere in a file, so they are grouped in a temporary SQLite table, which moves to disk
when it exceeds a few megabytes.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from aggregator import SENDER_FIELDS, TIME_FIELDS, known_sender
from domain.text import one_line
from error_handler import ConfigurationError
from help_desks import desks, rows, twcs
from help_desks.columns import Layout, Options, desk_of, drop, layout_with, named, require_columns, values_at
from help_desks.files import Row, TextFile, table_rows, text_file
from help_desks.findings import Findings
from help_desks.json_files import json_values
from help_desks.parts import Judge, document_of
from help_desks.times import DateOrder, date_order
from storage.extended_json import Document

logger = logging.getLogger(__name__)

SAMPLES = Path(__file__).parent.parent / "data" / "sample_conversations.jsonl"

_LOOKED_AT = 100  # records that decide about the layout of JSON
_PROGRESS_EVERY = 1000  # rows
_CONVERSATION_FIELDS = frozenset({"_id", "conversation_number", "status", "last_processed_at", "status_reason"})
_QUERY_FIELDS = frozenset({"_id", "text", "metadata", "processed", "processing_attempts", "status_reason"})
_SHAPES = "an object with tweets (a list), messages (a list) or text"


def read_documents(path: Path) -> Iterator[Document]:
    """Yield the documents of *path*, as ``Export.documents`` does; findings are logged as warnings."""
    export = Export(path)
    yield from export.documents()
    for line in export.findings.note_lines():
        logger.warning("%s: %s", path, line)


class Export:
    """The documents of one file, and what there is to report about it: ``findings``, complete after the last document.

    *on_rows* is called with the number of rows read so far, now and then.
    """

    def __init__(
        self, path: Path, options: Options | None = None, on_rows: Callable[[int], None] = lambda _: None
    ) -> None:
        self.findings = Findings()
        self.has_rows = False  # a row, or a record like one, is part of a conversation
        self._missing: set[str] = set()  # columns to drop that no record had so far
        self._path, self._options, self._on_rows = path, options or Options(), on_rows

    def documents(self) -> Iterator[Document]:
        """Yield the documents, ready for MongoDB; missing ``_id`` fields are not added.

        JSON holds one array, one page of an API, or one object per line. A missing status becomes pending, a missing
        ``processed`` False. Documents of labelled data sets (``gold``, or ``source`` with ``license``) lose the fields that
        are not part of their shape. The first row of a table holds the names of its columns.

        Raises:
            ConfigurationError: While iterating; the message names the file, the line, and the expected content.
                Documents already yielded stay valid.
        """
        file = text_file(self._path, self._options.encoding)
        if file.is_detected:
            self.findings.note("file", f"read as {file.encoding}, which was guessed; --encoding NAME changes it", "")
        yield from map(self._with_state, self._of_json(file) if file.is_json else self._of_table(file))
        for name in sorted(self._missing):
            self.findings.note("--drop-column", f"found no {one_line(name, 40)}", "")

    def _of_table(self, file: TextFile) -> Iterator[Document]:
        source = table_rows(file)
        place = f"{self._path}, line 1"
        header = _unique(next(source, (0, []))[1])
        if not header:
            raise ConfigurationError(f"{place}: the file is empty; expected a header, then a row for each message.")
        desk = desk_of(header) if self._options.layout == "auto" else self._options.layout
        if desk == "twcs" and not self._options.maps:
            header = [name.strip().lower() for name in header]
            self._require_twcs(header, place)
            self.findings.layout = "twcs"
            blank = dict.fromkeys(require_columns(self._options.dropped, header, place), "")
            lines = ((line, {**dict(zip(header, row, strict=True)), **blank}) for line, row in self._counted(source))
            yield from twcs.threads(self._path, lines, self.findings)
            return
        layout = layout_with(header, self._options, desk, place)
        dropped = tuple(require_columns(self._options.dropped, header, place))

        def records() -> Iterator[tuple[str, Row]]:
            for line, row in self._counted(source):
                yield f"line {line}", dict(zip(header, row, strict=True))

        def column(name: str) -> Iterator[str]:
            again = table_rows(file)
            next(again)
            place = header.index(name)
            return (row[place] for _, row in again if row[place])

        yield from self._reader(layout, column, dropped).documents(records())

    def _require_twcs(self, header: list[str], place: str) -> None:
        missing = [name for name in twcs.TWCS_COLUMNS if name not in header]
        if missing:
            raise ConfigurationError(
                f"{place}: the column {', '.join(missing)} is missing; expected {', '.join(twcs.TWCS_COLUMNS)}."
            )

    def _reader(
        self, layout: Layout, column: Callable[[str], Iterable[Any]], dropped: tuple[str, ...]
    ) -> rows.RowReader:
        order = DateOrder(self._options.is_day_first)
        name = layout.columns.get("created_at")
        if name and order.is_day_first is None:
            with contextlib.suppress(ConfigurationError):  # of damage further down: the rows before it are read first
                order = date_order(column(name))
        self.findings.layout, self.has_rows = layout.name, True
        return rows.RowReader(self._path, layout, Judge(self._options, self.findings, layout.name, order), dropped)

    def _of_json(self, file: TextFile) -> Iterator[Document]:
        self._missing = set(self._options.dropped)
        source = self._counted(self._records(file))
        first = list(itertools.islice(source, 1))
        desk = self._options.layout
        if desk == "twcs":
            raise ConfigurationError(f"{self._path}: --format twcs is a table, and this is JSON; leave the flag out.")
        if desk == "auto":
            desk = desks.desk_of_record(first[0][1]) if first and isinstance(first[0][1], dict) else "own"
        is_mapped = bool(self._options.maps)
        records = itertools.chain(first, source)  # what is added to first is in it, too
        if desk == "own" and not is_mapped:
            return (self._own(value, f"{self._path}, {place}") for place, value, _ in records)
        first += itertools.islice(source, _LOOKED_AT)
        keys = list(dict.fromkeys(key for _, value, _ in first if isinstance(value, dict) for key in value))
        if not is_mapped and (
            desk in ("zendesk", "intercom", "freshdesk") or (desk == "chatwoot" and "messages" in keys)
        ):
            return self._of_desk(desk, records)
        desk = desk_of(keys) if desk in ("table", "own") else desk
        return self._of_rows(file, desk, keys, first[0][0] if first else "line 1", records)

    def _of_desk(self, desk: str, records: Iterable[tuple[str, Any, dict[str, str]]]) -> Iterator[Document]:
        self.findings.layout = desk
        judge = Judge(self._options, self.findings, desk, DateOrder(self._options.is_day_first))
        for place, value, users in records:
            if not isinstance(value, dict):
                self.findings.note("record", f"left out: no conversation of {desk}", place)
                continue
            self._drop(value)
            part = desks.Reader(judge, users).read(value, place)
            if part.messages or part.fields.get("subject"):
                yield document_of(part, desk, self.findings, place)
            else:
                self.findings.note("conversation", "left out: neither a message nor a subject", place)

    def _of_rows(
        self,
        file: TextFile,
        desk: str,
        keys: list[str],
        first_place: str,
        records: Iterable[tuple[str, Any, dict[str, str]]],
    ) -> Iterator[Document]:
        layout = layout_with(keys, self._options, desk, f"{self._path}, {first_place}: expected {_SHAPES}")

        def values() -> Iterator[tuple[str, Document]]:
            for place, value, _ in records:
                if isinstance(value, dict):
                    self._drop(value)
                    yield place, value
                else:
                    self.findings.note("record", "left out: no JSON object", place)

        def column(name: str) -> Iterator[Any]:
            return (each for _, value, _ in self._records(file) for each in values_at(value, name) if each)

        return self._reader(layout, column, ()).documents(values())

    def _records(self, file: TextFile) -> Iterator[tuple[str, Any, dict[str, str]]]:
        for place, value in json_values(file):
            yield from desks.unwrapped(value, place)

    def _counted(self, source: Iterable[Any]) -> Iterator[Any]:
        for each in source:
            self.findings.rows += 1
            if not self.findings.rows % _PROGRESS_EVERY:
                self._on_rows(self.findings.rows)
            yield each

    def _own(self, document: Any, place: str) -> Document:
        """Return *document* with the fields of its shape; *place* names it in the error if it has no accepted shape."""
        fields: Document = document if isinstance(document, dict) else {}
        turns = {name for name in ("tweets", "messages") if isinstance(fields.get(name), list)}
        if not turns and not isinstance(fields.get("text"), str):
            raise ConfigurationError(f"{place}: expected {_SHAPES}; the fields are {named(list(fields)) or 'none'}.")
        if "gold" in fields or {"source", "license"} <= fields.keys():
            kept = _CONVERSATION_FIELDS | turns | {"text"} if turns else _QUERY_FIELDS
            what = "of a labelled data set; only the fields of its shape are imported"
            self.findings.note("document", what, place.rpartition(", ")[2])
            fields = {name: value for name, value in fields.items() if name in kept}
        self._drop(fields)
        if self._options.customer_roles or self._options.is_day_first is not None:
            fields |= {name: [self._judged(entry) for entry in fields[name]] for name in turns}
        return fields

    def _with_state(self, document: Document) -> Document:
        if "status" in document or "processed" in document:
            return document
        if not any(isinstance(document.get(name), list) for name in ("tweets", "messages")):
            return document | {"processed": False, "processing_attempts": 0}
        return document | {"status": "pending"} if self._options.adds_status else document

    def _drop(self, record: Document) -> None:
        self._missing -= {name for name in self._missing | set(self._options.dropped) if drop(record, name)}

    def _judged(self, entry: Any) -> Any:
        """Return the turn *entry* with the sender and the times that flags decide."""
        if not isinstance(entry, dict):
            return entry
        order = DateOrder(self._options.is_day_first)
        read = {name: order.numeric(entry.get(name)) for name in TIME_FIELDS}
        read["date"] = order.numeric(f"{entry.get('date')} {entry.get('time')}") or read["date"]
        times = {name: at for name, at in read.items() if at is not None}
        named = [entry[name] for name in SENDER_FIELDS if entry.get(name)]
        is_customer = any(str(one).strip().lower() in self._options.customer_roles for one in named)
        side = {"sender": "customer"} if is_customer and not any(map(known_sender, named)) else {}
        return {**entry, **times, **side}


def _unique(header: list[str]) -> list[str]:
    """Return *header* with a name for each column: a missing one, or one that is there twice, gets its number."""
    names: list[str] = []
    for number, name in enumerate(header, 1):
        plain = name.strip()
        names.append(f"{plain or 'column'} {number}" if not plain or plain in names else plain)
    return names

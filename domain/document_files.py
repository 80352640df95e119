"""Source documents from files: JSON, JSONL (Extended JSON) and CSV, in any accepted shape.

JSONL and CSV of single queries are streamed. The rows of one conversation can be anywhere in a CSV, so they are grouped
in a temporary SQLite table, which moves to disk when it exceeds a few megabytes. Only a JSON array is read into memory
as a whole.
"""

from __future__ import annotations

import codecs
import csv
import itertools
import json
import logging
import re
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from domain.text import counted
from error_handler import ConfigurationError
from storage import extended_json
from storage.extended_json import Document

logger = logging.getLogger(__name__)

SAMPLES = Path(__file__).parent.parent / "data" / "sample_conversations.jsonl"

JSON_SUFFIXES = frozenset({".json", ".jsonl", ".ndjson"})
CSV_SUFFIXES = frozenset({".csv", ".tsv"})
DELIMITERS = ",;\t|"
MOST_CHARACTERS = (
    16 * 1024 * 1024
)  # of a CSV cell: MongoDB stores no more, and a missing quote must not fill the memory

TWCS_COLUMNS = ("tweet_id", "author_id", "inbound", "created_at", "text", "in_response_to_tweet_id")
MESSAGE_COLUMNS = ("conversation_number", "sender", "text")
QUERY_COLUMNS = ("text",)

_CONVERSATION_FIELDS = frozenset({"_id", "conversation_number", "status", "last_processed_at", "status_reason"})
_QUERY_FIELDS = frozenset({"_id", "text", "metadata", "processed", "processing_attempts", "status_reason"})
_SHAPES = "an object with tweets (a list), messages (a list) or text"

# Spreadsheets show long numbers as 1.23457E+17; many ids become one.
_ROUNDED = re.compile(r"\d(?:[.,]\d+)?e\+\d+", re.IGNORECASE)

# The rows after the first one with the same id and text, and those with the same id but another text.
_REPEATED = """
    SELECT place, ROW_NUMBER() OVER (PARTITION BY name ORDER BY place) > 1,
        ROW_NUMBER() OVER (PARTITION BY name, json_extract(entry, '$.text') ORDER BY place) > 1
    FROM entries WHERE name IN (SELECT name FROM entries GROUP BY name HAVING COUNT(*) > 1) ORDER BY place
"""
# A conversation starts with a tweet of a customer that answers no tweet in the file.
_THREAD_STARTS = """
    SELECT place FROM entries
    WHERE inbound AND (parent = '' OR parent NOT IN (SELECT name FROM entries WHERE name IS NOT NULL)) ORDER BY place
"""
# Depth first: a reply follows the tweet that it answers.
_THREAD = """
    WITH RECURSIVE thread (name, entry, place, depth) AS (
        SELECT name, entry, place, 0 FROM entries WHERE place = ?
        UNION ALL
        SELECT entries.name, entries.entry, entries.place, depth + 1
        FROM entries JOIN thread ON entries.parent = thread.name
        ORDER BY 4 DESC, 3
    )
    SELECT entry FROM thread
"""
_GROUPS = """
    SELECT name, entry FROM entries JOIN (SELECT name, MIN(place) AS first FROM entries GROUP BY name) USING (name)
    ORDER BY first, place
"""

Row = dict[str, str]


def read_documents(path: Path) -> Iterator[Document]:
    """Yield the documents of *path*, ready for MongoDB; missing ``_id`` fields are not added.

    JSON holds one array or one object, JSONL one object per line. A CSV has a header with the columns
    of TWCS_COLUMNS (threads of tweets), MESSAGE_COLUMNS (rows of one conversation_number make one
    document; optional timestamp) or QUERY_COLUMNS (optional id, source, timestamp). For other suffixes, the first
    character of the file decides. A missing status becomes pending, a missing ``processed`` False. Documents of
    labelled data sets (``gold``, or ``source`` with ``license``) lose the fields that are not part of their shape.

    Raises:
        ConfigurationError: While iterating; the message names the file, the line, and the expected content.
            Documents already yielded stay valid.
    """
    suffix = path.suffix.lower()
    try:
        with path.open("rb") as file:
            start = file.read(4096).removeprefix(codecs.BOM_UTF8).lstrip()[:1]
            file.seek(0)
            is_json = suffix in JSON_SUFFIXES or (suffix not in CSV_SUFFIXES and start in (b"{", b"["))
            yield from _read_json(path, file) if is_json else _read_csv(path, file)
    except OSError as exc:
        raise ConfigurationError(f"{path} cannot be read ({exc.strerror}); name a file of documents.") from exc


def _read_json(path: Path, file: BinaryIO) -> Iterator[Document]:
    first = next((line for line in _without_bom(file) if line.strip()), b"")
    file.seek(0)
    if _is_object(first):
        for number, line in enumerate(_without_bom(file), 1):
            if line.strip():
                yield _ready(_loads(path, line.strip(), number), f"{path}, line {number}")
        return
    value = _loads(path, file.read().removeprefix(codecs.BOM_UTF8))
    if not isinstance(value, list):
        yield _ready(value, f"{path}, line 1")
        return
    for number, document in enumerate(value, 1):
        yield _ready(document, f"{path}, element {number}")


def _read_csv(path: Path, file: BinaryIO) -> Iterator[Document]:
    csv.field_size_limit(MOST_CHARACTERS)  # of the whole process; Python's own limit is 131,072
    lines = (_decoded(path, line, number) for number, line in enumerate(_without_bom(file), 1))
    first = next(lines, "")
    reader = csv.reader(itertools.chain([first], lines), delimiter=max(DELIMITERS, key=first.count), strict=True)
    rows = _rows(path, reader)
    columns = [name.strip().lower() for name in next(rows, (0, []))[1]]
    layout, read = next((value for name, value in _LAYOUTS.items() if name in columns), (QUERY_COLUMNS, _queries))
    missing = [name for name in layout if name not in columns]
    if missing:
        layouts = "; ".join(",".join(layout) for layout in (TWCS_COLUMNS, MESSAGE_COLUMNS, QUERY_COLUMNS))
        raise ConfigurationError(
            f"{path}, line 1: the column {', '.join(missing)} is missing; expected the columns of one of: {layouts}."
        )
    yield from read(path, ((line, dict(zip(columns, row, strict=True))) for line, row in rows))


def _twcs(path: Path, rows: Iterator[tuple[int, Row]]) -> Iterator[Document]:
    rounded = _Noted(path)

    def entries() -> Iterator[tuple[int, str | None, str, bool, str]]:
        for line, row in rows:
            inbound = {"true": True, "false": False}.get(row["inbound"].strip().lower())
            name, parent = _tweet_name(row["tweet_id"]), _tweet_name(row["in_response_to_tweet_id"])
            if inbound is None or not name:
                expected = "True or False in the column inbound" if name else "a number in the column tweet_id"
                raise ConfigurationError(f"{path}, line {line}: expected {expected}.")
            tweet = {
                "tweet_id": int(name) if name.isdecimal() and len(name) < 19 else name,
                "author_id": row["author_id"],
                "inbound": inbound,
                "created_at": row["created_at"],
                "text": row["text"],
            }
            for value in (name, parent):
                if _ROUNDED.fullmatch(value):
                    rounded.add(f"line {line}, {value}")
            yield line, None if _ROUNDED.fullmatch(name) else name, parent, inbound, json.dumps(tweet)

    with _table(path) as table:
        table.executemany("INSERT INTO entries (place, name, parent, inbound, entry) VALUES (?, ?, ?, ?, ?)", entries())
        table.execute("CREATE INDEX names ON entries (name)")
        table.execute("CREATE INDEX replies ON entries (parent)")
        rounded.warn("id", "rounded by a spreadsheet, so answers are not found; export the ids as text")
        _part_equal_names(path, table)
        threaded = 0
        for number, (place,) in enumerate(table.execute(_THREAD_STARTS), 1):
            tweets = [json.loads(entry) for (entry,) in table.execute(_THREAD, (place,))]
            threaded += len(tweets)
            yield {"conversation_number": str(number), "tweets": tweets, "status": "pending"}
        left_out = table.execute("SELECT COUNT(*) FROM entries").fetchone()[0] - threaded
    if left_out:
        logger.warning("%s: skipped %d tweets that belong to no thread started by a customer", path, left_out)


def _part_equal_names(path: Path, table: sqlite3.Connection) -> None:
    """Delete entries that are listed again, and take the name from later entries with another text."""
    repeated, other = _Noted(path), _Noted(path)
    for place, is_later, is_repeated in table.execute(_REPEATED).fetchall():
        if is_repeated:
            repeated.add(f"line {place}")
            table.execute("DELETE FROM entries WHERE place = ?", (place,))
        elif is_later:
            other.add(f"line {place}")
            table.execute("UPDATE entries SET name = NULL WHERE place = ?", (place,))
    repeated.warn("row", "left out: tweet_id and text as in an earlier row")
    other.warn("row", "kept with the tweet_id of an earlier row but another text; answers go to the earlier row")


def _messages(path: Path, rows: Iterator[tuple[int, Row]]) -> Iterator[Document]:
    def entries() -> Iterator[tuple[str, str]]:
        for line, row in rows:
            number = row["conversation_number"].strip()
            if not number:
                raise ConfigurationError(f"{path}, line {line}: expected a value in the column conversation_number.")
            if _ROUNDED.fullmatch(number):
                raise ConfigurationError(
                    f"{path}, line {line}: a spreadsheet has rounded the conversation_number {number}, so several "
                    "conversations could have it; export the column as text."
                )
            message = {name: row[name] for name in ("sender", "timestamp", "text") if row.get(name) or name == "text"}
            yield number, json.dumps(message)

    with _table(path) as table:
        table.executemany("INSERT INTO entries (name, entry) VALUES (?, ?)", entries())
        for number, group in itertools.groupby(table.execute(_GROUPS), key=lambda pair: pair[0]):
            messages = [json.loads(entry) for _, entry in group]
            yield {"conversation_number": number, "messages": messages, "status": "pending"}


def _queries(path: Path, rows: Iterator[tuple[int, Row]]) -> Iterator[Document]:
    rounded, other = _Noted(path), _Noted(path)
    with _table(path) as table:
        table.execute("CREATE UNIQUE INDEX names ON entries (name)")
        for line, row in rows:
            document_id = row.get("_id") or row.get("id") or ""
            if _ROUNDED.fullmatch(document_id):
                rounded.add(f"line {line}, {document_id}")
                document_id = ""
            elif document_id and not _is_first_text(table, document_id, row["text"]):
                other.add(f"line {line}")
                document_id = ""
            metadata = {name: row[name] for name in ("source", "timestamp") if row.get(name)}
            document: Document = {"_id": document_id} if document_id else {}
            yield {**document, "text": row["text"], "metadata": metadata, "processed": False, "processing_attempts": 0}
    rounded.warn("id", "rounded by a spreadsheet and replaced by one of the content")
    other.warn("row", "with the id of an earlier row but another text; the id is replaced by one of the content")


def _is_first_text(table: sqlite3.Connection, name: str, text: str) -> bool:
    """Return whether no earlier row with this *name* has another text, and remember the row."""
    if table.execute("INSERT OR IGNORE INTO entries (name, entry) VALUES (?, ?)", (name, hash(text))).rowcount:
        return True
    return bool(table.execute("SELECT entry FROM entries WHERE name = ?", (name,)).fetchone()[0] == hash(text))


class _Noted:
    """Counts rows of *path* that are not taken as they are, and remembers the first one."""

    def __init__(self, path: Path) -> None:
        self._path, self._count, self._first = path, 0, ""

    def add(self, place: str) -> None:
        self._count += 1
        self._first = self._first or place

    def warn(self, noun: str, what: str) -> None:
        if self._count:
            logger.warning("%s: %s %s (first: %s)", self._path, counted(self._count, noun), what, self._first)


_LAYOUTS = {  # by a column that no other layout has
    "tweet_id": (TWCS_COLUMNS, _twcs),
    "conversation_number": (MESSAGE_COLUMNS, _messages),
    "sender": (MESSAGE_COLUMNS, _messages),
}


def _ready(document: Any, place: str) -> Document:
    """Return *document* with its status fields; *place* names it in the error if it has no accepted shape."""
    fields: Document = document if isinstance(document, dict) else {}
    turns = {name for name in ("tweets", "messages") if isinstance(fields.get(name), list)}
    if not turns and not isinstance(fields.get("text"), str):
        raise ConfigurationError(f"{place}: expected {_SHAPES}.")
    if "gold" in fields or {"source", "license"} <= fields.keys():
        kept = _CONVERSATION_FIELDS | turns | {"text"} if turns else _QUERY_FIELDS
        fields = {name: value for name, value in fields.items() if name in kept}
    if "status" in fields or "processed" in fields:
        return fields
    return fields | ({"status": "pending"} if turns else {"processed": False, "processing_attempts": 0})


def _rows(path: Path, reader: Any) -> Iterator[tuple[int, list[str]]]:
    """Yield the header and the rows of a csv reader that are not blank, each with the line on which it starts."""
    start, width = 1, 0
    try:
        for row in reader:
            width = width or len(row)
            if row and len(row) != width:
                raise ConfigurationError(
                    f"{path}, line {start}: expected {width} values as in the header, found {len(row)}."
                )
            if row:
                yield start, row
            start = reader.line_num + 1
    except csv.Error as exc:
        if "field limit" in str(exc):
            raise ConfigurationError(
                f"{path}, the row from line {start}: a value has more than {MOST_CHARACTERS:,} characters, which MongoDB cannot "
                "store; shorten it, or add its closing quote if that is missing."
            ) from exc
        raise ConfigurationError(
            f"{path}, the row from line {start}: expected CSV with texts in double quotes, and quotes inside them doubled."
        ) from exc


def _loads(path: Path, data: bytes, line: int = 1) -> Any:
    """Return the value of *data*, which begins on *line* of the file."""
    try:
        return extended_json.loads(_decoded(path, data, line))
    except ValueError as exc:
        line += getattr(exc, "lineno", 1) - 1
        raise ConfigurationError(
            f"{path}, line {line}: expected (Extended) JSON: one array, one object, or one object per line."
        ) from exc


def _decoded(path: Path, data: bytes, line: int) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as exc:
        line += data[: exc.start].count(b"\n")
        raise ConfigurationError(f"{path}, line {line}: expected UTF-8; save the file in that encoding.") from exc


def _is_object(line: bytes) -> bool:
    """Return whether *line* is a complete JSON object, so the file is JSONL."""
    try:
        return line.lstrip().startswith(b"{") and isinstance(extended_json.loads(line), dict)
    except ValueError:
        return False


def _without_bom(file: BinaryIO) -> Iterator[bytes]:
    return itertools.chain([file.readline().removeprefix(codecs.BOM_UTF8)], file)


def _tweet_name(value: str) -> str:
    return value.strip().removesuffix(".0")  # pandas turns a column with gaps into floats


@contextmanager
def _table(path: Path) -> Iterator[sqlite3.Connection]:
    """Open a temporary table, which SQLite keeps in an unnamed file and deletes on close."""
    try:
        # Several threads may read pages, but never two at the same time.
        with closing(sqlite3.connect("", check_same_thread=False)) as table:
            table.execute("CREATE TABLE entries (place INTEGER PRIMARY KEY, name TEXT, parent TEXT, inbound, entry)")
            yield table
    except sqlite3.Error as exc:
        raise ConfigurationError(
            f"{path} cannot be grouped in the temporary folder ({exc}); free space, or set TMPDIR to a larger disk."
        ) from exc

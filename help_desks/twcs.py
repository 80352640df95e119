"""Threads of tweets from the TWCS data set's layout: one row per tweet, with the id of the tweet that it answers."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from pathlib import Path

from error_handler import ConfigurationError
from help_desks.columns import without_empty
from help_desks.files import Row
from help_desks.findings import Findings
from help_desks.table import ROUNDED, temporary_table
from storage.extended_json import Document

TWCS_COLUMNS = ("tweet_id", "author_id", "inbound", "created_at", "text", "in_response_to_tweet_id")
_READ_COLUMNS = frozenset(
    {*TWCS_COLUMNS, "response_tweet_id"}
)  # the last one is the inverse of in_response_to_tweet_id

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
    SELECT entry, place FROM thread
"""


def threads(path: Path, rows: Iterator[tuple[int, Row]], findings: Findings) -> Iterator[Document]:
    """Yield the threads of *rows* (line, cells by column in lower case) that a customer started, tweets in order.

    Raises:
        ConfigurationError: A row has no tweet_id, or no truth value in the column inbound.
    """
    with temporary_table(path) as table:
        table.executemany(
            "INSERT INTO entries (place, name, parent, inbound, entry) VALUES (?, ?, ?, ?, ?)",
            _entries(path, rows, findings),
        )
        table.execute("CREATE INDEX names ON entries (name)")
        table.execute("CREATE INDEX replies ON entries (parent)")
        _part_equal_names(table, findings)
        table.execute("ALTER TABLE entries ADD COLUMN is_threaded")
        starts = [place for (place,) in table.execute(_THREAD_STARTS)]
        for number, start in enumerate(starts, 1):
            found = table.execute(_THREAD, (start,)).fetchall()
            table.executemany("UPDATE entries SET is_threaded = 1 WHERE place = ?", [(place,) for _, place in found])
            tweets = [json.loads(entry) for entry, _ in found]
            yield {"conversation_number": str(number), "tweets": tweets}
        for (place,) in table.execute("SELECT place FROM entries WHERE is_threaded IS NULL ORDER BY place"):
            findings.note("tweet", "left out: in no thread that a customer started", f"line {place}")


def _entries(
    path: Path, rows: Iterator[tuple[int, Row]], findings: Findings
) -> Iterator[tuple[int, str | None, str, bool, str]]:
    for line, row in rows:
        inbound = {"true": True, "false": False}.get(row["inbound"].strip().lower())
        name, parent = _tweet_name(row["tweet_id"]), _tweet_name(row["in_response_to_tweet_id"])
        if inbound is None or not name:
            expected = "True or False in the column inbound" if name else "a number in the column tweet_id"
            raise ConfigurationError(f"{path}, line {line}: expected {expected}.")
        tweet: Document = {
            "tweet_id": int(name) if name.isdecimal() and len(name) < 19 else name,
            "author_id": row["author_id"],
            "inbound": inbound,
            "created_at": row["created_at"],
            "text": row["text"],
        }
        if more := without_empty({column: row[column] for column in row if column not in _READ_COLUMNS}):
            tweet["metadata"] = more
        for value in (name, parent):
            if ROUNDED.fullmatch(value):
                what = "rounded by a spreadsheet, so answers are not found; export the ids as text"
                findings.note("id", what, f"line {line}, {value}")
        yield line, None if ROUNDED.fullmatch(name) else name, parent, inbound, json.dumps(tweet)


def _part_equal_names(table: sqlite3.Connection, findings: Findings) -> None:
    """Delete entries that are listed again, and take the name from later entries with another text."""
    for place, is_later, is_repeated in table.execute(_REPEATED).fetchall():
        if is_repeated:
            findings.note("row", "left out: tweet_id and text as in an earlier row", f"line {place}")
            table.execute("DELETE FROM entries WHERE place = ?", (place,))
        elif is_later:
            what = "kept with the tweet_id of an earlier row but another text; answers go to the earlier row"
            findings.note("row", what, f"line {place}")
            table.execute("UPDATE entries SET name = NULL WHERE place = ?", (place,))


def _tweet_name(value: str) -> str:
    return value.strip().removesuffix(".0")  # pandas turns a column with gaps into floats

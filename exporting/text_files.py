"""Writes rows as CSV or JSON Lines."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, BinaryIO

import orjson

from exporting.columns import Column, joined
from exporting.formula_text import defused


def time_text(at: datetime) -> str:
    """Return *at* in ISO 8601, in UTC, with milliseconds."""
    return f"{at.astimezone(UTC).replace(tzinfo=None).isoformat(timespec='milliseconds')}Z"


def json_text(value: Any) -> str:
    """Return *value* as JSON on one line."""
    return orjson.dumps(value, option=orjson.OPT_NON_STR_KEYS).decode()


class CsvFile:
    """A CSV file (RFC 4180, UTF-8 without a byte order mark) with *columns* and a header."""

    def __init__(self, file: BinaryIO, columns: Sequence[Column]) -> None:
        self._file = file
        self._write([[defused(column.name) for column in columns]])

    def write(self, rows: Sequence[Sequence[Any]]) -> None:
        """Add *rows*."""
        self._write([[_csv_text(value) for value in row] for row in rows])

    def _write(self, rows: list[list[str]]) -> None:
        text = io.StringIO(newline="")
        csv.writer(text).writerows(rows)
        self._file.write(text.getvalue().encode())

    def finish(self) -> None:
        """Do nothing: the last row ends the file."""

    def close(self) -> None:
        """Do nothing: nothing is open."""


def _csv_text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, str):
        return defused(value)
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, datetime):
        return time_text(value)
    if isinstance(value, list):
        return defused(joined(value))
    return defused(json_text(value)) if isinstance(value, dict) else str(value)


class JsonLinesFile:
    """One JSON object on each line, with all *columns*."""

    def __init__(self, file: BinaryIO, columns: Sequence[Column]) -> None:
        self._file, self._names = file, [column.name for column in columns]

    def write(self, rows: Sequence[Sequence[Any]]) -> None:
        """Add *rows*."""
        lines = (
            json_text({name: _json_value(value) for name, value in zip(self._names, row, strict=True)}) for row in rows
        )
        self._file.write("".join(f"{line}\n" for line in lines).encode())

    def finish(self) -> None:
        """Do nothing: the last row ends the file."""

    def close(self) -> None:
        """Do nothing: nothing is open."""


def _json_value(value: Any) -> Any:
    return time_text(value) if isinstance(value, datetime) else value

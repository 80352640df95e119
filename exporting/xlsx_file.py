"""Writes rows as a workbook for spreadsheets (XLSX)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, BinaryIO

from openpyxl import Workbook
from openpyxl.cell import WriteOnlyCell

from exporting.columns import Column, joined
from exporting.formula_text import is_dangerous
from exporting.text_files import json_text, time_text

SHEET_ROWS = 1_048_576  # of the format, the header included
CELL_CHARACTERS = 32_767
CUT = " [cut]"
FIRST_YEAR = 1901  # spreadsheets cannot show a date of an earlier year
_NOT_XML = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\ufffe\uffff]")


class XlsxFile:
    """A workbook with *columns*; after SHEET_ROWS rows comes another sheet. Times are in UTC.

    Every text is a cell of type text, never a formula. One that could become a formula when a person edits it has the
    style ``quotePrefix``, as if it had been typed after an apostrophe. ``cut`` counts texts that were longer than a cell
    can be, and ``replaced`` those with characters that XML cannot hold, which become U+FFFD.
    """

    def __init__(self, file: BinaryIO, columns: Sequence[Column], sheet_rows: int = SHEET_ROWS) -> None:
        self._file, self._names, self._sheet_rows = file, [column.name for column in columns], sheet_rows
        self._book = Workbook(write_only=True)
        self.cut = self.replaced = 0
        self._add_sheet()

    def _add_sheet(self) -> None:
        number = len(self._book.worksheets) + 1
        self._sheet = self._book.create_sheet("results" if number == 1 else f"results {number}")
        self._sheet.freeze_panes = "A2"
        self._sheet.append(self._names)
        self._rows = 1

    def write(self, rows: Sequence[Sequence[Any]]) -> None:
        """Add *rows*."""
        for row in rows:
            if self._rows == self._sheet_rows:
                self._sheet.close()
                self._add_sheet()
            self._sheet.append([self._cell(value) for value in row])
            self._rows += 1

    def finish(self) -> None:
        """Write the workbook into the file."""
        self._book.save(self._file)

    def close(self) -> None:
        """End the sheet that is open; openpyxl removes its temporary files when the process ends."""
        if not self._sheet.closed:
            self._sheet.close()

    def _cell(self, value: Any) -> Any:
        if isinstance(value, datetime):
            at = value.astimezone(UTC).replace(tzinfo=None)
            return at if at.year >= FIRST_YEAR else time_text(value)
        if isinstance(value, list):
            return self._text(joined(value))
        if isinstance(value, dict):
            return self._text(json_text(value))
        return self._text(value) if isinstance(value, str) else value

    def _text(self, text: str) -> Any:
        if _NOT_XML.search(text):
            text = _NOT_XML.sub("\ufffd", text)
            self.replaced += 1
        if len(text) > CELL_CHARACTERS:
            text = text[: CELL_CHARACTERS - len(CUT)] + CUT
            self.cut += 1
        if not is_dangerous(text) and not text.startswith("#"):  # "#N/A" would become an error
            return text
        cell = WriteOnlyCell(self._sheet, text)
        cell.data_type = "s"
        cell.quotePrefix = True
        return cell

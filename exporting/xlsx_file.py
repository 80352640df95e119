"""Writes rows as a workbook for spreadsheets (XLSX)."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from datetime import UTC, datetime
from tempfile import TemporaryDirectory
from typing import Any, BinaryIO

from xlsxwriter import Workbook

from exporting.columns import Column, joined
from exporting.formula_text import is_dangerous
from exporting.text_files import json_text, time_text

SHEET_ROWS = 1_048_576  # of the format, the header included
CELL_CHARACTERS = 32_767  # in UTF-16, where an emoji is two; Excel finds a file with longer texts damaged
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
        self._names, self._sheet_rows = [column.name for column in columns], sheet_rows
        self._folder = TemporaryDirectory(prefix="xlsx.")
        # A row goes to a file in this folder when the next one begins.
        self._book = Workbook(file, {"constant_memory": True, "tmpdir": self._folder.name})
        self._time = self._book.add_format({"num_format": "yyyy-mm-dd h:mm:ss"})
        self._prefixed = self._book.add_format({"quote_prefix": True})
        self._plain = self._book.add_format()
        self.cut = self.replaced = 0
        self._add_sheet()

    def _add_sheet(self) -> None:
        number = len(self._book.worksheets()) + 1
        self._sheet = self._book.add_worksheet("results" if number == 1 else f"results {number}")
        self._sheet.freeze_panes(1, 0)
        self._rows = 0  # those in the sheet, the header included
        self._add_row(self._names)

    def write(self, rows: Sequence[Sequence[Any]]) -> None:
        """Add *rows*."""
        for row in rows:
            if self._rows == self._sheet_rows:
                self._add_sheet()
            self._add_row(row)

    def finish(self) -> None:
        """Write the workbook into the file."""
        self._book.close()

    def close(self) -> None:
        """Remove the temporary files of the rows."""
        if not self._book.fileclosed:
            for sheet in self._book.worksheets():
                sheet._opt_close()  # there is no public way to give a workbook up
        self._folder.cleanup()

    def _add_row(self, row: Sequence[Any]) -> None:
        number, sheet = self._rows, self._sheet
        for column, value in enumerate(row):
            if isinstance(value, str):
                self._add_text(number, column, value)
            elif isinstance(value, bool):
                sheet.write_boolean(number, column, value)
            elif isinstance(value, int | float):
                if math.isfinite(value):
                    sheet.write_number(number, column, value)
            elif isinstance(value, datetime):
                if value.year >= FIRST_YEAR:
                    sheet.write_datetime(number, column, value.astimezone(UTC).replace(tzinfo=None), self._time)
                else:
                    self._add_text(number, column, time_text(value))
            elif value is not None:
                self._add_text(number, column, joined(value) if isinstance(value, list) else json_text(value))
        self._rows += 1

    def _add_text(self, row: int, column: int, text: str) -> None:
        if _NOT_XML.search(text):
            text = _NOT_XML.sub("\ufffd", text)
            self.replaced += 1
        if len(text) > CELL_CHARACTERS // 2 and len(units := text.encode("utf-16-le")) > 2 * CELL_CHARACTERS:
            text = units[: 2 * (CELL_CHARACTERS - len(CUT))].decode("utf-16-le", "ignore") + CUT
            self.cut += 1
        if is_dangerous(text) or text.startswith("#"):  # "#N/A" would become an error
            self._sheet.write_string(row, column, text, self._prefixed)
        elif text.startswith("<r>"):  # the library would take it for markup
            self._sheet.write_rich_string(row, column, text[:1], self._plain, text[1:])
        elif text:
            self._sheet.write_string(row, column, text)

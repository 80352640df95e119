"""The formats of an export, and the packages that they need."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any, BinaryIO, Literal, Protocol, get_args

from error_handler import ConfigurationError
from exporting.columns import Column
from exporting.text_files import CsvFile, JsonLinesFile

Format = Literal["csv", "xlsx", "parquet", "jsonl"]
FORMATS: tuple[Format, ...] = get_args(Format)
STREAMED: tuple[Format, ...] = ("csv", "jsonl")  # those that can go to stdout

_NEEDED: dict[Format, str] = {"xlsx": "xlsxwriter", "parquet": "pyarrow"}


class TableFile(Protocol):
    """A file with rows; nothing is complete before ``finish``."""

    def write(self, rows: Sequence[Sequence[Any]]) -> None:
        """Add *rows*, whose cells are in the order of the columns."""

    def finish(self) -> None:
        """Write what completes the file, and leave it open."""

    def close(self) -> None:
        """Release what is open, also if the file was not finished because of an error."""


def require_package(form: Format) -> None:
    """Raise ConfigurationError if the package that writes *form* is not installed."""
    name = _NEEDED.get(form)
    if name and importlib.util.find_spec(name) is None:
        raise ConfigurationError(
            f"--format {form} needs a package that is not installed ({name}): "
            "run pip install -r requirements-export.txt, or use --format csv."
        )


def open_table(form: Format, file: BinaryIO, columns: Sequence[Column]) -> TableFile:
    """Return what writes rows with *columns* into *file*, which the caller closes."""
    if form == "xlsx":
        from exporting.xlsx_file import XlsxFile  # noqa: PLC0415 - its package is optional

        return XlsxFile(file, columns)
    if form == "parquet":
        from exporting.parquet_file import ParquetFile  # noqa: PLC0415 - its package is optional

        return ParquetFile(file, columns)
    return CsvFile(file, columns) if form == "csv" else JsonLinesFile(file, columns)

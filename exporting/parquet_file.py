"""Writes rows as Parquet."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from exporting.columns import Column, Kind
from exporting.text_files import json_text

ROW_GROUP_BYTES = 2_000_000  # of Arrow data, before compression

_TYPES: dict[Kind, Any] = {
    "text": pa.string(),
    "labels": pa.list_(pa.string()),
    "integer": pa.int64(),
    "number": pa.float64(),
    "flag": pa.bool_(),
    "time": pa.timestamp("ms", tz="UTC"),
    "object": pa.string(),  # JSON
}


class ParquetFile:
    """A Parquet file with *columns*; rows are kept as Arrow data until a row group is full."""

    def __init__(self, file: BinaryIO, columns: Sequence[Column]) -> None:
        self._kinds = [column.kind for column in columns]
        self._schema = pa.schema([(column.name, _TYPES[column.kind]) for column in columns])
        self._writer = pq.ParquetWriter(file, self._schema, compression="zstd")
        self._batches: list[Any] = []

    def write(self, rows: Sequence[Sequence[Any]]) -> None:
        """Add *rows*."""
        if not rows:
            return
        columns = [
            pa.array(map(_json_or_none, values) if kind == "object" else values, _TYPES[kind])
            for kind, values in zip(self._kinds, zip(*rows, strict=True), strict=True)
        ]
        self._batches.append(pa.record_batch(columns, schema=self._schema))
        if sum(batch.nbytes for batch in self._batches) >= ROW_GROUP_BYTES:
            self._flush()

    def _flush(self) -> None:
        if self._batches:
            self._writer.write_table(pa.Table.from_batches(self._batches))
            self._batches = []

    def finish(self) -> None:
        """Write what is left, and the footer."""
        self._flush()
        self._writer.close()

    def close(self) -> None:
        """Release the writer; a file that is not finished then lacks rows."""
        if self._writer.is_open:
            self._writer.close()


def _json_or_none(value: Any) -> str | None:
    return None if value is None else json_text(value)

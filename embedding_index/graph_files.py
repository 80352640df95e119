"""What ChromaDB leaves in the files of a small graph: memory that was never written, and so anything that was in it."""

from __future__ import annotations

import os
import struct
from pathlib import Path

from error_handler import VectorStoreError

# header.bin: format, offset, room and number of elements, bytes of one element (hnswlib as ChromaDB 1.5 has it).
_HEADER = struct.Struct("<iQQQQ")
_FORMAT = 1
_LENGTH_BYTES = 4


def blank_unused(chroma: Path) -> None:
    """Overwrite what lies behind the last element in the graphs of *chroma*, which is closed.

    A graph is first written with room for 100 vectors, of which those that are not there yet are whatever the memory of
    this process held before: texts of customers among it.

    Raises:
        VectorStoreError: A file cannot be written.
    """
    try:
        for header in chroma.glob("*/header.bin"):
            content = header.read_bytes()
            if len(content) < _HEADER.size:
                continue
            form, _, _, number, element_bytes = _HEADER.unpack_from(content)
            if form == _FORMAT:
                _blank_from(header.with_name("data_level0.bin"), number * element_bytes)
                _blank_from(header.with_name("length.bin"), number * _LENGTH_BYTES)
    except OSError as exc:
        raise VectorStoreError(
            f"{chroma} cannot be written ({exc.strerror}); free space or fix its rights, then run again."
        ) from exc


def _blank_from(path: Path, offset: int) -> None:
    unused = path.stat().st_size - offset
    if unused > 0:
        with path.open("r+b") as file:
            file.seek(offset)
            file.write(bytes(unused))
            file.flush()
            os.fsync(file.fileno())

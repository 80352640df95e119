"""The values of JSON and JSONL files. Lines and the elements of an array are streamed; any other value is read as a whole."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from typing import Any

from error_handler import ConfigurationError
from help_desks.files import TextFile
from storage import extended_json

_SHAPES = "(Extended) JSON: one array, one object, or one object per line."
_SPACE = " \t\r\n"


def json_values(file: TextFile) -> Iterator[tuple[str, Any]]:
    """Yield the values of *file* with their places: ``line 4``, or ``element 4`` of an array.

    Raises:
        ConfigurationError: The file is damaged; the message names the line.
    """
    with file.chunks() as chunks:
        start = next((text for chunk in chunks if (text := chunk.lstrip(_SPACE))), "")
    yield from _elements(file) if start.startswith("[") else _lines(file)


def _lines(file: TextFile) -> Iterator[tuple[str, Any]]:
    with file.lines() as lines:
        numbered = enumerate(lines, 1)
        start, first = next(((number, line) for number, line in numbered if line.strip()), (1, b""))
        if not first:
            raise ConfigurationError(f"{file.path}, line 1: the file is empty; export it again as {_SHAPES}")
        if _is_object(first):
            for number, line in itertools.chain([(start, first)], numbered):
                if line.strip():
                    yield f"line {number}", _loads(file, file.decoded(line.strip(), number), number)
            return
        yield "line 1", _loads(file, file.decoded(first + b"".join(lines), start), start)


def _elements(file: TextFile) -> Iterator[tuple[str, Any]]:
    """Yield the elements of an array; only one element, and one chunk of the file, are in memory."""
    with file.chunks() as chunks:
        scanner = _Scanner(file, chunks)
        scanner.skip("[")
        for number in itertools.count(1):
            sign = scanner.sign()
            if sign == "]" and number == 1:
                break
            yield f"element {number}", scanner.element()
            if scanner.sign() != ",":
                break
            scanner.skip(",")
        scanner.skip("]")
        if scanner.sign():
            raise scanner.error()


class _Scanner:
    """Text that is read in chunks: *text* is what is not scanned yet, *line* the line on which it begins."""

    def __init__(self, file: TextFile, chunks: Iterator[str]) -> None:
        self._file, self._chunks, self._text, self._line = file, chunks, "", 1
        self._decoder = json.JSONDecoder()

    def sign(self) -> str:
        """Return the next character that is no space, without taking it; an empty text at the end."""
        while not (plain := self._text.lstrip(_SPACE)):
            self._take(len(self._text))
            if not self._more():
                return ""
        self._take(len(self._text) - len(plain))
        return self._text[0]

    def skip(self, sign: str) -> None:
        if self.sign() != sign:
            raise self.error()
        self._take(1)

    def element(self) -> Any:
        self.sign()
        while True:
            try:
                _, end = self._decoder.raw_decode(self._text)
            except json.JSONDecodeError as exc:
                if not self._more(len(self._text)):
                    raise self.error(exc.lineno) from exc
            except RecursionError as exc:
                raise self.error() from exc
            else:
                if end < len(self._text) or not self._more():  # a number could go on in the next chunk
                    break
        line, text = self._line, self._text[:end]
        self._take(end)
        return _loads(self._file, text, line)

    def error(self, line: int = 1) -> ConfigurationError:
        """Return the error for damage on *line* (from 1) of what is not scanned yet."""
        return ConfigurationError(f"{self._file.path}, line {self._line + line - 1}: expected {_SHAPES}")

    def _take(self, characters: int) -> None:
        self._line += self._text.count("\n", 0, characters)
        self._text = self._text[characters:]

    def _more(self, characters: int = 1) -> bool:
        """Add at least as many *characters* as there are left; return whether there were any."""
        more = ""
        while len(more) < characters and (chunk := next(self._chunks, "")):
            more += chunk
        self._text += more
        return bool(more)


def _loads(file: TextFile, text: str, line: int) -> Any:
    """Return the value of *text*, which begins on *line* of the file."""
    try:
        return extended_json.loads(text)
    except ValueError as exc:
        line += getattr(exc, "lineno", 1) - 1
        raise ConfigurationError(f"{file.path}, line {line}: expected {_SHAPES}") from exc


def _is_object(line: bytes) -> bool:
    """Return whether *line* is a complete JSON object, so the file is JSONL."""
    try:
        return line.lstrip().startswith(b"{") and isinstance(extended_json.loads(line), dict)
    except ValueError:
        return False

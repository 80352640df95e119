"""Files as text: compression, encoding, and the dialect of a table are detected; damage is named by its line."""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import itertools
import re
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import charset_normalizer

from domain.text import one_line
from error_handler import ConfigurationError

JSON_SUFFIXES = frozenset({".json", ".jsonl", ".ndjson"})
TABLE_SUFFIXES = frozenset({".csv", ".tsv"})
DELIMITERS = ",;\t|"
# Of a cell. MongoDB stores no more, and a missing quote must not fill the memory.
MOST_CHARACTERS = 16 * 1024 * 1024

_NAMED_FILES = 5
_SAMPLE = 256 * 1024  # bytes
_CHUNK = 64 * 1024
_GZIP, _ZIP, _OLD_EXCEL = b"\x1f\x8b", b"PK\x03\x04", b"\xd0\xcf\x11\xe0"
_BOMS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
# What spreadsheets and help desks write beside UTF-8, the most usual first: short texts fit several of them equally well.
_LEGACY = (
    *("cp1252", "cp1250", "cp1251", "cp1253", "cp1254", "cp1255", "cp1256", "cp1257", "mac_roman", "koi8_r"),
    *("cp932", "gb18030", "big5", "cp949", "euc_jp"),
)
_SEPARATOR_LINE = re.compile(r'"?sep=(.)"?\s*')  # Excel reads and writes it above the header

Row = dict[str, str]


@dataclass(frozen=True, slots=True)
class TextFile:
    """A file that can be opened several times.

    *encoding* is a name of Python's codecs; *is_detected* is True if neither UTF-8 nor a byte order mark settled it.
    """

    path: Path
    is_json: bool
    encoding: str = "utf-8"
    is_detected: bool = False

    @contextmanager
    def lines(self) -> Iterator[Iterator[bytes]]:
        """Open the file as lines in UTF-8, without a byte order mark."""
        with _opened(self.path) as file:
            start = file.peek(4)[:4]
            bom = next((bom for bom, name in _BOMS if name == self.encoding and start.startswith(bom)), b"")
            file.read(len(bom))
            if self.encoding == "utf-8":
                yield file
                return
            text = io.TextIOWrapper(file, self.encoding, newline="\n")
            try:
                yield self._transcoded(text)
            finally:
                text.detach()

    @contextmanager
    def chunks(self) -> Iterator[Iterator[str]]:
        """Open the file as text in chunks of about 64 KB, without a byte order mark."""
        with self.lines() as lines:
            yield self._chunks(lines)

    def _chunks(self, lines: Iterator[bytes]) -> Iterator[str]:
        decoder, line = codecs.getincrementaldecoder("utf-8")(), 1
        while data := lines.read(_CHUNK) if isinstance(lines, io.BufferedIOBase) else next(lines, b""):
            try:
                yield decoder.decode(data)
            except UnicodeDecodeError as exc:
                raise self._problem(line + data[: exc.start].count(b"\n"), "UTF-8") from exc
            line += data.count(b"\n")

    def decoded(self, data: bytes, line: int) -> str:
        """Return *data*, which is of ``lines`` and begins on *line*, as text."""
        try:
            return data.decode()
        except UnicodeDecodeError as exc:
            raise self._problem(line + data[: exc.start].count(b"\n"), "UTF-8") from exc

    def _transcoded(self, lines: Iterable[str]) -> Iterator[bytes]:
        number = 1
        try:
            for line in lines:
                yield line.encode()
                number += 1
        except UnicodeDecodeError as exc:
            before = exc.object[: exc.start].decode(self.encoding, "ignore")
            raise self._problem(number + before.count("\n"), self.encoding) from exc

    def _problem(self, line: int, expected: str) -> ConfigurationError:
        return ConfigurationError(
            f"{self.path}, line {line}: expected {expected}; save the file as UTF-8, or name its encoding with --encoding."
        )


def text_file(path: Path, encoding: str | None = None) -> TextFile:
    """Return the file at *path*; its suffix decides between JSON and a table, for other suffixes its first character.

    Raises:
        ConfigurationError: The file cannot be read, or *encoding* is unknown.
    """
    suffix = next((s.lower() for s in reversed(path.suffixes) if s.lower() not in (".gz", ".gzip")), "")
    with _opened(path) as file:
        sample = file.read(4096)
    bom, found = next(((bom, name) for bom, name in _BOMS if sample.startswith(bom)), (b"", ""))
    start = sample.removeprefix(bom).replace(b"\0", b"").lstrip()[:1]
    is_json = suffix in JSON_SUFFIXES or (suffix not in TABLE_SUFFIXES and start in (b"{", b"["))
    if not found and sample[:400].count(b"\0") * 3 > len(sample[:400]):
        found = "utf-16-le" if sample[1:2] == b"\0" else "utf-16-be"
    if encoding:
        return TextFile(path, is_json, _codec(encoding, found))
    if found or is_json:
        return TextFile(path, is_json, found or "utf-8")
    doubtful = _not_utf8(path)
    return TextFile(path, is_json, _legacy_encoding(path, doubtful), True) if doubtful else TextFile(path, is_json)


def _codec(encoding: str, found: str) -> str:
    """Return the codec of *encoding*, which a flag names; *found* is what the start of the file shows, or empty."""
    try:
        io.TextIOWrapper(io.BytesIO(), encoding)  # unlike a look-up, it refuses codecs that are not for texts
    except LookupError as exc:
        raise ConfigurationError(f"--encoding {encoding} is unknown; for example, use cp1252 or utf-16.") from exc
    name = codecs.lookup(encoding).name.removesuffix("-sig")
    if name in ("utf-16", "utf-32"):  # of either byte order
        return found if found.startswith(name) else f"{name}-le"
    return name


def table_rows(file: TextFile) -> Iterator[tuple[int, list[str]]]:
    """Yield the header and the rows that are not blank, each with the line on which it starts."""
    csv.field_size_limit(MOST_CHARACTERS)  # of the whole process; Python's own limit is 131,072
    with file.lines() as raw:
        lines = _table_lines(file, raw)
        sample = list(itertools.islice(lines, 1000))
        skipped = _SEPARATOR_LINE.fullmatch(sample[0]) if sample else None
        known = skipped[1] if skipped else ""
        sample = sample[bool(skipped) :]
        reader = csv.reader(itertools.chain(sample, lines), strict=True, **_dialect(sample, known))
        yield from _rows(file.path, reader, 1 + bool(skipped))


def _table_lines(file: TextFile, raw: Iterator[bytes]) -> Iterator[str]:
    for number, line in enumerate(raw, 1):
        text = file.decoded(line, number)
        if "\r" in text[:-2] and not text.endswith("\n"):  # old Mac files: one line for csv, several for people
            yield from re.findall("[^\r]*\r\n?|[^\r]+", text)  # splitlines also ends a line at a vertical tab
        else:
            yield text


def _dialect(sample: list[str], delimiter: str = "") -> dict[str, Any]:
    """Return the arguments for csv.reader under which most rows of *sample* have as many values as the header.

    csv.Sniffer counts characters: it takes letters for delimiters, and commas inside quoted texts for columns.
    """
    header = sample[0] if sample else ""
    quotes = "'\"" if header.lstrip().startswith("'") else '"'
    best: tuple[tuple[int, int], dict[str, Any]] | None = None
    for sign in delimiter or DELIMITERS:
        for quote in quotes:
            for escape in (None, "\\"):
                arguments = {"delimiter": sign, "quotechar": quote, "escapechar": escape, "doublequote": escape is None}
                score = _score(sample, arguments)
                if score[1] > 1 and (best is None or score > best[0]):
                    best = score, arguments
    return best[1] if best else {"delimiter": delimiter or ","}


def _score(sample: list[str], arguments: dict[str, Any]) -> tuple[int, int]:
    """Return how many more rows fit to the header than do not, and the width of the header."""
    width = fitting = 0
    try:
        for row in csv.reader(sample, strict=True, **arguments):
            width = width or len(row)
            fitting += (1 if len(row) == width else -1) if row else 0
    except csv.Error:
        pass  # the sample may end inside a value; an error further up leaves few rows
    return fitting, width


def _rows(path: Path, reader: Any, start: int) -> Iterator[tuple[int, list[str]]]:
    width, before = 0, start - 1
    try:
        for row in reader:
            width = width or len(row)
            if row and len(row) != width:
                raise ConfigurationError(
                    f"{path}, line {start}: expected {width} values as in the header, found {len(row)}."
                )
            if row:
                yield start, row
            start = reader.line_num + 1 + before
    except csv.Error as exc:
        if "field limit" in str(exc):
            raise ConfigurationError(
                f"{path}, the row from line {start}: a value has more than {MOST_CHARACTERS:,} characters, which MongoDB cannot "
                "store; shorten it, or add its closing quote if that is missing."
            ) from exc
        raise ConfigurationError(
            f"{path}, the row from line {start}: expected CSV with texts in double quotes, and quotes inside them doubled."
        ) from exc


@contextmanager
def _opened(path: Path) -> Iterator[io.BufferedReader]:
    try:
        with path.open("rb") as file:
            start = file.read(4)
            file.seek(0)
            if start.startswith(_ZIP):
                raise ConfigurationError(_zip_problem(path))
            if start == _OLD_EXCEL:
                raise ConfigurationError(f"{path} is an Excel workbook; save the sheet as CSV in UTF-8.")
            if start.startswith(_GZIP):
                with io.BufferedReader(cast("Any", gzip.GzipFile(fileobj=file)), _SAMPLE) as unpacked:
                    yield unpacked
            else:
                yield file
    except (EOFError, zlib.error, gzip.BadGzipFile) as exc:
        raise ConfigurationError(f"{path} is damaged or cut off (gzip); export or copy it again.") from exc
    except OSError as exc:
        raise ConfigurationError(f"{path} cannot be read ({exc.strerror}); name a file of documents.") from exc


def _zip_problem(path: Path) -> str:
    """Return what to do with a zip archive: which of its files to import, after it is unpacked."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name for name in archive.namelist() if not name.endswith("/")]
    except (zipfile.BadZipFile, NotImplementedError):
        return f"{path} is a zip archive that is damaged or cut off; export or copy it again."
    if "[Content_Types].xml" in names:
        return f"{path} is an Excel workbook; save the sheet as CSV in UTF-8."
    readable = [name for name in names if Path(name).suffix.lower() in JSON_SUFFIXES | TABLE_SUFFIXES]
    # An account export has a file for each kind of record: Tickets0.json, Users0.json.
    named = [name for name in readable if re.search("ticket|conversation|message", name, re.IGNORECASE)] or readable
    shown = ", ".join(one_line(name, 60) for name in named[:_NAMED_FILES]) + (
        ", ..." if len(named) > _NAMED_FILES else ""
    )
    if not named:
        return f"{path} is a zip archive without JSON, JSONL or CSV; export the tickets in one of these formats."
    return f"{path} is a zip archive; unpack it, and import from it, each with --file: {shown}."


def _not_utf8(path: Path) -> bytes:
    """Return lines of the file that are not ASCII if it is not UTF-8; an empty value if it is."""
    decoder, collected, is_utf8 = codecs.getincrementaldecoder("utf-8")(), bytearray(), True
    with _opened(path) as file:
        for line in cast("BinaryIO", file):
            if line.isascii():
                continue
            if len(collected) < _SAMPLE:
                collected += line
            try:
                decoder.decode(line, final=True)
            except UnicodeDecodeError:
                is_utf8 = False
            if not is_utf8 and len(collected) >= _SAMPLE:
                break
    return b"" if is_utf8 else bytes(collected[:_SAMPLE])


def _legacy_encoding(path: Path, sample: bytes) -> str:
    matches = charset_normalizer.from_bytes(sample, cp_isolation=list(_LEGACY))
    best = matches.best()
    if best is None:
        raise ConfigurationError(
            f"{path}: expected UTF-8; save the file in that encoding, or name its own with --encoding."
        )
    likely = {
        name
        for match in matches
        if match.chaos <= best.chaos + 0.05 and match.coherence >= best.coherence - 0.02
        for name in match.could_be_from_charset
    }
    return next(name for name in (*_LEGACY, best.encoding) if name in likely)

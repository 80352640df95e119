"""Reads gold labels from a file (JSONL, CSV) or a collection, and finds their conversations."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from domain.text import one_line
from error_handler import ConfigurationError
from evaluation.values import GoldEntry, Labelled, Labels, Problem, Row, Spelling
from storage import extended_json
from storage.extended_json import Document, id_key, id_text

PAGE = 1000  # entries of one query
ID_FIELDS = ("source_conversation_id", "_id", "id")
NESTED = ("gold", "expected")  # objects that may hold the labels
DELIMITERS = ",;\t"
# A whole number as ``id_text`` shows it; the shell of MongoDB stores doubles.
_WHOLE = re.compile(r"(-?\d{1,19})(?:\.0)?", re.ASCII)

# Returns the conversations with one of the ids or conversation numbers.
Find = Callable[[list[Any], list[str]], Awaitable[list[Labelled]]]


@dataclass(slots=True)
class Gold:
    """Gold labels as they were read, and what could not be used; *note* says what limits their use."""

    source: str
    entries: list[GoldEntry] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    note: str = ""

    def add(self, place: str, document: Any, spelling: Spelling, *, has_own_id: bool = False) -> None:
        """Add the labels of *document*, a line of a file or a document that *has_own_id*."""
        if not isinstance(document, dict):
            self.problems.append(Problem("unreadable", place))
            return
        given = next((document[name] for name in NESTED if isinstance(document.get(name), dict)), document)
        labels: dict[str, Labels] = {}
        has_label = False
        for name in spelling.fields:
            value = given.get(name)
            if _is_blank(value):
                continue
            has_label = True
            found = spelling.read(name, value)
            if found is None:
                self.problems.append(Problem("outside", place, f"{name} {one_line(str(value), 60)}"))
            elif name in spelling.single and len(found) != 1:
                self.problems.append(Problem("not_one", place, f"{name} {one_line(str(value), 60)}"))
            else:
                labels[name] = found
        value = next((document[name] for name in ID_FIELDS if not _is_blank(document.get(name))), None)
        number = document.get("conversation_number")
        ids = () if value is None else possible_ids(value)
        if not ids and _is_blank(number):
            self.problems.append(Problem("no_key", place))
        elif labels:
            is_named = _is_blank(number) or (bool(ids) and not has_own_id)
            self.entries.append(GoldEntry(place, ids, None if is_named else str(number), labels))
        elif not has_label:
            self.problems.append(Problem("no_label", place))


def _is_blank(value: Any) -> bool:
    return value is None or (isinstance(value, str) and not value.strip())


def read_gold_file(path: Path, spelling: Spelling) -> Gold:
    """Return the gold labels in *path*: CSV with a header if its name ends in .csv or .tsv, else one JSON object per line.

    Raises:
        ConfigurationError: The file cannot be read, or no line has a field of the taxonomy.
    """
    gold = Gold(str(path))
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as exc:
        raise ConfigurationError(
            f"{path} cannot be read ({exc.strerror}); --gold requires a JSONL or CSV file."
        ) from exc
    except UnicodeDecodeError as exc:
        raise ConfigurationError(f"{path} cannot be read as UTF-8; --gold requires a JSONL or CSV file.") from exc
    if not text.strip():
        raise ConfigurationError(
            f"{path} is empty; --gold requires a line of JSON, or a row of CSV, for each conversation."
        )
    rows = _csv_rows(path, text) if path.suffix.lower() in (".csv", ".tsv") else _json_rows(text)
    for line, document in rows:
        gold.add(f"line {line}", document, spelling)
    require_labels(gold, spelling)
    return gold


def require_labels(gold: Gold, spelling: Spelling) -> None:
    """Raise ConfigurationError if no entry of *gold* has a field of the taxonomy."""
    if not gold.entries and not any(problem.kind in ("outside", "not_one") for problem in gold.problems):
        raise ConfigurationError(
            f"{gold.source} has no gold labels; expected _id or conversation_number, and one or more of the fields "
            f"{', '.join(spelling.fields)}."
        )


def _json_rows(text: str) -> Iterator[tuple[int, Any]]:
    for line, row in enumerate(text.split("\n"), 1):
        if row.strip():
            document: Any = None
            with suppress(ValueError):
                document = extended_json.loads(row)
            yield line, document


def _csv_rows(path: Path, text: str) -> Iterator[tuple[int, Document]]:
    first = text.partition("\n")[0]
    reader = csv.DictReader(io.StringIO(text), delimiter=max(DELIMITERS, key=first.count), strict=True)
    try:
        for row in reader:
            yield reader.line_num, {name.strip(): value for name, value in row.items() if name}
    except csv.Error as exc:
        raise ConfigurationError(
            f"{path}, line {reader.line_num}: expected CSV with texts in double quotes, and quotes inside them doubled."
        ) from exc


def possible_ids(value: Any) -> tuple[Any, ...]:
    """Return the ids that *value* may mean: a text may be an ObjectId or a number, and MongoDB has several types of numbers.

    It is empty if MongoDB cannot hold *value*.
    """
    ids: list[Any] = []
    with suppress(ValueError):
        id_key(value)
        ids.append(value)
        if isinstance(value, str) and len(value) == 24:
            ids.append(extended_json.loads(f'{{"$oid": "{value}"}}'))
        elif isinstance(value, str) and (written := _WHOLE.fullmatch(value)):
            value = int(written[1])
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if is_number and value == value // 1 and abs(value) < 2**63:
            ids += [int(value), extended_json.loads(f'{{"$numberLong": "{int(value)}"}}')]
            ids += [float(value)] if float(value) == value else []
    return tuple(ids)


async def match(entries: Sequence[GoldEntry], find: Find) -> tuple[list[tuple[GoldEntry, Labelled]], list[Problem]]:
    """Return each entry with its conversation, and the entries that name none ("unknown") or several."""
    pairs: list[tuple[GoldEntry, Labelled]] = []
    problems: list[Problem] = []
    for start in range(0, len(entries), PAGE):
        page = entries[start : start + PAGE]
        ids = [value for entry in page for value in entry.ids]
        found = await find(ids, [entry.number for entry in page if entry.number is not None])
        by_key = {labelled.key: labelled for labelled in found}
        by_number: dict[str | None, list[Labelled]] = {}
        for labelled in found:
            by_number.setdefault(labelled.number, []).append(labelled)
        for entry in page:
            hits = [by_key[key] for key in set(map(id_key, entry.ids)) if key in by_key]
            if not hits and entry.number is not None:
                hits = by_number.get(entry.number, [])
            if len(hits) == 1:
                pairs.append((entry, hits[0]))
            else:
                problems.append(Problem("ambiguous" if hits else "unknown", entry.place, name_of(entry)))
    return pairs, problems


def name_of(entry: GoldEntry) -> str:
    """Return the id or the number of *entry* for people."""
    return id_text(entry.ids[0]) if entry.ids else f"conversation {one_line(str(entry.number), 60)}"


def merge(pairs: Iterable[tuple[GoldEntry, Labelled]]) -> tuple[list[Row], list[Problem]]:
    """Return one row per conversation; of several gold labels of a field, the first one is used."""
    gold: dict[bytes, dict[str, tuple[str, Labels]]] = {}
    labelled: dict[bytes, Labelled] = {}
    problems: list[Problem] = []
    for entry, found in pairs:
        fields = gold.setdefault(found.key, {})
        labelled[found.key] = found
        for name, labels in entry.labels.items():
            if name not in fields:
                fields[name] = (entry.place, labels)
                continue
            place, used = fields[name]
            problems.append(
                Problem("duplicate" if used == labels else "conflict", entry.place, f"{name}, as in {place}")
            )
    rows = [Row({name: labels for name, (_, labels) in fields.items()}, labelled[key]) for key, fields in gold.items()]
    for row in rows:
        for name in row.gold.keys() - row.labelled.labels.keys():
            problems.append(Problem("no_field", row.labelled.name, name))
    return rows, problems

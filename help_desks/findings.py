"""What an import has to report: which column became which field, and which rows are special. No text of a conversation."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from domain.text import counted, one_line

NAMED_PLACES = 5
_WIDTH = 40


@dataclass(slots=True)
class Findings:
    """The report of one file.

    *rows* counts rows or records. *fields* maps a column to the fields that it became, in the order of the file; *filled*
    counts its values that are not empty, and *totals* the rows, or the messages inside records (by the prefix of their
    columns). *notes* maps a sentence to its places (``line 4``): the number of all, and the
    first ones.
    """

    rows: int = 0
    layout: str = ""
    fields: dict[str, dict[str, None]] = field(default_factory=dict)
    filled: Counter[str] = field(default_factory=Counter)
    totals: Counter[str] = field(default_factory=Counter)
    notes: dict[tuple[str, str], tuple[int, list[str]]] = field(default_factory=dict)

    def note(self, noun: str, what: str, place: str) -> None:
        """Count one *noun* (``row``) to which *what* (``left out: no text``) happened at *place*."""
        count, places = self.notes.get((noun, what), (0, []))
        self.notes[noun, what] = count + 1, places if len(places) == NAMED_PLACES else [*places, place]

    def became(self, column: str, target: str, is_filled: bool) -> None:
        """Record that a value of *column* became *target*."""
        self.fields.setdefault(column, {})[target] = None
        if is_filled:
            self.filled[column] += 1

    def note_lines(self) -> list[str]:
        """Return one sentence for each kind of note, with its first places."""
        lines = []
        for (noun, what), (count, places) in self.notes.items():
            first = f" ({', '.join(places)}{', ...' if count > len(places) else ''})" if places[0] else ""
            lines.append(f"{counted(count, noun)} {what}{first}")
        return lines

    def table_lines(self) -> list[str]:
        """Return the columns with their fields and numbers of empty values, aligned; an empty list if none was mapped."""
        if not self.fields:
            return []
        rows = [("column", "field", "empty")]
        for column, targets in self.fields.items():
            prefix = max((each for each in self.totals if column.startswith(each)), key=len, default="")
            empty = max(0, self.totals[prefix] - self.filled[column])
            rows.append((one_line(column, _WIDTH), one_line("; ".join(targets), 2 * _WIDTH), f"{empty:,}"))
        widths = [max(len(row[place]) for row in rows) for place in range(3)]
        return [f"  {a:<{widths[0]}}  {b:<{widths[1]}}  {c:>{widths[2]}}" for a, b, c in rows]

"""Texts that a spreadsheet would take for a formula, and how a CSV file holds them. Pure.

A program for spreadsheets skips spaces and quotation marks before it looks for a formula. If it expects another separator
than the comma, as many European settings do, a semicolon, a tab or a line break inside a text begins a cell as well. So
an apostrophe is put in front of each place that could be read as the start of a formula. A text with an apostrophe at such
a place gets a second one, so ``restored`` is exact.
"""

from __future__ import annotations

import re

_STARTS = r"[=+\-@\uFF1D\uFF0B\uFF0D\uFF20']"  # full-width forms count, too
# All of the spaces and quotation marks before a start, so that each of them is read once.
_LEAD = re.compile(rf'(?<![\s"])[\s"]*+{_STARTS}')
_BREAK = re.compile(r"[\t\r\n]")
_DEFUSED = re.compile(r"(\A|[;\t\r\n])'")
_MAY_BE_DANGEROUS = re.compile(r"[=+\-@\uFF1D\uFF0B\uFF0D\uFF20'\t\r\n]")


def is_dangerous(text: str) -> bool:
    """Return whether ``defused`` changes *text*."""
    return defused(text) != text


def defused(text: str) -> str:
    """Return *text* with an apostrophe at each place where a spreadsheet could read a formula."""
    if not _MAY_BE_DANGEROUS.search(text):
        return text
    safe = _LEAD.sub(_defused_lead, text)
    return f"'{safe}" if _BREAK.match(safe) else safe


def _defused_lead(found: re.Match[str]) -> str:
    is_start = not found.start() or found.string[found.start() - 1] == ";"
    return ("'" if is_start else "") + _BREAK.sub(r"\g<0>'", found.group())


def restored(text: str) -> str:
    """Return the original of a ``defused`` text."""
    return _DEFUSED.sub(r"\1", text)

"""Texts that a spreadsheet would take for a formula."""

from __future__ import annotations

import csv
import io

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from exporting.formula_text import defused, is_dangerous, restored

FORMULAS = "=+-@＝＋－＠"
_PIECES = st.sampled_from([*FORMULAS, "'", '"', " ", ";", ",", "\t", "\r", "\n", "a", "1", "\u00a0", "''", ";'"])
hostile = st.lists(_PIECES, max_size=12).map("".join)


@pytest.mark.parametrize("first", FORMULAS)
@pytest.mark.parametrize("padding", ["", " ", "\u00a0", '"', ' "" ', "\t", "\r\n"])
def test_formula_is_defused_also_after_spaces_and_quotes(first: str, padding: str) -> None:
    assert defused(f"{padding}{first}1+1")[0] == "'"


@pytest.mark.parametrize("first", ["\t", "\r", "\n"])
def test_text_that_starts_with_a_tab_or_line_break_is_defused(first: str) -> None:
    assert defused(f"{first}1+1")[0] == "'"


@pytest.mark.parametrize("separator", [";", "\t", "\n", "\r"])
def test_formula_after_a_separator_of_another_locale_is_defused(separator: str) -> None:
    """A spreadsheet that splits cells at semicolons or tabs sees a text again where ours is in the middle of one."""
    text = f'5 stars{separator} "=HYPERLINK(0)'
    for line in io.StringIO(defused(text)):
        for cell in line.replace("\t", ";").replace("\r", ";").split(";"):
            assert not cell.lstrip(' "').startswith(tuple(FORMULAS))


@pytest.mark.parametrize(
    "text", ["", "Complaint", "Shipping/Delivery", "a=b", "1 - 2", "don't", "x@y.example", "12,50"]
)
def test_ordinary_text_is_not_changed(text: str) -> None:
    assert defused(text) == text
    assert not is_dangerous(text)


@pytest.mark.parametrize("text", ["\t" * 200_000, "\n " * 100_000, '" ' * 100_000, ";" + " " * 200_000])
def test_long_white_space_is_read_once(text: str) -> None:
    """A customer could else hold up an export: 100,000 tabs took 138 s."""
    assert defused(text).lstrip("'") == text
    assert restored(defused(f"{text}=1")) == f"{text}=1"


@given(hostile)
@example("'=1")
@example(";'\t'=")
def test_defused_text_is_restored_exactly(text: str) -> None:
    assert restored(defused(text)) == text


@given(hostile)
def test_no_cell_of_another_separator_starts_with_a_formula(text: str) -> None:
    """Whatever of the three separators a spreadsheet expects, and however it treats quotation marks."""
    written = io.StringIO(newline="")
    csv.writer(written).writerow(["x", defused(text), "y"])
    for separator in ";\t\n":
        for piece in written.getvalue().replace("\r", "\n").replace("\n", separator).split(separator):
            assert not piece.lstrip(' "\u00a0').startswith(tuple(FORMULAS)), piece


@given(hostile)
def test_is_dangerous_tells_what_defused_changes(text: str) -> None:
    assert is_dangerous(text) == (defused(text) != text)

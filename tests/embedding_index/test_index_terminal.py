"""``cli.py index`` on a terminal of 80 columns: the question for the price, the progress bar, the table of hits."""

from __future__ import annotations

import pytest

from tests.embedding_index.index_commands import RELATIONSHIPS, TABLES, IndexSite
from tests.terminal import STEERING

OVER = ("--batch", "--max-cost", "0")


@pytest.mark.parametrize("no", ["\n", pytest.param("n\n", marks=pytest.mark.thorough)])
def test_the_question_for_the_price(site: IndexSite, no: str) -> None:
    """Enter and n send nothing; Ctrl-C ends the run at once; y continues, with a progress bar."""
    refused = site.on_terminal(*OVER, answer=no)
    assert (refused.code, site.calls) == (2, 0), refused.out
    assert "more than --max-cost 0 allows. Continue? [y/N]" in refused.out
    assert "Nothing was sent" in refused.out
    ended = site.on_terminal(*OVER, answer="\x03")
    assert (ended.code, site.calls) == (130, 0), ended.out
    agreed = site.on_terminal(*OVER, answer="y\n")
    assert (agreed.code, site.calls) == (0, 2), agreed.out
    assert f"{TABLES + RELATIONSHIPS}/{TABLES + RELATIONSHIPS}" in agreed.out
    assert f"{TABLES + RELATIONSHIPS} indexed, 0 failed" in agreed.out


def test_a_pipe_has_lines_and_no_bar(site: IndexSite) -> None:
    """Progress goes to stderr; stdout has only the outcome."""
    ended = site.run("--batch")
    assert f"Indexing: {TABLES + RELATIONSHIPS} of {TABLES + RELATIONSHIPS}, 0 failed\n" in ended.err
    assert ended.err.count("Indexing:") == 1
    assert "Indexing:" not in ended.out
    assert "\x1b" not in ended.said


@pytest.mark.parametrize("columns", [60, pytest.param(80, marks=pytest.mark.thorough)])
def test_hits_fit_the_terminal(site: IndexSite, columns: int) -> None:
    """No line is longer than the terminal, names are complete, and stored control characters have no effect."""
    site.change(
        "CREATE TABLE a_table_with_a_name_that_is_far_longer_than_what_is_left_beside_the_text (id INTEGER PRIMARY KEY, "
        "order_id INTEGER REFERENCES orders(id))",
        'CREATE TABLE "odd\x1b[31m[red]name" (id INTEGER PRIMARY KEY)',
    )
    assert site.run("--batch").code == 0
    shown = site.on_terminal("--search", "refunds", "--limit", "20", columns=columns)
    assert shown.code == 0, shown.out
    assert "\x1b[31m" not in shown.out
    lines = STEERING.sub("", shown.out).splitlines()
    assert max(map(len, lines)) <= columns
    header = next(line for line in lines if line.startswith("like"))
    name = slice(header.index("name"), header.index("about"))
    whole = "".join("".join(line[name].split()) for line in lines)
    assert "a_table_with_a_name_that_is_far_longer_than_what_is_left_beside_the_text" in whole
    assert "\\u001b[31m[red]name" in whole, shown.out

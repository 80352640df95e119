"""Long texts are cut without loss, within the limit, at places where people would cut them."""

from __future__ import annotations

import functools
import random
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from embedding_index.inputs import split_text


@functools.cache
def bpe() -> Any:
    """Return the encoding; its tables take a second, which no process needs for its other tests."""
    import bpe_openai

    return bpe_openai.get_encoding("cl100k_base")


def quarter_bytes(text: str) -> int:
    return -(-len(text.encode("utf-8", "surrogatepass")) // 4)


def words(text: str) -> int:
    """Nothing below a word counts, so the count of a beginning is no share of the whole."""
    return max(1, len(text.split()))


def tokens(text: str) -> int:
    return max(1, len(bpe().encode(text)))


def ragged(text: str) -> int:
    """Like tokens: a beginning may have more than the whole of which it is one."""
    return len(text) + 3 * (len(text) % 2)


COUNTS = {"characters": len, "bytes": quarter_bytes, "words": words, "ragged": ragged}
TEXTS = st.one_of(
    st.text(),
    st.text(alphabet=st.sampled_from("ab. \n\r\u0301\u200dé。」\U0001f1e9\U0001f1ea\U0001f44d\U0001f3fd")),
    st.lists(st.sampled_from(["word ", "End. ", "\n\n", "x" * 30, "\n", "...", '." ', "  ", "\r\n"])).map("".join),
)


@given(text=TEXTS, limit=st.integers(1, 40), name=st.sampled_from(sorted(COUNTS)))
@example(text="\ud83d\ude00" * 20, limit=3, name="characters")
@example(text="abcdef ghijk lmno pqrst uvwxyz", limit=9, name="ragged")
@example(text="e" + "\u0301" * 500, limit=7, name="characters")
def test_nothing_is_lost_and_the_limit_holds(text: str, limit: int, name: str) -> None:
    count = COUNTS[name]
    pieces = split_text(text, limit, count)
    assert "".join(pieces) == text
    assert all(pieces), "an empty piece"
    for piece in pieces:
        assert count(piece) <= limit or len(piece) == 1, (piece, limit)


def test_a_cut_that_makes_a_beginning_dearer_is_moved() -> None:
    """The beginning of a stretch that fits need not fit: here each piece that ends with a space has ten tokens more."""

    def count(text: str) -> int:
        return len(text) + 10 * text.endswith(" ")

    pieces = split_text("four word " * 30, 20, count)
    assert "".join(pieces) == "four word " * 30
    assert max(map(count, pieces)) <= 20


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("One two. Three.\n\nFour five. Six", ["One two. Three.\n\n", "Four five. Six"]),
        ("One two three. Four five six", ["One two three. ", "Four five six"]),
        ("one two three four five six", ["one two three four ", "five six"]),
        ("abcdefghijklmnopqrstuvwxyz", ["abcdefghijklmnopqrs", "tuvwxyz"]),  # nearly 20: a guess that fits
        ("ひとつです。ふたつです。みっつです。よっつです。", ["ひとつです。ふたつです。みっつです。", "よっつです。"]),
    ],
)
def test_the_cut_is_where_people_would_cut(text: str, pieces: list[str]) -> None:
    assert split_text(text, 20, len) == pieces


@pytest.mark.thorough
def test_pieces_of_real_tokens_are_full() -> None:
    rng = random.Random(3)
    vocabulary = ["refund", "card", "I", "was", "charged", "twice", "naïve", "Zürich", "ありがとう", "4711-AB", "é"]
    text = "".join(rng.choice(vocabulary) + rng.choice([" ", " ", " ", ". ", "\n\n"]) for _ in range(30_000))
    pieces = split_text(text, 256, tokens)
    assert "".join(pieces) == text
    assert max(map(tokens, pieces)) <= 256
    assert len(pieces) <= 1.6 * tokens(text) / 256


@pytest.mark.parametrize(
    "unit",
    [
        *("word ", "x", "。", "A sentence, of some words. "),
        *(
            pytest.param(unit, marks=pytest.mark.thorough)
            for unit in (".", " ", "\n", "e\u0301", "x" * 999 + " ", '."', "\u0301")
        ),
    ],
)
def test_a_long_text_is_not_counted_again_and_again(unit: str) -> None:
    text = unit * (500_000 // len(unit))
    counted = 0

    def count(stretch: str) -> int:
        nonlocal counted
        counted += len(stretch)
        return quarter_bytes(stretch)

    assert "".join(split_text(text, 2048, count)) == text
    assert counted < 6 * len(text)


def test_the_length_of_a_piece_is_learnt_from_the_last_one() -> None:
    """If characters have more tokens than elsewhere, each piece would be tried four times too long."""
    text, counted = "x" * 100_000, 0

    def count(stretch: str) -> int:
        nonlocal counted
        counted += len(stretch)
        return len(stretch)

    split_text(text, 1000, count)
    assert counted < 4 * len(text)

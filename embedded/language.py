"""A cheap, deterministic check whether customers write English. docs/baseline.md says how often it errs.

The vocabulary of the encoder is English: words of other languages fall apart into many pieces. English function words
keep names, hashtags and spelling mistakes from being mistaken for another language.
"""

from __future__ import annotations

import re
from collections.abc import Callable

MOST_EXTRA_PIECES = 0.4  # for each word
FEWEST_FUNCTION_WORDS = 0.15  # share of the words
READ_CHARACTERS = 2000
FEWEST_WORDS = 3  # fewer ASCII words tell nothing ("refund" has two pieces) and count as English

_WORD = re.compile(r"[^\W\d_]+")
_TAG = re.compile(r"#\w+")
# Without words that other European languages share, such as "a", "in", "me", "no", "was" and "will".
_FUNCTION_WORDS = frozenset(
    _WORD.findall(
        "about after again and any anyone are at be because been but by can could did didn does doesn don for from get got "
        "good great had has have he hello help her hi his how i id if ill im is isn it its ive know let my not of or order "
        "our please possible see she should some tell than thank thanks that the their there these they this those up us "
        "very wanna want we were what whats when where wheres which who why with would you your"
    )
)


def is_english(texts: list[str], count_pieces: Callable[[str], int]) -> bool:
    """Return whether *texts*, without links and handles, look English. True if they have hardly any words.

    *count_pieces* returns the number of pieces of the encoder's vocabulary in a text.
    """
    words = _WORD.findall(_TAG.sub(" ", " ".join(texts)[:READ_CHARACTERS]).lower())
    if not words or (len(words) < FEWEST_WORDS and all(word.isascii() for word in words)):
        return True
    extra_pieces = count_pieces(" ".join(words)) / len(words) - 1
    function_words = sum(word in _FUNCTION_WORDS for word in words) / len(words)
    return extra_pieces <= MOST_EXTRA_PIECES or function_words >= FEWEST_FUNCTION_WORDS

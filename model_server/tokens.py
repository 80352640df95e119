"""Estimates the tokens of a text before it is sent, and learns from the counts of answers and refusals. No I/O.

A prompt has a number of words, letters, digits, signs and characters of other scripts, and each kind has a rate: tokens
per piece. The rates start as wide guesses that hold for any common tokenizer. Each count of the server narrows them, those
most that were least certain (a Kalman filter). One count therefore suffices for texts of the same kind.
"""

from __future__ import annotations

import functools
import math
import operator
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

# Rate, its standard deviation, and the lowest rate, of: the template, words, ASCII letters, digits, other ASCII signs,
# characters of two (Greek, Cyrillic, Arabic), three (Chinese, Thai, Hindi) and four (emoji) bytes. English has the same
# rates with all current vocabularies. A byte is at most one token, which DEVIATIONS above the rate allow for.
_RATES = (24.0, 0.68, 0.10, 0.75, 0.60, 1.0, 1.5, 2.4)
_SPREADS = (25.0, 0.05, 0.015, 0.25, 0.08, 0.62, 0.93, 1.0)
_FLOORS = (0.0, 0.6, 0.0, 0.25, 0.0, 0.18, 0.25, 0.4)
_MOST = (0.0, 1.0, 0.4, 1.0, 1.0, 2.0, 3.0, 4.0)
DEVIATIONS = 1.6  # above the expected count: one prompt in twenty is longer
NOISE, LEAST_NOISE = 0.06, 8.0  # texts of one kind differ by this share, and by some tokens
TEMPLATE_TOKENS = 500  # the most that a chat template adds to a prompt
ODD = 4.0  # deviations: such a text is not like the others
FITTING_DEVIATIONS = (1.0, 0.6)  # before and after a count of the same text: a refusal of a fitted prompt costs little
DENSE, DENSE_SYSTEM, KNOWN = 1.2, 1.35, 0.04  # times the most expected; margin; deviation of a part that is known
SAME_TEXT_NOISE = 0.02  # parts of a text that was counted as a whole
CUT_SHARE, CUT_DEVIATIONS = 0.75, 3.0  # a count below this share of the lowest expected one proves a cut prompt

_WORD_PART = re.compile(r"[^\W_]{1,16}")
_RUN = re.compile(r"(.)\1{15,}", re.DOTALL)


def _kind(byte: int) -> bytes:
    """Return the kind of a *byte* of UTF-8: a letter, digit, white space or other sign, or the first of 2, 3 or 4."""
    character = bytes([byte])
    if byte < 128:
        return b"a" if character.isalpha() else b"0" if character.isdigit() else b" " if character.isspace() else b"."
    return b"2" if 0xC0 <= byte < 0xE0 else b"3" if 0xE0 <= byte < 0xF0 else b"4" if 0xF0 <= byte < 0xF8 else b"-"


_KINDS = b"".join(map(_kind, range(256)))

Count = Callable[[str], float]
_Pieces = tuple[float, ...]  # how many of each kind


def count_pieces(text: str) -> _Pieces:
    """Return how many pieces of each kind *text* has, without a template."""
    raw = text.encode("utf-8", "replace")
    kinds = raw.translate(_KINDS)
    letters, digits, spaces = kinds.count(b"a"), kinds.count(b"0"), kinds.count(b" ")
    words = spaces + 1 - kinds.startswith(b" ") - kinds.endswith(b" ")
    if b"  " in kinds or not kinds:  # otherwise not needed, which is much faster
        words = len(raw.split())
    others = [0, 0, 0] if raw.isascii() else [kinds.count(lead) for lead in (b"2", b"3", b"4")]
    ascii_count = len(raw) - 2 * others[0] - 3 * others[1] - 4 * others[2]
    # The space before a word is part of its token.
    return (0.0, words, letters, digits, ascii_count - letters - digits - min(spaces, words), *others)


def _bytes(text: str) -> int:
    return len(text.encode("utf-8", "replace"))


def _dot(first: Sequence[float], second: Sequence[float]) -> float:
    products: Iterator[float] = map(operator.mul, first, second)
    return sum(products)


def most_tokens(text: str) -> float:
    """Return the most tokens of *text*, in any language and with any common tokenizer."""
    return _dot(_MOST, count_pieces(text))


def least_tokens(text: str) -> int:
    """Return the fewest tokens of *text*, in any script and with any common tokenizer.

    No token spans two words or holds more than 16 letters, so this never exceeds the count of a whole prompt.
    """
    return len(_WORD_PART.findall(text))


def least_prompt_tokens(messages: Sequence[Mapping[str, str]], enough: int = 0) -> int:
    """Return ``least_tokens`` of all *messages*. The first one is the same in each prompt of a run, and is cached.

    If the result cannot exceed *enough*, the words are not counted and *enough* is returned.
    """
    first, *others = (message["content"] for message in messages)
    least_of_first = _least_of_system_prompt(first)
    # Each word part takes at least two characters: a letter and a separator, or sixteen letters.
    if least_of_first + sum((len(text) + 1) // 2 for text in others) <= enough:
        return enough
    return least_of_first + sum(least_tokens(text) for text in others)


_least_of_system_prompt = functools.lru_cache(maxsize=2)(least_tokens)


@dataclass(frozen=True, slots=True)
class Gauge:
    """The token counts of the parts of one text.

    *room* is what they may have in all by *tokens_of*, which is additive and includes the margin for a part like the whole
    text. *estimate* returns the expected tokens of one part and the margin that the whole prompt with it needs.
    """

    room: float
    tokens_of: Count
    estimate: Callable[[str], tuple[float, float]]


class TokenEstimator:
    """Estimates the tokens of prompts that share one system prompt, and errs on the high side."""

    def __init__(self, system_prompt: str) -> None:
        self._system: _Pieces = (1.0, *count_pieces(system_prompt)[1:])
        self._system_bytes = _bytes(system_prompt)
        self._rates = list(_RATES)
        self._covariance = [
            [spread**2 if row == column else 0.0 for column in range(len(_RATES))]
            for row, spread in enumerate(_SPREADS)
        ]

        self.system_tokens = (
            self._most_of_system()
        )  # the most tokens that system prompt and template are likely to have

    def fits(self, text: str, most_prompt_tokens: int) -> bool:
        """Return whether a prompt with *text* in it has at most *most_prompt_tokens*, whatever the rates. Cheap."""
        room = most_prompt_tokens - self.system_tokens
        return _bytes(text) <= room or most_tokens(text) <= room  # a byte is at most one token

    def text_tokens(self, text: str) -> float:
        """Return the most tokens that *text*, a part of the user message, is likely to have."""
        pieces = count_pieces(text)
        return self._most(pieces, NOISE * _dot(self._rates, pieces))

    def prompt_tokens(self, text: str) -> int:
        """Return the most tokens that the whole prompt with *text* in it is likely to have."""
        pieces = count_pieces(text)
        return math.ceil(self._most(self._with_system(pieces), NOISE * _dot(self._rates, pieces)))

    def least_prompt_tokens(self, text: str, enough: float = 0.0) -> float:
        """Return the fewest tokens that the whole prompt with *text* in it can have; a lower count proves a cut prompt.

        If the result cannot exceed *enough*, it is not worked out and *enough* is returned.
        """
        if CUT_SHARE * (self.system_tokens + _bytes(text)) <= enough:  # a byte is at most one token
            return enough
        whole = self._with_system(count_pieces(text))
        if max(CUT_SHARE * _dot(self._rates, whole), _dot(_FLOORS, whole)) <= enough:
            return enough
        pieces = count_pieces(_RUN.sub(r"\1\1\1", text))  # a tokenizer may know long runs
        prompt = self._with_system(pieces)
        expected = _dot(self._rates, prompt)
        deviation = self._deviation(prompt, NOISE * _dot(self._rates, pieces))
        return max(CUT_SHARE * (expected - CUT_DEVIATIONS * deviation), _dot(_FLOORS, prompt))

    def fewest_tokens(self, text: str) -> float:
        """Return the fewest tokens, at least 1, that *text*, a part of the user message, can have."""
        return max(1.0, _dot(_FLOORS, count_pieces(_RUN.sub(r"\1\1\1", text))))

    def gauge(self, text: str, most_prompt_tokens: int, counted: float | None = None) -> Gauge:
        """Return how parts of *text* are counted for a prompt of *most_prompt_tokens*.

        *counted* is the server's count for the prompt with the whole *text*.
        """
        pieces, system = count_pieces(text), _dot(self._rates, self._system)
        expected = max(1.0, _dot(self._rates, pieces))
        scale = 1.0
        if counted is not None:
            system = self._system_within(
                counted, self._most(self._with_system(pieces), NOISE * expected), most_prompt_tokens
            )
            scale = min(20.0, max(0.05, (counted - system) / expected))
        deviations = FITTING_DEVIATIONS[counted is not None]
        noise = (NOISE if counted is None else SAME_TEXT_NOISE) * scale

        def margin(part: _Pieces) -> float:
            return deviations * self._deviation(self._with_system(part), noise * _dot(self._rates, part))

        def most(share: float) -> float:  # tokens of this share of the text, with the margin of the prompt it makes
            return share * scale * expected + margin(tuple(share * count for count in pieces))

        def estimate(part: str) -> tuple[float, float]:
            found = count_pieces(part)
            return scale * _dot(self._rates, found), margin(found)

        room = most_prompt_tokens - system
        share = high = 1.0
        if most(high) > room:
            share = 0.0
            for _ in range(12):
                middle = (share + high) / 2
                share, high = (middle, high) if most(middle) <= room else (share, middle)
            share = max(share, 0.01)
        factor = most(share) / max(1.0, share * expected)
        return Gauge(room, lambda part: factor * _dot(self._rates, count_pieces(part)), estimate)

    def _system_within(self, counted: float, most: float, most_prompt_tokens: int) -> float:
        """Return the tokens of the system prompt to assume beside a text that made *counted*, where *most* were likely.

        If no answer has told them yet, a dense tokenizer makes more of the instructions, too; half of the rest stays.
        """
        system = _dot(self._rates, self._system)
        if counted < DENSE * most or self._deviation(self._system, 0.0) < KNOWN * system:
            return system
        return min(DENSE_SYSTEM * system * counted / most, (system + max(system, most_prompt_tokens)) / 2)

    def learn(self, text: str, prompt_tokens: int) -> None:
        """Record that the server counted *prompt_tokens* for the whole prompt with *text* in it."""
        most = self._system_bytes + _bytes(text) + TEMPLATE_TOKENS
        # Long runs say nothing about other texts; more tokens than bytes are not those of this prompt.
        if _RUN.search(text) or prompt_tokens > most:
            return
        pieces = count_pieces(text)
        prompt = self._with_system(pieces)
        expected = _dot(self._rates, pieces)
        noise = LEAST_NOISE + NOISE / 2 * expected
        shared = [_dot(row, prompt) for row in self._covariance]
        error = prompt_tokens - _dot(self._rates, prompt)
        total = _dot(shared, prompt) + noise**2
        if error**2 > ODD**2 * total:  # base64, say: it must not change what is known about other texts
            total += min(abs(error), expected) ** 2
        for row, weight in enumerate(shared):
            self._rates[row] = max(_FLOORS[row] / 2, self._rates[row] + weight / total * error)
            self._covariance[row] = [
                value - weight * other / total for value, other in zip(self._covariance[row], shared, strict=True)
            ]
        self.system_tokens = self._most_of_system()

    def _most_of_system(self) -> int:
        return math.ceil(self._most(self._system, 0.0))

    def _with_system(self, pieces: _Pieces) -> _Pieces:
        return tuple(map(operator.add, self._system, pieces))

    def _deviation(self, pieces: _Pieces, noise: float) -> float:
        variance = _dot([_dot(row, pieces) for row in self._covariance], pieces)
        return math.sqrt(max(0.0, variance) + noise**2)

    def _most(self, pieces: _Pieces, noise: float) -> float:
        return _dot(self._rates, pieces) + DEVIATIONS * self._deviation(pieces, noise)

"""Cuts long texts into pieces, and packs pieces into as few calls as possible. No I/O."""

from __future__ import annotations

import heapq
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from embedding_index.providers.contract import RequestLimits

Count = Callable[[str], int]

# From the best place for a cut to the worst; the next piece begins at the end of a match.
_CUTS = (
    re.compile(r"\n[^\S\n]*\n\s*"),  # paragraphs
    # Sentences and lines. The lookbehind avoids 10,000 attempts in a row of 10,000 dots.
    re.compile(r"(?<=[.!?…])[\"'”’)\]]*\s+|(?<=[。！？])[」』”’）]*|\n+"),
    re.compile(r"\s+"),  # words
)
_EARLIEST_CUT = 0.5  # of the longest piece that fits; earlier places are not used
_FIRST_RATE = 4.0  # characters per token; later that of the last piece


@dataclass(frozen=True, slots=True)
class Piece:
    """One input of a call: a whole text, or a part of a long one. *tokens* are by the provider's count."""

    content_hash: str
    text: str
    tokens: int


class LongTexts:
    """The pieces that long texts wait for, all by content hash. A piece may belong to several texts, or be divided again.

    The caller serialises access.
    """

    def __init__(self) -> None:
        self._pieces: dict[str, tuple[Piece, ...]] = {}
        self._missing: dict[str, set[str]] = {}
        self._wholes: dict[str, list[str]] = defaultdict(list)

    def add(self, whole: str, pieces: Sequence[Piece], missing: Iterable[str]) -> None:
        """Note that *whole* consists of *pieces*, of which those *missing* have no vector yet."""
        self._pieces[whole] = tuple(pieces)
        self._missing[whole] = set(missing)
        for piece in self._missing[whole]:
            self._wholes[piece].append(whole)

    def pieces(self, whole: str) -> tuple[Piece, ...]:
        """Return the pieces of *whole* in their order."""
        return self._pieces[whole]

    def arrived(self, piece: str) -> list[str]:
        """Return the texts whose pieces are complete now that *piece* has its vector."""
        complete = []
        for whole in self._wholes.pop(piece, ()):
            missing = self._missing.get(whole)
            if missing is not None:
                missing.discard(piece)
                if not missing:
                    del self._missing[whole]
                    complete.append(whole)
        return complete

    def failed(self, piece: str) -> list[str]:
        """Return the texts that will have no vector because *piece* has none, each once."""
        return [whole for whole in self._wholes.pop(piece, ()) if self._missing.pop(whole, None) is not None]


def pack(sizes: Sequence[int], limits: RequestLimits, batch_size: int) -> list[list[int]]:
    """Return the places of *sizes* (tokens, at least 1) in calls within *limits*, of at most *batch_size* inputs.

    If single inputs are small compared to a call, there are no more calls than ``inputs / inputs per call`` or ``tokens /
    tokens per call``. All have about the same number of tokens, so that concurrent calls end together. An input that is
    larger than a call gets a separate call.
    """
    if not sizes:
        return []
    most_inputs = min(limits.inputs, batch_size)
    most_tokens = limits.request_tokens
    longest_first = sorted(range(len(sizes)), key=lambda place: -sizes[place])
    fewest = -(-len(sizes) // most_inputs)
    if most_tokens is not None:
        fewest = max(fewest, -(-sum(sizes) // most_tokens))
    failed, step = fewest - 1, 0
    while (calls := _spread(sizes, longest_first, min(fewest + step, len(sizes)), most_inputs, most_tokens)) is None:
        failed, step = fewest + step, 2 * step + 1
    enough = len(calls)
    while enough - failed > 1:
        middle = (enough + failed) // 2
        fewer = _spread(sizes, longest_first, middle, most_inputs, most_tokens)
        if fewer is None:
            failed = middle
        else:
            calls, enough = fewer, middle
    return [sorted(call) for call in calls]


def _spread(
    sizes: Sequence[int], longest_first: Sequence[int], count: int, most_inputs: int, most_tokens: int | None
) -> list[list[int]] | None:
    """Return the places in *count* calls, each input in the emptiest call; None if one does not fit."""
    calls: list[list[int]] = [[] for _ in range(count)]
    emptiest = [(0, number) for number in range(count)]
    for place in longest_first:
        if not emptiest:
            return None
        tokens, number = emptiest[0]
        call = calls[number]
        filled = tokens + sizes[place]
        if most_tokens is not None and call and filled > most_tokens:
            return None
        call.append(place)
        if len(call) == most_inputs:
            heapq.heappop(emptiest)
        else:
            heapq.heapreplace(emptiest, (filled, number))
    return calls


def split_text(text: str, limit_tokens: int, count: Count) -> list[str]:
    """Return *text* in pieces of at most *limit_tokens* (from 1) by *count*; joined, they are *text* again.

    Cuts are at ends of paragraphs, else of sentences, else of words, else anywhere. A single character with more tokens
    than the limit is a piece. *count* need not be additive; it gets parts of about the size of a piece only, so the time
    grows linearly with the length.
    """
    pieces: list[str] = []
    start, rate = 0, _FIRST_RATE
    while start < len(text):
        cut = _best_cut(text, start, start + max(1, int(limit_tokens * rate)))
        while (tokens := count(text[start:cut])) > limit_tokens and cut > start + 1:
            # A part may have more tokens than its share, or even than the whole, because the cut splits a word.
            shorter = (cut - start) * min(0.9, 0.95 * limit_tokens / tokens)
            cut = _best_cut(text, start, start + max(1, int(shorter)))
        pieces.append(text[start:cut])
        rate = (cut - start) / tokens
        start = cut
    return pieces


def _best_cut(text: str, start: int, end: int) -> int:
    """Return the best place for a cut after *start* and up to *end*; the end of the text if *end* is behind it."""
    if end >= len(text):
        return len(text)
    earliest = start + int((end - start) * _EARLIEST_CUT)
    for pattern in _CUTS:
        cut = max((match.end() for match in pattern.finditer(text, earliest, end)), default=start)
        if cut > start:
            return cut
    return end

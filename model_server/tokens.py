"""How many tokens a text will be, before it is sent, learnt from the counts of earlier answers. Pure: no I/O."""

from __future__ import annotations

import functools
import math
import re
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

SYSTEM_CHARACTERS_PER_TOKEN = 3.0  # our own English; tokenizers of today make tokens of 4 and more characters of it
TEMPLATE_TOKENS = 32  # what a chat template adds to two messages

# Most tokens that one character makes: a byte-level tokenizer falls back to one token per byte in scripts it was not
# made for. ASCII letters are never that many; digits and signs may be.
LETTER_RATE = 0.4
MOST_PER_CHARACTER = {"marks": 1.0, "two": 2.0, "three": 3.0, "four": 4.0}

LEARN_FROM = 20  # answers of a script before its own rate counts
QUANTILE, MARGIN = 0.95, 1.05
LEAST_FACTOR = 0.45  # of the prior; lower rates come from text that repeats itself, and tell nothing about other text
SPAN = 60.0  # tokens of the prior by which a text must be longer than the shortest one to tell a rate

_WORD_PART = re.compile(r"[^\W_]{1,16}")
_NOT_LETTERS = bytes(byte for byte in range(128) if not (chr(byte).isalpha() or chr(byte) in " \n"))
_LEADS = {"two": (0xC0, 0xE0), "three": (0xE0, 0xF0), "four": (0xF0, 0xF8)}
_NOT_LEADS = {
    name: bytes(byte for byte in range(256) if not first <= byte < end) for name, (first, end) in _LEADS.items()
}


def most_tokens(text: str) -> dict[str, float]:
    """Return the most tokens that *text* makes by script: ``latin`` is ASCII, the others go by their length in UTF-8."""
    raw = text.encode("utf-8", "replace")
    ascii_bytes = raw if text.isascii() else text.encode("ascii", "ignore")
    letters = len(ascii_bytes.translate(None, _NOT_LETTERS))
    weights = {"latin": letters * LETTER_RATE + (len(ascii_bytes) - letters) * MOST_PER_CHARACTER["marks"]}
    if len(ascii_bytes) != len(raw):
        found = {name: len(raw.translate(None, delete)) for name, delete in _NOT_LEADS.items()}
        weights |= {name: number * MOST_PER_CHARACTER[name] for name, number in found.items() if number}
        main = max(found, key=lambda name: found[name])
        # A space before a word of English is part of its token; before bytes it is a token of its own.
        weights[main] = weights.get(main, 0.0) + min(raw.count(b" "), sum(found.values())) * (1 - LETTER_RATE)
    return weights


def least_tokens(text: str) -> int:
    """Return how many tokens *text* has at least, in any script and with any tokenizer in use.

    No token spans two words, and none holds more than 16 letters of one: so this never exceeds a whole prompt's count.
    """
    return len(_WORD_PART.findall(text))


def least_prompt_tokens(messages: Sequence[Mapping[str, str]], enough: int = 0) -> int:
    """Return ``least_tokens`` of all *messages*, the first of which is the same in each prompt of a run.

    Where that is surely not more than *enough*, it is not counted, and *enough* is returned.
    """
    first, *others = (message["content"] for message in messages)
    least_of_first = _least_of_system_prompt(first)
    # Between the beginnings of two of them are two characters or more: a letter and what ends the word, or sixteen letters.
    if least_of_first + sum((len(text) + 1) // 2 for text in others) <= enough:
        return enough
    return least_of_first + sum(least_tokens(text) for text in others)


_least_of_system_prompt = functools.lru_cache(maxsize=2)(least_tokens)


@dataclass(slots=True)
class _Script:
    """What answers to texts of mainly one script told. *anchor* is the shortest: (tokens of the prior, tokens counted)."""

    anchor: tuple[float, int] | None = None
    slopes: deque[float] = field(default_factory=lambda: deque(maxlen=400))
    factor: float = 1.0
    learnt: int = 0

    def learn(self, weight: float, prompt_tokens: int) -> None:
        if self.anchor is None or weight < self.anchor[0]:
            self.anchor = (weight, prompt_tokens)
            return
        if weight - self.anchor[0] < SPAN:
            return
        # A difference of two prompts: what they have in common, the system prompt, falls out of it.
        self.slopes.append((prompt_tokens - self.anchor[1]) / (weight - self.anchor[0]))
        self.learnt += 1
        # The rate of hundreds of answers does not move by one more.
        if len(self.slopes) >= LEARN_FROM and (self.learnt < 10 * LEARN_FROM or self.learnt % LEARN_FROM == 0):
            ordered = sorted(self.slopes)
            rate = ordered[math.ceil(QUANTILE * len(ordered)) - 1] * MARGIN
            self.factor = min(2.0, max(LEAST_FACTOR, rate))


class TokenEstimator:
    """Estimates the tokens of prompts that begin with one system prompt: rather too many than too few.

    Before anything was learnt it counts what no tokenizer exceeds in scripts other than Latin. Each answer to a whole
    prompt makes it sharper: the part that all prompts have in common, and the rate of each script, are learnt apart.
    """

    def __init__(self, system_prompt: str) -> None:
        self._system_tokens = len(system_prompt) / SYSTEM_CHARACTERS_PER_TOKEN + TEMPLATE_TOKENS
        self._scripts: dict[str, _Script] = {}
        self.has_learnt = False

    @property
    def system_tokens(self) -> int:
        """The most that system prompt and template take."""
        return math.ceil(self._system_tokens)

    def text_tokens(self, text: str) -> float:
        """Return the most tokens that *text*, a part of the user message, is likely to be."""
        weights = most_tokens(text)
        return sum(weight * self._factor(script) for script, weight in weights.items())

    def prompt_tokens(self, text: str) -> int:
        """Return the most tokens that the whole prompt with *text* in it is likely to be."""
        return math.ceil(self._system_tokens + self.text_tokens(text))

    def learn(self, text: str, prompt_tokens: int) -> None:
        """Note that the server counted *prompt_tokens* for the whole prompt with *text* in it."""
        self.has_learnt = True
        # The text is between its words and its bytes; the rest is the common part.
        most = prompt_tokens - least_tokens(text)
        least = prompt_tokens - len(text.encode("utf-8", "replace"))
        self._system_tokens = max(min(self._system_tokens, most), least, 0.0)
        weights = most_tokens(text)
        script = max(weights, key=lambda name: weights[name])
        total = sum(weights.values())
        if weights[script] >= 0.9 * total:
            self._scripts.setdefault(script, _Script()).learn(total, prompt_tokens)

    def _factor(self, script: str) -> float:
        known = self._scripts.get(script)
        return known.factor if known else 1.0

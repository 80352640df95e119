"""Estimates the tokens of a text before it is sent, and learns from the counts of earlier answers. No I/O."""

from __future__ import annotations

import functools
import math
import re
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

SYSTEM_CHARACTERS_PER_TOKEN = 3.0  # of our English prompt; current tokenizers have 4 or more
TEMPLATE_TOKENS = 32  # added by a chat template to two messages

# Most tokens of one character. A byte-level tokenizer uses one token per byte in scripts it was not trained on. ASCII
# letters have fewer; digits and signs may have one each.
LETTER_RATE = 0.4
MAX_PER_CHARACTER = {"marks": 1.0, "two": 2.0, "three": 3.0, "four": 4.0}

LEARN_FROM = 20  # answers in a script before its learnt rate is used
QUANTILE, MARGIN = 0.95, 1.05
LEAST_FACTOR = 0.45  # of the prior; lower rates come from repetitive text and do not apply to other text
SPAN = 60.0  # tokens by which a text must be longer than the shortest one to yield a rate

_WORD_PART = re.compile(r"[^\W_]{1,16}")
_NOT_LETTERS = bytes(byte for byte in range(128) if not (chr(byte).isalpha() or chr(byte) in " \n"))
_LEADS = {"two": (0xC0, 0xE0), "three": (0xE0, 0xF0), "four": (0xF0, 0xF8)}
_NOT_LEADS = {
    name: bytes(byte for byte in range(256) if not first <= byte < end) for name, (first, end) in _LEADS.items()
}


def most_tokens(text: str) -> dict[str, float]:
    """Return the most tokens of *text* for each script: ``latin`` is ASCII, the others are named for their UTF-8 length."""
    raw = text.encode("utf-8", "replace")
    ascii_bytes = raw if text.isascii() else text.encode("ascii", "ignore")
    letters = len(ascii_bytes.translate(None, _NOT_LETTERS))
    weights = {"latin": letters * LETTER_RATE + (len(ascii_bytes) - letters) * MAX_PER_CHARACTER["marks"]}
    if len(ascii_bytes) != len(raw):
        found = {name: len(raw.translate(None, delete)) for name, delete in _NOT_LEADS.items()}
        weights |= {name: number * MAX_PER_CHARACTER[name] for name, number in found.items() if number}
        main = max(found, key=lambda name: found[name])
        # A space before an English word is part of its token; before other scripts it is a token of its own.
        weights[main] = weights.get(main, 0.0) + min(raw.count(b" "), sum(found.values())) * (1 - LETTER_RATE)
    return weights


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


@dataclass(slots=True)
class _Script:
    """The calibration of one script. *anchor* is the shortest text: (tokens of the prior, tokens counted)."""

    anchor: tuple[float, int] | None = None
    slopes: deque[float] = field(default_factory=lambda: deque(maxlen=400))
    factor: float = 1.0

    def learn(self, weight: float, prompt_tokens: int) -> None:
        if self.anchor is None or weight < self.anchor[0]:
            self.anchor = (weight, prompt_tokens)
            return
        if weight - self.anchor[0] < SPAN:
            return
        # The system prompt is in both prompts, so it cancels out in the difference.
        self.slopes.append((prompt_tokens - self.anchor[1]) / (weight - self.anchor[0]))
        if len(self.slopes) >= LEARN_FROM:
            ordered = sorted(self.slopes)
            rate = ordered[math.ceil(QUANTILE * len(ordered)) - 1] * MARGIN
            self.factor = min(2.0, max(LEAST_FACTOR, rate))


class TokenEstimator:
    """Estimates the tokens of prompts that share one system prompt, and errs on the high side.

    At first it assumes one token per byte in scripts other than Latin, which no tokenizer exceeds. From each answer to a
    whole prompt it learns the size of the system prompt and the rate of each script.
    """

    def __init__(self, system_prompt: str) -> None:
        self._system_tokens = len(system_prompt) / SYSTEM_CHARACTERS_PER_TOKEN + TEMPLATE_TOKENS
        self._scripts: dict[str, _Script] = {}
        self.has_learnt = False

    @property
    def system_tokens(self) -> int:
        """The most tokens of system prompt and template."""
        return math.ceil(self._system_tokens)

    def text_tokens(self, text: str) -> float:
        """Return the most tokens that *text*, a part of the user message, is likely to have."""
        weights = most_tokens(text)
        return sum(weight * self._factor(script) for script, weight in weights.items())

    def prompt_tokens(self, text: str) -> int:
        """Return the most tokens that the whole prompt with *text* in it is likely to have."""
        return math.ceil(self._system_tokens + self.text_tokens(text))

    def learn(self, text: str, prompt_tokens: int) -> None:
        """Record that the server counted *prompt_tokens* for the whole prompt with *text* in it."""
        self.has_learnt = True
        # The text has between one token per word and one per byte; the rest is the system prompt.
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

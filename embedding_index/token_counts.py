"""Token counts of texts: counted with OpenAI's tokenizer if it is installed, else estimated. No I/O."""

from __future__ import annotations

import functools
import importlib.util
import math
import threading
from collections import deque
from collections.abc import Callable, Sequence

from domain.text import encodable
from model_server.tokens import LEARN_FROM, LEAST_FACTOR, most_tokens

OPENAI_ENCODINGS = {
    "text-embedding-3-small": "cl100k_base",
    "text-embedding-3-large": "cl100k_base",
    "text-embedding-ada-002": "cl100k_base",
}
COUNTED_CHARACTERS = 50_000  # at once: bpe_openai refuses texts of more than 200,000 tokens
END_TOKENS = 2  # models of the BERT family put them around each input

# Rates of whole calls are averages: one text of a call can be denser by this factor.
AVERAGE_MARGIN = 1.5
SEEN_MARGIN = 1.05
MOST_FACTOR = 2.0
LEAST_LEARNT = 200  # tokens of the prior; in shorter texts the end tokens distort the rate
ONE_SCRIPT = 0.9


def openai_counter(model: str) -> Callable[[str], int] | None:
    """Return a function that counts the tokens of *model* as OpenAI bills them, at least 1.

    None if its tokenizer is unknown or bpe_openai is not installed. The first count loads the tables (1 s).
    """
    encoding = OPENAI_ENCODINGS.get(model)
    if encoding is None or importlib.util.find_spec("bpe_openai") is None:
        return None

    def count(text: str) -> int:
        encode = _encoder(encoding)
        text = encodable(text)
        pieces = range(0, len(text), COUNTED_CHARACTERS)
        return max(1, sum(len(encode(text[start : start + COUNTED_CHARACTERS])) for start in pieces))

    return count


@functools.cache
def _encoder(encoding: str) -> Callable[[str], list[int]]:
    import bpe_openai  # noqa: PLC0415 - takes a second, and only OpenAI needs it

    encode: Callable[[str], list[int]] = bpe_openai.get_encoding(encoding).encode_ordinary
    return encode


class EstimatedCounter:
    """Estimates the tokens of inputs to a model whose tokenizer is not installed, with a margin to the safe side.

    The billed counts of answers improve it, for each script. Text that is no language (base64, random letters) can have
    half as many tokens again as estimated.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._rates: dict[str, deque[float]] = {}
        self._factors: dict[str, float] = {}

    def __call__(self, text: str) -> int:
        """Return the most tokens that *text* is likely to have, at least 1."""
        weights = most_tokens(text)
        return math.ceil(sum(self._factors.get(name, 1.0) * weight for name, weight in weights.items())) + END_TOKENS

    def learn(self, texts: Sequence[str], tokens: int) -> None:
        """Learn from *texts* that were billed as *tokens* together. Calls with several scripts are ignored."""
        weights: dict[str, float] = {}
        for text in texts:
            for name, weight in most_tokens(text).items():
                weights[name] = weights.get(name, 0.0) + weight
        total = sum(weights.values())
        if total < LEAST_LEARNT:
            return
        script = max(weights, key=lambda name: weights[name])
        if weights[script] < ONE_SCRIPT * total:
            return
        with self._lock:
            rates = self._rates.setdefault(script, deque(maxlen=10 * LEARN_FROM))
            rates.append(max(0.0, tokens - END_TOKENS * len(texts)) / total)
            self._factors[script] = _factor(rates)


def _factor(rates: Sequence[float]) -> float:
    """Return the factor for the prior. It rises at once if a call had more tokens, and falls only after many calls."""
    seen = max(rates) * SEEN_MARGIN
    least = max(LEAST_FACTOR, min(1.0, max(rates) * AVERAGE_MARGIN)) if len(rates) >= LEARN_FROM else 1.0
    return min(MOST_FACTOR, max(seen, least))

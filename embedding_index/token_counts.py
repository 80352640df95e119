"""Token counts of texts: counted with OpenAI's tokenizer if it is installed, else estimated. No I/O."""

from __future__ import annotations

import functools
import importlib.util
import math
from collections.abc import Callable

from domain.text import encodable
from model_server.tokens import most_tokens

OPENAI_ENCODINGS = {
    "text-embedding-3-small": "cl100k_base",
    "text-embedding-3-large": "cl100k_base",
    "text-embedding-ada-002": "cl100k_base",
}
COUNTED_CHARACTERS = 50_000  # at once: bpe_openai refuses texts of more than 200,000 tokens
END_TOKENS = 2  # models of the BERT family put them around each input


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


def estimated_tokens(text: str) -> int:
    """Return the most tokens that *text* is likely to have for a model whose tokenizer is not installed, at least 1.

    Text that is no language (base64, random letters) can have half as many tokens again. Most models have fewer.
    """
    return math.ceil(sum(most_tokens(text).values())) + END_TOKENS

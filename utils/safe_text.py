"""Make text from outside harmless for prompts, MongoDB and terminals."""

from __future__ import annotations

import re

# Control characters except tab and newline, lone surrogates (BSON cannot hold them), zero-width space,
# bidirectional overrides and Unicode tags (both hide text from people). The zero-width joiner stays:
# emoji and several scripts need it.
_INVISIBLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b\u2028\u2029\u202a-\u202e\u2060\u2066-\u2069\ufeff\ud800-\udfff\U000e0000-\U000e007f]"
)

# Tokens that chat templates of common models read as control tokens, and the fence of our own prompt.
_CONTROL_TOKEN = re.compile(
    r"<\|[^|<>\n]{0,40}\|>|\[/?INST\]|<</?SYS>>|</?s>|</?(?:think|bos|eos|pad|start_of_turn|end_of_turn|conversation)>|<unused\d+>",
    re.IGNORECASE,
)
_LOOKALIKE = str.maketrans({"<": "‹", ">": "›", "[": "⁅", "]": "⁆"})


def visible_text(text: str) -> str:
    """Return *text* without characters that cannot be stored or seen; line breaks become ``\\n``."""
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    return _INVISIBLE.sub("", text) if _INVISIBLE.search(text) else text


def prompt_text(text: str) -> str:
    """Return *text* fit for a prompt: visible, stripped, its control tokens replaced by look-alikes."""
    text = visible_text(text).strip()
    if "<" in text or "[" in text:
        text = _CONTROL_TOKEN.sub(lambda match: match.group().translate(_LOOKALIKE), text)
    return text


def one_line(text: str, limit: int) -> str:
    """Return *text* as one visible line of at most *limit* characters, cut with an ellipsis."""
    line = " ".join(visible_text(text).split())
    return line if len(line) <= limit else line[: limit - 1].rstrip() + "…"

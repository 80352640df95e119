"""Makes text from outside safe for prompts, MongoDB and terminals."""

from __future__ import annotations

import json
import re

_LINE_BREAK = re.compile("\r\n|[\r\x0b\x0c\x85\u2028\u2029]")

# Control characters except tab and newline, lone surrogates (BSON cannot hold them), zero-width space, bidirectional
# overrides and Unicode tags (both can hide text). The zero-width joiner stays: emoji and several scripts need it.
_INVISIBLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b\u2028\u2029\u202a-\u202e\u2060\u2066-\u2069\ufeff\ud800-\udfff\U000e0000-\U000e007f]"
)

# Control tokens in the chat templates of common models, and the fence of our own prompt. Models ignore spaces in tags.
_CONTROL_TOKEN = re.compile(
    r"<[|｜][^|｜<>\n]{0,40}[|｜]>|\[/?(?:INST|SYSTEM_PROMPT)\]|<</?SYS>>|<unused\d+>"
    r"|<\s{0,5}/?\s{0,5}(?:s|think|bos|eos|pad|start_of_turn|end_of_turn|conversation)\b[^<>]{0,40}>",
    re.IGNORECASE,
)
_LOOKALIKE = str.maketrans({"<": "‹", ">": "›", "[": "⁅", "]": "⁆"})


def visible_text(text: str) -> str:
    """Return *text* without characters that cannot be stored or seen; line breaks become ``\\n``."""
    # The fast test first: invisible characters are unprintable (but so are newlines and most spaces).
    if text.isprintable() or not _INVISIBLE.search(text):
        return text
    return _INVISIBLE.sub("", _LINE_BREAK.sub("\n", text))


def escaped(text: str) -> str:
    """Return *text* with invisible and terminal control characters as JSON escapes; newline and tab stay."""
    return _INVISIBLE.sub(lambda match: json.dumps(match.group())[1:-1], text)


def prompt_text(text: str) -> str:
    """Return *text* for a prompt: visible, stripped, with look-alikes instead of control tokens."""
    text = visible_text(text).strip()
    if "<" in text or "[" in text:
        text = _CONTROL_TOKEN.sub(lambda match: match.group().translate(_LOOKALIKE), text)
    return text


def one_line(text: str, limit: int) -> str:
    """Return *text* as one visible line of at most *limit* characters, shortened with an ellipsis."""
    line = " ".join(visible_text(text).split())
    return line if len(line) <= limit else line[: limit - 1].rstrip() + "…"


def counted(number: int, one: str, many: str = "") -> str:
    """Return *number* with its noun: ``1 file``, ``2,000 files``. *many* is the plural if it is not *one* with an s."""
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def encodable(text: str) -> str:
    """Return *text* with ``?`` for lone surrogates, which servers and tokenizers refuse."""
    return text.encode("utf-8", "replace").decode("utf-8")

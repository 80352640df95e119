"""Make text from outside harmless for prompts, MongoDB and terminals."""

from __future__ import annotations

import json
import re

_LINE_BREAK = re.compile("\r\n|[\r\x0b\x0c\x85\u2028\u2029]")

# Control characters except tab and newline, lone surrogates (BSON cannot hold them), zero-width space,
# bidirectional overrides and Unicode tags (both hide text from people). The zero-width joiner stays:
# emoji and several scripts need it.
_INVISIBLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b\u2028\u2029\u202a-\u202e\u2060\u2066-\u2069\ufeff\ud800-\udfff\U000e0000-\U000e007f]"
)

# Tokens that chat templates of common models read as control tokens, and the fence of our own prompt. Models read
# a tag with spaces in it like one without.
_CONTROL_TOKEN = re.compile(
    r"<[|｜][^|｜<>\n]{0,40}[|｜]>|\[/?(?:INST|SYSTEM_PROMPT)\]|<</?SYS>>|<unused\d+>"
    r"|<\s{0,5}/?\s{0,5}(?:s|think|bos|eos|pad|start_of_turn|end_of_turn|conversation)\b[^<>]{0,40}>",
    re.IGNORECASE,
)
_LOOKALIKE = str.maketrans({"<": "‹", ">": "›", "[": "⁅", "]": "⁆"})


def visible_text(text: str) -> str:
    """Return *text* without characters that cannot be stored or seen; line breaks become ``\\n``."""
    # All that is invisible is unprintable; the other way round it is not so: a newline, most kinds of space.
    if text.isprintable() or not _INVISIBLE.search(text):
        return text
    return _INVISIBLE.sub("", _LINE_BREAK.sub("\n", text))


def escaped(text: str) -> str:
    """Return *text* with what cannot be seen, or would steer a terminal, as JSON escapes; newline and tab stay."""
    return _INVISIBLE.sub(lambda match: json.dumps(match.group())[1:-1], text)


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


def counted(number: int, one: str, many: str = "") -> str:
    """Return *number* with its noun: ``1 file``, ``2,000 files``. *many* is the plural if it is not *one* with an s."""
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def encodable(text: str) -> str:
    """Return *text* with ``?`` for lone surrogates, which are no characters and which no server or tokenizer takes."""
    return text.encode("utf-8", "replace").decode("utf-8")

"""The reason that a server gives for a refusal, made safe for logs, files and terminals.

Servers quote what they refuse: validation errors hold the input, gateways the URL, OpenAI a part of the key. So only the
fields for humans are read, up to the first brace or tag; secrets are masked; and what the request also contains is left
out: the whole reason if it shares RUN letters and digits in a row (FOREIGN_RUN beyond ASCII) or a sentence with the
request, else single words that may be a name, a number or a quotation.
"""

from __future__ import annotations

import html
import re
import unicodedata
from collections.abc import Iterable
from typing import Any
from urllib.parse import unquote

import orjson

from domain.text import one_line

MAX_CHARACTERS = 300
READ_CHARACTERS = 4000  # what is examined of a longer text
RUN, FOREIGN_RUN = 16, 4
SENTENCE = 8  # letters and digits; shorter sentences of the request are single words for this purpose
LEFT_OUT, MASK = "[…]", "***"

_FIELDS = ("error", "message", "msg", "detail", "errors", "error_description", "title")
_ESCAPE = re.compile(r"\\+u([0-9a-fA-F]{4})|\\+([nrtbf\"/])|\x1b\[[0-9;]*[A-Za-z]")
_WORD = re.compile(r"[^\W_]+")
_QUOTED = re.compile(r"""(["'`«“‘])(.{1,200}?)(["'`»”’])""")
# What follows is data: the input, or what the model has written (llama.cpp: "Failed to parse input at pos 0: ...").
_DATA = re.compile(r"[{<].*|\[[\s'\"\[].*|(?<= at pos )\d+:.*", re.DOTALL)
_SENTENCE_END = re.compile(r"[\n.!?;]|: ")
_TITLE = re.compile(r"<(title|h1)\b[^<>]{0,200}>\s*([^<>]{1,200})", re.IGNORECASE)
_SECRETS = (
    (re.compile(r"\b([a-z][a-z0-9+.-]{1,20}://)[^\s\"'<>]*@", re.IGNORECASE), rf"\1{MASK}@"),
    (re.compile(r"\b([a-z]{2,5}://[^\s?#\"'<>]+)[?#][^\s\"'<>]*", re.IGNORECASE), r"\1"),
    (re.compile(r"[\w.+-]+@[\w-]+\.[\w.-]+"), MASK),
    (re.compile(r"\b(bearer|basic) +[\w.~+/=*-]{6,}", re.IGNORECASE), rf"\1 {MASK}"),
    (
        re.compile(
            r"\b((?:[a-z]+[-_])?(?:api[-_ ]?key|password|passwd|secret|token|authorization|cookie)\b[\"']?(?: \w+)?\s*[:=]\s*)"
            rf"(?!{re.escape(MASK)}|bearer |basic )[^\s,;]+",
            re.IGNORECASE,
        ),
        rf"\1{MASK}",
    ),
    (re.compile(r"\b(?:sk|pk|rk|hf|gh[opsu]|glpat|xox[a-z]|key)[-_][\w*.-]{6,}|\beyJ[\w.-]{10,}"), MASK),
    (re.compile(r"(?<!sha256-)(?<!sha256:)\b(?=[A-Za-z_]*\d)(?=\d*[A-Za-z_])\w{24,}", re.ASCII), MASK),
)


def server_reason(answer: bytes, sent: Iterable[str] = (), *, instructions: str = "", secret: str | None = None) -> str:
    """Return the reason in the body of a refusal, ready to be put after an error message; empty if it gives none.

    *sent* are the texts of the request that nobody may see, *instructions* its text that is no secret, *secret* its key.
    """
    raw = _words_for_humans(answer)
    if not raw.strip():
        return ""
    text = unquote(html.unescape(_ESCAPE.sub(_unescaped, raw[:READ_CHARACTERS])))
    if secret:
        text = text.replace(secret, MASK)
    for pattern, replacement in _SECRETS:
        text = pattern.sub(replacement, text)
    text = _DATA.sub(LEFT_OUT, text)
    private = [*sent]
    shown = one_line(text, MAX_CHARACTERS)
    if _shares_a_run(shown, [*private, instructions]):
        return "; the server's reason quotes the request, so only its own log shows it"
    shown = _without_words(shown, private, instructions).rstrip(" .")
    return f"; the server says: {shown}" if shown else ""


def _words_for_humans(answer: bytes) -> str:
    try:
        return _field(orjson.loads(answer))
    except orjson.JSONDecodeError:
        pass
    text = answer[:READ_CHARACTERS].decode("utf-8", "ignore").strip()
    if not text.startswith("<"):
        # A JSON object that cannot be read, or an image, has no fields that could be told apart.
        return "" if text.startswith(("{", "[")) or b"\0" in answer[:READ_CHARACTERS] else text
    title = _TITLE.search(text)
    return f"a web page, {title[2].strip()}" if title else "a web page"


def _field(value: Any, depth: int = 6) -> str:
    """Return the first text in the fields for humans; Ollama quotes the JSON of its runner as a string."""
    if isinstance(value, str):
        if value.lstrip().startswith(("{", "[")):
            try:
                return _field(orjson.loads(value), depth - 1) if depth else ""
            except orjson.JSONDecodeError:
                return ""
        return value
    entries: Iterable[Any] = value if isinstance(value, list) else ()
    if isinstance(value, dict):
        entries = (value.get(name) for name in _FIELDS)
    return next((found for entry in entries if entry and (found := _field(entry, depth - 1))), "") if depth else ""


def _unescaped(match: re.Match[str]) -> str:
    return chr(int(match[1], 16)) if match[1] else " "


def _bare(text: str) -> str:
    """Return the letters and digits of *text*, so that case, spaces and punctuation cannot hide a quotation."""
    return "".join(_WORD.findall(unicodedata.normalize("NFKC", text).casefold()))


def _shares_a_run(shown: str, sent: list[str]) -> bool:
    given, bare = _bare("\n".join(sent)), _bare(shown)
    if any(bare[at : at + RUN] in given for at in range(len(bare) - RUN + 1)):
        return True
    grams = (bare[at : at + FOREIGN_RUN] for at in range(len(bare) - FOREIGN_RUN + 1))
    if any(min(gram) > "\x7f" and gram in given for gram in grams):
        return True
    sentences = {_bare(part) for text in sent for part in _SENTENCE_END.split(text)}
    return any(len(sentence) >= SENTENCE and sentence in bare for sentence in sentences)


def _without_words(shown: str, private: list[str], instructions: str) -> str:
    """Leave out the words of *private* that may tell something: with a capital, a digit, a foreign letter, or quoted."""
    given = _bare("\n".join(private))
    words = {word for text in private for word in _words(text)} - set(_words(instructions))

    def word(match: re.Match[str]) -> str:
        found = match[0]
        is_telling = not found.isascii() or found != found.lower() or any(letter.isdigit() for letter in found)
        is_given = _bare(found) in words or (not found.isascii() and len(found) > 1 and _bare(found) in given)
        return LEFT_OUT if is_telling and is_given else found

    def quotation(match: re.Match[str]) -> str:
        parts = _words(match[2])
        return f"{match[1]}{LEFT_OUT}{match[3]}" if parts and words.issuperset(parts) else match[0]

    return _WORD.sub(word, _QUOTED.sub(quotation, shown))


def _words(text: str) -> list[str]:
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())

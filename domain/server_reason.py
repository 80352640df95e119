"""The reason that a server gives for a refusal, made safe for logs, files and terminals.

Servers quote what they refuse: validation errors hold the input, gateways the URL, OpenAI a part of the key. So only the
fields for humans are read, up to the first brace or tag; secrets are masked; and what the request also contains is left
out: the whole reason if it shares RUN letters and digits in a row (FOREIGN_RUN beyond ASCII) or a sentence with the
request, else each word of the conversation that is not in VOCABULARY, and WORDS_IN_A_ROW of any kind.
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
WORDS_IN_A_ROW = 3
PART = 4  # letters of a word that the server may have cut
LEFT_OUT, MASK = "[…]", "***"

# The words of servers. Alone, or in twos, they tell nothing about a customer who uses them as well. Names are left out,
# such as will, may, max and grant.
VOCABULARY = frozenset(
    """a about above access after again all allowed already an and another any api argument array as at available bad be because
    been before below between body bool boolean but by bytes call can cannot chat client code config connection content context
    could count data default deprecated did disabled do does done either embedding embeddings empty enable enabled end enough
    error errors exceed exceeded exceeds exception exist exists exit expected fail failed fails field file for format found from
    function generate gpu grammar greater had has have header host id if in index inference initialize input instead int integer
    internal into invalid is it its json key large last latest length less limit list llama load loaded loading local long
    longer lower make maximum memory message messages minimum missing model models more most must name need needs new no not
    null number object of off on one only open or other out output overloaded parameter parse parser path pending permission
    please plus process prompt property provide provided queue quota rate reach reached read refused request requested requests
    require required requires reset resource response result retry role route run runner running runtime samplers schema
    sequence server service session set shape should size slot slots slow so space start status stop stopped stream string
    support supported supports system temperature template terminated than that the their then there they this timeout to
    token tokens tool tools too try type unable unauthorized unavailable unexpected unknown unmarshal unsupported up update
    upstream url use user uses using valid value values vector version was we web were when where which while window with
    within without word words worker wrong yet you your""".split()
)

_FIELDS = ("error", "message", "msg", "detail", "errors", "error_description", "title")
_ESCAPE = re.compile(r"\\+u([0-9a-fA-F]{4})|\\+([nrtbf\"/])|\x1b\[[0-9;]*[A-Za-z]")
_WORD = re.compile(r"[^\W_]+")
_LEFT_OUT_TWICE = re.compile(rf"{re.escape(LEFT_OUT)}(?: {re.escape(LEFT_OUT)})+")
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
    whole = one_line(text, MAX_CHARACTERS)
    shown = _without_words(whole, private).rstrip(" .")
    if _shares_a_run(whole, [*private, instructions]) or (_WORD.search(whole) and not _WORD.search(shown)):
        return "; the server's reason quotes the request, so only its own log shows it"
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


def _without_words(shown: str, private: list[str]) -> str:
    """Leave out the words of *private* that are not in VOCABULARY, or a part of one, and WORDS_IN_A_ROW of any kind."""
    given, spaced = _bare("\n".join(private)), [f" {' '.join(_words(text))} " for text in private]
    words = {word for text in spaced for word in text.split()}
    found = [*_WORD.finditer(shown)]
    bare = [_bare(match[0]) for match in found]
    out = {place for place, word in enumerate(bare) if _tells(word) and (word in words or _is_part(word, given))}
    for start in range(len(bare) - WORDS_IN_A_ROW + 1):
        row = range(start, start + WORDS_IN_A_ROW)
        if any(f" {' '.join(bare[place] for place in row)} " in text for text in spaced):
            out.update(row)
    for place in sorted(out, reverse=True):
        shown = shown[: found[place].start()] + LEFT_OUT + shown[found[place].end() :]
    return _LEFT_OUT_TWICE.sub(LEFT_OUT, shown)


def _tells(word: str) -> bool:
    """Return whether *word* may tell something: it is not a server's, and longer than a letter or digit."""
    return word not in VOCABULARY and (len(word) > 1 or not word.isascii())


def _is_part(word: str, given: str) -> bool:
    """Return whether *word* may be a part of one in *given*; scripts without spaces have short ones."""
    return len(word) >= (PART if word.isascii() else 2) and word in given


def _words(text: str) -> list[str]:
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())

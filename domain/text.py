"""Makes text from outside safe for prompts, MongoDB and terminals."""

from __future__ import annotations

import json
import re
import unicodedata

_LINE_BREAK = re.compile("\r\n|[\r\x0b\x0c\x85\u2028\u2029]")

# Control characters except tab and newline, lone surrogates (BSON cannot hold them), zero-width space, bidirectional
# overrides and Unicode tags (both can hide text). The zero-width joiner stays: emoji and several scripts need it.
_INVISIBLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b\u2028\u2029\u202a-\u202e\u2060\u2066-\u2069\ufeff\ud800-\udfff\U000e0000-\U000e007f]"
)

# Tokenizers of model servers read control tokens in a text as if the chat template had written them, so a turn could end
# inside a conversation. These are the forms of common models: a bar inside the brackets, an underscore, or a known word.
_CONTROL_TOKEN = re.compile(
    r"<<?(?:\|.*|.*\||(?=[^>]*_)/?\w+|seed:\w+"
    r"|/?(?:s|sys|bos|eos|pad|unk|mask|cls|sep|sop|eop|think|role|tools|image|img|audio|video|endoftext|reponame|filename"
    r"|(?:unused|custom)\d+))>>?",
    re.IGNORECASE | re.DOTALL,
)
_SQUARE_TOKEN = re.compile(
    r"\[/?(?:(?i:INST|SYSTEM_PROMPT)|AVAILABLE_TOOLS|TOOL_(?:CALLS|RESULTS|CONTENT)|ARGS|CALL_ID|MODEL_SETTINGS|THINK"
    r"|PREFIX|MIDDLE|SUFFIX|IMG(?:_BREAK|_END)?|(?:BEGIN_)?AUDIO|TRANSCRIBE|CLS|SEP|PAD|UNK|BOS|EOS|[gs]?MASK"
    r"|UNUSED_TOKEN_\d+|\|\w+\|)\]|\[e~\[|\][~!]{1,2}b[\[\]]|◁/?think▷"
)
# Full-width and small brackets are the same signs to a model. A tag that is never closed could still be our fence.
_ANGLES = re.compile("[<＜﹤]{1,2}[^<>＜＞﹤﹥]+[>＞﹥]{0,2}")
_BRACKET = re.compile(r"[<＜﹤◁\[\]]")  # what every one of these begins with, or has
_NOT_A_TO_Z = re.compile("[^a-z]+")
_FENCE = "conversation"
_LOOKALIKE = str.maketrans("<>＜＞﹤﹥◁▷[]", "‹›‹›‹›‹›⁅⁆")


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
    """Return *text* for a prompt: visible, stripped, with look-alikes instead of control tokens and of our fence."""
    text = (text if text.isprintable() else visible_text(text)).strip()  # most are, and each turn comes here
    if not _BRACKET.search(text):
        return text
    text = _SQUARE_TOKEN.sub(lambda match: match.group().translate(_LOOKALIKE), text)
    return _ANGLES.sub(_harmless, text)


def _harmless(match: re.Match[str]) -> str:
    tag = match.group()
    plain = "".join(unicodedata.normalize("NFKC", tag).split())
    if _CONTROL_TOKEN.fullmatch(plain) or _is_fence(plain.casefold()):
        return tag.translate(_LOOKALIKE)
    return tag


def _is_fence(tag: str) -> bool:
    """Return whether a model could read *tag* (folded) as ``<conversation>`` or ``</conversation>``.

    Characters between the letters and attributes do not matter. Letters of other alphabets may stand for letters that
    look like them, so then the others only have to be in the right order.
    """
    letters = _NOT_A_TO_Z.sub("", tag)
    if letters.startswith(_FENCE):
        return True
    expected = iter(_FENCE)
    return not tag.isascii() and 4 <= len(letters) <= len(_FENCE) and all(letter in expected for letter in letters)


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

"""Replaces personal data by placeholders before it is sent, and restores it in answers. Pure.

The owner of phonenumbers and stdnum. A placeholder such as ``<EMAIL_K7Q>`` has a kind and a tag derived from the value
and the document's id. The same document always yields the same placeholders, so no mapping has to be stored until the
answer comes. If the document changes meanwhile, an old placeholder matches no value and stays as it is; a plain number
would restore another person's value.
"""

from __future__ import annotations

import hashlib
import html
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import phonenumbers
from stdnum import iban, luhn

from error_handler import JobProcessingError, JobValidationError

EMAIL, PHONE, CARD, IBAN, NAME = "EMAIL", "PHONE", "CARD", "IBAN", "NAME"

# No vowels and no look-alikes: a tag is never a word and is copied without mistakes.
_LETTERS = "BCDFGHJKLMNPQRSTVWXZ2345679"
_TAG_LENGTH = 3
_KINDS = "|".join((EMAIL, PHONE, CARD, IBAN, NAME))
# Exact, or as models rewrite it: in another case, with a space for the underscore, without brackets.
_PLACEHOLDER = re.compile(
    rf"<(?:{_KINDS})_\w{{{_TAG_LENGTH}}}>"
    rf"|(?:<\s?|(?<![^\W_]))(?:{_KINDS})[_\s-][{_LETTERS}]{{{_TAG_LENGTH}}}(?:\s?>|(?![^\W_]))",
    re.IGNORECASE | re.ASCII,
)
_EXACT = re.compile(rf"<(?:{_KINDS})_[{_LETTERS}]{{{_TAG_LENGTH}}}>")

# The bound of the first part keeps the search linear: a long word is not tried from every letter to its end.
_EMAIL = re.compile(r"[\w.!#$%&'*+/=?^`{|}~-]{1,64}+@[\w-]{1,63}+(?:\.[\w-]{1,63}+){1,8}")
# Groups of digits, and the separators that a card number may have.
_DIGIT_GROUPS = re.compile(r"\d+(?:[ \u00a0\u202f.\u2010-\u2013-]\d+)*")
_GROUP = re.compile(r"\d+")
_CARD_LENGTHS = range(13, 20)
# Visa, American Express, Diners, JCB, Mastercard (twice), Maestro; Discover, UnionPay and Maestro.
_CARD = re.compile(
    r"4\d{12}(\d{3}){0,2}|3[47]\d{13}|3[0689]\d{12}|35\d{14}|5[1-5]\d{14}|2[2-7]\d{14}|5[06-8]\d{14}|6\d{15,18}"
)
_FIRST_DIGITS = range(2, 7)
_MAX_CARD_GROUPS = 5
_IBAN_START = re.compile(r"(?<![^\W_])[A-Za-z]{2}\d{2}(?=[ \u00a0-]?[A-Za-z0-9])")
_IBAN_NEXT = re.compile(r"[ \u00a0-]?([A-Za-z0-9])")
_IBAN_LENGTHS = range(15, 35)

_MARKUP = str.maketrans({"&": "&amp;", "<": "&lt;", ">": "&gt;", "'": "&#39;", '"': "&#34;"})  # as Jinja2 escapes

MAX_CHARACTERS = 500_000  # per document; more than models read, and more than a second of search

Span = tuple[int, int, str]


class Masking:
    """Finds personal data. *region* (ISO 3166, such as ``US``) adds national phone numbers; None: only ``+...``."""

    def __init__(self, region: str | None = None) -> None:
        """Check *region*; raise JobValidationError if there is no such region."""
        if region is not None and region not in phonenumbers.SUPPORTED_REGIONS:
            raise JobValidationError(f"phone_region: there is no region {region!r}; give an ISO code such as US or DE.")
        self._region = region

    def of(self, texts: Iterable[str], salt: str, names: Iterable[str] = ()) -> Mask:
        """Return the mask of a document. *texts* are its messages, *salt* is its id, *names* are whole values to hide.

        Raises JobProcessingError if the texts have more than MAX_CHARACTERS.
        """
        texts = list(texts)
        if sum(map(len, texts)) > MAX_CHARACTERS:
            raise JobProcessingError(
                f"the prompt has more than {MAX_CHARACTERS} characters, too many for --mask-pii; shorten it",
                is_final=True,
            )
        pattern = _any_of(names)
        return Mask({text: self._spans(text, pattern) for text in texts}, salt)

    def _spans(self, text: str, names: re.Pattern[str] | None) -> list[Span]:
        spans = [(*match.span(), EMAIL) for match in _EMAIL.finditer(text)]
        spans += (*_ibans(text), *_cards(text), *self._phones(text))
        if names is not None:
            spans += ((*match.span(), NAME) for match in names.finditer(text))
        return _merged(spans)

    def _phones(self, text: str) -> Iterator[Span]:
        searches: list[tuple[str | None, int]] = []
        if "+" in text or "\uff0b" in text:  # any length that the country has: its newest numbers are in no table
            searches.append((None, phonenumbers.Leniency.POSSIBLE))
        if self._region is not None:
            searches.append((self._region, phonenumbers.Leniency.VALID))
        for region, leniency in searches:
            for match in phonenumbers.PhoneNumberMatcher(text, region, leniency, max_tries=len(text)):
                yield match.start, match.end, PHONE


class Mask:
    """The placeholders of one document."""

    def __init__(self, found: Mapping[str, list[Span]], salt: str) -> None:
        """*found* has the spans of personal data in each text."""
        self._found = found
        self._everything = re.sub(r"[\s-]", "_", "\n".join(found).upper())
        self._by_value: dict[str, str] = {}
        self._by_name: dict[str, str] = {}
        for text, spans in found.items():
            for start, end, kind in spans:
                value = text[start:end]
                if value not in self._by_value:
                    name = self._free_name(kind, value, salt)
                    self._by_value[value], self._by_name[name] = f"<{name}>", value

    def _free_name(self, kind: str, value: str, salt: str) -> str:
        """Return a name that no other value has and that the document itself does not contain."""
        names = (f"{kind}_{_tag(f'{salt}|{kind}|{value}|{count}')}" for count in itertools.count())
        return next(name for name in names if name not in self._by_name and name not in self._everything)

    def hide(self, text: str) -> str:
        """Return *text*, one of the mask's texts, with placeholders."""
        parts, last = [], 0
        for start, end, _ in self._found[text]:
            parts += [text[last:start], self._by_value[text[start:end]]]
            last = end
        return "".join([*parts, text[last:]])

    def restore(self, value: Any) -> Any:
        """Return *value* with personal data restored in its texts at any depth; keys are not changed."""
        if isinstance(value, str):
            return _PLACEHOLDER.sub(self._original, value)
        if isinstance(value, dict):
            return {key: self.restore(inner) for key, inner in value.items()}
        return [self.restore(inner) for inner in value] if isinstance(value, list) else value

    def _original(self, match: re.Match[str]) -> str:
        name = re.sub(r"[\s-]", "_", match[0].strip("< \t\r\n\f\v>")).upper()
        return self._by_name.get(name, match[0])

    def unresolved(self, value: Any) -> int:
        """Return how many placeholders in *value* match nothing in this document after ``restore``."""
        if isinstance(value, str):
            return sum(match[0][1:-1] not in self._everything for match in _EXACT.finditer(value))
        values = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        return sum(self.unresolved(inner) for inner in values)


def _tag(text: str) -> str:
    number = int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:8])
    places = (number // len(_LETTERS) ** power for power in range(_TAG_LENGTH))
    return "".join(_LETTERS[place % len(_LETTERS)] for place in places)


def _any_of(names: Iterable[str]) -> re.Pattern[str] | None:
    """Return a pattern for each of *names* as whole words, also escaped, in any case and with any spaces between its words."""
    written = [form for name in names for form in (name, *_escapes(name))]
    words = sorted({" ".join(name.split()) for name in written} - {""}, key=len, reverse=True)
    if not words:
        return None
    either = "|".join(r"\s+".join(re.escape(word) for word in name.split(" ")) for name in words)
    return re.compile(rf"(?<!\w)(?:{either})(?!\w)", re.IGNORECASE)


def _escapes(name: str) -> Iterator[str]:
    """Yield *name* as the filters ``tojson`` and ``escape`` of templates, and ``html.escape``, write it."""
    yield json.dumps(name, ensure_ascii=False)[1:-1]
    yield name.translate(_MARKUP)
    yield html.escape(name)


def _ibans(text: str) -> Iterator[Span]:
    for match in _IBAN_START.finditer(text):
        number, place = match[0], match.end()
        while len(number) < _IBAN_LENGTHS.stop and (following := _IBAN_NEXT.match(text, place)):
            number, place = number + following[1], following.end()
            is_end = place == len(text) or not text[place].isalnum()
            if is_end and len(number) in _IBAN_LENGTHS and iban.is_valid(number):
                yield match.start(), place, IBAN
                break


def _cards(text: str) -> Iterator[Span]:
    for run in _DIGIT_GROUPS.finditer(text):
        groups = [group.span() for group in _GROUP.finditer(text, *run.span())]
        for first, (start, _) in enumerate(groups):
            digits = ""
            if int(text[start]) not in _FIRST_DIGITS:
                continue
            for group_start, end in groups[first : first + _MAX_CARD_GROUPS]:
                digits += text[group_start:end]
                if len(digits) >= _CARD_LENGTHS.stop:
                    break
                if len(digits) in _CARD_LENGTHS and _is_card(digits):
                    yield start, end, CARD


def _is_card(digits: str) -> bool:
    plain = "".join(str(int(digit)) for digit in digits)  # digits of other scripts
    return _CARD.fullmatch(plain) is not None and bool(luhn.is_valid(plain))


def _merged(spans: Iterable[Span]) -> list[Span]:
    """Return *spans* with overlapping ones merged, so that no part of either is left visible."""
    merged: list[Span] = []
    for start, end, kind in sorted(spans):
        if not merged or start >= merged[-1][1]:
            merged.append((start, end, kind))
            continue
        before_start, before_end, before_kind = merged[-1]
        longer = kind if end - start > before_end - before_start else before_kind
        merged[-1] = (before_start, max(end, before_end), longer)
    return merged

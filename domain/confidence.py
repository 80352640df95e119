"""Computes the probability of each label from the log probabilities of an answer. Never raises.

Servers report the probabilities of the chosen token and of at most 20 alternatives, before the grammar of the answer
was applied. So at each token of a label, only tokens that continue an allowed label count:

* for: they lead to the label of the answer and settle at least as much of it as the chosen token;
* open: they could still lead there but settle less (the ``"`` before a label, or ``A`` if ``Account`` was chosen).
  They carry no information and are left out;
* against: they lead to other labels only.

The probability of a label is the product of for / (for + against) over its tokens, until only one label is possible. A
label that no listed token leads to counts against, with the weight of the least likely listed token, which is the most
it can have. So a value errs on the low side.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from domain.conversation import Classification

FIELDS = ("intent", "topic", "sentiment")
MAX_TOKENS = 20_000  # an answer has a few hundred


@dataclass(frozen=True, slots=True)
class _Token:
    """One token of the answer: its start in the joined bytes, and the server's entry."""

    start: int
    content: bytes
    entry: Mapping[str, Any]


def label_confidence(
    tokens: Iterable[Any], reply: str, classification: Classification, labels: Mapping[str, Iterable[str]]
) -> dict[str, float] | None:
    """Return the probability of each label of *classification*: intent, topic, sentiment -> 0 to 1, 4 digits.

    *tokens* are the entries of Ollama's ``logprobs`` or OpenAI's ``choices[0].logprobs.content``. *classification* was
    parsed from *reply*. *labels* maps each of the three fields to its allowed labels.

    Returns None if there are no entries, or if they are unclear: they do not spell *reply*, a label is not spelled as
    in the taxonomy or occurs twice, or a token of a label has no alternatives.
    """
    read = _read_tokens(tokens)
    spans = _value_spans(reply, classification) if read else None
    if spans is None:
        return None
    joined = b"".join(token.content for token in read)
    place = _place_of(reply, spans, joined)
    if place is None:
        return None
    found = {}
    for field, span in zip(FIELDS, spans, strict=True):
        start, end = (place + len(_encoded(reply[:at])) for at in span)
        probability = _probability(read, (start, end), getattr(classification, field), labels.get(field, ()), joined)
        if probability is None:
            return None
        found[field] = round(probability, 4)
    return found


def _read_tokens(entries: Iterable[Any]) -> list[_Token]:
    """Return *entries* with their bytes and positions; empty if one is malformed."""
    tokens: list[_Token] = []
    start = 0
    for entry in entries:
        content = _content(entry)
        if content is None or len(tokens) >= MAX_TOKENS:
            return []
        tokens.append(_Token(start, content, entry))
        start += len(content)
    return tokens


def _content(entry: Any) -> bytes | None:
    """Return the bytes of a token, or of its text if it has no bytes. Parts of a character have no text."""
    if not isinstance(entry, Mapping):
        return None
    values, text = entry.get("bytes"), entry.get("token")
    if isinstance(values, list):
        is_bytes = all(type(value) is int and 0 <= value <= 255 for value in values)
        return bytes(values) if is_bytes else None
    return _encoded(text) if isinstance(text, str) else None


def _encoded(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def _value_spans(reply: str, classification: Classification) -> list[tuple[int, int]] | None:
    """Return the span in *reply* of each label and its closing quote, in the order of FIELDS; None if one is not unique.

    Text inside a JSON string cannot match, because its quotes are escaped.
    """
    spans = []
    for field in FIELDS:
        label = re.escape(json.dumps(getattr(classification, field), ensure_ascii=False)[1:])
        found = list(re.finditer(rf'"{field}"\s*:\s*"({label})', reply))
        if len(found) != 1:
            return None
        spans.append(found[0].span(1))
    return spans


def _place_of(reply: str, spans: Sequence[tuple[int, int]], joined: bytes) -> int | None:
    """Return the position in *joined* of the first character of *reply*; None if it is not unique.

    Reasoning comes before an answer, so the last occurrence counts. Some servers strip fences and white space; then the
    part with the labels must occur exactly once.
    """
    place = joined.rfind(_encoded(reply))
    if place >= 0:
        return place
    first, last = min(spans)[0], max(spans)[1]
    core = _encoded(reply[first:last])
    return joined.find(core) - len(_encoded(reply[:first])) if joined.count(core) == 1 else None


def _probability(
    tokens: list[_Token], span: tuple[int, int], label: str, allowed: Iterable[str], joined: bytes
) -> float | None:
    """Return the probability of *label*, whose text and closing quote are at *span* in the *joined* tokens."""
    start, end = span
    written = joined[start:end]
    possible = {name: _encoded(json.dumps(name, ensure_ascii=False)[1:]) for name in allowed}
    if possible.get(label) != written:
        return None
    probability = 1.0
    for token in tokens:
        if token.start + len(token.content) <= start or token.start >= end or not token.content:
            continue
        if len(possible) == 1:
            break
        done = max(0, token.start - start)
        lead = joined[token.start : start]  # the part of the token before the label
        rest = {name: form[done:] for name, form in possible.items()}
        share = _share(token, lead, rest, label)
        if share is None:
            return None
        probability *= share
        possible = {name: possible[name] for name in _leads_to(token.content, lead, rest)}
    return probability


def _leads_to(content: bytes, lead: bytes, rest: Mapping[str, bytes]) -> set[str]:
    """Return the labels of *rest* (label -> bytes still to come) that a token of *content* continues."""
    if len(content) <= len(lead):
        return set(rest) if content and lead.startswith(content) else set()
    if not content.startswith(lead):
        return set()
    content = content[len(lead) :]
    return {name for name, form in rest.items() if form.startswith(content) or content.startswith(form)}


def _share(token: _Token, lead: bytes, rest: Mapping[str, bytes], label: str) -> float | None:
    """Return the factor of *token* in the probability of *label*; None if its entry does not allow it."""
    chosen = _weight(token.entry)
    others = _alternatives(token)
    if not chosen or not others:
        return None
    settled = _leads_to(token.content, lead, rest)
    weight_for, weight_against, covered = chosen, 0.0, set(settled)
    for content, weight in others:
        leads_to = _leads_to(content, lead, rest)
        if label in leads_to and not leads_to <= settled:
            continue
        covered |= leads_to
        if label in leads_to:
            weight_for += weight
        elif leads_to:
            weight_against += weight
    least = min(chosen, *(weight for _, weight in others))
    weight_against += least * len(rest.keys() - covered)
    return weight_for / (weight_for + weight_against)


def _alternatives(token: _Token) -> list[tuple[bytes, float]] | None:
    """Return bytes and probability of each listed alternative to *token*; None if one is malformed."""
    listed = token.entry.get("top_logprobs")
    if not isinstance(listed, list):
        return None
    others = []
    is_chosen_seen = False
    for entry in listed:
        content = _content(entry)
        weight = None if content is None else _weight(entry)
        if content is None or weight is None:
            return None
        if content == token.content and not is_chosen_seen:
            is_chosen_seen = True  # the list names the chosen token as well
            continue
        others.append((content, weight))
    return others


def _weight(entry: Any) -> float | None:
    """Return the probability in *entry*; None if there is none."""
    value = entry.get("logprob")
    if isinstance(value, bool) or not isinstance(value, int | float) or not -1e6 <= value <= 0.01:
        return None  # NaN is in no range
    return math.exp(min(0.0, value))

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

A list of labels has the product of its labels, each against the labels that are not in the list: the probability that
no label in it is wrong. A label that is missing from the list does not count.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from domain.conversation import Classification

MAX_TOKENS = 20_000  # an answer has a few hundred


# The start of a token in the joined bytes, its bytes, and the server's entry.
_Token = tuple[int, bytes, Mapping[str, Any]]
# A label, and where its text and closing quote are.
_Span = tuple[str, int, int]
_DECODER = json.JSONDecoder()


def label_confidence(
    tokens: Iterable[Any],
    reply: str,
    classification: Classification,
    labels: Mapping[str, Iterable[str]],
    *,
    is_array: bool = False,
) -> dict[str, float] | None:
    """Return the probability of each label of *classification*: field -> 0 to 1, 4 digits.

    *tokens* are the entries of Ollama's ``logprobs`` or OpenAI's ``choices[0].logprobs.content``. *classification* was
    parsed from *reply*: an object or, if *is_array*, an array of the labels in the order of the fields. *labels* maps each
    field to the allowed labels.

    Returns None if there are no entries, or if they are unclear: they do not spell *reply*, a label is not spelled as
    in the taxonomy or occurs twice, or a token of a label has no alternatives.
    """
    try:
        entries = list(itertools.islice(tokens, MAX_TOKENS))
        contents = [_content(entry) for entry in entries]
        starts = itertools.accumulate(map(len, contents), initial=0)
        read, joined = list(zip(starts, contents, entries, strict=False)), b"".join(contents)
        spans = _in_tokens(reply, (_array_spans if is_array else _object_spans)(reply, classification), joined)
        return {field: round(_product(read, spans[field], labels[field], joined), 4) for field in labels}
    except (AttributeError, LookupError, TypeError, ValueError):  # an entry is malformed or unclear
        return None


def _content(entry: Mapping[str, Any]) -> bytes:
    """Return the bytes of a token, or of its text if it has no bytes. Parts of a character have no text."""
    values = entry.get("bytes")
    return _encoded(entry["token"]) if values is None else bytes([*values])


def _weight(entry: Mapping[str, Any]) -> float:
    value = entry["logprob"]
    if not -1e6 <= value <= 0.01:  # NaN is in no range
        raise ValueError("not a log probability")
    return math.exp(min(0.0, value))


def _encoded(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def _object_spans(reply: str, classification: Classification) -> dict[str, list[_Span]]:
    """Return the spans in *reply*, a JSON object, of the labels of each field.

    Text inside a JSON string of *reply* cannot match, because its quotes are escaped.
    """
    spans: dict[str, list[_Span]] = {}
    for field, label in classification.labels.items():
        if isinstance(label, str):
            written = re.escape(json.dumps(label, ensure_ascii=False)[1:])
            (found,) = re.finditer(rf'"{field}"\s*:\s*"({written})', reply)
            spans[field] = [(label, *found.span(1))]
        else:
            (found,) = re.finditer(rf'"{field}"\s*:\s*\[', reply)
            spans[field] = _spans_of_list(reply, found.end())
    return spans


def _array_spans(reply: str, classification: Classification) -> dict[str, list[_Span]]:
    """Return the spans in *reply* of the labels of each field, if exactly one array in it has these labels."""
    ways = [_spans_from(reply, found.end(), classification) for found in re.finditer(r"\[", reply)]
    (spans,) = [way for way in ways if way is not None]
    return spans


def _spans_from(reply: str, place: int, classification: Classification) -> dict[str, list[_Span]] | None:
    """Return the spans of the labels in the array whose values begin at *place*; None if it has other values."""
    spans: dict[str, list[_Span]] = {}
    try:
        for field, label in classification.labels.items():
            place += len(reply[place:]) - len(reply[place:].lstrip(" \t\r\n,"))
            value, end = _DECODER.raw_decode(reply, place)
            if isinstance(label, str):
                spans[field] = [(label, place + 1, end)]
                same = value == label
            else:
                spans[field] = _spans_of_list(reply, place + 1)
                same = {*value} == {*label}
            if not same:
                return None
            place = end
    except (LookupError, TypeError, ValueError):
        return None
    return spans


def _in_tokens(reply: str, spans: dict[str, list[_Span]], joined: bytes) -> dict[str, list[_Span]]:
    """Return *spans*, which are of *reply*, as spans in *joined*.

    Reasoning comes before an answer, so the last occurrence of *reply* counts. Some servers strip fences and white space;
    then the part with the labels must occur exactly once.
    """
    place = joined.rfind(_encoded(reply))
    if place < 0:
        first = min(start for found in spans.values() for _, start, _ in found)
        last = max(end for found in spans.values() for _, _, end in found)
        core = _encoded(reply[first:last])
        if joined.count(core) != 1:
            raise ValueError("the tokens do not spell the reply")
        place = joined.index(core) - len(_encoded(reply[:first]))
    return {
        field: [
            (name, place + len(_encoded(reply[:start])), place + len(_encoded(reply[:end])))
            for name, start, end in found
        ]
        for field, found in spans.items()
    }


def _spans_of_list(reply: str, place: int) -> list[_Span]:
    """Return the spans in *reply* of the texts in a JSON list, whose first value begins at or after *place*."""
    spans = []
    while reply[place] != "]":
        if reply[place] == '"':
            label, end = _DECODER.raw_decode(reply, place)
            spans.append((label, place + 1, end))
            place = end
        else:  # white space or a comma
            place += 1
    return spans


def _product(tokens: list[_Token], spans: list[_Span], allowed: Iterable[str], joined: bytes) -> float:
    """Return the probability that all labels of a field are right; see the module."""
    names, found = set(allowed), {label for label, _, _ in spans}
    if not found <= names:
        raise ValueError("a label is not spelled as in the taxonomy")
    others = names - found
    return math.prod(_probability(tokens, span, [span[0], *others], joined) for span in spans)


def _probability(tokens: list[_Token], span: _Span, allowed: Iterable[str], joined: bytes) -> float:
    """Return the probability of the label at *span* in the *joined* tokens."""
    label, start, end = span
    possible = {name: _encoded(json.dumps(name, ensure_ascii=False)[1:]) for name in allowed}
    if possible[label] != joined[start:end]:
        raise ValueError("the tokens do not spell the label")
    probability = 1.0
    for place, content, entry in tokens:
        if place + len(content) <= start or place >= end or not content:
            continue
        if len(possible) == 1:
            break
        lead = joined[place:start]  # the part of the token before the label
        rest = {name: form[max(0, place - start) :] for name, form in possible.items()}
        probability *= _share(content, entry, lead, rest, label)
        possible = {name: possible[name] for name in _leads_to(content, lead, rest)}
    return probability


def _leads_to(content: bytes, lead: bytes, rest: Mapping[str, bytes]) -> set[str]:
    """Return the labels of *rest* (label -> bytes still to come) that a token of *content* continues."""
    if len(content) <= len(lead):
        return set(rest) if content and lead.startswith(content) else set()
    if not content.startswith(lead):
        return set()
    content = content[len(lead) :]
    return {name for name, form in rest.items() if form.startswith(content) or content.startswith(form)}


def _share(token: bytes, entry: Mapping[str, Any], lead: bytes, rest: Mapping[str, bytes], label: str) -> float:
    """Return the factor of *token* in the probability of *label*."""
    others = [(_content(other), _weight(other)) for other in entry["top_logprobs"]]
    chosen = next((other for other in others if other[0] == token), None)
    if chosen is not None:
        others.remove(chosen)  # the list names the chosen token as well
    weight_for, weight_against = _weight(entry), 0.0
    if not weight_for or not others:
        raise ValueError("no probability or no alternatives")
    least = min(weight_for, *(weight for _, weight in others))
    settled = _leads_to(token, lead, rest)
    covered = set(settled)
    for content, weight in others:
        leads_to = _leads_to(content, lead, rest)
        if label in leads_to and not leads_to <= settled:
            continue
        covered |= leads_to
        if label in leads_to:
            weight_for += weight
        elif leads_to:
            weight_against += weight
    weight_against += least * len(rest.keys() - covered)
    return weight_for / (weight_for + weight_against)

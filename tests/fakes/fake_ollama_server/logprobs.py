"""Log probabilities of an answer, in Ollama's shape, with a chosen probability per label.

Each label is one token. As with a real engine the numbers are from before the grammar: half of the probability goes to
a word that no schema allows.
"""

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from .labels import array_properties

_LABEL = re.compile(r'"(\w+)"\s*:\s*"([^"\\]*)"')
_VALUE = re.compile(r'"([^"\\]*)"')  # of an array
_OUTSIDE = "The"
_OUTSIDE_SHARE = 0.5
_PIECE = 4  # characters of a token outside of the labels


def logprobs_of(
    content: str, schema: Mapping[str, Any] | None, probabilities: Mapping[str, float], top: int
) -> list[dict[str, Any]]:
    """The entries for *content*.

    Args:
        content: The answer, as it is sent.
        schema: The schema of the request; the ``enum`` lists in it are the other labels.
        probabilities: Probability among the allowed labels by label, and ``"*"`` for all that are not named.
        top: Alternatives per token, 0 to 20.
    """
    entries: list[dict[str, Any]] = []
    at = 0
    for start, end, names in _label_places(content, schema or {}):
        entries += _plain(content[at:start], top)
        label = content[start:end]
        others = [name for name in names if name != label]
        chosen = probabilities.get(label, probabilities.get("*", 1.0))
        shares = {label: chosen, **{name: (1 - chosen) / len(others) for name in others}}
        entries.append(_entry(label, {name: share * (1 - _OUTSIDE_SHARE) for name, share in shares.items()}, top))
        at = end
    return entries + _plain(content[at:], top) + [{"token": "", "logprob": -0.01, "bytes": [], "top_logprobs": []}]


def _label_places(content: str, schema: Mapping[str, Any]) -> Iterator[tuple[int, int, list[str]]]:
    """Start and end of each label in *content* and the labels of its field; labels in lists are left out."""
    if listed := list(array_properties(schema).values()):
        if all("enum" in one for one in listed):
            for match, one in zip(_VALUE.finditer(content), listed, strict=True):
                yield *match.span(1), one["enum"]
        return
    properties = schema.get("properties", {})
    for match in _LABEL.finditer(content):
        if "enum" in properties.get(match.group(1), {}):
            yield *match.span(2), properties[match.group(1)]["enum"]


def _plain(text: str, top: int) -> list[dict[str, Any]]:
    pieces = [text[at : at + _PIECE] for at in range(0, len(text), _PIECE)]
    return [_entry(piece, {piece: 1 - _OUTSIDE_SHARE}, top) for piece in pieces]


def _entry(token: str, shares: Mapping[str, float], top: int) -> dict[str, Any]:
    ranked = sorted({**shares, _OUTSIDE: _OUTSIDE_SHARE}.items(), key=lambda pair: -pair[1])
    listed = [_piece(text, share) for text, share in ranked[:top]]
    return {**_piece(token, shares[token]), "top_logprobs": listed}


def _piece(text: str, share: float) -> dict[str, Any]:
    return {"token": text, "logprob": math.log(max(share, 1e-30)), "bytes": list(text.encode("utf-8", "replace"))}

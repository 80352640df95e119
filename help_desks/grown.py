"""What a newer export of a conversation adds to the one that is stored. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from aggregator import DIRECTION_FIELDS, SENDER_FIELDS, TIME_FIELDS, entry_text, known_sender, parse_time
from domain.plain_text import plain_text

TurnsField = Literal["messages", "tweets"]
_ID_FIELDS = ("id", "tweet_id", "message_id")


@dataclass(frozen=True, slots=True)
class Comparison:
    """The turns in *field* of two documents: those *added* by the newer one, how many both have, and only the stored one."""

    field: TurnsField
    added: list[Any]
    shared: int
    only_stored: int


def compared(stored: Mapping[str, Any], newer: Mapping[str, Any]) -> Comparison | None:
    """Compare the turns of two documents; None if they do not hold lists of turns under the same name.

    Turns are equal if their ids are, whatever became of the text; without an id on both sides, if senders, times and texts
    are (as the model sees them). A turn that occurs twice counts twice.
    """
    for field in ("messages", "tweets"):
        before, after = stored.get(field), newer.get(field)
        if isinstance(before, list) and isinstance(after, list):
            added = [after[key.place] for key in _added(_keys(before), _keys(after))]
            shared = len(after) - len(added)
            return Comparison(field, added, shared, len(before) - shared)
    return None


@dataclass(frozen=True, slots=True)
class _Key:
    """What identifies the turn at *place*; an empty *turn_id* if it has none that is its own."""

    place: int
    turn_id: str
    content: Hashable


def _keys(turns: Sequence[Any]) -> list[_Key]:
    keys = [_key(place, turn) for place, turn in enumerate(turns)]
    times_used = Counter(key.turn_id for key in keys)
    return [replace(key, turn_id="") if times_used[key.turn_id] > 1 else key for key in keys]


def _key(place: int, turn: Any) -> _Key:
    if not isinstance(turn, dict):
        return _Key(place, "", repr(turn))
    metadata = turn.get("metadata")
    holders = (turn, metadata) if isinstance(metadata, dict) else (turn,)
    turn_id = next((str(each[name]) for each in holders for name in _ID_FIELDS if each.get(name) is not None), "")
    at = next((time for name in TIME_FIELDS if (time := parse_time(turn.get(name))) is not None), None)
    said = next((turn[name] for name in (*DIRECTION_FIELDS, *SENDER_FIELDS) if turn.get(name) is not None), None)
    text = " ".join(plain_text(entry_text(turn)).split())
    return _Key(place, turn_id, (known_sender(said) or str(said).lower(), at, text))


def _added(before: list[_Key], after: list[_Key]) -> list[_Key]:
    """Return those of *after* that *before* lacks, in their order."""
    before, after = _unmatched(before, after, lambda key: (key.turn_id, key.content))
    before, after = _unmatched(before, after, lambda key: key.turn_id or None)
    # What is left has no id on one side: another format of the export, for example.
    _, after = _unmatched([key for key in before if not key.turn_id], after, lambda key: key.content)
    without_id = [key for key in after if not key.turn_id]
    _, new = _unmatched([key for key in before if key.turn_id], without_id, lambda key: key.content)
    return sorted([*new, *(key for key in after if key.turn_id)], key=lambda key: key.place)


def _unmatched(
    before: list[_Key], after: list[_Key], identity: Callable[[_Key], Hashable]
) -> tuple[list[_Key], list[_Key]]:
    """Return both lists without the pairs of equal *identity*; None is equal to nothing."""
    common = Counter(map(identity, before)) & Counter(map(identity, after))
    del common[None]
    return _without(before, common, identity), _without(after, common, identity)


def _without(keys: list[_Key], common: Counter[Hashable], identity: Callable[[_Key], Hashable]) -> list[_Key]:
    left, kept = Counter(common), []
    for key in keys:
        if left[identity(key)] > 0:
            left[identity(key)] -= 1
        else:
            kept.append(key)
    return kept

"""A conversation that is too long becomes one that fits, knowingly: marked, counted, in its order. Pure: no I/O."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from domain.conversation import SPEAKER, Conversation, Turn

FIRST_SHARE = 0.5  # of the room, the most that the first customer turn takes: it tells the problem
LAST_SHARE = 0.5  # of what is left then, for the last turns: they tell how it ended

Count = Callable[[str], float]


@dataclass(frozen=True, slots=True)
class Fitted:
    """What the model gets to see. *turns_used* counts turns that are there, in whole or in part; None: all of them."""

    transcript: str
    is_complete: bool = True
    turns_used: int | None = None


def turns_marker(count: int) -> str:
    """Return the line that stands for *count* turns.

    It begins in the first column, where each line of a conversation has its speaker or an indent: no text can forge it.
    """
    return f"[... {count} turn{'' if count == 1 else 's'} left out ...]"


def cut_marker(count: int) -> str:
    """Return the line that stands for *count* characters in the middle of a turn."""
    return f"[... {count} characters left out ...]"


def fit_conversation(conversation: Conversation, room_tokens: float, tokens_of: Count) -> Fitted | None:
    """Return *conversation* in at most *room_tokens*, as *tokens_of* counts; None where not even a piece of it fits.

    Kept are the first customer turn (its middle cut where it is long), the last turns, then as many customer turns as
    fit, then other turns, the later ones first. They stay in their order.
    """
    if tokens_of(conversation.transcript) <= room_tokens:
        return Fitted(conversation.transcript)
    turns = conversation.turns
    first = next(index for index, turn in enumerate(turns) if turn.sender == "customer")
    selection = _Selection([_line(turn) for turn in turns], room_tokens, tokens_of)
    if not selection.keep_part(first, selection.left * (FIRST_SHARE if len(turns) > 1 else 1.0)):
        return None
    selection.keep_end(first, selection.left * LAST_SHARE)
    for index in sorted(range(len(turns)), key=lambda index: (turns[index].sender != "customer", -index)):
        selection.keep(index, selection.left)
    return Fitted(selection.transcript, is_complete=False, turns_used=len(selection.kept))


class _Selection:
    """The turns that are kept so far, and the room that is *left* in tokens."""

    def __init__(self, lines: list[str], room_tokens: float, tokens_of: Count) -> None:
        self._lines = lines
        self._tokens_of = tokens_of
        # One marker before each turn that is kept and one at the end cover every gap there can be.
        self._marker_tokens = tokens_of("\n" + turns_marker(len(lines)) + "\n")
        self.left = room_tokens - self._marker_tokens
        self.kept: dict[int, str] = {}

    def keep(self, index: int, most_tokens: float) -> bool:
        """Keep a whole turn where that takes at most *most_tokens*."""
        if index in self.kept or self.left <= self._marker_tokens:
            return index in self.kept
        return self._take(index, self._lines[index], most_tokens)

    def keep_part(self, index: int, most_tokens: float) -> bool:
        """Keep a turn whole, or with its middle cut out, where either fits in *most_tokens*."""
        part = _within(self._lines[index], most_tokens - self._marker_tokens, self._tokens_of)
        return part is not None and self._take(index, part, self.left)

    def keep_end(self, first: int, most_tokens: float) -> None:
        """Keep the turns after *first*, from the last one back, that together take at most *most_tokens*."""
        end_at = self.left - most_tokens
        last = len(self._lines) - 1
        for index in range(last, first, -1):
            if not self.keep(index, self.left - end_at):
                if index == last:
                    self.keep_part(index, self.left - end_at)
                break

    @property
    def transcript(self) -> str:
        """What is kept, in its order, with a marker for each gap."""
        parts, expected = [], 0
        for index in sorted(self.kept):
            if index > expected:
                parts.append(turns_marker(index - expected))
            parts.append(self.kept[index])
            expected = index + 1
        if expected < len(self._lines):
            parts.append(turns_marker(len(self._lines) - expected))
        return "\n".join(parts)

    def _take(self, index: int, line: str, most_tokens: float) -> bool:
        cost = self._tokens_of(line + "\n") + self._marker_tokens
        if cost > min(most_tokens, self.left):
            return False
        self.kept[index] = line
        self.left -= cost
        return True


def _line(turn: Turn) -> str:
    return f"{SPEAKER[turn.sender]}: {turn.text}".replace("\n", "\n    ")


def _within(line: str, room_tokens: float, tokens_of: Count) -> str | None:
    """Return *line* whole, or with its middle cut out; None where there is no room for anything of it."""
    # No token holds more than this of ordinary text: what is beyond is not even counted.
    most = max(0, int(room_tokens * 16))
    if len(line) <= most and tokens_of(line + "\n") <= room_tokens:
        return line
    room = room_tokens - tokens_of("\n" + cut_marker(len(line)) + "\n    \n")
    low, high = 0, min(len(line) - 1, most) // 2
    while low < high:  # characters kept at each end
        middle = (low + high + 1) // 2
        if tokens_of(line[:middle] + line[-middle:]) <= room:
            low = middle
        else:
            high = middle - 1
    if low < 16:
        return None
    return f"{line[:low].rstrip()}\n{cut_marker(len(line) - 2 * low)}\n    {line[-low:].lstrip()}"

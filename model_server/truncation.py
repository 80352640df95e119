"""Truncates a conversation to a number of tokens: which turns are kept, and the markers for the others. No I/O."""

from __future__ import annotations

from dataclasses import dataclass

from domain.conversation import Conversation
from model_server.tokens import Count

FIRST_SHARE = 0.5  # of the room: the most that the first customer turn, which states the problem, may take
LAST_SHARE = 0.5  # of the remaining room: the most for the last turns, which tell how it ended


@dataclass(frozen=True, slots=True)
class Fitted:
    """The part of a conversation that is sent. *turns_used* counts its whole or shortened turns; None means all.

    *is_refitted*: it follows a refusal. *assumed_window*: the size it was fitted to because the refusal named none, or 0.
    *is_trial*: it is longer than the window, to be refused with its token count.
    """

    transcript: str
    is_complete: bool = True
    turns_used: int | None = None
    is_refitted: bool = False
    is_trial: bool = False
    assumed_window: int = 0


# Markers start in the first column, where a conversation has a speaker or an indent, so no customer text can forge them.
def _turns_marker(count: int) -> str:
    return f"[... {count} turn{'' if count == 1 else 's'} left out ...]"


def _cut_marker(count: int) -> str:
    return f"[... {count} characters left out ...]"


def fit_conversation(conversation: Conversation, room_tokens: float, tokens_of: Count) -> Fitted | None:
    """Return *conversation* in at most *room_tokens*, counted by *tokens_of*; None if nothing fits.

    Kept are the first customer turn (its middle is cut if it is long), the last turns, then as many customer turns as
    fit, then other turns, later ones first. The order stays.
    """
    if tokens_of(conversation.transcript) <= room_tokens:
        return Fitted(conversation.transcript)
    turns = conversation.turns
    first = next(index for index, turn in enumerate(turns) if turn.sender == "customer")
    selection = _Selection([turn.line for turn in turns], room_tokens, tokens_of)
    if not selection.keep(first, selection.left * (FIRST_SHARE if len(turns) > 1 else 1.0), may_cut=True):
        return None
    end_at, last = selection.left * (1 - LAST_SHARE), len(turns) - 1
    for index in range(last, first, -1):
        if not selection.keep(index, selection.left - end_at, may_cut=index == last):
            break
    for index in sorted(range(len(turns)), key=lambda index: (turns[index].sender != "customer", -index)):
        selection.keep(index, selection.left)
    return Fitted(selection.transcript, is_complete=False, turns_used=len(selection.kept))


class _Selection:
    """The turns that are kept so far, and the room that is *left*, in tokens."""

    def __init__(self, lines: list[str], room_tokens: float, tokens_of: Count) -> None:
        self._lines = lines
        self._tokens_of = tokens_of
        self._marker_tokens = tokens_of("\n" + _turns_marker(len(lines)) + "\n")
        self.left = room_tokens - self._marker_tokens  # the gap that holds all turns
        self.kept: dict[int, str] = {}

    def keep(self, index: int, most_tokens: float, *, may_cut: bool = False) -> bool:
        """Keep a turn if it takes at most *most_tokens*; *may_cut* cuts out the middle of a longer one."""
        if index in self.kept or self.left <= 0:
            return index in self.kept
        line: str | None = self._lines[index]
        if may_cut:
            line = _within(self._lines[index], most_tokens - 2 * self._marker_tokens, self._tokens_of)
        if line is None:
            return False
        # The turn splits a gap, shortens it, or closes it; each gap has a marker.
        gaps = self._is_gap(index - 1) + self._is_gap(index + 1) - 1
        cost = self._tokens_of(line + "\n") + gaps * self._marker_tokens
        # A line that was cut may take a few tokens more than its halves.
        if cost > (self.left if may_cut else min(most_tokens, self.left)):
            return False
        self.kept[index] = line
        self.left -= cost
        return True

    def _is_gap(self, index: int) -> bool:
        return 0 <= index < len(self._lines) and index not in self.kept

    @property
    def transcript(self) -> str:
        """The kept turns in order, with a marker for each gap."""
        parts, expected = [], 0
        for index in sorted(self.kept):
            if index > expected:
                parts.append(_turns_marker(index - expected))
            parts.append(self.kept[index])
            expected = index + 1
        if expected < len(self._lines):
            parts.append(_turns_marker(len(self._lines) - expected))
        return "\n".join(parts)


def _within(line: str, room_tokens: float, tokens_of: Count) -> str | None:
    """Return *line*, whole or with its middle cut out; None if there is too little room."""
    # Ordinary text has at most 16 characters per token, so longer text need not be counted.
    most = max(0, int(room_tokens * 16))
    if len(line) <= most and tokens_of(line + "\n") <= room_tokens:
        return line
    room = room_tokens - tokens_of("\n" + _cut_marker(len(line)) + "\n    \n")
    low, high = 0, min(len(line) - 1, most) // 2
    while low < high:  # characters kept at each end
        middle = (low + high + 1) // 2
        if tokens_of(line[:middle] + line[-middle:]) <= room:
            low = middle
        else:
            high = middle - 1
    if low < 16:
        return None
    return f"{line[:low].rstrip()}\n{_cut_marker(len(line) - 2 * low)}\n    {line[-low:].lstrip()}"

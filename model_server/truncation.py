"""Truncates long conversations so that they fit the context window: marked, counted, in order. No I/O."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from domain.conversation import Conversation
from error_handler import LLMContextError, LLMError, LLMReplyError, Reason, SkippedDocumentError
from model_server.protocol import NUM_PREDICT, ChatTarget, is_half_window
from model_server.tokens import TokenEstimator
from model_server.window import REPAIR_TOKENS

SUSPECT_RATIO = 1.4  # estimate to reported tokens
LEARN_FROM_ALL, LEARN_FROM_EACH = 200, 20  # learn from the first 200 answers, then from every 20th
FIRST_SHARE = 0.5  # of the room: the most that the first customer turn, which states the problem, may take
LAST_SHARE = 0.5  # of the remaining room: the most for the last turns, which tell how it ended

Count = Callable[[str], float]
OnLong = Literal["fit", "skip", "fail"]


@dataclass(frozen=True, slots=True)
class Fitted:
    """The part of a conversation that is sent. *turns_used* counts its whole or shortened turns; None means all."""

    transcript: str
    is_complete: bool = True
    turns_used: int | None = None


class TranscriptTruncator:
    """Fits conversations into the window of a target, and learns from the token counts of the server.

    One for each system prompt and model. *on_long*: truncate a long conversation ("fit"), or "skip" or "fail" it.
    """

    def __init__(self, system_prompt: str, on_long: OnLong = "fit") -> None:
        self.estimator = TokenEstimator(system_prompt)
        self._on_long = on_long
        self._answers = 0

    def fit(self, conversation: Conversation, target: ChatTarget) -> Fitted:
        """Return what to send of *conversation*: all of it if it fits or if the window is unknown.

        Raises:
            LLMContextError, SkippedDocumentError: It does not fit, and ON_LONG forbids truncation.
        """
        if target.protocol == "openai_chat":
            return Fitted(conversation.transcript)
        return self._fit(conversation, target.num_ctx, 1.0, None)

    def fit_again(self, conversation: Conversation, sent: Fitted, target: ChatTarget, refusal: LLMError) -> Fitted:
        """Return what to send of *conversation* after the server refused *sent* with *refusal*.

        Raises:
            LLMContextError, SkippedDocumentError: ON_LONG forbids truncation.
            LLMError: *refusal* itself, if no smaller size follows from it.
        """
        told = refusal if isinstance(refusal, LLMContextError) else LLMContextError("")
        window = told.window_tokens
        if target.protocol != "openai_chat":  # we set this window
            window = target.num_ctx if window is None else min(window, target.num_ctx)
        if window is None:
            raise refusal
        system_tokens, text_tokens = self.estimator.system_tokens, self.estimator.text_tokens(sent.transcript)
        if told.prompt_tokens is not None and self._on_long == "fit" and not self.estimator.has_learnt:
            # Either part may be larger than estimated: scale both, with a margin.
            factor = max(1.0, 1.08 * told.prompt_tokens / (system_tokens + text_tokens))
            return self._fit(conversation, window - math.ceil(system_tokens * (factor - 1)), factor, refusal)
        if told.prompt_tokens is not None:
            real = 1.02 * (told.prompt_tokens - system_tokens)
        else:
            # No count was reported, so assume one token per byte, which no tokenizer exceeds.
            real = len(sent.transcript.encode("utf-8", "replace"))
            if system_tokens + real + NUM_PREDICT <= window:
                raise refusal  # it did fit, so the server has another window than requested
            real = max(real, window - system_tokens)
        fitted = self._fit(conversation, window, max(1.0, real / max(1.0, text_tokens)), refusal)
        if fitted.transcript == sent.transcript:
            raise refusal
        return fitted

    def require_whole(self, sent: Fitted, target: ChatTarget, prompt_tokens: int | None) -> None:
        """Refuse a token count of half the window if the estimate is much higher: the server cut the prompt.

        model_server.protocol refuses the counts that prove a cut without an estimate.

        Raises:
            LLMReplyError: context_overflow.
        """
        if target.protocol == "openai_chat" or prompt_tokens is None or not is_half_window(target, prompt_tokens):
            return
        estimate = self.estimator.prompt_tokens(sent.transcript)
        if estimate > SUSPECT_RATIO * prompt_tokens:
            raise LLMReplyError(
                f"the server counted {prompt_tokens} prompt tokens, half of its window, for an estimated {estimate}: "
                "it cut the prompt",
                Reason.CONTEXT_OVERFLOW,
            )

    def learn(self, sent: Fitted, prompt_tokens: int | None) -> None:
        """Record that the server counted *prompt_tokens* for the prompt with *sent* in it."""
        self._answers += 1
        # Learning costs as much as parsing the answer, and changes little after some hundred answers.
        if prompt_tokens is not None and (self._answers <= LEARN_FROM_ALL or self._answers % LEARN_FROM_EACH == 0):
            self.estimator.learn(sent.transcript, prompt_tokens)

    def _fit(self, conversation: Conversation, window: int, factor: float, refusal: LLMError | None) -> Fitted:
        """Return what fits into *window* if text has *factor* times the estimated tokens."""
        estimator = self.estimator
        room = window - NUM_PREDICT - REPAIR_TOKENS - estimator.system_tokens

        def tokens_of(text: str) -> float:
            return estimator.text_tokens(text) * factor

        # A character has at most four bytes, and a byte is at most one token.
        if refusal is None and (4 * len(conversation.transcript) <= room or tokens_of(conversation.transcript) <= room):
            return Fitted(conversation.transcript)
        if self._on_long == "fit":
            if fitted := fit_conversation(conversation, room, tokens_of):
                return fitted
            if refusal is not None:
                raise refusal
        needed = math.ceil(estimator.system_tokens + tokens_of(conversation.transcript)) + NUM_PREDICT
        sentence = (
            f"the conversation needs about {needed} tokens and the context window holds {window}; "
            "raise OLLAMA_NUM_CTX if the model allows it"
        )
        if self._on_long == "skip":
            raise SkippedDocumentError(sentence, Reason.CONTEXT_OVERFLOW) from refusal
        raise LLMContextError(sentence) from refusal


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
        # One marker before each kept turn and one at the end cover every possible gap.
        self._marker_tokens = tokens_of("\n" + _turns_marker(len(lines)) + "\n")
        self.left = room_tokens - self._marker_tokens
        self.kept: dict[int, str] = {}

    def keep(self, index: int, most_tokens: float, *, may_cut: bool = False) -> bool:
        """Keep a turn if it takes at most *most_tokens*; *may_cut* cuts out the middle of a longer one."""
        if index in self.kept or self.left <= self._marker_tokens:
            return index in self.kept
        line: str | None = self._lines[index]
        if may_cut:
            line = _within(self._lines[index], most_tokens - self._marker_tokens, self._tokens_of)
        if line is None:
            return False
        cost = self._tokens_of(line + "\n") + self._marker_tokens
        # A line that was cut may take a few tokens more than its halves.
        if cost > (self.left if may_cut else min(most_tokens, self.left)):
            return False
        self.kept[index] = line
        self.left -= cost
        return True

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

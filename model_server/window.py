"""The context window: choose one for a whole run, load the model with it, and fit conversations into it. No I/O.

The window holds system prompt, conversation and answer together. Facts about Ollama: a longer prompt is refused, or cut
to half of the window and answered anyway (github.com/ollama/ollama, llm/llama_server.go, read at v0.33).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from config import Settings
from domain.conversation import Conversation
from error_handler import (
    LLMContextError,
    LLMError,
    LLMModelError,
    LLMRejectedError,
    LLMReplyError,
    Reason,
    SkippedDocumentError,
)
from model_server.models import BEHIND_V1, LoadedModel, TargetFlow, find_loaded, find_ollama, loaded_request
from model_server.protocol import (
    DEFAULT_NUM_CTX,
    LEAST_SHARE,
    NUM_PREDICT,
    ChatTarget,
    ServerRequest,
    build_load_body,
    is_half_window,
    parse_load_response,
)
from model_server.tokens import Count, TokenEstimator, least_tokens

SIZES = (4096, 8192, 16_384, 32_768)
SHARE = 0.99  # of the documents that the window should hold whole
MARGIN = 0.15
REPAIR_TOKENS = 400  # the one repair turn: 500 characters of the answer, and the reason
REPAIR_ROOM = 200  # tokens that a repair turn takes of the window of a long conversation
SECOND_SHARE = 0.8  # of the window, after a second refusal
SUSPECT_RATIO = 1.4  # estimate to reported tokens
LEARN_FROM_ALL, LEARN_FROM_EACH = 200, 20  # learn from the first 200 answers, then from every 20th
FIRST_SHARE = 0.5  # of the room: the most that the first customer turn, which states the problem, may take
LAST_SHARE = 0.5  # of the remaining room: the most for the last turns, which tell how it ended

logger = logging.getLogger(__name__)

Say = Callable[[str], None]
OnLong = Literal["fit", "skip", "fail"]


def tokens_needed(prompt_tokens: int) -> int:
    """Return the window that a prompt of *prompt_tokens* needs, with its answer, a repair turn, and a margin."""
    return prompt_tokens + max(REPAIR_TOKENS, math.ceil(MARGIN * prompt_tokens)) + NUM_PREDICT


@dataclass(frozen=True, slots=True)
class WindowChoice:
    """A window of *num_ctx* tokens, which holds the share *held* of *sample* documents whole; *asked* is the setting.

    *least* is the smallest window of a loaded model that is used instead.
    """

    num_ctx: int
    least: int
    held: float = 1.0
    sample: int = 0
    asked: int | None = None

    def __str__(self) -> str:
        size = f"context window: {self.num_ctx} tokens"
        if self.asked is not None:
            return size if self.asked == self.num_ctx else f"{size} (the model's limit; {self.asked} were set)"
        if not self.sample:
            return f"{size} (default; no conversations to sample)"
        return f"{size}, holds {self.held:.1%} of a sample of {self.sample} conversations"

    def beside(self, loaded: LoadedModel | None) -> int:
        """Return the window to use if *loaded* is in memory: its own, if no window was set and it is large enough."""
        has = loaded.context_length if loaded else None
        return has if self.asked is None and has is not None and has >= self.least else self.num_ctx


def choose_window(needs: Sequence[int] | None, limit: int | None, asked: int | None = None) -> WindowChoice:
    """Return the window for documents that need *needs* tokens (``tokens_needed``).

    None means that the documents are not known; then the window of a loaded model is used if a conversation fits into
    it. *limit* is the model's own limit, None if unknown; no window exceeds it. *asked* is what the operator set.
    """
    most = limit or SIZES[-1]
    if asked is not None:
        num_ctx = min(asked, limit or asked)
        return WindowChoice(num_ctx, num_ctx, asked=asked)
    if not needs:
        num_ctx = min(DEFAULT_NUM_CTX, most)  # no documents to measure
        return WindowChoice(num_ctx, num_ctx if needs is not None else min(num_ctx, SIZES[0]))
    enough = sorted(needs)[math.ceil(SHARE * len(needs)) - 1]
    num_ctx = min(most, next((size for size in SIZES if size >= enough), SIZES[-1]))
    return WindowChoice(num_ctx, num_ctx, sum(need <= num_ctx for need in needs) / len(needs), len(needs))


def warm_up(target: ChatTarget, settings: Settings, choice: WindowChoice, say: Say) -> TargetFlow:
    """Load the model: yield each request, receive its status and body, return the target with the window to use.

    A model that is loaded with a window that *choice* accepts is not loaded again. *say* gets one sentence for each
    fact the operator should know. Servers with OpenAI's protocol set their own window, but an Ollama is recognised.

    Raises:
        LLMError: The model does not load.
    """
    if target.protocol == "openai_chat":
        if (yield from find_ollama(target)) is not None:
            logger.warning("%s", BEHIND_V1)
        return target
    say(str(choice))
    loaded = find_loaded(target.model, *(yield loaded_request(target.server_url)))
    target = replace(target, num_ctx=choice.beside(loaded))
    has = loaded.context_length if loaded else None
    if has != target.num_ctx:
        if has is not None:
            say(f"{target.model} is loaded with {has} tokens, but {target.num_ctx} are needed: loading it again")
        limit_s = f"{settings.llm_load_timeout_s:.0f} s"
        say(f"loading {target.model} with {target.num_ctx} tokens (may take up to {limit_s}) ...")
    elif has != choice.num_ctx:
        say(f"{target.model} is already loaded with a window of {has} tokens; using that")
    url = f"{target.server_url}/api/chat"
    answer = yield ServerRequest("POST", url, build_load_body(target), settings.llm_load_timeout_s)
    try:
        parse_load_response(target, *answer)
    except LLMModelError:
        raise
    except LLMRejectedError:  # a server that only emulates Ollama may refuse a chat without messages
        say(f"the server at {target.server_url} loads no model on request; the first answer shows if it works")
    return _verified(target, find_loaded(target.model, *(yield loaded_request(target.server_url))), say)


def _verified(target: ChatTarget, loaded: LoadedModel | None, say: Say) -> ChatTarget:
    """Return *target* with the window that the server really gave."""
    if loaded is None:
        return target
    if loaded.size_bytes and loaded.vram_bytes is not None and loaded.vram_bytes < loaded.size_bytes:
        share = 1 - loaded.vram_bytes / loaded.size_bytes
        part = f"{100 * share:.0f} % of {target.model} is outside GPU memory"
        say(f"{part if loaded.vram_bytes else f'{target.model} runs on the CPU only'}; answers will be slow")
    given = loaded.context_length
    if given is not None and given < target.num_ctx:
        say(f"the server gave a window of {given} tokens instead of {target.num_ctx}; using {given}")
        return replace(target, num_ctx=given)
    return target


@dataclass(frozen=True, slots=True)
class Fitted:
    """The part of a conversation that is sent. *turns_used* counts its whole or shortened turns; None means all.

    *is_refitted*: it follows a refusal.
    """

    transcript: str
    is_complete: bool = True
    turns_used: int | None = None
    is_refitted: bool = False


class TranscriptTruncator:
    """Fits conversations into the window of a target, and learns from the token counts of the server.

    One for each system prompt and model. *on_long*: truncate a long conversation ("fit"), or "skip" or "fail" it.
    """

    def __init__(self, system_prompt: str, on_long: OnLong = "fit") -> None:
        self.estimator = TokenEstimator(system_prompt)
        self._least_of_system_prompt = least_tokens(system_prompt)
        self._refuses = False  # the server refuses long prompts, so it does not cut them
        self._on_long = on_long
        self._answers = 0

    def fit(self, conversation: Conversation, target: ChatTarget) -> Fitted:
        """Return what to send of *conversation*: all of it if it fits or if the window is unknown.

        Raises:
            LLMContextError, SkippedDocumentError: It does not fit, and ON_LONG forbids truncation.
        """
        if target.protocol == "openai_chat":
            return Fitted(conversation.transcript)
        return self._fit(conversation, target.num_ctx - target.thinking_tokens, conversation.transcript, None, None)

    def fit_again(self, conversation: Conversation, sent: Fitted, target: ChatTarget, refusal: LLMError) -> Fitted:
        """Return what to send of *conversation* after the server refused *sent* with *refusal*, or cut it.

        Raises:
            LLMContextError, SkippedDocumentError: ON_LONG forbids truncation.
            LLMError: *refusal* itself, if no smaller size follows from it.
        """
        told = refusal if isinstance(refusal, LLMContextError) else LLMContextError("")
        window, counted = told.window_tokens, told.prompt_tokens
        if target.protocol != "openai_chat":  # we set this window
            window = target.num_ctx if window is None else min(window, target.num_ctx)
        elif isinstance(refusal, LLMReplyError) and refusal.kept_tokens is not None:
            window = _window_of_cut(refusal.kept_tokens)
        if window is None:
            raise refusal
        window -= target.thinking_tokens
        if counted is not None:
            self._refuses = True
            counted = min(counted, window) if sent.is_refitted else counted  # it is near the window by now
            self.estimator.learn(sent.transcript, counted)
        elif self.estimator.prompt_tokens(sent.transcript) + NUM_PREDICT <= window:
            # No count was reported, so assume one token per byte, which no tokenizer exceeds.
            counted = self.estimator.system_tokens + len(sent.transcript.encode("utf-8", "replace"))
        if counted is not None and counted + NUM_PREDICT <= window:
            raise refusal  # it did fit, so the server has another window than requested
        if sent.is_refitted:  # refused twice: the instructions are longer than estimated
            window = round(SECOND_SHARE * window)
        fitted = self._fit(conversation, window, sent.transcript, counted, refusal)
        if fitted.transcript == sent.transcript:
            raise refusal
        return replace(fitted, is_refitted=True)

    def require_whole(self, sent: Fitted, target: ChatTarget, prompt_tokens: int | None) -> None:
        """Refuse a token count that is lower than a whole prompt with *sent* in it can have: the server cut the prompt.

        model_server.protocol refuses the counts that prove a cut without an estimate. A server that refused a prompt for its
        length does not cut others.

        Raises:
            LLMReplyError: context_overflow.
        """
        if prompt_tokens is None or self._refuses:
            return
        least = max(
            self.estimator.least_prompt_tokens(sent.transcript, prompt_tokens),
            LEAST_SHARE * self._least(sent.transcript, int(prompt_tokens / LEAST_SHARE)),
        )
        is_half = target.protocol != "openai_chat" and is_half_window(target, prompt_tokens)
        if prompt_tokens >= least and not is_half:
            return
        estimate = self.estimator.prompt_tokens(sent.transcript)
        if prompt_tokens < least or estimate > SUSPECT_RATIO * prompt_tokens:
            raise LLMReplyError(
                f"the server counted {prompt_tokens} prompt tokens for an estimated {estimate}: it cut the prompt",
                Reason.CONTEXT_OVERFLOW,
                kept_tokens=prompt_tokens,
            )

    def learn(self, sent: Fitted, prompt_tokens: int | None) -> None:
        """Record that the server counted *prompt_tokens* for the prompt with *sent* in it."""
        self._answers += 1
        # Learning costs as much as parsing the answer, and changes little after some hundred answers.
        if prompt_tokens is not None and (self._answers <= LEARN_FROM_ALL or self._answers % LEARN_FROM_EACH == 0):
            self.estimator.learn(sent.transcript, prompt_tokens)

    def _least(self, transcript: str, enough: int) -> int:
        # Each word part takes at least two characters: a letter and a separator, or sixteen letters.
        if self._least_of_system_prompt + (len(transcript) + 1) // 2 <= enough:
            return enough
        return self._least_of_system_prompt + least_tokens(transcript)

    def _fit(
        self, conversation: Conversation, window: int, sent: str, counted: float | None, refusal: LLMError | None
    ) -> Fitted:
        """Return what fits into *window*; *counted* are the tokens of the prompt with *sent* in it, if they are known."""
        most_prompt_tokens = window - NUM_PREDICT - REPAIR_ROOM
        if refusal is None and self.estimator.fits(sent, most_prompt_tokens):
            return Fitted(conversation.transcript)
        room, tokens_of = self.estimator.counter(sent, most_prompt_tokens, counted)
        if refusal is None and tokens_of(sent) <= room:
            return Fitted(conversation.transcript)
        if self._on_long == "fit":
            if fitted := fit_conversation(conversation, room, tokens_of):
                return fitted
            if refusal is not None:
                raise refusal
        needed = math.ceil(window - room + tokens_of(conversation.transcript))
        sentence = (
            f"the conversation needs about {needed} tokens and the context window holds {window}; "
            "raise OLLAMA_NUM_CTX if the model allows it"
        )
        if self._on_long == "skip":
            raise SkippedDocumentError(sentence, Reason.CONTEXT_OVERFLOW) from refusal
        raise LLMContextError(sentence) from refusal


def _window_of_cut(kept_tokens: int) -> int:
    """Return the window of a server that cut a prompt to *kept_tokens*: twice as much for Ollama, which keeps half of it."""
    twice = 2 * (kept_tokens - 2)
    return next((twice + off for off in (0, -2, 2) if (twice + off) % 256 == 0), kept_tokens + NUM_PREDICT)


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

"""One context window for a whole run, and what is known about the prompts that go into it. Pure: no I/O.

The window holds system prompt, conversation and answer together. Facts about Ollama: a prompt that is longer is
refused or cut to half of it and answered all the same (github.com/ollama/ollama, llm/llama_server.go, read at v0.33).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from domain.conversation import Conversation
from error_handler import LLMContextError, LLMError, LLMReplyError, Reason, SkippedDocumentError
from model_server.protocol import NUM_PREDICT, ChatTarget
from model_server.tokens import TokenEstimator
from model_server.truncation import Fitted, fit_conversation

SIZES = (4096, 8192, 16_384, 32_768)
DEFAULT_SIZE = 8192  # where no documents are known: the service, an empty collection
SHARE = 0.99  # of the documents that the window shall hold whole
MARGIN = 0.15
SUSPECT_RATIO = 1.4
REPAIR_TOKENS = 400  # what the one repair turn adds to a prompt: 500 characters of the answer, and what was wrong

OnLong = Literal["fit", "skip", "fail"]


def tokens_needed(prompt_tokens: int) -> int:
    """Return the window that a prompt of *prompt_tokens* needs: with its answer, a repair turn, and a margin."""
    return prompt_tokens + max(REPAIR_TOKENS, math.ceil(MARGIN * prompt_tokens)) + NUM_PREDICT


@dataclass(frozen=True, slots=True)
class WindowChoice:
    """A window of *num_ctx* tokens. *held* is the share of *sample* documents that it holds whole (1.0 of none)."""

    num_ctx: int
    held: float = 1.0
    sample: int = 0
    asked: int | None = None

    def __str__(self) -> str:
        if self.asked is not None:
            lowered = "" if self.asked == self.num_ctx else f" ({self.asked} were asked for, the model takes no more)"
            return f"context window: {self.num_ctx} tokens{lowered}"
        basis = (
            f"holds {self.held:.1%} of a sample of {self.sample} conversations" if self.sample else "nothing to go by"
        )
        return f"context window: {self.num_ctx} tokens, {basis}"


def choose_window(needs: Sequence[int], limit: int | None, asked: int | None = None) -> WindowChoice:
    """Return the window for documents whose ``tokens_needed`` are *needs*.

    *limit* is the model's own, None where it is unknown; no window exceeds it. *asked* is what the operator set.
    """
    most = limit or SIZES[-1]
    if asked is not None:
        return WindowChoice(min(asked, limit or asked), asked=asked)
    if not needs:
        return WindowChoice(min(DEFAULT_SIZE, most))
    ordered = sorted(needs)
    enough = ordered[math.ceil(SHARE * len(ordered)) - 1]
    num_ctx = min(most, next((size for size in SIZES if size >= enough), SIZES[-1]))
    return WindowChoice(num_ctx, sum(need <= num_ctx for need in needs) / len(needs), len(needs))


LEARN_FROM_ALL, LEARN_FROM_EACH = 300, 20  # answers: every one at first, then each n-th


class TranscriptTruncator:
    """Fits conversations into the window of a target, and learns from what the server says about them.

    One for each system prompt and model; *on_long* says what becomes of a conversation that does not fit.
    """

    def __init__(self, system_prompt: str, on_long: OnLong = "fit") -> None:
        self.estimator = TokenEstimator(system_prompt)
        self._on_long = on_long
        self._answers = 0

    def fit(self, conversation: Conversation, target: ChatTarget) -> Fitted:
        """Return what of *conversation* is sent: all of it where it fits, or where the window is unknown.

        Raises:
            LLMContextError, SkippedDocumentError: It does not fit, and shall not be cut.
        """
        if target.protocol == "openai_chat":
            return Fitted(conversation.transcript)
        return self._fit(conversation, target.num_ctx, 1.0, None)

    def fit_again(self, conversation: Conversation, sent: Fitted, target: ChatTarget, refusal: LLMError) -> Fitted:
        """Return what of *conversation* is sent after the server gave *refusal* to *sent*.

        Raises:
            LLMContextError, SkippedDocumentError: It shall not be cut, or there is nothing to go by: *refusal* itself
                where the server told neither count nor window and the window is not ours.
        """
        told = refusal if isinstance(refusal, LLMContextError) else LLMContextError("")
        is_ours = target.protocol != "openai_chat"
        windows = [told.window_tokens, target.num_ctx if is_ours else None]
        known = [window for window in windows if window is not None]
        if not known:
            raise refusal
        window = min(known)
        system_tokens, text_tokens = self.estimator.system_tokens, self.estimator.text_tokens(sent.transcript)
        if told.prompt_tokens is not None and self._on_long == "fit" and not self.estimator.has_learnt:
            # The count may be high for either part: both are taken to be so alike, and some more.
            factor = max(1.0, 1.08 * told.prompt_tokens / (system_tokens + text_tokens))
            return self._fit(conversation, window - math.ceil(system_tokens * (factor - 1)), factor, refusal)
        if told.prompt_tokens is not None:
            real = 1.02 * (told.prompt_tokens - system_tokens)
        else:
            # Only that it was too long: count what no tokenizer exceeds, and no less than what cannot have fitted.
            real = len(sent.transcript.encode("utf-8", "replace"))
            if system_tokens + real + NUM_PREDICT <= window:
                raise refusal  # it was not: the server has another window than it was asked for
            real = max(real, window - system_tokens)
        fitted = self._fit(conversation, window, max(1.0, real / max(1.0, text_tokens)), refusal)
        if fitted.transcript == sent.transcript:
            raise refusal
        return fitted

    def require_whole(self, sent: Fitted, target: ChatTarget, prompt_tokens: int | None) -> None:
        """Refuse a count that is to the token what servers from 0.30 on leave of a prompt that they cut: half the window.

        model_server.protocol refuses what betrays a cut by itself; this one goes by the estimate.

        Raises:
            LLMReplyError: context_overflow.
        """
        if target.protocol == "openai_chat" or prompt_tokens is None:
            return
        is_half = abs(prompt_tokens - target.num_ctx // 2 - 2) <= 2
        if is_half and self.estimator.prompt_tokens(sent.transcript) > SUSPECT_RATIO * prompt_tokens:
            raise LLMReplyError(
                f"the server saw {prompt_tokens} prompt tokens, half of the window, of an estimated "
                f"{self.estimator.prompt_tokens(sent.transcript)}: it cut the prompt",
                Reason.CONTEXT_OVERFLOW,
            )

    def learn(self, sent: Fitted, prompt_tokens: int | None) -> None:
        """Note what the server counted for the prompt with *sent* in it."""
        self._answers += 1
        # What hundreds have taught, thousands do not change; to look at each costs as much as to parse its answer.
        if prompt_tokens is not None and (self._answers <= LEARN_FROM_ALL or self._answers % LEARN_FROM_EACH == 0):
            self.estimator.learn(sent.transcript, prompt_tokens)

    def _fit(self, conversation: Conversation, window: int, factor: float, refusal: LLMError | None) -> Fitted:
        estimator = self.estimator
        room = window - NUM_PREDICT - REPAIR_TOKENS - estimator.system_tokens

        def tokens_of(text: str) -> float:
            return estimator.text_tokens(text) * factor

        # No character has more than four bytes, and no byte is more than one token.
        if refusal is None and 4 * len(conversation.transcript) <= room:
            return Fitted(conversation.transcript)
        if refusal is None and tokens_of(conversation.transcript) <= room:
            return Fitted(conversation.transcript)
        if self._on_long == "fit":
            fitted = fit_conversation(conversation, room, tokens_of)
            if fitted is not None:
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

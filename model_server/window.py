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
    build_chat_body,
    is_half_window,
    parse_load_response,
)
from model_server.tokens import NOISE, Gauge, TokenEstimator, least_tokens
from model_server.truncation import Fitted, fit_conversation

SIZES = (4096, 8192, 16_384, 32_768)
SHARE = 0.99  # of the documents that the window should hold whole
SHARE_BESIDE = 0.95  # the same for the window of other workers, which costs no load
MARGIN = 0.15
REPAIR_TOKENS = 400  # the one repair turn: 500 characters of the answer, and the reason
REPAIR_ROOM = 200  # tokens that a repair turn takes of the window of a long conversation
SECOND_SHARE = 0.8  # of the window, after a second refusal
SUSPECT_RATIO = 1.4  # estimate to reported tokens
CERTAIN = 2.0  # times the margin that text of a known kind needs: with a larger one, a trial is sent
TRIALS = 12  # in a run
CLOSE, AIM, FITS = 0.96, 0.98, 5  # share of the room: a looser fit is repeated and aims at this, at most so often
LEARN_FROM_ALL, LEARN_FROM_EACH = 200, 20  # learn from the first 200 answers, then from every 20th

logger = logging.getLogger(__name__)

Say = Callable[[str], None]
OnLong = Literal["fit", "skip", "fail"]


def tokens_needed(prompt_tokens: int) -> int:
    """Return the window that a prompt of *prompt_tokens* needs, with its answer, a repair turn, and a margin."""
    return prompt_tokens + max(REPAIR_TOKENS, math.ceil(MARGIN * prompt_tokens)) + NUM_PREDICT


@dataclass(frozen=True, slots=True)
class WindowChoice:
    """A window of *num_ctx* tokens, which holds the share *held* of *sample* documents whole; *asked* is the setting.

    *least* is the smallest window of a loaded model that is used instead, and *least_beside_others* that of a model which other
    workers use.
    """

    num_ctx: int
    least: int
    least_beside_others: int
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

    def given(self, num_ctx: int) -> WindowChoice:
        """Return the choice after the server gave *num_ctx* tokens."""
        return replace(self, num_ctx=num_ctx, least=min(self.least, num_ctx))

    def beside(self, loaded: LoadedModel | None) -> int:
        """Return the window to use if *loaded* is in memory: its own, if no window was set and it is large enough."""
        has = loaded.context_length if loaded else None
        return has if self.asked is None and has is not None and has >= self.least else self.num_ctx


def choose_window(needs: Sequence[int] | None, limit: int | None, asked: int | None = None) -> WindowChoice:
    """Return the window for documents that need *needs* tokens (``tokens_needed``).

    None or empty means that the documents are not known; then the window of a loaded model is used if a conversation fits
    into it. *limit* is the model's own limit, None if unknown; no window exceeds it. *asked* is what the operator set.
    """
    most = limit or SIZES[-1]
    if asked is not None:
        num_ctx = min(asked, limit or asked)
        return WindowChoice(num_ctx, num_ctx, num_ctx, asked=asked)
    if not needs:
        num_ctx = min(DEFAULT_NUM_CTX, most)  # no documents to measure
        least = min(num_ctx, SIZES[0])
        return WindowChoice(num_ctx, least, least)

    def holding(share: float) -> int:
        enough = sorted(needs)[math.ceil(share * len(needs)) - 1]
        return min(most, next((size for size in SIZES if size >= enough), SIZES[-1]))

    num_ctx = holding(SHARE)
    held = sum(need <= num_ctx for need in needs) / len(needs)
    return WindowChoice(num_ctx, num_ctx, holding(SHARE_BESIDE), held, len(needs))


def build_load_body(target: ChatTarget) -> bytes:
    """Return the body that loads the model with the options of ``build_chat_body``, without a question."""
    return build_chat_body(replace(target, protocol="ollama_chat"), [], b"null")


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
        say(f"the server at {target.address} loads no model on request; the first answer shows if it works")
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


class TranscriptTruncator:
    """Fits conversations into the window of a target, and learns from the token counts of the server.

    One for each system prompt and model. *on_long*: truncate a long conversation ("fit"), or "skip" or "fail" it.
    """

    def __init__(self, system_prompt: str, on_long: OnLong = "fit") -> None:
        self.estimator = TokenEstimator(system_prompt)
        self._least_of_system_prompt = least_tokens(system_prompt)
        self._refuses = False  # the server refuses long prompts, so it does not cut them
        self._on_long = on_long
        self._trials = TRIALS
        self._assumed = SIZES[-1]
        self._answers = 0

    def fit(self, conversation: Conversation, target: ChatTarget) -> Fitted:
        """Return what to send of *conversation*: all of it if it fits or if the window is unknown.

        If the tokens of such text are so uncertain that much of the window would stay empty, a trial is returned: a prompt
        that is longer than the window in any case. The refusal names its tokens and costs no generation; pass it to
        ``fit_again``. A run has at most TRIALS of them, and none after a trial that was not refused with a count.

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
        assumed = self._smaller_window(sent, refusal) if window is None else 0
        window = (window or assumed) - target.thinking_tokens
        if counted is not None:
            self._refuses = True
            self.estimator.learn(sent.transcript, counted)
        elif sent.is_trial:
            self._trials = 0
        elif self.estimator.prompt_tokens(sent.transcript) + NUM_PREDICT <= window:
            # No count was reported, so assume one token per byte, which no tokenizer exceeds.
            counted = self.estimator.system_tokens + len(sent.transcript.encode("utf-8", "replace"))
        if counted is not None and counted + NUM_PREDICT <= window:
            raise refusal  # it did fit, so the server has another window than requested
        if sent.is_refitted and counted is None and not assumed:  # the instructions are longer than estimated
            window = round(SECOND_SHARE * window)
        fitted = self._fit(conversation, window, sent.transcript, counted, refusal)
        if fitted.transcript == sent.transcript:
            if assumed:  # by the estimate it would fit there, too
                return self.fit_again(conversation, replace(sent, assumed_window=assumed), target, refusal)
            raise refusal
        return replace(fitted, is_refitted=True, assumed_window=assumed)

    def _smaller_window(self, sent: Fitted, refusal: LLMError) -> int:
        """Return the next of SIZES that may hold less than *sent*, for a server that refuses without naming a size."""
        if self._on_long == "skip":
            raise SkippedDocumentError(str(refusal), Reason.CONTEXT_OVERFLOW) from refusal
        most = sent.assumed_window or self.estimator.prompt_tokens(sent.transcript) + NUM_PREDICT
        smaller = [size for size in SIZES if size < most]
        if self._on_long == "fail" or not smaller:
            raise refusal
        self._assumed = min(self._assumed, smaller[-1])  # later conversations begin with the size that was not refused
        return self._assumed

    def require_whole(self, sent: Fitted, target: ChatTarget, prompt_tokens: int | None) -> None:
        """Refuse a token count that is lower than a whole prompt with *sent* in it can have: the server cut the prompt.

        model_server.protocol refuses the counts that prove a cut without an estimate. A server that refused a prompt for its
        length does not cut others. An answer to a trial is always refused.

        Raises:
            LLMReplyError: context_overflow.
        """
        if sent.is_trial:
            raise LLMReplyError("the server answered a prompt that is longer than its window", Reason.CONTEXT_OVERFLOW)
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
        gauge = self.estimator.gauge(sent, most_prompt_tokens, counted)
        if gauge.tokens_of(conversation.transcript) <= gauge.room:
            return Fitted(conversation.transcript)
        fitted, is_certain = _fit_closely(conversation, gauge)
        expected, margin = gauge.estimate(conversation.transcript)
        matters = self._on_long == "fit" or expected - margin <= gauge.room
        if refusal is None and self._trials > 0 < gauge.room and matters and not is_certain:
            self._trials -= 1
            return self._trial(fitted.transcript if fitted else sent, window)
        if self._on_long == "fit" and fitted is not None:
            return fitted
        if self._on_long == "fit" and refusal is not None:
            raise refusal
        needed = math.ceil(window - gauge.room + gauge.tokens_of(conversation.transcript))
        sentence = (
            f"the conversation needs about {needed} tokens and the context window holds {window}; "
            "raise OLLAMA_NUM_CTX if the model allows it"
        )
        if self._on_long == "skip":
            raise SkippedDocumentError(sentence, Reason.CONTEXT_OVERFLOW) from refusal
        raise LLMContextError(sentence) from refusal

    def _trial(self, text: str, window: int) -> Fitted:
        """Return *text*, what would be sent, so many times that it exceeds *window* with any tokenizer."""
        return Fitted("\n".join([text] * math.ceil(window / self.estimator.fewest_tokens(text))), is_trial=True)


def _fit_closely(conversation: Conversation, gauge: Gauge) -> tuple[Fitted | None, bool]:
    """Return *conversation* in the room of *gauge*, None if nothing fits, and whether its tokens are certain.

    The turns that are kept may be of another kind than the rest, so the room is corrected for them.
    """
    best, best_tokens, is_certain = None, 0.0, False
    room, low, high = gauge.room, 0.0, math.inf  # the largest room that was small enough; the smallest that was not
    for _ in range(FITS):
        fitted = fit_conversation(conversation, room, gauge.tokens_of)
        if fitted is None:
            break
        expected, margin = gauge.estimate(fitted.transcript)
        likely = max(1.0, expected + margin)
        if likely > gauge.room:
            high = room
        else:
            low = room
            if likely > best_tokens:
                best, best_tokens, is_certain = fitted, likely, margin <= CERTAIN * NOISE * expected
            if likely >= CLOSE * gauge.room:
                break
        room *= AIM * gauge.room / likely
        if not low < room < high:
            room = (low + high) / 2
    return best, is_certain


def _window_of_cut(kept_tokens: int) -> int:
    """Return the window of a server that cut a prompt to *kept_tokens*: twice as much for Ollama, which keeps half of it."""
    twice = 2 * (kept_tokens - 2)
    return next((twice + off for off in (0, -2, 2) if (twice + off) % 256 == 0), kept_tokens + NUM_PREDICT)

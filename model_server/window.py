"""The context window: choose one size for a whole run, reuse a loaded one, and load the model with it. No I/O.

The window holds system prompt, conversation and answer together. Facts about Ollama: a longer prompt is refused, or cut
to half of the window and answered anyway (github.com/ollama/ollama, llm/llama_server.go, read at v0.33).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from config import Settings
from model_server.models import LoadedModel, TargetFlow, find_loaded, loaded_request
from model_server.protocol import (
    DEFAULT_NUM_CTX,
    NUM_PREDICT,
    ChatTarget,
    ServerRequest,
    build_load_body,
    parse_load_response,
)

SIZES = (4096, 8192, 16_384, 32_768)
SHARE = 0.99  # of the documents that the window should hold whole
MARGIN = 0.15
REPAIR_TOKENS = 400  # the one repair turn: 500 characters of the answer, and the reason

logger = logging.getLogger(__name__)

Say = Callable[[str], None]


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
    fact the operator should know. Servers with OpenAI's protocol set their own window and get no request.

    Raises:
        LLMError: The model does not load.
    """
    if target.protocol == "openai_chat":
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
    parse_load_response(target, *answer)
    return _verified(target, find_loaded(target.model, *(yield loaded_request(target.server_url))), say)


def _verified(target: ChatTarget, loaded: LoadedModel | None, say: Say) -> ChatTarget:
    """Return *target* with the window that the server really gave."""
    if loaded is None:
        return target
    if loaded.size_bytes and loaded.vram_bytes is not None and loaded.vram_bytes < loaded.size_bytes:
        share = 1 - loaded.vram_bytes / loaded.size_bytes
        logger.warning("%.0f %% of %s is outside GPU memory; answers will be slow", 100 * share, target.model)
    given = loaded.context_length
    if given is not None and given < target.num_ctx:
        say(f"the server gave a window of {given} tokens instead of {target.num_ctx}; using {given}")
        return replace(target, num_ctx=given)
    return target

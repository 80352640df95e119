"""Settles on one context window and loads the model into it, as a flow of requests that both wrappers drive. No I/O."""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator
from dataclasses import dataclass, replace

from config import Settings
from model_server import models as served_models
from model_server import protocol
from model_server.models import LoadedModel
from model_server.protocol import ChatTarget
from model_server.window import SIZES, WindowChoice

logger = logging.getLogger(__name__)

Say = Callable[[str], None]
Adopt = Callable[[WindowChoice, LoadedModel | None], int]
LOOK_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True)
class ServerRequest:
    """One request to the model server; *timeout_s* is of the whole of it."""

    method: str
    url: str
    body: bytes | None
    timeout_s: float


WarmUp = Generator[ServerRequest, tuple[int, bytes], ChatTarget]


def warm_up(target: ChatTarget, settings: Settings, choice: WindowChoice, say: Say, adopt: Adopt) -> WarmUp:
    """Yield the requests that load the model, take status and body of each answer, return the target to ask.

    The window is that of *choice*, or the one that the model is loaded with already, where *adopt* takes it: then
    nothing is loaded again.
    What an operator should know goes to *say*, one sentence each. A server that sets its window itself (OpenAI's
    protocol) is left alone.

    Raises:
        LLMError: The model does not load.
    """
    if target.protocol == "openai_chat":
        return target
    say(str(choice))
    loaded = find_loaded(target, *(yield look(target)))
    target = replace(target, num_ctx=adopt(choice, loaded))
    has = loaded.context_length if loaded else None
    if has is not None and has == target.num_ctx:
        if has != choice.num_ctx:
            say(f"{target.model} is loaded with a window of {has} tokens, which is used as it is")
    else:
        if has is not None:
            say(f"{target.model} is loaded with {has} tokens and this needs {target.num_ctx}: it is loaded again")
        say(
            f"loading {target.model} with {target.num_ctx} tokens (may take up to {settings.llm_load_timeout_s:.0f} s) ..."
        )
    body = protocol.build_load_body(target)
    answer = yield ServerRequest("POST", f"{target.server_url}/api/chat", body, settings.llm_load_timeout_s)
    protocol.parse_load_response(target, *answer)
    return _verified(target, find_loaded(target, *(yield look(target))), say)


def look(target: ChatTarget) -> ServerRequest:
    """Return the request that asks what is loaded."""
    return ServerRequest("GET", f"{target.server_url}/api/ps", None, LOOK_TIMEOUT_S)


def find_loaded(target: ChatTarget, status: int, body: bytes) -> LoadedModel | None:
    """Return what the answer to ``look`` says about the model of *target*; None where it is not loaded."""
    names = (target.model, f"{target.model}:latest")
    return next((model for model in served_models.parse_loaded(status, body) if model.name in names), None)


def adopt_larger(choice: WindowChoice, loaded: LoadedModel | None) -> int:
    """Return the window to use: a *loaded* one that is large enough goes before the chosen one, not before a set one."""
    has = loaded.context_length if loaded else None
    if choice.asked is None and has is not None and has >= choice.num_ctx:
        return has
    return choice.num_ctx


def reuse_loaded_window(choice: WindowChoice, loaded: LoadedModel | None) -> int:
    """Return the window of one who has no corpus: whatever is loaded, be it of a worker, as long as a conversation has room in it."""
    has = loaded.context_length if loaded else None
    if choice.asked is None and has is not None and has >= min(choice.num_ctx, SIZES[0]):
        return has
    return choice.num_ctx


def _verified(target: ChatTarget, loaded: LoadedModel | None, say: Say) -> ChatTarget:
    """Return *target* with the window that the server really gave."""
    if loaded is None:
        return target
    if loaded.size_bytes and loaded.vram_bytes is not None and loaded.vram_bytes < loaded.size_bytes:
        share = 1 - loaded.vram_bytes / loaded.size_bytes
        logger.warning("%.0f %% of %s is not in the GPU's memory, so answers take long", 100 * share, target.model)
    given = loaded.context_length
    if given is not None and given < target.num_ctx:
        say(f"the server gave a window of {given} tokens instead of {target.num_ctx}; {given} are used")
        return replace(target, num_ctx=given)
    return target

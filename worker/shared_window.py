"""The worker's side of the agreement on the context window (storage/window_agreement.py)."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeAlias

from async_llm_wrapper import AsyncLLMClient, SharedWindow
from error_handler import ConfigurationError, StoreError
from model_server.window import Say, WindowChoice
from storage.service_lease import server_name
from storage.window_agreement import RENEW_S, UsedWindow

if TYPE_CHECKING:  # few runs have several servers
    from worker.server_pool import ServerPool

    Window: TypeAlias = SharedWindow | ServerPool

logger = logging.getLogger(__name__)

CHANGE_OVER_S = 2 * RENEW_S


async def loaded_window(
    stack: AsyncExitStack,
    database: Any,
    client: AsyncLLMClient | ServerPool,
    choice: WindowChoice,
    say: Say,
    on_load: Callable[[float], None] | None = None,
) -> Window:
    """Load the model with *choice*, settled with the other workers on the servers, and return the window of the run.

    The agreement ends with *stack*. If MongoDB refuses, the worker chooses alone, and one warning is logged. *say* gets what
    the operator should know, *on_load* the seconds of the load.

    Raises:
        LLMError: The model does not load.
        ConfigurationError: Several servers give different windows.
    """
    used = []
    if client.target.protocol != "openai_chat":  # such a server sets its window
        used = _used_windows(database, client)
    try:
        choice = await _settled(used, choice, client.target.context_limit, say)
    except (StoreError, ConfigurationError) as exc:
        logger.warning("the context window is not agreed with other workers: %s", exc)
        used = []
    window = window_of(client, choice.asked, choice)
    stack.push_async_callback(window.close)
    task = asyncio.create_task(_keep(used, window, choice), name="window")
    stack.push_async_callback(_end, used, task)
    start_s = time.monotonic()
    await window.load(say)
    if on_load is not None:
        on_load(time.monotonic() - start_s)
    return window


def window_of(client: AsyncLLMClient | ServerPool, asked: int | None, chosen: WindowChoice | None = None) -> Window:
    """Return the window of *client*, see SharedWindow. A pool keeps one for each server."""
    if isinstance(client, AsyncLLMClient):
        return SharedWindow(client, asked, chosen)
    return client.with_window(chosen)


def _used_windows(database: Any, client: AsyncLLMClient | ServerPool) -> list[UsedWindow]:
    targets = [client.target] if isinstance(client, AsyncLLMClient) else client.targets
    worker = secrets.token_hex(8)
    return [UsedWindow(database, worker, server_name(target.server_url), target.model) for target in targets]


async def _settled(used: list[UsedWindow], choice: WindowChoice, limit: int | None, say: Say) -> WindowChoice:
    """Return *choice* with the window to use beside other workers, and store it.

    A larger window than theirs is returned when they have had the time to change over. A window that the operator set stays.
    """
    others = await _of_others(used)
    if limit is not None:
        others = min(others, limit)
    if not others or others == choice.num_ctx:
        await _renew(used, choice.num_ctx)
        return choice
    told = f"another worker uses {used[0].model} with a window of {others} tokens"
    if choice.asked is not None:
        say(
            f"{told}, and OLLAMA_NUM_CTX is {choice.num_ctx} here: the server loads the model again and again; "
            "set one OLLAMA_NUM_CTX for both"
        )
    elif others >= choice.least_beside_others:
        say(f"{told}; using that")
        choice = replace(choice, num_ctx=others, least=min(choice.least_beside_others, others))
    await _renew(used, choice.num_ctx)
    if choice.asked is None and choice.num_ctx > others:
        say(
            f"{told}; it changes to {choice.num_ctx} within {CHANGE_OVER_S:.0f} s, because these conversations need them"
        )
        await asyncio.sleep(CHANGE_OVER_S)
    return choice


async def _keep(used: list[UsedWindow], window: Window, choice: WindowChoice) -> None:
    """Renew the agreement each RENEW_S for ever; once the model is loaded, *window* adopts a larger one of others.

    It adopts each size once, because the server may give a smaller window than anybody asks for.
    """
    num_ctx = choice.num_ctx
    while True:
        await asyncio.sleep(RENEW_S)
        with contextlib.suppress(StoreError, ConfigurationError):  # the next call of the run reports it
            others = 0 if choice.asked is not None else await _of_others(used)
            if others > num_ctx and window.is_loaded:
                num_ctx = others
                window.adopt(num_ctx)
            await _renew(used, num_ctx)


async def _of_others(used: list[UsedWindow]) -> int:
    return max([await one.of_others() or 0 for one in used], default=0)


async def _renew(used: list[UsedWindow], num_ctx: int) -> None:
    for one in used:
        await one.renew(num_ctx)


async def _end(used: list[UsedWindow], task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.wait([task])
    with contextlib.suppress(StoreError, ConfigurationError):  # it expires
        for one in used:
            await one.end()

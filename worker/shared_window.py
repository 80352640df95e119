"""The worker's side of the agreement on the context window (storage/window_agreement.py)."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
from contextlib import AsyncExitStack
from dataclasses import replace
from typing import Any

from async_llm_wrapper import AsyncLLMClient, SharedWindow
from error_handler import ConfigurationError, StoreError
from model_server.window import Say, WindowChoice
from storage.service_lease import server_name
from storage.window_agreement import RENEW_S, UsedWindow

logger = logging.getLogger(__name__)

CHANGE_OVER_S = 2 * RENEW_S


async def agreed_window(
    stack: AsyncExitStack, database: Any, client: AsyncLLMClient, choice: WindowChoice, say: Say
) -> SharedWindow:
    """Return the window of a run with *choice*, settled with the other workers on the server. The model is not loaded yet.

    The agreement ends with *stack*. If MongoDB refuses, the worker chooses alone, and one warning is logged. *say* gets what
    the operator should know.
    """
    target = client.target
    if target.protocol == "openai_chat":  # the server sets its window
        return SharedWindow(client, choice.asked, choice)
    used = UsedWindow(database, secrets.token_hex(8), server_name(target.server_url), target.model)
    try:
        choice = await _settled(used, choice, target.context_limit, say)
    except (StoreError, ConfigurationError) as exc:
        logger.warning("the context window is not agreed with other workers: %s", exc)
        return SharedWindow(client, choice.asked, choice)
    window = SharedWindow(client, choice.asked, choice)
    task = asyncio.create_task(_keep(used, window, choice.num_ctx), name="window")
    stack.push_async_callback(_end, used, task)
    return window


async def _settled(used: UsedWindow, choice: WindowChoice, limit: int | None, say: Say) -> WindowChoice:
    """Return *choice* with the window to use beside other workers, and store it.

    A larger window than theirs is returned when they have had the time to change over. A window that the operator set stays.
    """
    others = await used.of_others()
    if others is not None and limit is not None:
        others = min(others, limit)
    if others is None or others == choice.num_ctx:
        await used.renew(choice.num_ctx)
        return choice
    told = f"another worker uses {used.model} with a window of {others} tokens"
    if choice.asked is not None:
        say(
            f"{told}, and OLLAMA_NUM_CTX is {choice.num_ctx} here: the server loads the model again and again; "
            "set one OLLAMA_NUM_CTX for both"
        )
    elif others >= choice.least_beside_others:
        say(f"{told}; using that")
        choice = replace(choice, num_ctx=others, least=min(choice.least_beside_others, others))
    await used.renew(choice.num_ctx)
    if choice.asked is None and choice.num_ctx > others:
        say(
            f"{told}; it changes to {choice.num_ctx} within {CHANGE_OVER_S:.0f} s, because these conversations need them"
        )
        await asyncio.sleep(CHANGE_OVER_S)
    return choice


async def _keep(used: UsedWindow, window: SharedWindow, num_ctx: int) -> None:
    """Renew the agreement each RENEW_S for ever; *window* adopts a larger one of others."""
    while True:
        await asyncio.sleep(RENEW_S)
        with contextlib.suppress(StoreError, ConfigurationError):  # the next call of the run reports it
            num_ctx = max(num_ctx, await used.of_others() or 0)
            window.adopt(num_ctx)
            await used.renew(num_ctx)


async def _end(used: UsedWindow, task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.wait([task])
    with contextlib.suppress(StoreError, ConfigurationError):  # it expires
        await used.end()

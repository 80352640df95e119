"""A loaded model that stays loaded, in one window for all who use it on this machine."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from dataclasses import replace

from async_llm_wrapper import AsyncLLMClient
from error_handler import LLMError
from utils.context_window import WindowChoice, choose_window
from utils.model_warm_up import adopt_any, find_loaded, look

logger = logging.getLogger(__name__)

LOOK_EVERY_S = 10.0  # also how long a reload by somebody else goes unnoticed


class SharedWindow:
    """Keeps the target of *client* in step with what is loaded; *asked* is the window an operator set, or None."""

    def __init__(self, client: AsyncLLMClient, asked: int | None) -> None:
        self._client = client
        self._asked = asked
        self._looked_at = -math.inf
        self._loading: asyncio.Task[None] | None = None
        self.is_loaded = False

    async def load(self) -> None:
        """Load the model, however long that takes, or find it loaded.

        Raises:
            LLMError: It does not load.
        """
        await self._client.warm_up(self._choice(), logger.info, adopt_any)
        self._looked_at = time.monotonic()
        self.is_loaded = True

    async def renew(self) -> None:
        """Look, at most every LOOK_EVERY_S, whether the model is still loaded, and with which window; to be awaited
        before a call.

        A model that was unloaded is loaded again first, by one task for all callers: one that leaves does not end it.

        Raises:
            LLMError: It does not load.
        """
        if self._client.target.protocol == "openai_chat":
            return
        if self._loading is None and time.monotonic() - self._looked_at >= LOOK_EVERY_S:
            self._looked_at = time.monotonic()
            await self._look()
        if self._loading is not None:
            await asyncio.shield(self._loading)

    async def close(self) -> None:
        """End a load that is under way."""
        if self._loading is not None:
            self._loading.cancel()
            await asyncio.wait([self._loading])

    def _choice(self) -> WindowChoice:
        return choose_window([], self._client.target.context_limit, self._asked)

    async def _look(self) -> None:
        target = self._client.target
        try:
            status, body = await self._client.send(look(target))
            loaded = find_loaded(target, status, body)
        except LLMError:
            return  # the call that follows says what is wrong
        if status == 200 and loaded is None:
            if self._loading is None:
                self._loading = asyncio.create_task(self.load(), name="load-model")
                self._loading.add_done_callback(self._loaded)
            return
        num_ctx = adopt_any(self._choice(), loaded)
        if num_ctx != target.num_ctx:
            logger.info("the model is loaded with a window of %d tokens, which is used from now on", num_ctx)
            self._client.target = replace(self._client.target, num_ctx=num_ctx)

    def _loaded(self, task: asyncio.Task[None]) -> None:
        self._loading = None
        if not task.cancelled() and (problem := task.exception()) is not None:
            logger.warning("model: it does not load: %s", problem)

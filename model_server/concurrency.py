"""The gate before the model server for ``--max-concurrent auto``: as many places as its answers show to be right."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable

from error_handler import LLMBusyError, LLMTimeoutError
from model_server.protocol import ChatReply

LOG_EVERY_S = 15.0

logger = logging.getLogger(__name__)


class ConcurrencyLimit:
    """A gate with as many places as the controller finds right; one for each model server.

    ``place`` is what a worker holds while it has a document in hand, ``observed`` sends one request and learns from it.
    For one event loop.
    """

    def __init__(self, most: int, clock: Callable[[], float] = time.monotonic) -> None:
        from model_server.concurrency_controller import LimitController  # noqa: PLC0415 - a run with a fixed setting has none

        self.controller = LimitController(most)
        self._clock = clock
        self._taken = 0
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._probing: asyncio.TimerHandle | None = None
        self._logged, self._logged_at_s = self.controller.settled, -math.inf

    @property
    def current(self) -> int:
        """The limit of this moment, without the one request too many that probes for more."""
        return self.controller.settled

    @contextlib.asynccontextmanager
    async def place(self) -> AsyncIterator[None]:
        """Wait for a place, first come first served, and hold it."""
        if self._waiting or self._taken >= self.controller.limit:
            turn = asyncio.get_running_loop().create_future()
            self._waiting.append(turn)
            try:
                await turn
            except asyncio.CancelledError:
                if turn.done() and not turn.cancelled():  # it had just got the place
                    self._taken -= 1
                    self._let_in()
                raise
        else:
            self._taken += 1
        try:
            yield
        finally:
            self._taken -= 1
            self._let_in()

    async def observed(self, send: Callable[[], Awaitable[ChatReply]]) -> ChatReply:
        """Return what *send* returns; whatever it raises is let through."""
        call, is_told = self.controller.sent(self._clock()), False
        try:
            reply = await send()
            now_s, is_told = self._clock(), True
            self.controller.answered(
                call, now_s, queue_wait_s=reply.queue_wait_s, load_s=reply.load_s, total_s=reply.total_s
            )
            self._plan_probe(now_s)
            return reply
        except (LLMBusyError, LLMTimeoutError):
            is_told = True
            self.controller.congested(call, self._clock())
            raise
        finally:
            if not is_told:  # an outage, a cancellation, a useless answer: no sign of too many
                self.controller.lost(call)
            self._log()
            self._let_in()

    def close(self) -> None:
        """Stop probing."""
        if self._probing is not None:
            self._probing.cancel()

    def _let_in(self) -> None:
        while self._waiting and self._taken < self.controller.limit:
            turn = self._waiting.popleft()
            if not turn.done():
                self._taken += 1
                turn.set_result(None)

    def _plan_probe(self, now_s: float) -> None:
        if self._probing is None:
            in_s = self.controller.probe_in_s(now_s)
            if in_s is not None:
                self._probing = asyncio.get_running_loop().call_later(in_s, self._probe)

    def _probe(self) -> None:
        self._probing = None
        if self.controller.probe():
            self._let_in()

    def _log(self) -> None:
        now_s, limit = self._clock(), self.controller.settled
        if limit != self._logged and now_s - self._logged_at_s >= LOG_EVERY_S:
            logger.info("model calls in flight: at most %d now, %d before", limit, self._logged)
            self._logged, self._logged_at_s = limit, now_s

"""``--max-concurrent auto``: a concurrency limit that follows the model server.

A server that runs k requests at once queues the next one, and Ollama reports how long each request was queued. The
controller therefore counts, over a window of answers, how many requests were queued on average (Little's law). It
doubles the limit until requests queue, goes back to what fits, and from then on tries one more at intervals.

Servers that report no queue time are judged by latency, compared with the latency at the lowest limit.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass

from error_handler import LLMBusyError, LLMTimeoutError
from model_server.protocol import ChatReply

START = 2
LOAD_S = 0.5  # if loading the model took longer, the answer gives no information about the queue
NOISE_S, NOISE_SHARE = 0.003, 0.02  # a wait below this, or below this share of the latency, is no queue
MAX_QUEUED, MAX_IDLE = 0.6, 0.3  # mean requests queued, less those on the network: lower the limit; raise it early
HOLD_WINDOWS = 6  # windows without a queue before the limit is raised by one
MIN_WINDOW = 8  # answers
LATENCY_WINDOW = 32  # answers, if latency is all there is
MIN_RISE, SPREADS = 0.10, 2.5  # of the mean log latency: a smaller rise is noise
LOG_EVERY_S = 15.0

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Call:
    """One request; *in_flight* counts the requests in flight when it was sent, itself included.

    The other times are known once it is answered.
    """

    sent_at_s: float
    in_flight: int
    latency_s: float = 0.0
    wait_s: float = 0.0
    network_s: float = 0.0


_Window = list[Call]  # answered ones, all of them sent at the present limit


def _mean_in_flight(window: _Window) -> float:
    return sum(call.in_flight for call in window) / len(window)


def _queued(window: _Window) -> float:
    """Return the mean number of queued requests, less those on the network: they fill the slots that become free."""
    share = sum(call.wait_s - call.network_s for call in window) / sum(call.latency_s for call in window)
    return _mean_in_flight(window) * share


def _slower(window: _Window, baseline: _Window) -> float:
    """Return how many requests are too many, judged by the rise in latency over *baseline*."""
    (mean, error), (base_mean, base_error) = _log_latency(window), _log_latency(baseline)
    rise, spread = mean - base_mean, math.sqrt(error + base_error)
    return _mean_in_flight(window) * -math.expm1(spread - rise) if rise > max(MIN_RISE, SPREADS * spread) else 0.0


def _log_latency(window: _Window) -> tuple[float, float]:
    """Return the mean of the log latencies and the variance of that mean."""
    logs = [math.log(call.latency_s) for call in window]
    mean = sum(logs) / len(logs)
    return mean, sum((log - mean) ** 2 for log in logs) / len(logs) ** 2


class LimitController:
    """Finds the limit, from 1 to *most*. It has no clock and does no I/O.

    Report the end of each request with ``answered`` or ``congested``, except one that says nothing about load: without a
    connection, cancelled, or refused. Times are seconds of one monotonic clock.
    """

    def __init__(self, most: int, start: int = START) -> None:
        self.limit = min(start, most)
        self._most = most
        self._step = self.limit  # added to the limit if no request queues; doubles each time
        self._hold = 0  # windows to wait before the next step
        self._proven = 1  # the limit before the last step, at which no request queued
        self._judged_at_s = self._changed_at_s = -math.inf
        self._least_wait_s = math.inf
        self._window: _Window = []
        self._baseline: _Window = []

    def congested(self, call: Call, now_s: float) -> None:
        """Handle a 503 or a timeout: halve the limit, once for all requests sent before that."""
        if call.sent_at_s >= self._changed_at_s:
            self._lower(max(1, self.limit // 2), now_s, hold=1)

    def answered(self, call: Call, now_s: float, reply: ChatReply) -> None:
        """Record the answer to *call* and what the server reported about it."""
        if call.sent_at_s < self._judged_at_s or (reply.load_s is not None and reply.load_s > LOAD_S):
            return
        call.latency_s = max(now_s - call.sent_at_s, 1e-6)
        if reply.queue_wait_s is not None and reply.total_s is not None:
            call.network_s = max(0.0, call.latency_s - reply.total_s)
            self._least_wait_s = min(self._least_wait_s, reply.queue_wait_s)
            above_s = reply.queue_wait_s - self._least_wait_s
            if above_s > max(NOISE_S, NOISE_SHARE * (call.latency_s - above_s)):
                call.wait_s = above_s
            else:  # the server was about to begin
                call.network_s += above_s
        window = self._window
        window.append(call)
        if reply.queue_wait_s is not None:
            if len(window) >= max(self.limit, MIN_WINDOW if self._hold else 1):
                self._judge(now_s, _queued(window))
        elif len(window) >= max(self.limit, LATENCY_WINDOW if self.limit > START else LATENCY_WINDOW // 2):
            if not self._baseline or self.limit <= START:
                self._baseline = window
            self._judge(now_s, _slower(window, self._baseline))

    def _judge(self, now_s: float, excess: float) -> None:
        """Set the limit after a full window, in which *excess* more requests were queued than on the network."""
        in_flight = _mean_in_flight(self._window)
        self._window, self._judged_at_s = [], now_s
        if excess > MAX_QUEUED and in_flight > 1:
            # Short answers come first and overstate the queue, so a limit that was right before the step stays so.
            fitting = max(self._proven, min(self.limit - 1, round(in_flight - excess)))
            self._lower(fitting, now_s, hold=HOLD_WINDOWS)
        elif 2 * in_flight < self.limit:
            return  # too little work to fill the limit
        elif self._hold and excess > -MAX_IDLE:
            self._hold -= 1
        elif self.limit < self._most:
            self._proven = self.limit
            self.limit = min(self._most, self.limit + self._step)
            self._step *= 2
            self._changed_at_s = now_s

    def _lower(self, limit: int, now_s: float, *, hold: int) -> None:
        """Lower the limit; the next steps up begin with one again."""
        self.limit, self._hold = limit, hold
        self._step = self._proven = 1
        self._window = []
        self._judged_at_s = self._changed_at_s = now_s


class ConcurrencyLimit:
    """Concurrency slots of one model server, as many as the controller allows. For one event loop.

    A worker holds a ``slot`` while it works on a document; ``observed`` sends one request and learns from it.
    """

    def __init__(self, most: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.controller = LimitController(most)
        self._clock = clock
        self._permits = self.controller.limit  # issued: free ones and those that are held
        self._slots = asyncio.Semaphore(self._permits)
        self._in_flight = 0
        self._logged, self._logged_at_s = self._permits, -math.inf

    @property
    def current(self) -> int:
        """The limit now."""
        return self.controller.limit

    @contextlib.asynccontextmanager
    async def slot(self) -> AsyncIterator[None]:
        """Wait for a slot, first come, first served, and hold it."""
        await self._slots.acquire()
        while self._permits > self.controller.limit:  # the limit fell while this permit was free
            self._permits -= 1
            await self._slots.acquire()
        try:
            yield
        finally:
            self._slots.release()
            self._issue_permits()

    async def observed(self, send: Callable[[], Awaitable[ChatReply]]) -> ChatReply:
        """Return what *send* returns; its errors pass through."""
        self._in_flight += 1
        call = Call(self._clock(), self._in_flight)
        try:
            reply = await send()
            self.controller.answered(call, self._clock(), reply)
            return reply
        except (LLMBusyError, LLMTimeoutError):  # an outage, a cancellation or an unusable answer is no sign of load
            self.controller.congested(call, self._clock())
            raise
        finally:
            self._in_flight -= 1
            self._issue_permits()
            self._log()

    def _issue_permits(self) -> None:
        while self._permits < self.controller.limit:
            self._permits += 1
            self._slots.release()

    def _log(self) -> None:
        now_s, limit = self._clock(), self.controller.limit
        if limit != self._logged and now_s - self._logged_at_s >= LOG_EVERY_S:
            logger.info("model calls in flight: at most %d now, %d before", limit, self._logged)
            self._logged, self._logged_at_s = limit, now_s

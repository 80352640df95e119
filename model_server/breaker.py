"""A circuit breaker for the model server.

While it is open, calls wait instead of failing: a batch can wait, and a document must not lose an attempt because of an
outage. The service, whose callers cannot wait, lets it fail fast.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeVar

from error_handler import LLMConnectionError, LLMElsewhereError, LLMError, LLMOutageError, LLMTimeoutError

logger = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class BreakerPolicy:
    """*threshold* connection failures in a row open the breaker.

    Probes start after *first_probe_s* and slow down to one every *probe_cap_s*. An outage longer than *outage_limit_s*
    is final. With *fails_fast*, an open breaker raises LLMOutageError at once. With *has_others*, there are further
    servers: a server that is dead after a lost connection or a timeout opens the breaker at once, and an open breaker raises
    LLMElsewhereError.
    """

    threshold: int = 5
    first_probe_s: float = 0.5
    probe_cap_s: float = 30.0
    outage_limit_s: float = 3600.0
    fails_fast: bool = False
    has_others: bool = False


class CircuitBreaker:
    """Guards calls to one server. *probe* returns whether the server is alive and never raises LLMError."""

    def __init__(self, probe: Callable[[], Awaitable[bool]], policy: BreakerPolicy) -> None:
        self._probe = probe
        self._policy = policy
        self._failures = 0
        self.problem = ""  # the last lost connection
        self._outage: asyncio.Task[bool] | None = None  # of the last outage; its result: the server came back in time
        self.openings = 0

    @property
    def is_open(self) -> bool:
        """True if calls wait for the server to come back."""
        return self._outage is not None and not self._outage.done()

    async def call(self, send: Callable[[], Awaitable[T]]) -> T:
        """Return the result of *send*; wait while the server is away.

        After a lost connection the server is probed. If it is dead, the request is not at fault and is repeated without
        limit. If it is alive, the error is raised.

        Raises:
            LLMOutageError: The server stayed away for longer than the limit.
            LLMElsewhereError: The server is away, and there are others.
            LLMError: Any other error of *send*.
        """
        while True:
            await self._wait_until_closed()
            try:
                result = await send()
            except (LLMConnectionError, LLMTimeoutError) as exc:
                if not await self._is_to_blame(exc):
                    raise
            except LLMError:  # any answer shows that the server is alive
                self._failures = 0
                raise
            else:
                self._failures = 0
                return result

    def open(self, problem: str) -> None:
        """Send no further calls until a probe finds the server alive; *problem* is named in errors."""
        self.problem = problem
        if not self.is_open:
            self.openings += 1
            self._outage = asyncio.create_task(self._probe_until_alive(), name="breaker-probe")

    async def until_closed(self) -> None:
        """Return as soon as the breaker is closed."""
        if self._outage is not None:
            await asyncio.shield(self._outage)

    async def close(self) -> None:
        """Stop probing. Cancel waiting calls before."""
        if self._outage is not None:
            self._outage.cancel()
            await asyncio.wait([self._outage])

    async def _wait_until_closed(self) -> None:
        if self._outage is None:
            return
        if self.is_open and self._policy.fails_fast:
            raise LLMOutageError(
                f"the model server is away, and the service continues when it is back ({self.problem})"
            )
        if self.is_open and self._policy.has_others:
            raise LLMElsewhereError(self.problem)
        if not await asyncio.shield(self._outage):
            raise LLMOutageError(
                f"the model server was away for more than {self._policy.outage_limit_s:.0f} s ({self.problem}); "
                "run the same command again when it is back"
            )

    async def _is_to_blame(self, exc: LLMConnectionError | LLMTimeoutError) -> bool:
        """Return whether the server is at fault for *exc*, and not the request, which is then worth repeating."""
        if isinstance(exc, LLMConnectionError):
            self.problem = str(exc)
            self._count_failure()
        elif not self._policy.has_others:
            return False
        if self._policy.fails_fast:
            return False
        if self.is_open:
            return True
        if await self._probe():
            return False
        if self._policy.has_others:
            self.open(str(exc))
        else:
            await asyncio.sleep(self._policy.first_probe_s * random.uniform(0.5, 1.5))
        return True

    def _count_failure(self) -> None:
        self._failures += 1
        if self._failures >= self._policy.threshold and not self.is_open:
            logger.warning(
                "circuit breaker: open after %d connection failures in a row; %s (%s)",
                self._failures,
                "other servers are asked" if self._policy.has_others else "intake pauses",
                self.problem,
            )
            self.open(self.problem)

    async def _probe_until_alive(self) -> bool:
        start = time.monotonic()
        wait_s = self._policy.first_probe_s
        while time.monotonic() - start < self._policy.outage_limit_s:
            await asyncio.sleep(wait_s * random.uniform(0.5, 1.0))
            if await self._probe():
                logger.info("circuit breaker: closed, the server was away for %.1f s", time.monotonic() - start)
                self._failures = 0
                return True
            wait_s = min(self._policy.probe_cap_s, wait_s * 2)
        return False

"""Until when the requests in hand may take; all of them end with the grace period when the service is stopped."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from error_handler import RequestError
from utils.service_errors import STOPPING, TOO_SLOW

STOPPING_RETRY_AFTER_S = 5


class Deadlines:
    """The ends of the requests in hand. Times are those of the running loop."""

    def __init__(self) -> None:
        self._running: set[asyncio.Timeout] = set()
        self._stop_at = math.inf

    def stop(self, grace_s: float) -> None:
        """Let nothing run for longer than *grace_s* from now on."""
        self._stop_at = asyncio.get_running_loop().time() + grace_s
        for timeout in self._running:
            timeout.reschedule(min(timeout.when() or math.inf, self._stop_at))

    @asynccontextmanager
    async def until(self, deadline: float) -> AsyncIterator[None]:
        """Cancel the inside at *deadline*, or at the end of the grace period.

        Raises:
            RequestError: TOO_SLOW or STOPPING.
        """
        timeout = asyncio.timeout_at(min(deadline, self._stop_at))
        try:
            async with timeout:
                self._running.add(timeout)
                yield
        except TimeoutError as exc:
            if not timeout.expired():
                raise
            if self._stop_at < deadline:
                raise RequestError(STOPPING, retry_after_s=STOPPING_RETRY_AFTER_S) from exc
            raise RequestError(TOO_SLOW) from exc
        finally:
            self._running.discard(timeout)

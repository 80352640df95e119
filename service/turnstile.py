"""Lets one in per turn of the event loop, so that what comes in one moment leaves one after another."""

from __future__ import annotations

import asyncio
from collections import deque


class Turnstile:
    """One waiter per turn of the loop, in the order they came.

    Requests that arrive together would go through each of their steps in step: all would be read before the
    first is sent on, all answers would come in one moment as well, and the last of them would wait for the work
    of all others twice. Who is let in alone sends its request while the next one is read.
    """

    def __init__(self) -> None:
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._is_turning = False

    async def enter(self) -> None:
        """Return at once where nobody entered in this turn of the loop, else when all who came before have."""
        loop = asyncio.get_running_loop()
        if not self._is_turning:
            self._is_turning = True
            loop.call_soon(self._turn)
            return
        turn = loop.create_future()
        self._waiting.append(turn)
        await turn

    def _turn(self) -> None:
        while self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_result(None)
                asyncio.get_running_loop().call_soon(self._turn)
                return
        self._is_turning = False

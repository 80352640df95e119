"""What a worker learns from its model server while it runs: tokens, queue waits, the state of the breaker."""

from __future__ import annotations

from collections import deque
from typing import Any, Literal, Protocol

from model_server.protocol import ChatReply

RECENT = 50  # answers, for the mean time in the server's queue


class Breaker(Protocol):
    """A breaker, of one server or of several."""

    @property
    def is_open(self) -> bool:
        """True if calls wait."""


class Pool(Protocol):
    """Several servers."""

    def states(self) -> list[dict[str, Any]]:
        """Return the state of each; see worker.pool_server."""


class ModelUse:
    """Counts since the start of the process. *breaker* is None until the model server is known; a built-in classifier has none.

    *pool* is None with one server.
    """

    def __init__(self) -> None:
        self.breaker: Breaker | None = None
        self.pool: Pool | None = None
        self.tokens = {"prompt": 0, "reply": 0}
        self._waits_s: deque[float] = deque(maxlen=RECENT)

    def note_answer(self, reply: ChatReply) -> None:
        """Count the tokens and the queue wait of one answer of the model server."""
        self.tokens["prompt"] += reply.prompt_tokens or 0
        self.tokens["reply"] += reply.reply_tokens or 0
        if reply.queue_wait_s is not None:
            self._waits_s.append(reply.queue_wait_s)

    @property
    def queue_wait_s(self) -> float | None:
        """The mean time that the last RECENT answers waited in the server's queue; None if the server does not report it."""
        return round(sum(self._waits_s) / len(self._waits_s), 3) if self._waits_s else None

    @property
    def servers(self) -> list[dict[str, Any]]:
        """The state of each of several servers; empty with one."""
        return [] if self.pool is None else self.pool.states()

    @property
    def breaker_state(self) -> Literal["open", "closed"] | None:
        """The state of the breaker, None without one."""
        return None if self.breaker is None else "open" if self.breaker.is_open else "closed"

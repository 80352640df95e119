"""What a worker learns from its model server while it runs: tokens, queue waits, the state of the breaker."""

from __future__ import annotations

from collections import deque
from typing import Literal

from model_server.breaker import CircuitBreaker
from model_server.protocol import ChatReply

RECENT = 50  # answers, for the mean time in the server's queue


class ModelUse:
    """Counts since the start of the process. *breaker* is None until the model server is known; a built-in classifier has none."""

    def __init__(self) -> None:
        self.breaker: CircuitBreaker | None = None
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
    def breaker_state(self) -> Literal["open", "closed"] | None:
        """The state of the breaker, None without one."""
        return None if self.breaker is None else "open" if self.breaker.is_open else "closed"

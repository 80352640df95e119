"""Keeps when each document of a sample was asked, and what the model server told about its answers."""

from __future__ import annotations

import time
from contextvars import ContextVar

from error_handler import LLMError
from utils.batch_run import Classify
from utils.classification import Outcome
from utils.conversation import Conversation
from utils.ollama_protocol import ChatReply
from utils.run_estimate import DocumentTiming


class SampleRecorder:
    """Wraps what asks the model; *timings* are of the documents that were answered or failed, in the order they ended.

    *load_s* is the longest that the model took to be loaded, in seconds: at the start of the run, or before an answer.
    """

    def __init__(self) -> None:
        self.timings: list[DocumentTiming] = []
        self.load_s = 0.0
        # Each worker of a run is a task with a context of its own, so this is the worker's latest document.
        self._latest: ContextVar[DocumentTiming | None] = ContextVar("latest", default=None)

    def recorded(self, classify: Classify) -> Classify:
        """Return *classify*, recorded; one that is cancelled leaves no timing."""

        async def recorded_classify(conversation: Conversation, rounds: int) -> Outcome:
            before = self._latest.get()
            timing = DocumentTiming(time.monotonic())
            if before is not None:
                timing.gap_s = timing.started_s - before.ended_s
            self._latest.set(timing)
            try:
                outcome = await classify(conversation, rounds)
            except LLMError:
                self._end(timing)
                raise
            self._end(timing)
            return outcome

        return recorded_classify

    def _end(self, timing: DocumentTiming) -> None:
        timing.ended_s = time.monotonic()
        self.timings.append(timing)

    def note_answer(self, reply: ChatReply) -> None:
        """Add *reply* to the document that the calling task asks; without one it was asked for itself, to warm up."""
        self.load_s = max(self.load_s, reply.load_s or 0.0)
        timing = self._latest.get()
        if timing is None:
            return
        timing.load_s += reply.load_s or 0.0
        if reply.queue_wait_s is not None:
            timing.queue_wait_s = (timing.queue_wait_s or 0.0) + reply.queue_wait_s
        if reply.prompt_tokens is not None and reply.reply_tokens is not None:
            timing.prompt_tokens = (timing.prompt_tokens or 0) + reply.prompt_tokens
            timing.reply_tokens = (timing.reply_tokens or 0) + reply.reply_tokens

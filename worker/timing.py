"""Timings of a sample of documents, and the arithmetic of ``cli.py estimate`` on them."""

from __future__ import annotations

import heapq
import itertools
import math
import statistics
import time
from collections.abc import Iterable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass

from domain.conversation import Conversation, Outcome
from error_handler import LLMError
from model_server.protocol import ChatReply
from worker.intake import Classify

BUSY_SHARE = 0.1  # of a document's time; servers report a few milliseconds of overhead as queue wait
MIN_TIMED = 8  # documents, without the first one of each call, which reads the whole prompt uncached
MIN_FOR_INTERVAL = 5
SCHEDULED = 400  # documents assigned to slots one by one, for the idle slots at the end; the rest takes the mean
Z_90 = 1.645


@dataclass(slots=True)
class DocumentTiming:
    """The times of one document of the sample, in seconds of one monotonic clock.

    *gap_s* is the time since the same worker finished its previous document, None for the first. *queue_wait_s* and the
    token counts are sums over the calls of the document, None if the server does not report them.
    """

    started_s: float
    ended_s: float = 0.0
    gap_s: float | None = None
    queue_wait_s: float | None = None
    load_s: float = 0.0
    prompt_tokens: int | None = None
    reply_tokens: int | None = None

    @property
    def cycle_s(self) -> float:
        """The time that the document kept one of our calls busy, without the model's load."""
        return max(0.0, self.ended_s - self.started_s - self.load_s) + (self.gap_s or 0.0)

    @property
    def service_s(self) -> float:
        """The time that the document held a slot of the server."""
        return max(0.0, self.ended_s - self.started_s - self.load_s - (self.queue_wait_s or 0.0))


class SampleRecorder:
    """Records *timings* of the documents that were answered or failed, in the order they ended.

    *load_s* is the longest load of the model, in seconds: at the start of the run, or before an answer.
    """

    def __init__(self) -> None:
        self.timings: list[DocumentTiming] = []
        self.load_s = 0.0
        # Each worker is a task with its own context, so this is the worker's latest document.
        self._latest: ContextVar[DocumentTiming | None] = ContextVar("latest", default=None)

    def recorded(self, classify: Classify) -> Classify:
        """Return *classify* with recording; a cancelled call leaves no timing."""

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

    def note_load(self, seconds: float) -> None:
        """Record that loading the model took *seconds*."""
        self.load_s = max(self.load_s, seconds)

    def note_answer(self, reply: ChatReply) -> None:
        """Add *reply* to the calling task's document; the warm-up has none."""
        self.note_load(reply.load_s or 0.0)
        timing = self._latest.get()
        if timing is None:
            return
        timing.load_s += reply.load_s or 0.0
        if reply.queue_wait_s is not None:
            timing.queue_wait_s = (timing.queue_wait_s or 0.0) + reply.queue_wait_s
        if reply.prompt_tokens is not None and reply.reply_tokens is not None:
            timing.prompt_tokens = (timing.prompt_tokens or 0) + reply.prompt_tokens
            timing.reply_tokens = (timing.reply_tokens or 0) + reply.reply_tokens


@dataclass(frozen=True, slots=True)
class Pace:
    """The throughput of a sample: *slots* documents at once, each taking one of *holds_s* (seconds).

    *wait_share* is the share of a document's time spent in the server's queue (0 to 1), None if the server does not
    report it. If *is_server_busy*, additional calls would only wait.
    """

    slots: int
    holds_s: tuple[float, ...]
    wait_share: float | None
    is_server_busy: bool

    @property
    def documents_per_s(self) -> float:
        """The rate while every slot is busy; infinite if no time could be measured."""
        mean_s = statistics.fmean(self.holds_s)
        return self.slots / mean_s if mean_s > 0 else math.inf

    def with_calls(self, calls: int) -> Pace:
        """Return the pace with *calls* concurrent calls; an upper bound unless the server is busy."""
        slots = min(calls, self.slots) if self.is_server_busy else calls
        return Pace(slots, self.holds_s, self.wait_share, self.is_server_busy and calls >= self.slots)


def measure_pace(timings: Sequence[DocumentTiming], max_concurrent: int) -> Pace:
    """Return the pace of a sample (one document or more) taken with *max_concurrent* calls."""
    later = [timing for timing in timings if timing.gap_s is not None]
    timed = later if len(later) >= MIN_TIMED else list(timings)
    waiting = [timing for timing in timed if timing.queue_wait_s is not None]
    share = None
    if waiting:
        wait_s = sum(timing.queue_wait_s or 0.0 for timing in waiting)
        share = wait_s / max(wait_s + sum(timing.service_s for timing in waiting), 1e-9)
    if share is not None and share > BUSY_SHARE:
        held = slots_held_while_waiting(timings)
        if held > 0 and round(held) < max_concurrent:
            slots = max(1, round(held))
            # Both were measured by our clock, network included; their ratio is the server's rate.
            holds_s = tuple(timing.service_s * slots / held for timing in timed)
            return Pace(slots, holds_s, share, is_server_busy=True)
    return Pace(max_concurrent, tuple(timing.cycle_s for timing in timed), share, is_server_busy=False)


def slots_held_while_waiting(timings: Sequence[DocumentTiming]) -> float:
    """Return the mean number of documents in service while another one waited; 0.0 if none waited.

    No slot is free while a document waits, so this is the number of slots that this client gets.
    """
    changes: list[tuple[float, int, int]] = []  # time, change in waiting, change in service
    for timing in timings:
        arrived_s = timing.started_s + timing.load_s
        served_s = arrived_s + (timing.queue_wait_s or 0.0)
        changes += [(arrived_s, 1, 0), (served_s, -1, 1), (timing.ended_s, 0, -1)]
    waiting = served = 0
    busy_s = slot_s = last_s = 0.0
    for at_s, waits, serves in sorted(changes):
        if waiting > 0:
            busy_s += at_s - last_s
            slot_s += served * (at_s - last_s)
        waiting, served, last_s = waiting + waits, served + serves, at_s
    return slot_s / busy_s if busy_s > 0 else 0.0


@dataclass(frozen=True, slots=True)
class TimeQuote:
    """Seconds; the 90 % prediction interval is None if the sample is too small."""

    expected_s: float
    low_s: float | None
    high_s: float | None


def quote_time(pace: Pace, documents: int) -> TimeQuote:
    """Return the time that *documents* take at *pace*.

    The expected time assigns the sample's times to the slots, in turn. The interval is the usual prediction interval of
    a mean: Student's t times the standard error of the sample and of the documents to come.
    """
    holds_s, size = pace.holds_s, len(pace.holds_s)
    mean_s = statistics.fmean(holds_s)
    scheduled = min(documents, SCHEDULED)
    expected_s = _makespan(itertools.islice(itertools.cycle(holds_s), scheduled), pace.slots)
    expected_s += (documents - scheduled) * mean_s / pace.slots
    if size < MIN_FOR_INTERVAL:
        return TimeQuote(expected_s, None, None)
    if not expected_s:
        return TimeQuote(0.0, 0.0, 0.0)
    student_t = Z_90 * (1 + (Z_90**2 + 1) / (4 * (size - 1)))
    margin = student_t * statistics.stdev(holds_s) / mean_s * math.sqrt(1 / size + 1 / documents)
    return TimeQuote(expected_s, expected_s * max(0.0, 1 - margin), expected_s * (1 + margin))


def _makespan(holds_s: Iterable[float], slots: int) -> float:
    """Return when the last of *holds_s* ends if each starts as soon as one of *slots* is free."""
    free_at_s = [0.0] * slots
    for hold_s in holds_s:
        heapq.heapreplace(free_at_s, free_at_s[0] + hold_s)
    return max(free_at_s)


def mean_tokens(timings: Sequence[DocumentTiming]) -> tuple[float, float] | None:
    """Return the mean prompt and reply tokens per document, repair turns included; None if the server reports none."""
    prompts = [timing.prompt_tokens for timing in timings if timing.prompt_tokens is not None]
    replies = [timing.reply_tokens for timing in timings if timing.reply_tokens is not None]
    return (statistics.fmean(prompts), statistics.fmean(replies)) if prompts and replies else None

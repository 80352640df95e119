"""Timings of a sample of documents, and what they predict for the rest: the arithmetic of ``cli.py estimate``."""

from __future__ import annotations

import heapq
import math
import random
import statistics
import time
from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass

from domain.conversation import Conversation, Outcome
from error_handler import LLMError
from model_server.protocol import ChatReply
from worker.run import Classify


class SampleRecorder:
    """Records the *timings* of documents that were answered or failed, in the order in which they ended.

    *load_s* is the longest time that loading the model took, in seconds: at the start of the run, or before an answer.
    """

    def __init__(self) -> None:
        self.timings: list[DocumentTiming] = []
        self.load_s = 0.0
        # Each worker of a run is a task with its own context, so this is the latest document of one worker.
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
        """Add *reply* to the document of the calling task; a warm-up call has no document."""
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


BUSY_SHARE = 0.1  # of a document's time; servers report some milliseconds of overhead as waiting
LEAST_TIMED = 8  # documents, apart from the first of each slot, whose prompt was not cached
LEAST_FOR_INTERVAL = 5
RESAMPLES = 500
SCHEDULED = 400  # documents simulated one by one, to count idle slots at the end; the others take the mean
Z_90 = 1.645
SEED = 20_250_924


@dataclass(slots=True)
class DocumentTiming:
    """When one document of the sample was asked, in seconds of one monotonic clock.

    *gap_s* is the time since its worker finished the previous document, None for the first. *queue_wait_s* and the
    token counts are sums over its calls, None if the server does not report them.
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
        """How long it occupied one of our concurrent calls, without the loading of the model."""
        return max(0.0, self.ended_s - self.started_s - self.load_s) + (self.gap_s or 0.0)

    @property
    def service_s(self) -> float:
        """How long it held a slot of the server; its queue wait must be known."""
        return max(0.0, self.ended_s - self.started_s - self.load_s - (self.queue_wait_s or 0.0))


@dataclass(frozen=True, slots=True)
class Pace:
    """The rate of documents: *slots* at once, each for one of *holds_s*.

    *wait_share* is the part of a document's time in the queue of the server (0 to 1), None if the server does not
    report it. *is_server_busy* means that more concurrent calls would only wait.
    """

    slots: int
    holds_s: tuple[float, ...]
    wait_share: float | None
    is_server_busy: bool

    @property
    def documents_per_s(self) -> float:
        """The rate while every slot is taken; infinite if no time could be measured."""
        mean_s = statistics.fmean(self.holds_s)
        return self.slots / mean_s if mean_s > 0 else math.inf

    def with_calls(self, calls: int) -> Pace:
        """Return the pace with *calls* at once; an upper bound if the server is not busy."""
        slots = min(calls, self.slots) if self.is_server_busy else calls
        return Pace(slots, self.holds_s, self.wait_share, self.is_server_busy and calls >= self.slots)


@dataclass(frozen=True, slots=True)
class TimeQuote:
    """Seconds; 90 % of the outcomes lie between *low_s* and *high_s*, None if the sample is too small."""

    expected_s: float
    low_s: float | None
    high_s: float | None


def measure_pace(timings: Sequence[DocumentTiming], max_concurrent: int) -> Pace:
    """Return the pace of a sample (at least one document) that was asked with *max_concurrent* calls at once."""
    later = [timing for timing in timings if timing.gap_s is not None]
    timed = later if len(later) >= LEAST_TIMED else list(timings)
    waits = [timing.queue_wait_s for timing in timed if timing.queue_wait_s is not None]
    share = None
    if waits:
        told = [timing for timing in timed if timing.queue_wait_s is not None]
        share = sum(waits) / max(sum(waits) + sum(timing.service_s for timing in told), 1e-9)
    if share is not None and share > BUSY_SHARE:
        held = slots_held_while_waiting(timings)
        if held > 0 and round(held) < max_concurrent:
            slots = max(1, round(held))
            # Our clock measures both, network included; their ratio is the server's own rate.
            holds_s = tuple(timing.service_s * slots / held for timing in timed)
            return Pace(slots, holds_s, share, is_server_busy=True)
    return Pace(max_concurrent, tuple(timing.cycle_s for timing in timed), share, is_server_busy=False)


def slots_held_while_waiting(timings: Sequence[DocumentTiming]) -> float:
    """Return how many documents the server processed, on average, while another one waited; 0.0 if none waited.

    While a document waits, no slot is free, so this is the number of slots that this client gets.
    """
    changes: list[tuple[float, int, int]] = []  # when, change of the waiting, change of the served
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


def quote_time(pace: Pace, documents: int) -> TimeQuote:
    """Return how long *documents* take at *pace*.

    The interval is a bootstrap: RESAMPLES times, a sample is drawn from the sample with replacement, and the documents
    are scheduled into the slots with times from it. The interval is from the 5th to the 95th percentile. The means are
    spread by sqrt(n / (n - 1)) and Student's t over z; without that, an interval from 20 documents is too narrow.
    """
    source = random.Random(SEED)
    holds_s, size = pace.holds_s, len(pace.holds_s)
    mean_s = statistics.fmean(holds_s)
    scheduled = min(documents, SCHEDULED)
    student_over_z = 1 + (Z_90**2 + 1) / (4 * max(1, size - 1))
    spread = student_over_z * math.sqrt(size / max(1, size - 1))
    outcomes = []
    for _ in range(RESAMPLES):
        drawn = source.choices(holds_s, k=size)
        drawn_mean_s = statistics.fmean(drawn)
        in_slots_s = _makespan(source.choices(drawn, k=scheduled), pace.slots)
        outcome_s = in_slots_s + (documents - scheduled) * drawn_mean_s / pace.slots
        factor = max(0.0, mean_s + spread * (drawn_mean_s - mean_s)) / drawn_mean_s if drawn_mean_s > 0 else 1.0
        outcomes.append(outcome_s * factor)
    expected_s = statistics.fmean(outcomes)
    if size < LEAST_FOR_INTERVAL:
        return TimeQuote(expected_s, None, None)
    twentieths = statistics.quantiles(outcomes, n=20)
    return TimeQuote(expected_s, twentieths[0], twentieths[-1])


def _makespan(holds_s: Sequence[float], slots: int) -> float:
    """Return when the last of *holds_s* ends if each begins as soon as one of *slots* is free."""
    free_at_s = [0.0] * slots
    for hold_s in holds_s:
        heapq.heapreplace(free_at_s, free_at_s[0] + hold_s)
    return max(free_at_s)


def mean_tokens(timings: Sequence[DocumentTiming]) -> tuple[float, float] | None:
    """Return the mean tokens of prompt and reply per document, with repair turns; None if the server reports none."""
    told = [
        (timing.prompt_tokens, timing.reply_tokens)
        for timing in timings
        if timing.prompt_tokens is not None and timing.reply_tokens is not None
    ]
    if not told:
        return None
    return statistics.fmean(pair[0] for pair in told), statistics.fmean(pair[1] for pair in told)

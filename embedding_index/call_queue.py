"""The calls of a run: their queue, and what follows a failed call (a retry, a wait, two halves, or the failure of its text).

Not tenacity: a retry here is another call in the queue, and depends on what other calls have met meanwhile.
"""

from __future__ import annotations

import heapq
import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

from embedding_index.inputs import Piece
from error_handler import (
    IndexingError,
    ProviderBusyError,
    ProviderRejectedError,
    ProviderUnavailableError,
    UnusableVectorsError,
)
from utils.retry_utils import RetryPolicy

POLL_S = 0.1  # how soon a waiting thread sees a stop
# If this many texts, each sent alone, are refused before any was accepted, all others would be refused as well.
MOST_LONE_FAILURES = 8
# A call without an answer is halved, to find out whether its texts are the reason, only if at most this many calls are
# left. In an outage, thousands would be halved.
MOST_PROBES = 8
SHORTEST_WAIT_S = 0.05

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Call:
    """One request. *attempt* counts from 1; *failed_at_s* is the ``time.monotonic`` of its first failure, or of the first
    failure of the larger call it is a part of.
    """

    pieces: tuple[Piece, ...]
    attempt: int = 1
    failed_at_s: float | None = None


class CallQueue:
    """A queue with bounded concurrency, delayed retries, and a gate for rate limits.

    The run is over when no call waits and none is taken.
    """

    def __init__(self, calls: Iterable[Call], slots: int, stop: threading.Event) -> None:
        """Allow at most *slots* calls at once. After *stop* no new call starts."""
        self._ready = deque(calls)
        self._later: list[tuple[float, int, Call]] = []
        self._numbers = itertools.count()
        self._slots = slots
        self._in_slot: set[int] = set()
        self._taken = 0
        self._gate_s = 0.0
        self._stop = stop
        self._is_aborted = False
        self._changed = threading.Condition()

    def take(self) -> Call | None:
        """Wait for a call that may start, give it a slot and return it; None when the run is over."""
        with self._changed:
            while not self._is_over():
                now_s = time.monotonic()
                while self._later and self._later[0][0] <= now_s:
                    self._ready.append(heapq.heappop(self._later)[2])
                if self._ready and self._gate_s <= now_s and len(self._in_slot) < self._slots:
                    call = self._ready.popleft()
                    self._in_slot.add(id(call))
                    self._taken += 1
                    return call
                due_s = self._later[0][0] if self._later else now_s
                waits_s = [at_s - now_s for at_s in (due_s, self._gate_s) if at_s > now_s]
                self._changed.wait(min([POLL_S, *waits_s]))
            self._changed.notify_all()
            return None

    def free_slot(self, call: Call) -> None:
        """Release the slot of *call*: another one may start while its answer is read and stored."""
        with self._changed:
            self._in_slot.discard(id(call))
            self._changed.notify()

    def settle(self, call: Call, first: Iterable[Call] = (), later: Iterable[Call] = (), wait_s: float = 0.0) -> None:
        """Finish *call*. The calls *first* are next; the calls *later* follow after *wait_s* seconds and all others."""
        with self._changed:
            self._in_slot.discard(id(call))
            self._taken -= 1
            self._ready.extendleft(reversed(list(first)))
            for each in later:
                heapq.heappush(self._later, (time.monotonic() + wait_s, next(self._numbers), each))
            self._changed.notify_all()

    def close_gate(self, wait_s: float) -> None:
        """Let no call start for at least *wait_s* seconds."""
        with self._changed:
            self._gate_s = max(self._gate_s, time.monotonic() + wait_s)

    def unsettled(self) -> int:
        """Return the number of calls that wait or are taken."""
        with self._changed:
            return len(self._ready) + len(self._later) + self._taken

    def abort(self) -> None:
        """Let no new call start."""
        with self._changed:
            self._is_aborted = True
            self._changed.notify_all()

    def _is_over(self) -> bool:
        return self._is_aborted or self._stop.is_set() or not (self._ready or self._later or self._taken)


@dataclass(frozen=True, slots=True)
class RunOptions:
    """Options of a run. *batch_size*: most inputs of a call. *max_retries*: retries of a failed call, or of one text.

    *patience_s*: longest time without any answer before the run ends. *first_wait_s*: backoff before the first retry;
    see ``RetryPolicy``.
    """

    batch_size: int = 100
    max_retries: int = 3
    patience_s: float = 300.0
    first_wait_s: float = 1.0


class CallRepetition:
    """Decides what follows a failed call of one run. Thread-safe. Each ``after_`` method settles its call in the queue."""

    def __init__(
        self,
        options: RunOptions,
        queue: CallQueue,
        fail: Callable[[str, str], None],
        probe: Callable[[], None] = lambda: None,
    ) -> None:
        """*fail* gets the content hash of each piece that gets no vector, and the problem.

        *probe* asks the provider for another text, and calls ``heard`` if it answers: is it away, or is it the text?
        """
        self._probe = probe
        self._options = options
        self._policy = RetryPolicy(options.max_retries + 1, options.first_wait_s)
        self._queue = queue
        self._fail = fail
        self._lock = threading.Lock()
        self._silent_since_s: float | None = None
        self._heard_of_s = float("-inf")
        self._busy_in_a_row = 0
        self._busy_until_s = float("-inf")
        self._has_vectors = False
        self._lone_failures = 0

    def heard(self, started_s: float) -> None:
        """Note that the provider answered a call, in whatever way. It started at *started_s* (``time.monotonic``)."""
        with self._lock:
            self._silent_since_s = None
            self._busy_in_a_row = 0
            self._heard_of_s = max(self._heard_of_s, started_s)

    def after_busy(self, call: Call, exc: ProviderBusyError) -> None:
        """Let no call start before the time that the provider asks for. It did nothing, so no attempt is used up.

        Raises:
            ProviderBusyError: That would be longer than the patience.
        """
        now_s = time.monotonic()
        with self._lock:
            self._busy_in_a_row += now_s >= self._busy_until_s  # calls that were in flight together count as one
            wait_s = exc.wait_s if exc.wait_s is not None else self._policy.wait_s(self._busy_in_a_row)
            wait_s = max(SHORTEST_WAIT_S, wait_s)
            self._busy_until_s = now_s + wait_s
        if self._is_patience_over(wait_s):
            raise ProviderBusyError(
                f"the embedding provider asks to wait {wait_s:.0f} s, beyond the {self._options.patience_s:.0f} s without an "
                f"answer that a run allows ({exc}); what was embedded is stored: run the same command again later.",
                exc.wait_s,
            ) from exc
        logger.warning("the embedding provider is busy (%s); next call in %.1f s", exc, wait_s)
        self._queue.close_gate(wait_s)
        self._queue.settle(call, first=[call])

    def after_no_answer(self, call: Call, exc: ProviderUnavailableError) -> None:
        """Retry *call*. After the last retry: halve it if other calls are answered, else wait for the provider.

        Raises:
            ProviderUnavailableError: There was no answer at all for longer than the patience.
        """
        failed_at_s = time.monotonic() if call.failed_at_s is None else call.failed_at_s
        wait_s = self._policy.wait_s(call.attempt)
        is_over = self._is_patience_over(wait_s)  # checked each time, because the silence begins with the first failure
        if call.attempt > self._options.max_retries:
            if len(call.pieces) == 1 and self._heard_of_s <= failed_at_s:
                self._probe()
            with self._lock:
                is_provider_there = self._heard_of_s > failed_at_s
            if is_provider_there:
                problem = f"the provider answers for others, and not for it, {call.attempt} times: {exc}"
                return self._halve(call, problem, failed_at_s)
            if is_over:
                raise ProviderUnavailableError(
                    f"the embedding provider gave no usable answer for {self._options.patience_s:.0f} s ({exc}); what was "
                    "embedded is stored: run the same command again when the provider is back."
                ) from exc
            if len(call.pieces) > 1 and self._queue.unsettled() <= MOST_PROBES:
                return self._halve(call, str(exc), failed_at_s)
        logger.warning(
            "a call of %d texts failed at attempt %d (%s), next in %.1f s", len(call.pieces), call.attempt, exc, wait_s
        )
        again = replace(call, attempt=call.attempt + 1, failed_at_s=failed_at_s)
        return self._queue.settle(call, later=[again], wait_s=wait_s)

    def after_refusal(self, call: Call, exc: ProviderRejectedError) -> None:
        """Send *call* in halves; a single text fails.

        Raises:
            ProviderRejectedError: The first texts of the run were all refused, each alone.
        """
        if len(call.pieces) == 1:
            self._count_lone_failure(exc)
        self._halve(call, f"the provider refuses it: {exc}")

    def after_unusable_answer(self, call: Call, exc: UnusableVectorsError) -> None:
        """Send *call* in halves, or a single text again until its retries are used up.

        Raises:
            UnusableVectorsError: No usable vector came since the start of the run.
        """
        is_single = len(call.pieces) == 1
        if is_single and call.attempt <= self._options.max_retries:
            return self._queue.settle(call, first=[replace(call, attempt=call.attempt + 1)])
        if is_single:
            self._count_lone_failure(exc)
        return self._halve(call, f"no usable vector came in {call.attempt} attempts: {exc}")

    def after_check(self, call: Call, problems: Mapping[Piece, str], *, has_good: bool) -> None:
        """Send the pieces with *problems* again, each alone, until their retries are used up.

        Raises:
            UnusableVectorsError: No usable vector came since the start of the run.
        """
        with self._lock:
            self._has_vectors |= has_good
        attempt = call.attempt if len(call.pieces) == 1 else 1
        if attempt <= self._options.max_retries:
            return self._queue.settle(call, first=[Call((piece,), attempt + 1) for piece in problems])
        for piece, problem in problems.items():
            self._count_lone_failure(UnusableVectorsError(f"{problem}; check the model at the provider's address."))
            self._fail(piece.content_hash, f"{problem}, in {attempt} attempts")
        return self._queue.settle(call)

    def _halve(self, call: Call, problem: str, failed_at_s: float | None = None) -> None:
        """Send *call* in halves. With *failed_at_s*, it had no answer: a half without an answer is halved again at once."""
        if len(call.pieces) == 1:
            self._fail(call.pieces[0].content_hash, problem)
            return self._queue.settle(call)
        last = self._options.max_retries + 1
        halves = [
            Call(half, 1 if failed_at_s is None or len(half) == 1 else last, failed_at_s)
            for half in (call.pieces[::2], call.pieces[1::2])
        ]
        logger.warning("a call of %d texts failed; it is sent in halves: %s", len(call.pieces), problem)
        return self._queue.settle(call, first=halves)

    def _count_lone_failure(self, exc: IndexingError) -> None:
        with self._lock:
            self._lone_failures += 1
            is_hopeless = not self._has_vectors and self._lone_failures >= MOST_LONE_FAILURES
        if is_hopeless:
            raise type(exc)(
                f"the provider took none of the first {MOST_LONE_FAILURES} texts, each sent alone, so the others were not "
                f"sent; it says: {exc}"
            ) from exc

    def _is_patience_over(self, wait_s: float) -> bool:
        """Return whether the provider will have been silent for longer than the patience after *wait_s* more seconds."""
        now_s = time.monotonic()
        with self._lock:
            if self._silent_since_s is None:
                self._silent_since_s = now_s
            return now_s + wait_s - self._silent_since_s > self._options.patience_s

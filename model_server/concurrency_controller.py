"""How many model calls may be in flight: a limit that follows the server by what its answers tell.

A server that runs *k* requests at once lets the next one wait, and Ollama says for how long. So an answer that waited
although only *f* requests were in flight when it was sent tells that k < f; one that did not, that k is about f or
more. The controller doubles the limit until answers wait, goes back to what fits, and from then on sends one request
too many every now and then, to see whether there is room. Answer times themselves are no evidence where the server
tells its queue, however much they vary.

Servers that tell no queue are judged by latency: beside that of the first, hardly loaded answers, in windows that are
large enough for the spread of the times.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

START = 2
LOAD_S = 0.5  # an answer that took so long to load its model tells nothing about the queue
NOISE_S, NOISE_SHARE = 0.003, 0.02  # of a wait: what is shorter, or so small a part of the answer's time, is no queue
SPARE, IDLE = 0.35, 0.65  # requests that may wait on average, above or below as many as are on their way
SMOOTH = 0.05  # weight of the newest value in a running mean
PROBE_EVERY_S, PROBE_EVERY_ANSWERS, PROBE_AT_LATEST_S = 3.0, 40, 60.0
PROBES = 3  # that find room in a row: one alone may have come while a slot waited for its next request
FIRST_WINDOW, WINDOW = 8, 32  # answers, where latency has to do
LEAST_RISE = 0.10  # of the latency's logarithm
HOLD_WINDOWS = 4


@dataclass(slots=True)
class Call:
    """One request; *in_flight* counts those under way when it was sent, itself included."""

    sent_at_s: float
    in_flight: int
    is_probe: bool = False


@dataclass(slots=True)
class _Window:
    """Sums over answers to calls that were sent after *since_s*."""

    since_s: float
    answers: int = 0
    in_flight: int = 0
    latency_s: float = 0.0
    wait_s: float = 0.0
    gap_s: float = 0.0
    log_sum: float = 0.0
    log_squares: float = 0.0

    def add(self, call: Call, latency_s: float, wait_s: float, gap_s: float) -> None:
        self.answers += 1
        self.in_flight += call.in_flight
        self.latency_s += latency_s
        self.wait_s += wait_s
        self.gap_s += gap_s
        log = math.log(max(latency_s, 1e-6))
        self.log_sum += log
        self.log_squares += log * log

    @property
    def mean_in_flight(self) -> float:
        return self.in_flight / self.answers

    @property
    def queued(self) -> float:
        """How many requests waited on average, by Little's law."""
        return self.mean_in_flight * self.wait_s / self.latency_s

    @property
    def on_their_way(self) -> float:
        """How many requests were neither in the queue nor in a slot, by the same law."""
        return self.mean_in_flight * self.gap_s / self.latency_s

    @property
    def log_mean(self) -> float:
        return self.log_sum / self.answers

    @property
    def log_variance(self) -> float:
        return max(0.0, self.log_squares / self.answers - self.log_mean**2)


class LimitController:
    """Finds the limit; no clock of its own, no I/O.

    Tell it each request by ``sent`` and its end by ``answered``, ``congested`` or ``lost``; times are seconds of one
    monotonic clock. ``limit`` is from 1 to *most*. With a limit of 1 it still probes, so it never gets stuck.
    """

    def __init__(self, most: int, start: int = START) -> None:
        self.most = most
        self.in_flight = 0
        self.tells_queue: bool | None = None  # None: no answer yet
        self._base = min(start, most)
        self._grows = True  # doubles with each round of answers
        self._ceiling: int | None = None  # a limit that was too high when it was last tried
        self._strikes: list[int] = []
        self._strike_score = 0.0
        self._floor_s = math.inf  # the least wait told
        self._usual_s: float | None = None  # what is told where there is no queue
        self._turnaround_s = 0.0  # from an answer to the next request
        self._ended_at_s: float | None = None
        self._proven = 0  # what growth does not go back below
        self._window = _Window(-math.inf)
        self._baseline = _Window(-math.inf)
        self._fell_from: tuple[int, float] | None = None  # limit and rise of latency before steps down in a row
        self._hold = 0
        self._changed_at_s = -math.inf
        self._busy_until_s = -math.inf
        self._probe_wanted = self._probe_out = False
        self._probed_at_s = -math.inf
        self._answers_since_probe = 0
        self._rooms = self._raises = self._probes = 0
        self._latency_s = 0.0

    @property
    def limit(self) -> int:
        """How many requests may be in flight now; one more than usual while a probe is wanted."""
        return min(self.most, self._base + 1) if self._probe_wanted else self._base

    @property
    def settled(self) -> int:
        """The limit without a probe."""
        return self._base

    def sent(self, now_s: float) -> Call:
        """Note that a request is sent."""
        self.in_flight += 1
        call = Call(now_s, self.in_flight)
        if self._ended_at_s is not None and self.in_flight == self._base:
            self._turnaround_s += SMOOTH * (now_s - self._ended_at_s - self._turnaround_s)
        self._ended_at_s = None
        if self._probe_wanted and self.in_flight > self._base:
            self._probe_wanted, self._probe_out, call.is_probe = False, True, True
        return call

    def lost(self, call: Call) -> None:
        """Note that *call* ended in a way that tells nothing about load: no connection, cancelled, refused."""
        self.in_flight -= 1
        if call.is_probe:
            self._probe_out = False

    def congested(self, call: Call, now_s: float) -> None:
        """Note that *call* ended with 503 or a time-out: half as many, once for all calls of the same moment."""
        self.lost(call)
        if call.is_probe:
            self._judge_probe(has_room=False, now_s=now_s)
        if call.sent_at_s < self._changed_at_s:
            return
        if now_s > self._busy_until_s:  # of one bad moment only the first limit is known to be too high
            self._ceiling = max(2, self._base)
        self._busy_until_s = now_s + PROBE_EVERY_S
        self._set(max(1, self._base // 2), now_s)
        self._grows = True  # back to below the ceiling at once: nothing says that less is right

    def answered(
        self, call: Call, now_s: float, *, queue_wait_s: float | None, load_s: float | None, total_s: float | None
    ) -> None:
        """Note the answer to *call* and what the server told about it."""
        self.in_flight -= 1
        self.tells_queue = queue_wait_s is not None
        latency_s = max(now_s - call.sent_at_s, 1e-6)
        self._ended_at_s = now_s
        if load_s is not None and load_s > LOAD_S:
            if call.is_probe:
                self._probe_out = False
            return
        self._answers_since_probe += 1
        self._latency_s += 0.2 * (latency_s - self._latency_s)
        if queue_wait_s is None:
            self._judge_latency(call, latency_s, now_s)
            return
        self._floor_s = min(self._floor_s, queue_wait_s)
        above_s = queue_wait_s - self._floor_s
        waited = above_s > max(NOISE_S, NOISE_SHARE * (latency_s - above_s))
        if not waited:
            usual_s = queue_wait_s if self._usual_s is None else self._usual_s
            self._usual_s = usual_s + SMOOTH * (queue_wait_s - usual_s)
        wait_s = queue_wait_s - (self._floor_s if self._usual_s is None else self._usual_s)
        if call.is_probe:
            self._probe_out = False
            self._judge_probe(has_room=not waited, now_s=now_s)
            return
        gap_s = (max(0.0, latency_s - total_s) if total_s is not None else 0.0) + (self._usual_s or 0.0)
        gap_s += min(self._turnaround_s, latency_s / 4)
        if call.sent_at_s >= self._window.since_s:
            self._window.add(call, latency_s, wait_s, gap_s)
        if self._grows:
            self._grow(call, waited=waited, now_s=now_s)
        elif self._window.answers >= max(8, self._base):
            self._judge_window(now_s)

    # A server that tells its queue

    def _grow(self, call: Call, *, waited: bool, now_s: float) -> None:
        """One more for each answer that did not wait, which doubles the limit in each round."""
        if waited and call.sent_at_s >= self._changed_at_s:
            self._strikes.append(call.in_flight)
            self._strike_score += 1
            if self._strike_score >= 2:
                self._ceiling = max(2, min(self._strikes), self._proven + 1)
                self._set(self._ceiling - 1, now_s)
                self._proven = 0
            return
        self._strike_score = max(0.0, self._strike_score - 0.25)
        if not self._strike_score:
            self._strikes.clear()
        most = self.most if self._ceiling is None else min(self.most, self._ceiling - 1)
        if self._base >= most:
            self._set(self._base, now_s)
        elif 2 * call.in_flight >= self._base:  # else there was too little work to fill the places
            self._base += 1

    def _judge_window(self, now_s: float) -> None:
        window = self._window
        excess = window.queued - window.on_their_way
        if excess > SPARE and window.mean_in_flight > 1:
            fitting = round(window.mean_in_flight - excess)
            self._ceiling = max(2, self._base)
            self._set(max(1, min(self._base - 1, fitting)), now_s)
        elif excess < -IDLE and window.mean_in_flight > self._base - 0.5 and self._base < self.most:
            self._set(self._base + 1, now_s)
        else:
            self._window = _Window(now_s)

    def probe_in_s(self, now_s: float) -> float | None:
        """Return after how many seconds ``probe`` should be called; None where none is due.

        At some moment between two answers: just after one, slots may be free that are about to be used again.
        """
        if self._grows or self._probe_out or self._probe_wanted or self._base >= self.most or not self.tells_queue:
            return None
        since_s = now_s - self._probed_at_s
        is_due = since_s >= PROBE_EVERY_S and self._answers_since_probe >= PROBE_EVERY_ANSWERS
        if not (is_due or since_s >= PROBE_AT_LATEST_S or self._rooms or self._raises):
            return None
        self._probes += 1
        return self._latency_s * (self._probes * 0.618 % 1.0)

    def probe(self) -> bool:
        """Ask for one request too many, if all places are taken; return whether there is one more place now."""
        self._probe_wanted = not (self._grows or self._probe_out) and self.in_flight == self._base < self.most
        return self._probe_wanted

    def _judge_probe(self, *, has_room: bool, now_s: float) -> None:
        self._probed_at_s, self._answers_since_probe = now_s, 0
        if not has_room:
            self._rooms = self._raises = 0
            return
        self._rooms += 1
        if self._rooms < PROBES:
            return
        self._rooms = 0
        self._raises += 1
        raises = self._raises
        self._ceiling = None
        self._set(min(self.most, self._base + 1), now_s)
        self._raises = raises
        if raises >= 2:
            self._grows, self._proven = True, self._base

    # A server that does not

    def _judge_latency(self, call: Call, latency_s: float, now_s: float) -> None:
        if call.sent_at_s < self._window.since_s or 2 * call.in_flight < self._base:
            return
        window = self._window
        window.add(call, latency_s, 0.0, 0.0)
        if window.answers < (max(FIRST_WINDOW, self._base) if self._grows else max(WINDOW, 2 * self._base)):
            return
        if not self._baseline.answers:
            self._baseline = window
            self._set(min(self.most, 2 * self._base), now_s, grows=True)
            return
        variance = (self._baseline.log_variance + window.log_variance) / 2
        spread = math.sqrt(variance * (1 / window.answers + 1 / self._baseline.answers))
        rise = window.log_mean - self._baseline.log_mean
        if rise > max(LEAST_RISE, 2.5 * spread):
            self._fall(rise, spread, now_s)
            return
        self._fell_from = None
        if self._grows:
            self._pool(window)
            self._set(min(self.most, 2 * self._base), now_s, grows=True)
        elif self._hold:
            self._hold -= 1
            self._window = _Window(now_s)
        else:
            is_below = self._ceiling is not None and self._base + 1 < self._ceiling
            self._set(min(self.most, self._base + 1), now_s)
            self._hold = 0 if is_below else HOLD_WINDOWS

    def _fall(self, rise: float, spread: float, now_s: float) -> None:
        """Fewer, by as much as the latency has surely risen."""
        limit, first_rise = self._fell_from = self._fell_from or (self._base, rise)
        if 2 * self._base <= limit and 1.5 * rise > first_rise:  # fewer did not help: the work has become slower
            self._fell_from, self._baseline = None, self._window
            self._set(limit, now_s)
            return
        self._hold, self._ceiling = 0, self._base
        self._set(max(1, min(self._base - 1, round(self._base * math.exp(spread - rise)))), now_s)

    def _pool(self, window: _Window) -> None:
        self._baseline.answers += window.answers
        self._baseline.log_sum += window.log_sum
        self._baseline.log_squares += window.log_squares

    def _set(self, limit: int, now_s: float, *, grows: bool = False) -> None:
        self._base = limit
        self._grows = grows
        self._changed_at_s = now_s
        self._window = _Window(now_s)
        self._strikes, self._strike_score = [], 0.0
        self._probe_wanted = False
        self._rooms = self._raises = 0

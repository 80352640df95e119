"""A model server and its callers on a simulated clock, for what decides how many calls are in flight.

Discrete events: the server runs ``slots`` requests at once, first come first served; each answer takes what
``service_s`` draws, and says how long it waited unless ``tells`` is False. Callers send as soon as the limit lets them.
"""

from __future__ import annotations

import heapq
import itertools
import math
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from model_server.concurrency import Call, LimitController
from model_server.protocol import ChatReply

Service = Callable[[random.Random], float]


def constant(seconds: float) -> Service:
    """Each answer takes *seconds*."""
    return lambda _: seconds


def lognormal(mean_s: float, sigma: float = 0.8) -> Service:
    """Log-normal times around *mean_s*."""
    return lambda chance: chance.lognormvariate(math.log(mean_s) - sigma * sigma / 2, sigma)


def uniform(least_s: float, most_s: float) -> Service:
    """Times evenly spread between the two."""
    return lambda chance: chance.uniform(least_s, most_s)


@dataclass(slots=True)
class Answer:
    """One answer as its caller saw it."""

    at_s: float
    latency_s: float
    service_s: float


@dataclass
class Simulation:
    """Callers that keep as many requests in flight as *controller* lets them, or *fixed*."""

    slots: int
    service_s: Service
    controller: LimitController | None = None
    fixed: int = 0
    tells: bool = True
    noise_s: float = 0.001  # mean of what the server adds to a wait, and of what the way there and back takes each
    documents: float = math.inf
    seed: int = 1
    cold_load_s: float = 0.0
    shares_processor: float = math.inf  # requests that the processor runs at full speed; more slow each other down
    now_s: float = 0.0
    answers: list[Answer] = field(default_factory=list)
    limits: list[tuple[float, int]] = field(default_factory=list)
    busy_between: tuple[float, float] = (math.inf, math.inf)  # each request gets a 503
    away_between: tuple[float, float] = (math.inf, math.inf)  # no connection
    rejected: int = 0

    def __post_init__(self) -> None:
        self._chance = random.Random(self.seed)
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._queue: deque[tuple[Call | None, float, float]] = deque()
        self._running = 0
        self._in_flight = 0

    def run(self, until_s: float) -> Simulation:
        """Go on to *until_s*."""
        self._fill()
        while self._events and self._events[0][0] <= until_s:
            self.now_s, _, happen = heapq.heappop(self._events)
            happen()
        self.now_s = until_s
        return self

    def rate(self, from_s: float, to_s: float) -> float:
        """Answers per second between the two."""
        return sum(from_s <= answer.at_s < to_s for answer in self.answers) / (to_s - from_s)

    def busy(self, from_s: float, to_s: float) -> float:
        """Slots in use, on average between the two: throughput without the luck of the draw."""
        return sum(answer.service_s for answer in self.answers if from_s <= answer.at_s < to_s) / (to_s - from_s)

    def p95_s(self, from_s: float, to_s: float) -> float:
        """The 95th percentile of latency between the two."""
        found = sorted(answer.latency_s for answer in self.answers if from_s <= answer.at_s < to_s)
        return found[math.ceil(0.95 * len(found)) - 1]

    def limit_at(self, at_s: float) -> int:
        """The limit at that time."""
        return [limit for changed_s, limit in self.limits if changed_s <= at_s][-1]

    def _at(self, after_s: float, happen: Callable[[], None]) -> None:
        heapq.heappush(self._events, (self.now_s + after_s, next(self._order), happen))

    def _noise(self) -> float:
        return self._chance.expovariate(1 / self.noise_s) if self.noise_s else 0.0

    def _fill(self) -> None:
        while self.documents > 0 and self._in_flight < (self.controller.limit if self.controller else self.fixed):
            self.documents -= 1
            self._in_flight += 1
            call = Call(self.now_s, self._in_flight) if self.controller else None
            sent_s = self.now_s
            self._at(self._noise(), lambda call=call, sent_s=sent_s: self._arrive(call, sent_s))
        if self.controller and (not self.limits or self.limits[-1][1] != self.controller.limit):
            self.limits.append((self.now_s, self.controller.limit))

    def _arrive(self, call: Call | None, sent_s: float) -> None:
        if self.busy_between[0] <= self.now_s < self.busy_between[1]:
            self._at(0.001, lambda: self._end(call, sent_s, "busy"))
            return
        if self.away_between[0] <= self.now_s < self.away_between[1]:
            self._at(0.001, lambda: self._end(call, sent_s, "away"))
            return
        self._queue.append((call, sent_s, self.now_s))
        self._dispatch()

    def _dispatch(self) -> None:
        while self._queue and self._running < self.slots:
            call, sent_s, arrived_s = self._queue.popleft()
            self._running += 1
            wait_s = self.now_s - arrived_s + self._noise()
            load_s = max(0.0, self.cold_load_s - arrived_s)
            slower = max(1.0, self._running / self.shares_processor)
            takes_s = self.service_s(self._chance) * slower + load_s
            self._at(takes_s, lambda c=call, s=sent_s, w=wait_s, t=takes_s, o=load_s: self._done(c, s, w, t, o))

    def _done(self, call: Call | None, sent_s: float, wait_s: float, takes_s: float, load_s: float) -> None:
        self._running -= 1
        self._dispatch()
        self._at(self._noise(), lambda: self._end(call, sent_s, "answered", wait_s, takes_s, load_s))

    def _end(
        self,
        call: Call | None,
        sent_s: float,
        how: str,
        wait_s: float = 0.0,
        takes_s: float = 0.0,
        load_s: float = 0.0,
    ) -> None:
        self._in_flight -= 1
        if how == "answered":
            self.answers.append(Answer(self.now_s, self.now_s - sent_s, takes_s - load_s))
        else:
            self.rejected += 1
            self.documents += 1
        if self.controller is not None and call is not None:
            if how == "answered":
                times = (wait_s, load_s, (), wait_s + takes_s) if self.tells else ()
                self.controller.answered(call, self.now_s, ChatReply("{}", None, None, *times))
            elif how == "busy":
                self.controller.congested(call, self.now_s)
        self._at(0.5 if how != "answered" else self._noise() / 2, self._fill)

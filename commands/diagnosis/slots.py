"""Measures how many calls a model server really runs at once, for ``concurrency_check`` and ``cli.py doctor``.

Sends 1, 2, 4, ... identical small requests at the same moment and looks who had to wait. Ollama tells
it: what is left of its total time after loading, reading the prompt and writing the answer was spent
in the queue. Where a server does not tell, a call that took half as long again as the fastest of its
round counts as one that waited. The first wave of a round that is too large for the server is its slots.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from async_llm_wrapper import AsyncLLMClient, open_session
from config import Settings
from error_handler import LLMReplyError, LLMUnavailableError
from model_server.protocol import chat_target
from model_server.warm_up import reuse_loaded_window
from model_server.window import choose_window

WAIT_SHARE = 0.5  # of the time one call takes alone; waiting for a slot takes about all of it
NEARLY = 0.9
NANOSECONDS = 1e9

MESSAGES = [
    {"role": "system", "content": "Answer with one JSON object."},
    {"role": "user", "content": "Write the numbers from 1 to 10, separated by spaces."},
]
SCHEMA_JSON = json.dumps(
    {
        "type": "object",
        "properties": {"numbers": {"type": "string", "maxLength": 40}},
        "required": ["numbers"],
        "additionalProperties": False,
    }
).encode()


@dataclass(frozen=True, slots=True)
class Call:
    """One request: how long it took, and how long of that it waited in the server, None where that is unknown."""

    latency_s: float
    queue_wait_s: float | None


@dataclass(frozen=True, slots=True)
class Round:
    """Requests that were sent at the same moment."""

    duration_s: float
    calls: tuple[Call, ...]

    @property
    def waited(self) -> int:
        """How many of the calls waited for a slot."""
        fastest_s = min(call.latency_s for call in self.calls)
        if self.is_told:
            service_s = min(call.latency_s - (call.queue_wait_s or 0.0) for call in self.calls)
            return sum((call.queue_wait_s or 0.0) > WAIT_SHARE * service_s for call in self.calls)
        return sum(call.latency_s > (1 + WAIT_SHARE) * fastest_s for call in self.calls)

    @property
    def is_told(self) -> bool:
        """Whether the server told the wait of every call."""
        return all(call.queue_wait_s is not None for call in self.calls)


@dataclass(frozen=True, slots=True)
class Level:
    """The rounds with the same number of requests at once."""

    at_once: int
    rounds: tuple[Round, ...]

    @property
    def requests_per_s(self) -> float:
        """Answers per second, of the median round."""
        return self.at_once / statistics.median(one.duration_s for one in self.rounds)

    @property
    def latency_s(self) -> float:
        """Seconds from request to answer, of the median call."""
        return statistics.median(call.latency_s for one in self.rounds for call in one.calls)

    @property
    def queue_waits_s(self) -> list[float]:
        """The waits that the server told; empty where it tells none."""
        return [call.queue_wait_s for one in self.rounds for call in one.calls if call.queue_wait_s is not None]

    @property
    def waited(self) -> int:
        """How many calls of a round waited for a slot, in the median round."""
        return statistics.median_low(one.waited for one in self.rounds)


@dataclass(frozen=True, slots=True)
class Measurement:
    """What was measured; *stopped* says why the last levels are missing."""

    model: str
    server_url: str
    levels: tuple[Level, ...]
    stopped: str | None
    num_ctx: int | None = None  # the window of all calls, tokens; None where the server sets it

    @property
    def slots(self) -> int:
        """How many calls the server runs at once; at least as many where nobody waited."""
        return self.levels[-1].at_once - self.levels[-1].waited

    @property
    def is_minimum(self) -> bool:
        """Whether the server may run more than *slots*: nobody waited."""
        return self.levels[-1].waited == 0

    @property
    def enough(self) -> int:
        """The fewest requests at once that give nearly as many answers per second as any number does."""
        most = max(level.requests_per_s for level in self.levels)
        return next(level.at_once for level in self.levels if level.requests_per_s >= NEARLY * most)


class TimingClient(AsyncLLMClient):
    """Notes the queue wait of each answer; one call at a time per client."""

    queue_wait_s: float | None = None

    async def _request(self, *arguments: Any, **options: Any) -> tuple[int, bytes]:
        status, body = await super()._request(*arguments, **options)
        self.queue_wait_s = parse_queue_wait(body)
        return status, body


def parse_queue_wait(body: bytes) -> float | None:
    """Return the seconds that an answer of Ollama waited for a slot; None where the body does not tell."""
    try:
        fields = json.loads(body)
        total = fields["total_duration"]
        spent = (fields.get(name, 0) for name in ("load_duration", "prompt_eval_duration", "eval_duration"))
        return max(0.0, float(total - sum(spent)) / NANOSECONDS)
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def without_second_attempts(settings: Settings) -> Settings:
    """Return *settings* with nothing in them that would hide what the server does."""
    return settings.model_copy(update={"llm_max_attempts": 1, "outage_limit_s": 1.0})


async def measure(
    settings: Settings, at_most: int, rounds: int, tell: Callable[[str], None], *, until_one_waits: bool = False
) -> Measurement:
    """Measure with 1, 2, 4, ... up to *at_most* requests at once; *tell* hears what is going on.

    A level that the server cannot serve (busy, time-out, connection lost) ends the measurement; with
    *until_one_waits*, so does the first level at which a call waits for a slot. *settings* are those of
    ``without_second_attempts``. The window is the one they name, else that of the loaded model, else the one of a run
    that has no documents.

    Raises:
        LLMError: The server is not there, does not load the model, or does not even serve one request at a time.
        ConfigurationError: The model is not named, or the server does not have it.
    """
    async with open_session(at_most) as session, contextlib.AsyncExitStack() as stack:
        target = chat_target(settings, settings.model or "")
        clients = [TimingClient(settings, target, session) for _ in range(at_most)]
        for client in clients:
            stack.push_async_callback(client.breaker.close)
        target = await clients[0].prepare(settings)
        # What is loaded is measured as it is (from 4096 tokens on, as the service takes it): with another window, the server
        # would load the model again, for us and then back for whoever uses it.
        target = await clients[0].warm_up(
            choose_window([], target.context_limit, settings.ollama_num_ctx), tell, reuse_loaded_window
        )
        for client in clients:
            client.target = target
        levels: list[Level] = []
        stopped = None
        tell(f"Warming up {target.model} at {target.server_url} ...")
        await _call(clients[0])
        for at_once in levels_up_to(at_most):
            tell(f"{at_once} at once, {rounds} rounds ...")
            try:
                done = [await _round(clients[:at_once]) for _ in range(rounds)]
            except LLMUnavailableError as exc:
                if not levels:
                    raise
                stopped = f"with {at_once} at once: {exc}"
                break
            levels.append(Level(at_once, tuple(done)))
            if until_one_waits and levels[-1].waited:
                break
    num_ctx = None if target.protocol == "openai_chat" else target.num_ctx
    return Measurement(target.model, target.server_url, tuple(levels), stopped, num_ctx)


def levels_up_to(at_most: int) -> list[int]:
    """Return 1, 2, 4, ... and, last, *at_most* itself."""
    powers = [2**exponent for exponent in range(at_most.bit_length()) if 2**exponent < at_most]
    return [*powers, at_most]


async def _round(clients: list[TimingClient]) -> Round:
    start = time.monotonic()
    calls = await asyncio.gather(*(_call(client) for client in clients))
    return Round(time.monotonic() - start, tuple(calls))


async def _call(client: TimingClient) -> Call:
    start = time.monotonic()
    with contextlib.suppress(LLMReplyError):  # an answer that is no use still took its time
        await client.chat(MESSAGES, SCHEMA_JSON)
    return Call(time.monotonic() - start, client.queue_wait_s)

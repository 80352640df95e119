"""Measures how many calls a model server runs at once, for ``concurrency_check`` and ``cli.py doctor``.

It sends 1, 2, 4, ... identical small requests at the same moment and counts those that waited. Ollama reports how long
each request was queued. If a server does not, a call waited if it took 1.5 times as long as the fastest of its round.
The calls of a round that did not wait are the slots.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

from async_llm_wrapper import AsyncLLMClient, drive, open_session
from config import Settings
from error_handler import LLMReplyError, LLMUnavailableError
from model_server.chat import chat_flow
from model_server.models import chat_target
from model_server.protocol import ServerRequest, json_object, queue_wait_s
from model_server.window import choose_window

WAIT_SHARE = 0.5  # of the time that one call takes alone; a call that waits for a slot waits about that long
NEARLY = 0.9

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
    """One request: its latency, and the time in the queue of the server, None if unknown."""

    latency_s: float
    queue_wait_s: float | None


Round = tuple[Call, ...]  # sent at the same moment


@dataclass(frozen=True, slots=True)
class Level:
    """The rounds with *at_once* requests each."""

    at_once: int
    rounds: tuple[Round, ...]

    @property
    def requests_per_s(self) -> float:
        """Answers per second, of the median round."""
        return self.at_once / statistics.median(max(call.latency_s for call in calls) for calls in self.rounds)

    @property
    def latency_s(self) -> float:
        """Seconds from request to answer, of the median call."""
        return statistics.median(call.latency_s for calls in self.rounds for call in calls)

    @property
    def queue_waits_s(self) -> list[float]:
        """The waits that the server reported; empty if it reports none."""
        return [call.queue_wait_s for calls in self.rounds for call in calls if call.queue_wait_s is not None]

    @property
    def waited(self) -> int:
        """The number of calls that waited for a slot in the median round."""
        return statistics.median_low(calls_that_waited(calls) for calls in self.rounds)


def calls_that_waited(calls: Round) -> int:
    """Return how many of *calls* waited for a slot."""
    fastest_s = min(call.latency_s for call in calls)
    reported_s = [call.queue_wait_s for call in calls if call.queue_wait_s is not None]
    waits_s = reported_s if len(reported_s) == len(calls) else [call.latency_s - fastest_s for call in calls]
    service_s = min(call.latency_s - wait_s for call, wait_s in zip(calls, waits_s, strict=True))
    return sum(wait_s > WAIT_SHARE * service_s for wait_s in waits_s)


@dataclass(frozen=True, slots=True)
class Measurement:
    """The measured levels; *stopped* is the reason why the last ones are missing."""

    model: str
    server_url: str
    levels: tuple[Level, ...]
    stopped: str | None
    num_ctx: int | None = None  # the window of all calls, tokens; None if the server sets it

    @property
    def slots(self) -> int:
        """The number of calls that the server runs at once; a lower bound if no call waited."""
        return self.levels[-1].at_once - self.levels[-1].waited

    @property
    def is_minimum(self) -> bool:
        """True if the server may run more than *slots*, because no call waited."""
        return self.levels[-1].waited == 0

    @property
    def queue_wait_from(self) -> str:
        """``server`` if it reports how long calls wait for a slot, ``latency`` if that shows it."""
        return "server" if self.levels[-1].queue_waits_s else "latency"

    @property
    def enough(self) -> int:
        """The fewest requests at once with nearly the highest throughput."""
        most = max(level.requests_per_s for level in self.levels)
        return next(level.at_once for level in self.levels if level.requests_per_s >= NEARLY * most)


def without_second_attempts(settings: Settings) -> Settings:
    """Return *settings* without retries, which would hide what the server does."""
    return settings.model_copy(update={"llm_max_attempts": 1, "outage_limit_s": 1.0})


async def measure(
    settings: Settings, at_most: int, rounds: int, tell: Callable[[str], None], *, until_one_waits: bool = False
) -> Measurement:
    """Measure with 1, 2, 4, ... up to *at_most* requests at once; *tell* gets the progress, one sentence each.

    The measurement ends at a level that the server cannot serve (busy, timeout, connection lost) and, with
    *until_one_waits*, at the first level at which a call waits. *settings* come from ``without_second_attempts``. The
    window is the one they set, otherwise that of the loaded model, otherwise the default of a run without documents.

    Raises:
        LLMError: The server is away, does not load the model, or cannot serve even one request at a time.
        ConfigurationError: No model is set, or the server does not have it.
    """
    async with open_session(at_most) as session, contextlib.AsyncExitStack() as stack:
        client = AsyncLLMClient(settings, chat_target(settings, settings.model or ""), session)
        stack.push_async_callback(client.breaker.close)
        target = await client.prepare(settings)
        # Another window would make the server reload the model, and again for the next client.
        choice = choose_window(None, target.context_limit, settings.ollama_num_ctx)
        target = await client.warm_up(choice, tell)
        tell(f"Warming up {target.model} at {target.address} ...")
        await _call(client, settings.llm_timeout_s)
        levels: list[Level] = []
        stopped = None
        for at_once in levels_up_to(at_most):
            done = []
            try:
                for number in range(1, rounds + 1):
                    tell(f"{at_once} at once, round {number} of {rounds} ...")
                    done.append(await _round(client, settings.llm_timeout_s, at_once))
            except LLMUnavailableError as exc:
                if not levels:
                    raise
                stopped = f"with {at_once} at once: {exc}"
                break
            levels.append(Level(at_once, tuple(done)))
            if until_one_waits and levels[-1].waited:
                break
    num_ctx = None if target.protocol == "openai_chat" else target.num_ctx
    return Measurement(target.model, target.address, tuple(levels), stopped, num_ctx)


def levels_up_to(at_most: int) -> list[int]:
    """Return 1, 2, 4, ... and, last, *at_most* itself."""
    powers = [2**exponent for exponent in range(at_most.bit_length()) if 2**exponent < at_most]
    return [*powers, at_most]


async def _round(client: AsyncLLMClient, timeout_s: float, at_once: int) -> Round:
    return tuple(await asyncio.gather(*(_call(client, timeout_s) for _ in range(at_once))))


async def _call(client: AsyncLLMClient, timeout_s: float) -> Call:
    """Time one request. An unusable answer takes time too, so it counts."""
    queued_s: float | None = None
    start_s = time.monotonic()

    async def send(request: ServerRequest) -> tuple[int, bytes]:
        nonlocal start_s, queued_s
        start_s = time.monotonic()  # a request that is sent again because of what the first one taught
        status, body = await client.send(request)
        queued_s = queue_wait_s(json_object(body)) if status == 200 else None
        return status, body

    with contextlib.suppress(LLMReplyError):
        await drive(chat_flow(client, MESSAGES, SCHEMA_JSON, 0, timeout_s), send)
    return Call(time.monotonic() - start_s, queued_s)

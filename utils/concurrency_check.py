"""Measures how many calls the model server really runs at once.

Sends 1, 2, 4, ... identical small requests at the same moment and looks who had to wait. Ollama tells
it: what is left of its total time after loading, reading the prompt and writing the answer was spent
in the queue. Where a server does not tell, a call that took half as long again as the fastest of its
round counts as one that waited. The first wave of a round that is too large for the server is its slots.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:  # started as a file: the modules beside it must not hide packages of the same name
    _folder = Path(__file__).resolve().parent
    sys.path[:] = [str(_folder.parent), *(entry for entry in sys.path if Path(entry).resolve() != _folder)]

import argparse
import asyncio
import contextlib
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from async_llm_wrapper import AsyncLLMClient, open_session
from config import Settings, load_settings
from error_handler import ExitCode, LLMReplyError, LLMUnavailableError
from logger import configure_logging
from utils.exit_boundary import exit_code_of
from utils.ollama_protocol import chat_target

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


def main(argv: Sequence[str] | None = None) -> int:
    """Run the measurement with the flags in *argv* (None: of the process) and return its exit code."""
    arguments = _create_parser().parse_args(argv)

    def run() -> int:
        configure_logging("DEBUG" if arguments.verbose else "ERROR")
        return asyncio.run(_check(arguments, _settings(arguments)))

    return exit_code_of(run, "concurrency_check.py", verbose=arguments.verbose)


def _create_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="concurrency_check.py",
        description="Measure how many calls the model server really runs at once, to choose --max-concurrent by.",
        epilog="Exit codes: 0 measured, 2 usage, configuration or model, 3 the server is not reachable.",
        allow_abbrev=False,
    )
    parser.add_argument("--max", type=_positive, default=16, metavar="K", help="most requests at once (16)")
    parser.add_argument("--rounds", type=_positive, default=3, metavar="N", help="rounds with each number (3)")
    parser.add_argument("--json", action="store_true", help="print the measurement as JSON")
    parser.add_argument("--model", help="model to ask (OLLAMA_MODEL, or LLM_MODEL with LLM_API_URL)")
    parser.add_argument("--ollama-endpoint", help="where Ollama is (OLLAMA_ENDPOINT; http://localhost:11434)")
    parser.add_argument("--verbose", action="store_true", help="log lines, and a traceback with an error")
    return parser


def _settings(arguments: argparse.Namespace) -> Settings:
    """Return the settings, with nothing in them that would hide what the server does: no second attempts."""
    settings = load_settings(ollama_endpoint=arguments.ollama_endpoint)
    changes: dict[str, Any] = {"llm_max_attempts": 1, "outage_limit_s": 1.0}
    if arguments.model:
        changes["llm_model" if settings.llm_api_url else "ollama_model"] = arguments.model
    return settings.model_copy(update=changes)


async def _check(arguments: argparse.Namespace, settings: Settings) -> int:
    talk = Console(stderr=True)
    measurement = await measure(settings, arguments.max, arguments.rounds, talk)
    if arguments.json:
        print(json.dumps(as_json(measurement), indent=2))
    else:
        _print_table(measurement, Console())
    return ExitCode.DONE


async def measure(settings: Settings, at_most: int, rounds: int, talk: Console) -> Measurement:
    """Measure with 1, 2, 4, ... up to *at_most* requests at once; say on *talk* what is going on.

    A level that the server cannot serve (busy, time-out, connection lost) ends the measurement.

    Raises:
        LLMError: The server is not there, or does not even serve one request at a time.
        ConfigurationError: The model is not named, or the server does not have it.
    """
    async with open_session(at_most) as session, contextlib.AsyncExitStack() as stack:
        target = chat_target(settings, settings.model or "")
        clients = [TimingClient(settings, target, session) for _ in range(at_most)]
        for client in clients:
            stack.push_async_callback(client.breaker.close)
        target = await clients[0].prepare(settings)
        for client in clients:
            client.target = target
        levels: list[Level] = []
        stopped = None
        with talk.status(f"Warming up {target.model} at {target.server_url} ...") as status:
            await _call(clients[0])
            for at_once in levels_up_to(at_most):
                status.update(f"{at_once} at once, {rounds} rounds ...")
                try:
                    done = [await _round(clients[:at_once]) for _ in range(rounds)]
                except LLMUnavailableError as exc:
                    if not levels:
                        raise
                    stopped = f"with {at_once} at once: {exc}"
                    break
                levels.append(Level(at_once, tuple(done)))
    return Measurement(target.model, target.server_url, tuple(levels), stopped)


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


def as_json(measurement: Measurement) -> dict[str, Any]:
    """Return *measurement* as plain values; waits are null where the server does not tell them."""
    return {
        "model": measurement.model,
        "server_url": measurement.server_url,
        "slots": measurement.slots,
        "slots_is_minimum": measurement.is_minimum,
        "queue_wait_from": "server" if measurement.levels[-1].queue_waits_s else "latency",
        "enough_at_once": measurement.enough,
        "stopped": measurement.stopped,
        "levels": [
            {
                "at_once": level.at_once,
                "requests_per_s": round(level.requests_per_s, 3),
                "latency_s": round(level.latency_s, 4),
                "queue_wait_s_median": _rounded(statistics.median, level.queue_waits_s),
                "queue_wait_s_max": _rounded(max, level.queue_waits_s),
                "waited": level.waited,
            }
            for level in measurement.levels
        ],
    }


def _rounded(reduce: Any, values: list[float]) -> float | None:
    return round(reduce(values), 4) if values else None


def _print_table(measurement: Measurement, console: Console) -> None:
    table = Table(title=f"{measurement.model} at {measurement.server_url}", title_justify="left")
    for heading in ("at once", "answers/s", "s per answer", "s in queue, median", "s in queue, most", "waited"):
        table.add_column(heading, justify="right")
    for level in measurement.levels:
        waits = level.queue_waits_s
        table.add_row(
            str(level.at_once),
            f"{level.requests_per_s:.2f}",
            f"{level.latency_s:.2f}",
            f"{statistics.median(waits):.2f}" if waits else "not told",
            f"{max(waits):.2f}" if waits else "not told",
            f"{level.waited} of {level.at_once}",
        )
    console.print(table)
    if measurement.stopped:
        console.print(f"Stopped {measurement.stopped}", soft_wrap=True, markup=False)
    slots, enough = measurement.slots, measurement.enough
    if not measurement.levels[-1].queue_waits_s:
        console.print("The server does not tell its queue; who waited is judged by latency.", soft_wrap=True)
    if measurement.is_minimum:
        sentence = f"The server runs at least {slots} at once: nobody waited. --max {2 * slots} looks further."
    else:
        sentence = (
            f"The server runs {slots} at once; --max-concurrent {slots + 1} keeps one call ready for a free slot."
        )
    console.print(sentence, soft_wrap=True)
    if 2 * enough <= slots:
        console.print(f"More than {enough} at once gives hardly more answers per second.", soft_wrap=True)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be 1 or more")
    return value


if __name__ == "__main__":
    sys.exit(main())

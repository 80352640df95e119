"""A load test for a running service: sends many conversations concurrently and prints statuses and latencies.

    python tests/performance_test.py --url http://127.0.0.1:8000 --requests 1000 --concurrency 100

All conversations differ, so that no answer comes from a cache. A second process requests /health twenty times a second,
like a load balancer, without waiting for the previous answer, so that a stalled service is noticed. If load, service and
model share a few cores, they slow each other down.

Requests are not retried: a 503 is an answer. Exit code 0 if every request got 200, or 429 or 503 with Retry-After; 1 after
anything else; 3 if no service answers.

This is a script; pytest collects no tests from it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import multiprocessing
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path

import aiohttp
from rich.console import Console
from rich.table import Table

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from error_handler import ConfigurationError, ExitCode
from service.client.protocol import ServiceTarget, service_target

HEALTH_EVERY_S = 0.05
HEALTH_TIMEOUT_S = 10.0
ACCEPTED = frozenset({200, 429, 503})
SUBJECTS = ("parcel", "invoice", "password", "refund", "router", "booking", "card", "contract")


@dataclass
class Load:
    """The results; latencies in seconds by status, with "no answer" for lost connections and timeouts."""

    duration_s: float = 0.0
    latencies_s: dict[str, list[float]] = field(default_factory=dict)
    without_retry_after: Counter[str] = field(default_factory=Counter)
    no_answer: Counter[str] = field(default_factory=Counter)
    health_s: list[float] = field(default_factory=list)
    health_failed: int = 0

    @property
    def is_clean(self) -> bool:
        """True if every answer is one that a busy service may give."""
        statuses = {status for status in self.latencies_s if status.isdecimal()}
        only_accepted = {int(status) for status in statuses} <= ACCEPTED
        return only_accepted and not self.no_answer and not self.without_retry_after and not self.health_failed


def conversation(number: int, padding: int) -> bytes:
    """Return the request body of *number*, unlike any other, with *padding* more characters of text."""
    subject = SUBJECTS[number % len(SUBJECTS)]
    text = f"Hello, this is customer {number}: my {subject} is not as it should be. " + "I wrote before. " * (
        padding // 16
    )
    messages = [
        {"sender": "customer", "text": text},
        {"sender": "agent", "text": "I am sorry to hear that. Which number has it?"},
        {"sender": "customer", "text": f"It is {number * 7919 % 1_000_003}, and I am still waiting."},
    ]
    return json.dumps({"conversation_number": f"load-{number}", "messages": messages}).encode()


async def run_load(target: ServiceTarget, arguments: argparse.Namespace) -> Load:
    """Send the requests at the concurrency in *arguments*; connections are kept open."""
    load = Load()
    numbers = iter(range(arguments.requests))
    timeout = aiohttp.ClientTimeout(total=arguments.timeout)
    connector = aiohttp.TCPConnector(limit=arguments.concurrency)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout, trust_env=False) as session:

        async def send_in_turn() -> None:
            for number in numbers:
                await send(session, number)

        async def send(session: aiohttp.ClientSession, number: int) -> None:
            headers = target.headers | {"Content-Type": "application/json"}
            body = conversation(number, arguments.padding)
            started = time.monotonic()
            try:
                async with session.post(f"{target.url}/classify", data=body, headers=headers) as response:
                    await response.read()
                    status = str(response.status)
                    if response.status in (429, 503) and "Retry-After" not in response.headers:
                        load.without_retry_after[status] += 1
            except (TimeoutError, aiohttp.ClientError, ConnectionError) as exc:
                status = "no answer"
                load.no_answer[type(exc).__name__] += 1
            load.latencies_s.setdefault(status, []).append(time.monotonic() - started)

        started = time.monotonic()
        await asyncio.gather(*(send_in_turn() for _ in range(arguments.concurrency)))
        load.duration_s = time.monotonic() - started
    return load


async def _watch(url: str, pipe: Connection) -> None:
    latencies: list[float] = []
    failed = 0
    timeout = aiohttp.ClientTimeout(total=HEALTH_TIMEOUT_S)
    async with aiohttp.ClientSession(timeout=timeout, trust_env=False) as session:

        async def ask() -> None:
            nonlocal failed
            started = time.monotonic()
            try:
                async with session.get(f"{url}/health") as response:
                    await response.read()
                    failed += response.status != 200
            except (TimeoutError, aiohttp.ClientError, ConnectionError):
                failed += 1
            latencies.append(time.monotonic() - started)

        await ask()
        pipe.send(failed)
        async with asyncio.TaskGroup() as asked:
            while not pipe.poll():
                asked.create_task(ask())
                await asyncio.sleep(HEALTH_EVERY_S)
    pipe.send((latencies, failed))


def watch_health(url: str, pipe: Connection) -> None:
    """Request /health until *pipe* has data; report the first result at once, and latencies and failures at the end."""
    asyncio.run(_watch(url, pipe))


def measure(target: ServiceTarget, arguments: argparse.Namespace) -> Load:
    """Return the results of the load and of the /health requests during it.

    Raises:
        ConfigurationError: /health does not answer; no load was sent.
    """
    here, there = multiprocessing.Pipe()
    # Its own process: this one's event loop is busy with the load.
    watcher = multiprocessing.get_context("spawn").Process(target=watch_health, args=(target.url, there), daemon=True)
    watcher.start()
    if here.recv():
        here.send("stop")
        raise ConfigurationError(f"No service answers at {target.url}/health; start it (make serve) or correct --url.")
    load = asyncio.run(run_load(target, arguments))
    here.send("stop")
    load.health_s, load.health_failed = here.recv()
    watcher.join()
    return load


def percentile(values: Sequence[float], share: float) -> float:
    """Return the nearest-rank percentile of *values*, *share* from 0 to 1."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def print_table(load: Load, arguments: argparse.Namespace, console: Console) -> None:
    """Print one row per status and one for /health, then the problems."""
    count = sum(map(len, load.latencies_s.values()))
    table = Table(
        title=f"{count} requests, {arguments.concurrency} at once, {load.duration_s:.1f} s", title_justify="left"
    )
    for heading in ("status", "answers", "per second", "p50 ms", "p95 ms", "p99 ms", "max ms"):
        table.add_column(heading, justify="left" if heading == "status" else "right")
    rows = [(status, values) for status, values in sorted(load.latencies_s.items())]
    for status, values in [*rows, ("/health meanwhile", load.health_s)]:
        shares = (percentile(values, share) for share in (0.5, 0.95, 0.99, 1.0))
        rate = f"{len(values) / load.duration_s:.1f}"
        table.add_row(status, str(len(values)), rate, *(f"{1000 * value:.0f}" for value in shares))
    console.print(table)
    for status in ("429", "503"):
        if status in load.latencies_s:
            without = load.without_retry_after[status]
            with_header = len(load.latencies_s[status]) - without
            console.print(f"{status}: {with_header} with Retry-After, {without} without")
    for reason, times in load.no_answer.items():
        console.print(f"no answer: {times} x {reason}")
    if load.health_failed:
        console.print(f"/health failed {load.health_failed} times")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command in *argv* (None: of the process) and return its exit code."""
    parser = argparse.ArgumentParser(prog="performance_test.py", description="Load test for a running service.")
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="address of the service (%(default)s)")
    parser.add_argument("--requests", type=int, default=1000, metavar="N", help="number of requests (%(default)s)")
    parser.add_argument("--concurrency", type=int, default=100, metavar="N", help="concurrent requests (%(default)s)")
    parser.add_argument(
        "--timeout", type=float, default=120.0, metavar="S", help="timeout of one request, seconds (%(default)g)"
    )
    parser.add_argument(
        "--padding", type=int, default=0, metavar="N", help="additional characters per request (%(default)s)"
    )
    parser.add_argument("--api-key-file", type=Path, metavar="FILE", help="file that holds the API key")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write all measurements as JSON")
    arguments = parser.parse_args(argv)
    if arguments.requests < 1 or arguments.concurrency < 1:
        parser.error("--requests and --concurrency must be 1 or more")
    try:
        target = service_target(arguments.url, None, arguments.api_key_file)
    except ConfigurationError as exc:
        parser.error(str(exc))
    try:
        load = measure(target, arguments)
    except ConfigurationError as exc:
        print(f"performance_test.py: {exc}", file=sys.stderr)
        return ExitCode.UNREACHABLE
    print_table(load, arguments, Console(width=None if sys.stdout.isatty() else 110))
    if arguments.output:
        arguments.output.write_text(json.dumps(asdict(load)))
    return ExitCode.DONE if load.is_clean else ExitCode.INCOMPLETE


if __name__ == "__main__":
    sys.exit(main())

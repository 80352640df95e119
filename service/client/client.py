"""A client of the REST service (aiohttp): concurrency limit, retries, Retry-After; and its command-line flags."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import time
from array import array
from collections.abc import AsyncIterator, Callable, Coroutine
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import aiohttp

from error_handler import ExitCode, RequestError, RunInterruptedError, TriadError
from logger import configure_logging
from network.outgoing import aiohttp_session, problem_of, route_to
from service.client import protocol
from service.client.protocol import ServiceRequest, ServiceTarget, service_target
from utils.process import exit_code_of, number_between
from utils.retry_utils import RetryPolicy

CONNECT_TIMEOUT_S = 5.0
MAX_RETRY_AFTER_S = 600.0
GROWTH = 0.1  # slots per answer; faster growth makes half of all calls exceed a rate limit

logger = logging.getLogger(__name__)


class ServiceAwayError(TriadError):
    """The service is not reachable, or asks for a very long wait."""

    exit_code = ExitCode.UNREACHABLE


class ServiceTimeoutError(TriadError):
    """The service did not answer one request in time."""


class Pace:
    """A concurrency limit that adapts to the service.

    Each Retry-After halves the limit and blocks all requests for that time; each answer raises the limit by GROWTH.
    """

    def __init__(self, concurrency: int, stop: asyncio.Event) -> None:
        self._most = self._limit = float(concurrency)
        self._stop = stop
        self._open_at = 0.0
        self._changed = asyncio.Condition()
        self.in_flight = 0

    @contextlib.asynccontextmanager
    async def slot(self) -> AsyncIterator[None]:
        """Hold a slot; wait until one is free and Retry-After has passed.

        Raises:
            RunInterruptedError: The run was stopped.
        """
        async with self._changed:
            await self._changed.wait_for(lambda: self.in_flight < int(self._limit))
            self.in_flight += 1
        try:
            await self.wait(self._open_at - time.monotonic())
            yield
        finally:
            self.in_flight -= 1
            async with self._changed:
                self._changed.notify_all()

    async def wait(self, seconds: float) -> None:
        """Wait; raise RunInterruptedError as soon as the run is stopped."""
        if seconds > 0:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stop.wait(), seconds)
        if self._stop.is_set():
            raise RunInterruptedError("Stopped before the request was sent.")

    def slow_down(self, seconds: float) -> None:
        """Block all requests for *seconds* and halve the limit."""
        self._limit = max(1.0, self._limit / 2)
        self._open_at = max(self._open_at, time.monotonic() + seconds)

    def speed_up(self) -> None:
        """Raise the limit after an answer."""
        self._limit = min(self._most, self._limit + GROWTH)


def open_session(concurrency: int) -> aiohttp.ClientSession:
    """Return a session for one service; see network.outgoing. The caller closes it."""
    return aiohttp_session(aiohttp.TCPConnector(limit=concurrency))


class ServiceClient:
    """Client of one service; the caller owns *session*."""

    def __init__(
        self, target: ServiceTarget, session: aiohttp.ClientSession, pace: Pace, policy: RetryPolicy, timeout_s: float
    ) -> None:
        """*timeout_s* limits one attempt; *policy* sets the number of attempts and the waits between them."""
        self._target = target
        self._session = session
        self._route = route_to(target.url)
        self._pace = pace
        self._policy = policy
        self._timeout = aiohttp.ClientTimeout(total=timeout_s, sock_connect=min(timeout_s, CONNECT_TIMEOUT_S))
        self.retries = 0
        self.latencies_s = array("d")  # of the attempts that were answered

    async def classify(self, request: ServiceRequest) -> dict[str, Any]:
        """Return the answer to *request*; Retry-After delays all requests.

        Raises:
            RequestError: The service rejected this conversation, or the last attempt failed.
            ServiceTimeoutError: The last attempt timed out.
            ServiceAwayError: The service is not reachable, or Retry-After exceeds MAX_RETRY_AFTER_S.
            ConfigurationError: The service would reject every conversation.
            RunInterruptedError: The run was stopped before the service answered.
        """
        attempt = 0
        while True:
            attempt += 1
            try:
                async with self._pace.slot():
                    started = time.monotonic()
                    body = await self._post(request, attempt)
            except (RequestError, ServiceTimeoutError, ServiceAwayError) as exc:
                await self._before_next(exc, attempt)
            else:
                self._pace.speed_up()
                self.latencies_s.append(time.monotonic() - started)
                return body

    async def _before_next(self, exc: RequestError | ServiceTimeoutError | ServiceAwayError, attempt: int) -> None:
        """Wait for the next attempt; raise *exc* if there is none."""
        delay_s = exc.retry_after_s if isinstance(exc, RequestError) else None
        if delay_s is not None and delay_s > MAX_RETRY_AFTER_S:
            raise ServiceAwayError(f"The service asks to retry after {delay_s} s; run the same command then.") from exc
        if delay_s is not None:
            self._pace.slow_down(delay_s)
        is_final = isinstance(exc, RequestError) and exc.kind.status not in protocol.REPEATED_STATUSES
        if is_final or attempt >= self._policy.attempts:
            raise exc
        self.retries += 1
        wait_s = self._policy.wait_s(attempt) if delay_s is None else 0.0
        logger.info("attempt %d failed (%s), next in %.1f s", attempt, exc, delay_s or wait_s)
        await self._pace.wait(wait_s)

    async def _post(self, request: ServiceRequest, attempt: int) -> dict[str, Any]:
        """Send one request; the errors are those of ``classify``."""
        headers = self._target.headers | request.headers | {"X-Request-ID": f"{request.id}-{attempt}"}
        url = f"{self._target.url}/classify"
        try:
            async with self._session.post(
                url, data=request.body, headers=headers, timeout=self._timeout, **self._route.options
            ) as response:
                delay_s = protocol.parse_retry_after(response.headers.get("Retry-After"), datetime.now(UTC))
                return protocol.parse_answer(request, response.status, await _read_bounded(response), delay_s)
        except (aiohttp.ClientError, ConnectionError, TimeoutError) as exc:
            if isinstance(exc, TimeoutError) and not isinstance(exc, aiohttp.ConnectionTimeoutError):
                raise ServiceTimeoutError("The service did not answer within --timeout.") from exc
            raise ServiceAwayError(
                problem_of(exc, self._target.url, "--url")
                or f"No service answers at {self._target.url}; start it (make serve) or correct --url."
            ) from exc


async def _read_bounded(response: aiohttp.ClientResponse) -> bytes:
    received = bytearray()
    async for chunk in response.content.iter_chunked(65_536):
        received += chunk
        if len(received) > protocol.MAX_ANSWER_BYTES:
            raise ServiceAwayError(f"The answer is larger than {protocol.MAX_ANSWER_BYTES} bytes; check --url.")
    return bytes(received)


def add_service_arguments(parser: argparse.ArgumentParser) -> None:
    """Add --url, --api-key-file, --api-key, --timeout and --verbose to *parser*."""
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="address of the service (%(default)s)")
    parser.add_argument("--api-key-file", type=Path, metavar="FILE", help="file that holds the API key")
    parser.add_argument("--api-key", metavar="KEY", help="the API key; other users of this machine can see it in ps")
    parser.add_argument(
        "--timeout",
        type=number_between(float, 0.001, 3600),
        default=90.0,
        metavar="S",
        help="timeout of one attempt, seconds (%(default)g)",
    )
    parser.add_argument("--verbose", action="store_true", help="log at level DEBUG and print tracebacks")


def run_client(
    prog: str,
    arguments: argparse.Namespace,
    work: Callable[[ServiceTarget], Coroutine[Any, Any, int]],
    interrupted: str,
) -> int:
    """Run *work* with the service that *arguments* name, and return the exit code; *interrupted* is for Ctrl-C."""

    def run() -> int:
        target = service_target(arguments.url, arguments.api_key, arguments.api_key_file)
        configure_logging("DEBUG" if arguments.verbose else "WARNING", secrets=target.headers.values())
        return asyncio.run(work(target))

    return exit_code_of(run, prog, verbose=arguments.verbose, interrupted=interrupted)

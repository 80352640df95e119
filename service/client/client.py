"""The REST service as a caller asks it: bounded, repeated where that helps, at the pace the service names (aiohttp)."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import aiohttp

from error_handler import ErrorClass, ExitCode, Reason, RequestError, RunInterruptedError, TriadError
from service.client import protocol
from service.client.protocol import ServiceRequest, ServiceTarget
from utils.retry_utils import RetryPolicy

CONNECT_TIMEOUT_S = 5.0
MAX_TOLD_WAIT_S = 600.0
GROWTH = 0.1  # slow, or half of all calls would be the ones too many while a rate limit holds

logger = logging.getLogger(__name__)


class ServiceAwayError(TriadError):
    """The service is not reachable, or asks to come back much later."""

    exit_code = ExitCode.UNREACHABLE
    error_class = ErrorClass.TRANSIENT
    reason = Reason.TRANSPORT


class ServiceTimeoutError(TriadError):
    """The service did not answer one request in time."""

    exit_code = ExitCode.UNREACHABLE
    error_class = ErrorClass.TRANSIENT
    reason = Reason.TIMEOUT


@dataclass(frozen=True, slots=True)
class ServiceAnswer:
    """The body of a 200, and the seconds that the attempt which brought it took; *attempts* counts all."""

    body: dict[str, Any]
    latency_s: float
    attempts: int


class Pace:
    """Lets at most *concurrency* requests out at once; fewer, and later, while the service asks to wait.

    Each request to wait halves the number, each answer adds a tenth of a place.
    """

    def __init__(self, concurrency: int, stop: asyncio.Event) -> None:
        self._most = self._limit = float(concurrency)
        self._stop = stop
        self._open_at = 0.0
        self._changed = asyncio.Condition()
        self.in_flight = 0

    @contextlib.asynccontextmanager
    async def place(self) -> AsyncIterator[None]:
        """Wait for a place and for the time that the service named, and hold the place.

        Raises:
            RunInterruptedError: The run was stopped meanwhile.
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
        """Wait; raises RunInterruptedError as soon as the run is stopped."""
        if seconds > 0:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stop.wait(), seconds)
        if self._stop.is_set():
            raise RunInterruptedError("Stopped before the request was sent.")

    def slow_down(self, seconds: float) -> None:
        """Let nothing out for *seconds*, and fewer at once from then on."""
        self._limit = max(1.0, self._limit / 2)
        self._open_at = max(self._open_at, time.monotonic() + seconds)

    def speed_up(self) -> None:
        """Note an answer."""
        self._limit = min(self._most, self._limit + GROWTH)


def open_session(concurrency: int) -> aiohttp.ClientSession:
    """Return a session for one service; whoever opens it closes it.

    No cookies, no proxy from the environment (it would also catch loopback), no compression (it hides a body's size).
    """
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=concurrency),
        headers={"Accept-Encoding": "identity"},
        cookie_jar=aiohttp.DummyCookieJar(),
        trust_env=False,
        auto_decompress=False,
    )


class ServiceClient:
    """Asks one service; *session* stays the caller's."""

    def __init__(
        self, target: ServiceTarget, session: aiohttp.ClientSession, pace: Pace, policy: RetryPolicy, timeout_s: float
    ) -> None:
        """*timeout_s* bounds one attempt, *policy* how often and how slowly one is repeated."""
        self._target = target
        self._session = session
        self._pace = pace
        self._policy = policy
        self._timeout = aiohttp.ClientTimeout(total=timeout_s, sock_connect=min(timeout_s, CONNECT_TIMEOUT_S))
        self.retries = 0

    async def classify(self, request: ServiceRequest) -> ServiceAnswer:
        """Return the service's answer to *request*.

        Where it says Retry-After, all requests wait as long as it asks.

        Raises:
            RequestError: The service refuses or fails this conversation, the last attempt included.
            ServiceTimeoutError: It did not answer in time, the last attempt included.
            ServiceAwayError: It is not reachable, or asks to wait for longer than MAX_TOLD_WAIT_S.
            ConfigurationError: It would refuse every conversation.
            RunInterruptedError: The run was stopped before the service had answered.
        """
        for attempt in itertools.count(1):
            try:
                async with self._pace.place():
                    started = time.monotonic()
                    body = await self._post(request, attempt)
            except (RequestError, ServiceTimeoutError, ServiceAwayError) as exc:
                await self._before_next(exc, attempt)
            else:
                self._pace.speed_up()
                return ServiceAnswer(body, time.monotonic() - started, attempt)
        raise AssertionError("the loop returns or raises")

    async def _before_next(self, exc: RequestError | ServiceTimeoutError | ServiceAwayError, attempt: int) -> None:
        """Wait until the next attempt is due; raise *exc* where none is."""
        told_s = exc.retry_after_s if isinstance(exc, RequestError) else None
        if told_s is not None and told_s > MAX_TOLD_WAIT_S:
            raise ServiceAwayError(f"The service asks to come back in {told_s} s; run the same command then.") from exc
        if told_s is not None:
            self._pace.slow_down(told_s)
        is_final = isinstance(exc, RequestError) and exc.kind.status not in protocol.REPEATED_STATUSES
        if is_final or attempt >= self._policy.attempts:
            raise exc
        self.retries += 1
        wait_s = self._policy.wait_s(attempt) if told_s is None else 0.0
        logger.info("attempt %d failed (%s), next in %.1f s", attempt, exc, told_s or wait_s)
        await self._pace.wait(wait_s)

    async def _post(self, request: ServiceRequest, attempt: int) -> dict[str, Any]:
        """Send one request. aiohttp's time-outs are also ClientErrors, so they come first."""
        headers = self._target.headers | request.headers | {"X-Request-ID": request_id(request, attempt)}
        url = f"{self._target.url}/classify"
        try:
            async with self._session.post(
                url, data=request.body, headers=headers, timeout=self._timeout, allow_redirects=False
            ) as response:
                told = protocol.parse_retry_after(response.headers.get("Retry-After"), datetime.now(UTC))
                return protocol.parse_answer(request, response.status, await _read_bounded(response), told)
        except aiohttp.ConnectionTimeoutError as exc:
            raise ServiceAwayError(self._away) from exc
        except TimeoutError as exc:
            raise ServiceTimeoutError("The service did not answer within --timeout.") from exc
        except (aiohttp.ClientError, ConnectionError) as exc:
            raise ServiceAwayError(self._away) from exc

    @property
    def _away(self) -> str:
        return f"No service answers at {self._target.url}; start it (uvicorn main:app) or correct --url."


def request_id(request: ServiceRequest, attempt: int) -> str:
    """Return the X-Request-ID of one attempt, by which the service's log names it."""
    return f"{request.key.hex()[:24]}-{attempt}"


async def _read_bounded(response: aiohttp.ClientResponse) -> bytes:
    received = bytearray()
    async for chunk in response.content.iter_chunked(65_536):
        received += chunk
        if len(received) > protocol.MAX_ANSWER_BYTES:
            raise ServiceAwayError(f"The answer is larger than {protocol.MAX_ANSWER_BYTES} bytes; check --url.")
    return bytes(received)

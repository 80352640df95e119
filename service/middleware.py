"""What every request passes, as pure ASGI: its id, the gate, one shape for errors, one log line, the numbers."""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

import orjson

from error_handler import RequestError
from logger import REQUEST_ID_HEADER, begin_request
from service.access import ASKED, ServiceGate, route_of
from service.errors import BODY_TOO_SLOW, UNAUTHENTICATED, CallerLeftError
from service.metrics import ServiceMetrics

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

logger = logging.getLogger(__name__)

_EVERY_ANSWER = [(b"cache-control", b"no-store"), (b"x-content-type-options", b"nosniff")]
_ID_NAME = REQUEST_ID_HEADER.lower().encode()


class ServiceMiddleware:
    """Finds the gate and the metrics in the lifespan's state, under ``gate`` and ``metrics``.

    Leaves in the state of the request: ``caller``, ``headers`` (names in lower case; of several
    with one name the last) and ``started_at`` (monotonic seconds). An application that writes ``note``
    there has it in the log line.
    """

    def __init__(self, app: App) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request; hand on what is none, such as the lifespan."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        state = scope["state"]
        metrics: ServiceMetrics = state["metrics"]
        gate: ServiceGate = state["gate"]
        started_at = time.monotonic()
        headers = dict(scope["headers"])
        added = [*_EVERY_ANSWER, (_ID_NAME, begin_request(headers.get(_ID_NAME)).encode())]
        route = route_of(scope["path"])
        status = 0

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), *added]
            await send(message)

        metrics.in_flight.inc()
        try:
            state["caller"] = gate.admit(route, headers, scope.get("client"))
            state["headers"], state["started_at"] = headers, started_at
            await self._app(scope, receive, send_with_headers)
        except RequestError as problem:
            metrics.rejections.labels(problem.kind.name).inc()
            status = problem.kind.status
            if not isinstance(problem, CallerLeftError):
                await send_error(problem, send_with_headers)
        finally:
            metrics.in_flight.dec()
            duration_s = time.monotonic() - started_at
            metrics.requests.labels(route, str(status or 500)).inc()
            metrics.latency.labels(route).observe(duration_s)
            level = logging.INFO if route in ASKED or status >= 500 else logging.DEBUG
            logger.log(
                level,
                "%s %d in %.0f ms for %s%s",
                route,
                status or 500,
                duration_s * 1000,
                state.get("caller", "nobody"),
                state.get("note", ""),
            )


async def send_error(problem: RequestError, send: Send) -> None:
    """Answer with the body, status and headers of *problem*."""
    headers = []
    if problem.retry_after_s is not None:
        headers.append((b"retry-after", str(problem.retry_after_s).encode()))
    if problem.kind is BODY_TOO_SLOW:
        headers.append((b"connection", b"close"))  # what still comes is no next request
    if problem.kind is UNAUTHENTICATED:
        headers.append((b"www-authenticate", b'Bearer, Basic realm="triad"'))
    await send_json(send, problem.kind.status, problem.body, headers)


async def send_json(send: Send, status: int, content: Any, headers: list[tuple[bytes, bytes]]) -> None:
    """Answer with *content* as JSON."""
    body = orjson.dumps(content)
    length = (b"content-length", str(len(body)).encode())
    await send(
        {
            "type": "http.response.start",
            "status": status,
            "headers": [(b"content-type", b"application/json"), length, *headers],
        }
    )
    await send({"type": "http.response.body", "body": body})

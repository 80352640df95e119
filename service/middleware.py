"""ASGI middleware around every request (request id, access, metrics, one log line), and the error responses."""

from __future__ import annotations

import asyncio
import logging
import time

import orjson
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from error_handler import RequestError
from logger import REQUEST_ID_HEADER, begin_request, request_id
from service import errors
from service.access import ASKED, LABELS, WITH_BODY, route_of
from service.contract import invalid_request
from service.metrics import ServiceMetrics
from service.startup import Service

logger = logging.getLogger(__name__)

_NOT_STORED = (b"cache-control", b"no-store")
_EVERY_ANSWER = [(b"x-content-type-options", b"nosniff")]
_ID_NAME = REQUEST_ID_HEADER.lower().encode()


class ServiceMiddleware:
    """Expects the Service in the lifespan's state, as ``service``.

    Adds to the state of the request: ``caller``, ``headers`` (lower-case names; the last of several with one name)
    and ``deadline`` (on the loop's clock). The log line ends with ``note`` if a route sets it.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request; pass everything else on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        state = scope["state"]
        service: Service = state["service"]
        metrics, started_at = service.metrics, time.monotonic()
        state["deadline"] = asyncio.get_running_loop().time() + service.settings.request_timeout_s
        headers = state["headers"] = dict(scope["headers"])
        route = route_of(scope["path"])
        stored = () if route == LABELS else (_NOT_STORED,)
        added = [*stored, *_EVERY_ANSWER, (_ID_NAME, begin_request(headers.get(_ID_NAME)).encode())]
        status = 500

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), *added]
            await send(message)

        metrics.in_flight.inc()
        try:
            state["caller"] = service.gate.admit(route, headers, scope.get("client"))
            if scope["path"] in WITH_BODY and scope["method"] == "POST":
                await service.bodies.run(self._app, scope, receive, send_with_headers)
            else:
                await self._app(scope, receive, send_with_headers)
        except RequestError as problem:  # of the gate, or of the body; the application answers its own
            metrics.rejections.labels(problem.kind.name).inc()
            status = problem.kind.status
            if not isinstance(problem, errors.CallerLeftError):
                await error_response(problem)(scope, receive, send_with_headers)
        finally:
            metrics.in_flight.dec()
            duration_s = time.monotonic() - started_at
            metrics.requests.labels(route, str(status)).inc()
            metrics.latency.labels(route).observe(duration_s)
            level = logging.INFO if route in ASKED or status >= 500 else logging.DEBUG
            caller, note = state.get("caller", "nobody"), state.get("note", "")
            logger.log(level, "%s %d in %.0f ms for %s%s", route, status, duration_s * 1000, caller, note)


def error_response(problem: RequestError) -> Response:
    """Return the response for *problem*."""
    headers = {}
    if problem.retry_after_s is not None:
        headers["retry-after"] = str(problem.retry_after_s)
    if problem.kind is errors.BODY_TOO_SLOW:
        headers["connection"] = "close"  # the rest of the body must not be read as the next request
    response = Response(orjson.dumps(problem.body), problem.kind.status, headers, "application/json")
    if problem.kind is errors.UNAUTHENTICATED:
        # One header each: Chromium does not look for Basic behind a comma, and would not ask for the key.
        for scheme in ('Basic realm="triad"', "Bearer"):
            response.headers.append("www-authenticate", scheme)
    return response


def add_error_handlers(app: FastAPI) -> None:
    """Answer every error of *app* in the shape of ErrorResponse."""
    app.exception_handler(RequestError)(_refuse)
    app.exception_handler(RequestValidationError)(_refuse)
    app.exception_handler(HTTPException)(_no_such_route)
    app.exception_handler(Exception)(_internal_error)


async def _refuse(request: Request, exc: RequestError | RequestValidationError) -> Response:
    problem = exc if isinstance(exc, RequestError) else invalid_request(exc.errors())
    metrics: ServiceMetrics = request.state.service.metrics
    metrics.rejections.labels(problem.kind.name).inc()
    return error_response(problem)


async def _no_such_route(request: Request, exc: HTTPException) -> Response:
    kind = errors.METHOD_NOT_ALLOWED if exc.status_code == 405 else errors.NOT_FOUND
    response = error_response(RequestError(kind))
    if kind is errors.METHOD_NOT_ALLOWED:
        path = getattr(request.scope.get("route"), "path", request.url.path)
        # Starlette names the methods of the first route of the path only; the document has all, if it has the path.
        operations = request.app.openapi()["paths"].get(path)
        methods = (exc.headers or {}).get("Allow", "GET") if operations is None else ", ".join(operations).upper()
        response.headers["Allow"] = methods
    return response


async def _internal_error(_request: Request, _exc: Exception) -> Response:
    response = error_response(RequestError(errors.INTERNAL))
    response.headers[REQUEST_ID_HEADER] = request_id.get() or ""
    return response

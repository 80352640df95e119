"""Error responses: the handlers that make them, and their place in the OpenAPI document."""

from __future__ import annotations

from typing import Any

import orjson
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from error_handler import ErrorKind, RequestError
from logger import REQUEST_ID_HEADER, request_id
from service import errors
from service.contract import ErrorResponse, invalid_request
from service.metrics import ServiceMetrics

Responses = dict[int | str, dict[str, Any]]

REQUEST_ID: dict[str, Any] = {
    REQUEST_ID_HEADER: {"schema": {"type": "string"}, "description": "the request's id, also in the log"}
}
_RETRY_AFTER = {"Retry-After": {"schema": {"type": "integer", "minimum": 1}, "description": "seconds to wait"}}


def error_response(problem: RequestError) -> Response:
    """Return the response for *problem*."""
    headers = {}
    if problem.retry_after_s is not None:
        headers["retry-after"] = str(problem.retry_after_s)
    if problem.kind is errors.BODY_TOO_SLOW:
        headers["connection"] = "close"  # the rest of the body must not be read as the next request
    if problem.kind is errors.UNAUTHENTICATED:
        headers["www-authenticate"] = 'Bearer, Basic realm="triad"'
    return Response(orjson.dumps(problem.body), problem.kind.status, headers, "application/json")


def add_error_handlers(app: FastAPI) -> None:
    """Answer every error of *app* in the shape of ErrorResponse."""
    app.exception_handler(RequestError)(_refuse)
    app.exception_handler(RequestValidationError)(_refuse_invalid)
    app.exception_handler(HTTPException)(_no_such_route)
    app.exception_handler(Exception)(_internal_error)


async def _refuse(request: Request, problem: RequestError) -> Response:
    metrics: ServiceMetrics = request.state.service.metrics
    metrics.rejections.labels(problem.kind.name).inc()
    return error_response(problem)


async def _refuse_invalid(request: Request, exc: RequestValidationError) -> Response:
    return await _refuse(request, invalid_request(exc.errors()))


async def _no_such_route(request: Request, exc: HTTPException) -> Response:
    kind = errors.METHOD_NOT_ALLOWED if exc.status_code == 405 else errors.NOT_FOUND
    response = error_response(RequestError(kind))
    if kind is errors.METHOD_NOT_ALLOWED:
        # Starlette names the methods of the first route of the path only; the document has all.
        operations = request.app.openapi()["paths"].get(request.url.path, {"get": {}})
        response.headers["Allow"] = ", ".join(method.upper() for method in operations)
    return response


async def _internal_error(_request: Request, _exc: Exception) -> Response:
    response = error_response(RequestError(errors.INTERNAL))
    response.headers[REQUEST_ID_HEADER] = request_id.get() or ""
    return response


def documented_errors(*kinds: ErrorKind) -> Responses:
    """Return the ``responses=`` of a route that answers with *kinds*, and the headers of its success."""
    responses: Responses = {200: {"headers": REQUEST_ID}}
    for kind in kinds:
        headers = {**REQUEST_ID, **(_RETRY_AFTER if kind.status in (429, 503) else {})}
        empty = {"model": ErrorResponse, "description": "", "headers": headers}
        response = responses.setdefault(kind.status, {**empty, "content": {"application/json": {"examples": {}}}})
        examples = response["content"]["application/json"]["examples"]
        examples[kind.name] = {"value": RequestError(kind).body}
        response["description"] = ", ".join(examples)
    return responses

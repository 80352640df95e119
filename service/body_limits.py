"""Request bodies: limits on size, time and memory, and strict JSON.

FastAPI has no time limit for a body and no budget for all of them, and Python's JSON parser accepts duplicate keys.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping
from typing import Any

import orjson
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from config.service_settings import ServiceSettings
from error_handler import RequestError
from service.access import OF_MANY, Headers
from service.errors import BODY_TOO_SLOW, INVALID_JSON, NOT_JSON, QUEUE_FULL, TOO_LARGE, CallerLeftError

BUDGET_BYTES = 16 * 1024 * 1024  # for all bodies in memory
RETRY_AFTER_S = 2


class BodyLimits:
    """Reads request bodies within the limits of *settings*, and BUDGET_BYTES for all of them."""

    def __init__(self, settings: ServiceSettings, admission_checks: Mapping[str, Callable[[], None]]) -> None:
        """*admission_checks*, by path, raise RequestError if a request would be rejected with any body."""
        self._max_bytes = settings.max_body_bytes
        self._max_of_many_bytes = settings.max_batch_bytes
        self._timeout_s = settings.body_timeout_s
        self._admission_checks = admission_checks
        self._used_bytes = 0

    async def run(self, app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
        """Read the body of the request, and run *app* with it.

        Raises:
            RequestError: What the admission check raises, NOT_JSON, TOO_LARGE, BODY_TOO_SLOW, INVALID_JSON,
                QUEUE_FULL if other bodies use up the budget, CallerLeftError.
        """
        headers: Headers = scope["state"]["headers"]
        check = self._admission_checks.get(scope["path"])
        if check is not None and b"idempotency-key" not in headers:  # a stored answer needs no slot
            check()
        _require_json(headers)
        most = self._max_of_many_bytes if scope["path"] in OF_MANY else self._max_bytes
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or int(length) > most:
            raise RequestError(TOO_LARGE)
        body = bytearray()
        try:
            await self._read(body, receive, most)
            check_json_object(body)
            first: Message | None = {"type": "http.request", "body": bytes(body), "more_body": False}

            async def receive_again() -> Message:
                nonlocal first
                message, first = first, None
                return await receive() if message is None else message  # the server's own, such as the disconnect

            await app(scope, receive_again, send)
        finally:
            self._used_bytes -= len(body)

    async def _read(self, body: bytearray, receive: Receive, most: int) -> None:
        try:
            async with asyncio.timeout(self._timeout_s):
                more = True
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise CallerLeftError
                    chunk = message.get("body", b"")
                    body += chunk
                    self._used_bytes += len(chunk)
                    if len(body) > most:
                        raise RequestError(TOO_LARGE)
                    if self._used_bytes > BUDGET_BYTES:
                        raise RequestError(QUEUE_FULL, retry_after_s=RETRY_AFTER_S)
                    more = message.get("more_body", False)
        except TimeoutError as exc:
            raise RequestError(BODY_TOO_SLOW) from exc


def _require_json(headers: Headers) -> None:
    """Require uncompressed JSON, because compression hides the size of a body."""
    media_type, _, parameters = headers.get(b"content-type", b"").lower().partition(b";")
    charset = parameters.replace(b" ", b"").replace(b'"', b"")
    encoding = headers.get(b"content-encoding", b"identity").strip().lower()
    if media_type.strip() != b"application/json" or charset not in (b"", b"charset=utf-8") or encoding != b"identity":
        raise RequestError(NOT_JSON)


def check_json_object(body: bytes | bytearray) -> None:
    """Require one JSON object in UTF-8 without a byte order mark.

    Python's parser, and so FastAPI, accepts more: duplicate keys, NaN and Infinity, lone surrogates, UTF-16.

    Raises:
        RequestError: INVALID_JSON. The message never quotes the body.
    """
    try:
        value = orjson.loads(body)  # rejects all of these but duplicate keys
        json.loads(body, object_pairs_hook=_require_distinct_keys)
    except (ValueError, RecursionError) as exc:
        raise RequestError(INVALID_JSON) from exc
    if not isinstance(value, dict):
        raise RequestError(INVALID_JSON)


def _require_distinct_keys(pairs: list[tuple[str, Any]]) -> None:
    if len(dict(pairs)) != len(pairs):
        raise ValueError("a duplicate key")

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
from service.access import Headers
from service.errors import BODY_TOO_SLOW, INVALID_JSON, NOT_JSON, QUEUE_FULL, TOO_LARGE, CallerLeftError

BUDGET_BYTES = 16 * 1024 * 1024  # for all bodies in memory
RETRY_AFTER_S = 2


class BodyLimits:
    """Reads request bodies within the limits of *settings*, and BUDGET_BYTES for all of them."""

    def __init__(self, settings: ServiceSettings, admission_checks: Mapping[str, Callable[[], None]]) -> None:
        """*admission_checks*, by path, raise RequestError if a request would be rejected with any body."""
        self._settings = settings
        self._admission_checks = admission_checks
        self._used_bytes = 0

    async def run(self, app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
        """Run *app* with the body of the request, which is read first.

        Raises:
            RequestError: What the admission check raises, NOT_JSON, TOO_LARGE, BODY_TOO_SLOW, INVALID_JSON,
                QUEUE_FULL if other bodies use up the budget, CallerLeftError.
        """
        headers: Headers = scope["state"]["headers"]
        if b"idempotency-key" not in headers:  # a stored answer needs no slot
            self._admission_checks[scope["path"]]()
        _require_json(headers)
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or int(length) > self._settings.max_body_bytes:
            raise RequestError(TOO_LARGE)
        chunks: list[bytes] = []
        try:
            await self._read(chunks, receive)
            body = b"".join(chunks)
            check_json_object(body)
            await app(scope, _replay(body, receive), send)
        finally:
            self._used_bytes -= sum(map(len, chunks))

    async def _read(self, chunks: list[bytes], receive: Receive) -> None:
        size, more = 0, True
        try:
            async with asyncio.timeout(self._settings.body_timeout_s):
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise CallerLeftError
                    chunks.append(message.get("body", b""))
                    size += len(chunks[-1])
                    self._used_bytes += len(chunks[-1])
                    if size > self._settings.max_body_bytes:
                        raise RequestError(TOO_LARGE)
                    if self._used_bytes > BUDGET_BYTES:
                        raise RequestError(QUEUE_FULL, retry_after_s=RETRY_AFTER_S)
                    more = message.get("more_body", False)
        except TimeoutError as exc:
            raise RequestError(BODY_TOO_SLOW) from exc


def _replay(body: bytes, receive: Receive) -> Receive:
    """Return a ``receive`` that yields *body* first, and then the server's messages, such as the disconnect."""
    is_read = False

    async def replayed() -> Message:
        nonlocal is_read
        if is_read:
            return await receive()
        is_read = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replayed


def _require_json(headers: Headers) -> None:
    """Require uncompressed JSON, because compression hides the size of a body."""
    media_type, _, parameters = headers.get(b"content-type", b"").lower().partition(b";")
    charset = parameters.replace(b" ", b"").replace(b'"', b"")
    encoding = headers.get(b"content-encoding", b"identity").strip().lower()
    if media_type.strip() != b"application/json" or charset not in (b"", b"charset=utf-8") or encoding != b"identity":
        raise RequestError(NOT_JSON)


def check_json_object(body: bytes) -> None:
    """Require one JSON object in UTF-8 without a byte order mark.

    Python's parser, and so FastAPI, accepts more: duplicate keys, NaN and Infinity, lone surrogates, UTF-16.

    Raises:
        RequestError: INVALID_JSON. The message never quotes the body.
    """
    try:
        value = _DECODER.decode(body.decode())
    except UnicodeDecodeError as exc:
        raise RequestError(INVALID_JSON, "The body is not UTF-8; send UTF-8 JSON.") from exc
    except RecursionError as exc:
        raise RequestError(INVALID_JSON, "The body is nested too deeply; send one flat conversation.") from exc
    except ValueError as exc:  # JSONDecodeError, and integers of thousands of digits
        raise RequestError(INVALID_JSON) from exc
    if not isinstance(value, dict):
        raise RequestError(INVALID_JSON)
    # Python reads lone surrogates, but nothing can write them.
    if (b"\\ud" in body or b"\\uD" in body) and not _is_writable(value):
        raise RequestError(INVALID_JSON, "The body contains half of a surrogate pair; send whole characters.")


def _is_writable(value: dict[str, Any]) -> bool:
    try:
        orjson.dumps(value)
    except orjson.JSONEncodeError:
        return False
    return True


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise RequestError(INVALID_JSON, "The body has a duplicate key; name each key once.")
    return fields


def _no_constant(_name: str) -> Any:
    raise RequestError(INVALID_JSON, "The body contains NaN or Infinity, which are not JSON; send numbers.")


_DECODER = json.JSONDecoder(object_pairs_hook=_distinct, parse_constant=_no_constant)

"""Read the body of a request within limits of size, time and memory."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any

import orjson

from error_handler import RequestError
from service.access import Headers
from service.errors import BODY_TOO_SLOW, INVALID_JSON, NOT_JSON, QUEUE_FULL, TOO_LARGE, CallerLeftError

Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]

BUDGET_BYTES = 16 * 1024 * 1024  # of all bodies in hand together
RETRY_AFTER_S = 2


class BodyReader:
    """Reads JSON bodies of at most *max_bytes* within *timeout_s* each."""

    def __init__(self, max_bytes: int, timeout_s: float) -> None:
        self._max_bytes = max_bytes
        self._timeout_s = timeout_s
        self._in_hand = 0

    @contextmanager
    def hold(self) -> Iterator[BodyHold]:
        """Account for one body while inside, so that many together stay within BUDGET_BYTES."""
        hold = BodyHold()
        try:
            yield hold
        finally:
            self._in_hand -= hold.size

    async def read(self, hold: BodyHold, headers: Headers, receive: Receive) -> bytes:
        """Return the body.

        Raises:
            RequestError: NOT_JSON by the headers, TOO_LARGE before it is read or as soon as it shows,
                BODY_TOO_SLOW, QUEUE_FULL where other bodies fill the budget; CallerLeftError.
        """
        _require_json(headers)
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or int(length) > self._max_bytes:
            raise RequestError(TOO_LARGE)
        try:
            async with asyncio.timeout(self._timeout_s):
                return await self._collect(hold, receive)
        except TimeoutError as exc:
            raise RequestError(BODY_TOO_SLOW) from exc

    async def _collect(self, hold: BodyHold, receive: Receive) -> bytes:
        chunks: list[bytes] = []
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise CallerLeftError
            chunk: bytes = message.get("body", b"")
            hold.size += len(chunk)
            self._in_hand += len(chunk)
            if hold.size > self._max_bytes:
                raise RequestError(TOO_LARGE)
            if self._in_hand > BUDGET_BYTES:
                raise RequestError(QUEUE_FULL, retry_after_s=RETRY_AFTER_S)
            chunks.append(chunk)
            if not message.get("more_body", False):
                return chunks[0] if len(chunks) == 1 else b"".join(chunks)


class BodyHold:
    """How many bytes of one body are in hand."""

    __slots__ = ("size",)

    def __init__(self) -> None:
        self.size = 0


def _require_json(headers: Headers) -> None:
    """A compressed body would hide its size, and another charset what it says."""
    media_type, _, parameters = headers.get(b"content-type", b"").lower().partition(b";")
    charset = parameters.replace(b" ", b"").replace(b'"', b"")
    encoding = headers.get(b"content-encoding", b"identity").strip().lower()
    if media_type.strip() != b"application/json" or charset not in (b"", b"charset=utf-8") or encoding != b"identity":
        raise RequestError(NOT_JSON)


def read_json_object(body: bytes) -> dict[str, Any]:
    """Return the object in *body*, which is UTF-8 without a byte order mark.

    Refused although common parsers take it: a key named twice, NaN and Infinity, lone surrogates,
    numbers that do not fit, nesting deeper than the interpreter can follow (about 900).

    Raises:
        RequestError: INVALID_JSON. The message says what is wrong and quotes nothing.
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
    # Python reads a lone surrogate, and nothing that follows can write it.
    if (b"\\ud" in body or b"\\uD" in body) and not _is_writable(value):
        raise RequestError(INVALID_JSON, "The body holds half of a surrogate pair; send whole characters.")
    return value


def _is_writable(value: dict[str, Any]) -> bool:
    try:
        orjson.dumps(value)
    except orjson.JSONEncodeError:
        return False
    return True


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise RequestError(INVALID_JSON, "The body names a key twice; name each key once.")
    return fields


def _no_constant(_name: str) -> Any:
    raise RequestError(INVALID_JSON, "The body holds NaN or Infinity, which JSON does not have.")


_DECODER = json.JSONDecoder(object_pairs_hook=_distinct, parse_constant=_no_constant)

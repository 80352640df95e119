"""Read the body of a request within limits of size, time and memory."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any

from error_handler import RequestError
from utils.api_keys import Headers
from utils.service_errors import BODY_TOO_SLOW, NOT_JSON, QUEUE_FULL, TOO_LARGE, CallerLeftError

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

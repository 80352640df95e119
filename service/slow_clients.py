"""Closes connections that make no progress. uvicorn itself never does; docs/decisions.md has the reasons.

uvicorn 0.54 has no timeout for the head or the body of a request, nor for a client that does not read its answer, and
it waits for all of them when it stops. The guard replaces the protocol class in the ``Config`` of the running server,
which reads it for each new connection. Plain ``uvicorn main:app`` is protected too; other servers in the process are
not affected.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from enum import Enum
from http import HTTPStatus
from typing import Any

import orjson
from uvicorn.config import Config
from uvicorn.lifespan.on import LifespanOn
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from config.service_settings import ServiceSettings
from error_handler import ConfigurationError, ErrorKind, RequestError
from service.errors import HEAD_TOO_LARGE, MALFORMED

logger = logging.getLogger(__name__)
OnStop = Callable[[float], None]

SWEEP_EVERY_S = 0.5
# The application answers 408 to a late body. The guard closes later, for what the application cannot see.
AFTER_APPLICATION_S = 2.0
UNREAD_WHEN_STOPPING_S = 2.0  # how long an answer may stay unread while the server stops
# A client that still sends a rejected body does not read the answer if the connection is cut off.
DISCARD_S = 3.0
# Longer than clients and proxies keep a connection: if both ends close it at the same time, a request is lost.
KEEP_ALIVE_S = 75
UVICORN_KEEP_ALIVE_S = 5
# uvicorn's limit on a graceful shutdown comes after ours: ours answers 503, uvicorn's cuts off.
AFTER_GRACE_S = 3.0
MAX_HEAD_BYTES = 65_536  # the limit of h11; httptools has none


class Phase(Enum):
    """The event that a connection waits for."""

    IDLE = "another request; uvicorn's keep-alive closes it"
    HEAD = "the head of a request"
    DISCARD = "the rest of a body that was rejected"
    BODY = "the body of a request"
    WORK = "the application"
    READER = "the client, to read its answer"


def server_config(receive: Any) -> Config | None:
    """Return the configuration of the uvicorn that calls the lifespan with *receive*; None for another server."""
    lifespan = getattr(receive, "__self__", None)
    return lifespan.config if isinstance(lifespan, LifespanOn) else None


class SlowClientGuard:
    """Watches the connections of one uvicorn inside ``run``, which begins before the server listens."""

    def __init__(
        self, config: Config, settings: ServiceSettings, grace_s: float, max_connections: int, on_stop: OnStop
    ) -> None:
        """*on_stop* is called with the grace period in seconds, at most *grace_s*, when the server begins to stop.

        Raises:
            ConfigurationError: The server uses an unknown protocol class.
        """
        known: dict[type, type[_Guarded]] = {HttpToolsProtocol: _GuardedHttpTools, H11Protocol: _GuardedH11}
        if config.http_protocol_class not in known:
            raise ConfigurationError(
                "uvicorn runs with an unknown protocol; start it with --http httptools or --http h11."
            )
        self._protocol = known[config.http_protocol_class]
        self._config = config
        self._grace_s = grace_s
        self._max_connections = max_connections
        self._on_stop = on_stop
        body_s = settings.body_timeout_s + AFTER_APPLICATION_S
        self._longest_s = {
            Phase.HEAD: settings.header_timeout_s,
            Phase.DISCARD: DISCARD_S,
            Phase.BODY: body_s,
            Phase.READER: body_s,
        }
        self.connections: set[_Guarded] = set()
        self._stopping = False

    @asynccontextmanager
    async def run(self) -> AsyncIterator[None]:
        """Guard the connections that the server accepts during the block."""
        config = self._config
        # uvicorn only calls it, so a factory is as good as a class.
        config.http_protocol_class = lambda **arguments: self._protocol(self, **arguments)  # type: ignore[assignment]
        config.ws_protocol_class = None
        if config.timeout_keep_alive == UVICORN_KEEP_ALIVE_S:
            config.timeout_keep_alive = KEEP_ALIVE_S
        config.encoded_headers = [pair for pair in config.encoded_headers if pair[0] != b"server"]
        if config.timeout_graceful_shutdown is None:
            config.timeout_graceful_shutdown = math.ceil(self._grace_s + AFTER_GRACE_S)
        sweeper = asyncio.create_task(self._sweep(), name="slow-client-guard")
        try:
            yield
        finally:
            sweeper.cancel()

    def add(self, protocol: _Guarded) -> None:
        """Watch a new connection. If there are too many, close the idle ones; if none is idle, close the new one."""
        is_full = len(self.connections) >= self._max_connections
        idle = [other for other in self.connections if is_full and other.phase() is Phase.IDLE]
        for other in idle:
            other.transport.abort()
        if self._stopping or (is_full and not idle):
            protocol.transport.abort()
        self.connections.add(protocol)

    def stop(self) -> None:
        """Start the grace period. uvicorn calls this once for each connection when it begins to stop."""
        if not self._stopping:
            self._stopping = True
            self._longest_s[Phase.READER] = UNREAD_WHEN_STOPPING_S
            given_s = float(self._config.timeout_graceful_shutdown or 0.0)
            self._on_stop(min(self._grace_s, max(given_s - AFTER_GRACE_S, given_s / 2)))

    async def _sweep(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(SWEEP_EVERY_S)
            closed = sum(protocol.close_if_slow(loop.time(), self._longest_s) for protocol in list(self.connections))
            if closed:
                logger.warning("closed slow connections: %d", closed)


class _Guarded(asyncio.Protocol):
    """The additions to both of uvicorn's protocols."""

    transport: asyncio.Transport
    cycle: Any

    def __init__(self, guard: SlowClientGuard, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._guard = guard
        self._seen: tuple[Phase, Any] | None = None  # phase and request at the last sweep
        self._since = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._guard.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._guard.connections.discard(self)

    def close_if_slow(self, now: float, longest_s: dict[Phase, float]) -> bool:
        """Close the connection if it stayed in one phase for too long; return whether it did."""
        seen = (self.phase(), self.cycle)
        if seen != self._seen:
            self._seen, self._since = seen, now
        if now - self._since <= longest_s.get(seen[0], math.inf):
            return False
        self.transport.abort()
        return True

    def phase(self) -> Phase:
        """Return what the connection waits for."""
        if self.transport.is_closing() or self.transport.get_write_buffer_size():
            return Phase.READER
        if self.cycle is None:
            return Phase.HEAD
        if not self.cycle.response_complete:
            return Phase.BODY if self.cycle.more_body else Phase.WORK
        if self.has_begun_head():
            return Phase.HEAD
        return Phase.DISCARD if self.cycle.more_body else Phase.IDLE

    def has_begun_head(self) -> bool:
        """Return whether the connection has received a part of a head."""
        raise NotImplementedError

    def shutdown(self) -> None:
        """Close the connection as soon as its request is answered. uvicorn calls this when it begins to stop."""
        self._guard.stop()
        if self.phase() is Phase.BODY:  # the application has not seen it yet
            self.transport.abort()
        else:
            super().shutdown()  # type: ignore[misc]  # of uvicorn's protocol

    def send_400_response(self, msg: str) -> None:  # noqa: ARG002 - uvicorn's own sentence
        """Answer invalid HTTP in the shape of all errors."""
        self.refuse(MALFORMED)

    def refuse(self, kind: ErrorKind) -> None:
        """Close, after an error response if it cannot be mistaken for the answer to an earlier request."""
        if self.cycle is None or self.cycle.response_complete:
            body = orjson.dumps(RequestError(kind).body)
            head = (
                f"HTTP/1.1 {kind.status} {HTTPStatus(kind.status).phrase}\r\ncontent-type: application/json\r\n"
                f"connection: close\r\ncontent-length: {len(body)}\r\n\r\n"
            )
            self.transport.write(head.encode() + body)
        self.transport.close()


class _GuardedHttpTools(_Guarded, HttpToolsProtocol):
    head_bytes = 0

    def has_begun_head(self) -> bool:
        """The parser creates a scope at the first byte of a head, and a cycle with it at the last."""
        return self.scope is not (None if self.cycle is None else self.cycle.scope)

    def data_received(self, data: bytes) -> None:
        """Parse *data*, and reject an endless head."""
        super().data_received(data)
        self.head_bytes = self.head_bytes + len(data) if self.has_begun_head() else 0
        if self.head_bytes > MAX_HEAD_BYTES:
            self.refuse(HEAD_TOO_LARGE)


class _GuardedH11(_Guarded, H11Protocol):
    def has_begun_head(self) -> bool:
        """h11 keeps an incomplete head in its buffer."""
        return bool(self.conn.trailing_data[0])

"""Closes connections that do not go on, which uvicorn itself never does.

uvicorn 0.54 has no time-out for the head or the body of a request, nor for a client that does not
read its answer, and it waits for all of them when it is stopped. The guard is installed at the
start of the lifespan, through the ``Config`` that the running server reads for each new connection,
so that plain ``uvicorn main:app`` is protected too; nothing of uvicorn is changed for other servers
in the process.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from http import HTTPStatus
from typing import Any

import orjson
from uvicorn.config import Config
from uvicorn.lifespan.on import LifespanOn
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from error_handler import ConfigurationError, ErrorKind, RequestError
from service.errors import HEAD_TOO_LARGE, MALFORMED

logger = logging.getLogger(__name__)

SWEEP_EVERY_S = 0.5
# The application answers 408 when a body is late; the guard comes after it, for what the application cannot see.
AFTER_APPLICATION_S = 2.0
# How long an answer may stay unread when the server is being stopped.
UNREAD_WHEN_STOPPING_S = 2.0
# Longer than clients and proxies keep a connection: where both sides end it together, a request is lost on its way.
KEEP_ALIVE_S = 75
UVICORN_KEEP_ALIVE_S = 5
# uvicorn's own limit comes after ours, which answers 503 where it would break off.
AFTER_GRACE_S = 3.0

# How long the rest of a body may take that was refused; a client that is not done hears nothing where it is cut off.
DISCARD_S = 3.0
MAX_HEAD_BYTES = 65_536  # what h11 allows by itself; httptools takes any size


class Phase(Enum):
    """What a connection waits for."""

    IDLE = "another request; uvicorn's keep-alive closes it"
    HEAD = "the head of a request"
    DISCARD = "the rest of a body that was refused"
    BODY = "the body of a request"
    WORK = "the application"
    READER = "the client, to read its answer"


@dataclass(frozen=True, slots=True)
class GuardLimits:
    """Longest waits in seconds, and how many connections may be open (None: no limit)."""

    head_s: float
    body_s: float
    grace_s: float
    max_connections: int | None = None


def server_config(receive: Any) -> Config | None:
    """Return the configuration of the uvicorn whose lifespan *receive* belongs to; None for other servers."""
    lifespan = getattr(receive, "__self__", None)
    return lifespan.config if isinstance(lifespan, LifespanOn) else None


class SlowClientGuard:
    """Watches the connections of one server; *on_stop* is called with the grace period when it begins to stop."""

    def __init__(self, config: Config, limits: GuardLimits, on_stop: Callable[[float], None]) -> None:
        self._config = config
        self._limits = limits
        self._on_stop = on_stop
        self._connections: set[_Guarded] = set()
        self._sweeper: asyncio.Task[None] | None = None
        self.stopping = False

    def start(self) -> None:
        """Guard every connection from now on; call it in the running loop, before the server listens.

        Raises:
            ConfigurationError: The server was told to use a protocol class that is not known here.
        """
        known: dict[type, type[_Guarded]] = {HttpToolsProtocol: _GuardedHttpTools, H11Protocol: _GuardedH11}
        guarded = known.get(self._config.http_protocol_class)
        if guarded is None:
            raise ConfigurationError(
                "uvicorn runs with an unknown protocol; start it with --http httptools or --http h11."
            )

        def create(**arguments: Any) -> _Guarded:
            protocol = guarded(**arguments)
            protocol.guard = self
            return protocol

        self._config.http_protocol_class = create  # type: ignore[assignment]  # uvicorn only calls it
        self._config.ws_protocol_class = None
        if self._config.timeout_keep_alive == UVICORN_KEEP_ALIVE_S:
            self._config.timeout_keep_alive = KEEP_ALIVE_S
        self._config.encoded_headers = [pair for pair in self._config.encoded_headers if pair[0] != b"server"]
        if self._config.timeout_graceful_shutdown is None:
            self._config.timeout_graceful_shutdown = math.ceil(self._limits.grace_s + AFTER_GRACE_S)
        self._sweeper = asyncio.create_task(self._sweep(), name="slow-client-guard")

    async def close(self) -> None:
        """Stop watching."""
        if self._sweeper is not None:
            self._sweeper.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._sweeper

    def admit(self, protocol: _Guarded) -> None:
        """Watch a new connection. Where there are too many, the idle ones make room; without any, it is closed."""
        limit = self._limits.max_connections
        if self.stopping or (limit is not None and len(self._connections) >= limit and not self._close_idle()):
            protocol.transport.abort()
        self._connections.add(protocol)

    def _close_idle(self) -> bool:
        idle = [protocol for protocol in self._connections if protocol.phase() is Phase.IDLE]
        for protocol in idle:
            protocol.transport.abort()
        return bool(idle)

    def forget(self, protocol: _Guarded) -> None:
        """Stop watching a connection that is gone."""
        self._connections.discard(protocol)

    def stop(self) -> None:
        """Take note that the server has begun to stop."""
        if not self.stopping:
            self.stopping = True
            given_s = float(self._config.timeout_graceful_shutdown or 0.0)
            self._on_stop(min(self._limits.grace_s, max(given_s - AFTER_GRACE_S, given_s / 2)))

    async def _sweep(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(SWEEP_EVERY_S)
            now = loop.time()
            closed = 0
            for protocol in list(self._connections):
                phase = protocol.phase()
                seen = (phase, protocol.cycle)
                if protocol.seen != seen:
                    protocol.seen, protocol.since = seen, now
                elif now - protocol.since > self._longest_s(phase):
                    protocol.transport.abort()
                    closed += 1
            if closed:
                logger.warning("closed %d connections that did not go on", closed)

    def _longest_s(self, phase: Phase) -> float:
        if phase in (Phase.WORK, Phase.IDLE):
            return math.inf
        if phase is Phase.HEAD:
            return self._limits.head_s
        if phase is Phase.DISCARD:
            return DISCARD_S
        if phase is Phase.READER and self.stopping:
            return UNREAD_WHEN_STOPPING_S
        return self._limits.body_s + AFTER_APPLICATION_S


class _Guarded(asyncio.Protocol):
    """What both of uvicorn's protocols get; *seen* is what the last sweeps saw, *since* when they saw it first."""

    guard: SlowClientGuard
    transport: asyncio.Transport
    cycle: Any
    timeout_keep_alive_task: asyncio.TimerHandle | None
    seen: tuple[Phase, Any] | None = None
    since = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self.guard.admit(self)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self.guard.forget(self)

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
        """Whether a part of a head is there that makes no request yet."""
        raise NotImplementedError

    def shutdown(self) -> None:
        """Called by the server for each open connection when it begins to stop."""
        self.guard.stop()
        if self.phase() is Phase.BODY:  # nobody has begun to work for it
            self.transport.abort()
        else:
            super().shutdown()  # type: ignore[misc]  # of uvicorn's protocol

    def send_400_response(self, msg: str) -> None:  # noqa: ARG002 - uvicorn's own sentence
        """Answer what is not HTTP in the shape of all errors."""
        self.refuse(MALFORMED)

    def refuse(self, kind: ErrorKind) -> None:
        """Answer a request that has no complete head, where an answer can be told from that of another, and close."""
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
        """The parser makes a scope with the first byte, and a cycle of it with the last."""
        return self.scope is not (None if self.cycle is None else self.cycle.scope)

    def data_received(self, data: bytes) -> None:
        """Parse what came, and refuse a head without end."""
        super().data_received(data)
        self.head_bytes = self.head_bytes + len(data) if self.has_begun_head() else 0
        if self.head_bytes > MAX_HEAD_BYTES:
            self.refuse(HEAD_TOO_LARGE)


class _GuardedH11(_Guarded, H11Protocol):
    def has_begun_head(self) -> bool:
        """What makes no event yet stays in h11's buffer."""
        return bool(self.conn.trailing_data[0])

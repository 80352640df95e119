"""HTTP on a raw asyncio.Protocol, so that resets, slow bytes and cut bodies are easy."""

import asyncio
import socket
import struct
from collections import deque
from typing import TYPE_CHECKING, cast

import httptools

from .faults import Fault
from .replies import TEXT_TYPE, Clock

if TYPE_CHECKING:
    from .records import RequestRecord
    from .scheduler import Job
    from .server import FakeServer

_REASONS = {
    200: b"OK",
    204: b"No Content",
    301: b"Moved Permanently",
    307: b"Temporary Redirect",
    400: b"Bad Request",
    401: b"Unauthorized",
    403: b"Forbidden",
    404: b"Not Found",
    405: b"Method Not Allowed",
    413: b"Request Entity Too Large",
    429: b"Too Many Requests",
    499: b"Client Closed Request",
    500: b"Internal Server Error",
    501: b"Not Implemented",
    502: b"Bad Gateway",
    503: b"Service Unavailable",
    504: b"Gateway Timeout",
}
_MAX_PIPELINED = 64
_TICK_S = 0.02
_RESET_DELAY_S = 0.02  # lets the bytes before the reset arrive first
_LINGER_ZERO = struct.pack("ii", 1, 0)


class Exchange:
    """One request, and the means to answer it."""

    __slots__ = (
        "body",
        "clock",
        "connection",
        "counted",
        "host",
        "job",
        "keep_alive",
        "method",
        "path",
        "record",
        "request_id",
        "status",
        "streaming",
        "target",
        "timer",
        "user_sha",
        "wire_fault",
    )

    def __init__(self, connection: "Connection", method: bytes, target: str, body: bytes) -> None:
        self.connection = connection
        self.clock: Clock = connection.server.clock
        self.method = method
        self.target = target
        self.path = target.partition("?")[0]
        self.body = body
        self.host = b""
        self.request_id = ""
        self.keep_alive = True
        self.user_sha = ""
        self.status = 0
        self.streaming = False
        self.wire_fault: Fault | None = None
        self.timer: asyncio.TimerHandle | None = None
        self.job: Job | None = None
        self.record: RequestRecord | None = None
        self.counted = False

    def send(self, status: int, body: bytes, content_type: bytes, headers: bytes = b"") -> None:
        """Send the whole answer, spoiled by `wire_fault` where there is one."""
        self.status = status
        head = self._head(status, content_type, headers + b"Content-Length: %d\r\n" % len(body))
        if self.method == b"HEAD":
            body = b""
        if self.wire_fault is None:
            self.connection.write(head + body)
            self.connection.exchange_ended(self)
        else:
            self._send_spoiled(self.wire_fault, head, body)

    def start_stream(self, content_type: bytes) -> None:
        """Send the head of a chunked answer."""
        self.status = 200
        self.streaming = True
        self.connection.write(self._head(200, content_type, b"Transfer-Encoding: chunked\r\n"))

    def send_chunk(self, data: bytes) -> None:
        """Send one chunk of a stream."""
        self.connection.write(b"%x\r\n%b\r\n" % (len(data), data))

    def end_stream(self) -> None:
        """Send the end of a stream."""
        self.connection.write(b"0\r\n\r\n")
        self.connection.exchange_ended(self)

    def close(self) -> None:
        """Close the connection once what was written is out."""
        self.keep_alive = False
        self.connection.exchange_ended(self)

    def reset(self) -> None:
        """End the connection with a TCP RST instead of a FIN."""
        self.keep_alive = True  # the connection must not be closed the gentle way
        self.connection.exchange_ended(self)
        self.connection.reset()

    def write_raw(self, data: bytes) -> None:
        """Send bytes that are not an HTTP answer of ours."""
        self.connection.write(data)

    def _head(self, status: int, content_type: bytes, headers: bytes) -> bytes:
        reason = _REASONS.get(status, b"Unknown")
        sha = b"X-Fake-User-Sha256: %b\r\n" % self.user_sha.encode() if self.user_sha else b""
        close = b"" if self.keep_alive else b"Connection: close\r\n"
        return b"HTTP/1.1 %d %b\r\nContent-Type: %b\r\nDate: %b\r\n%b%b%b\r\n" % (
            status,
            reason,
            content_type,
            self.clock.http_date(),
            sha,
            headers,
            close,
        )

    def _send_spoiled(self, fault: Fault, head: bytes, body: bytes) -> None:
        params = fault.params
        if fault.kind == "half_json":
            # The length is right: only the JSON inside is cut.
            half = body[: len(body) // 2]
            self.connection.write(head.replace(b"Length: %d\r" % len(body), b"Length: %d\r" % len(half)) + half)
            self.connection.exchange_ended(self)
        elif fault.kind == "slow_headers":
            self._drip(head, float(params.get("bytes_per_s", 10.0)), body)
        elif fault.kind == "slow_body":
            self.connection.write(head)
            self._drip(body, float(params.get("bytes_per_s", 1.0)), b"")
        elif fault.kind == "reset_after":
            self.connection.write((head + body)[: int(params.get("bytes", 20))])
            self.timer = self.connection.loop.call_later(_RESET_DELAY_S, self.reset)
        else:
            self.connection.write(head + body[: int(params.get("bytes", len(body) // 2))])
            self.close()

    def _drip(self, slow: bytes, bytes_per_s: float, rest: bytes) -> None:
        size = max(1, int(bytes_per_s * _TICK_S))
        pause_s = size / bytes_per_s
        position = 0

        def step() -> None:
            nonlocal position
            if position >= len(slow):
                self.connection.write(rest)
                self.connection.exchange_ended(self)
                return
            self.connection.write(slow[position : position + size])
            position += size
            self.timer = self.connection.loop.call_later(pause_s, step)

        step()


class Connection(asyncio.Protocol):
    """One client connection: parses requests, answers them one after the other."""

    def __init__(self, server: "FakeServer") -> None:
        self.server = server
        self.loop = server.loop
        self._transport: asyncio.Transport | None = None
        self._parser = httptools.HttpRequestParser(self)
        self._waiting: deque[Exchange] = deque()
        self._current: Exchange | None = None
        self._starting = False
        self._target = b""
        self._body: list[bytes] = []
        self._host = b""
        self._request_id = b""
        self._wants_continue = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Part of asyncio.Protocol."""
        self._transport = cast("asyncio.Transport", transport)
        self.server.connections.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        """Part of asyncio.Protocol; the client is gone, so its request is cancelled, as in Go."""
        self._transport = None
        self.server.connections.discard(self)
        self._waiting.clear()
        current, self._current = self._current, None
        if current is not None:
            if current.timer is not None:
                current.timer.cancel()
            self.server.client_left(current)

    def data_received(self, data: bytes) -> None:
        """Part of asyncio.Protocol."""
        self.server.bytes_in += len(data)
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserCallbackError:
            raise  # a bug of the fake, not of the client
        except (httptools.HttpParserUpgrade, httptools.HttpParserError):
            self._refuse()

    def on_url(self, url: bytes) -> None:
        """Part of httptools' protocol; may come in pieces."""
        self._target += url

    def on_header(self, name: bytes, value: bytes) -> None:
        """Part of httptools' protocol."""
        size = len(name)
        if size == 4 and name.lower() == b"host":
            self._host = value
        elif size == 12 and name.lower() == b"x-request-id":
            self._request_id = value
        elif size == 6 and name.lower() == b"expect":
            self._wants_continue = True

    def on_headers_complete(self) -> None:
        """Part of httptools' protocol."""
        if self._wants_continue:
            self._wants_continue = False
            self.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def on_body(self, body: bytes) -> None:
        """Part of httptools' protocol."""
        self._body.append(body)

    def on_message_complete(self) -> None:
        """Part of httptools' protocol: a whole request is there."""
        body = self._body[0] if len(self._body) == 1 else b"".join(self._body)
        exchange = Exchange(self, self._parser.get_method(), self._target.decode("latin-1"), body)
        exchange.host = self._host
        if self._request_id:
            exchange.request_id = self._request_id.decode("latin-1")
        exchange.keep_alive = self._parser.should_keep_alive()
        self._target = self._host = self._request_id = b""
        self._body = []
        self._waiting.append(exchange)
        if len(self._waiting) > _MAX_PIPELINED and self._transport is not None:
            self._transport.pause_reading()
        if self._current is None:
            self._start_next()

    def exchange_ended(self, exchange: Exchange) -> None:
        """Called by the exchange after its last byte was written."""
        if self._current is not exchange:
            return
        self._current = None
        self.server.exchange_ended(exchange)
        if not exchange.keep_alive:
            if self._transport is not None:
                self._transport.close()
            return
        self._start_next()

    def write(self, data: bytes) -> None:
        """Write unless the connection is gone."""
        if self._transport is not None:
            self._transport.write(data)

    def reset(self) -> None:
        """Abort the connection; linger 0 makes the kernel send RST."""
        if self._transport is not None:
            connected: socket.socket = self._transport.get_extra_info("socket")
            connected.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_ZERO)
            self._transport.abort()

    def _start_next(self) -> None:
        """Handle waiting requests; flat, because handling may end before it returns."""
        if self._starting:
            return
        self._starting = True
        try:
            while self._waiting and self._current is None:
                self._current = self._waiting.popleft()
                self.server.handle(self._current)
        finally:
            self._starting = False
        if not self._waiting and self._transport is not None and not self._transport.is_reading():
            self._transport.resume_reading()

    def _refuse(self) -> None:
        """Answer like Go to what is not HTTP."""
        self.write(
            b"HTTP/1.1 400 Bad Request\r\nContent-Type: %b\r\nConnection: close\r\n\r\n400 Bad Request" % TEXT_TYPE
        )
        if self._transport is not None:
            self._transport.close()

"""A real HTTP server that receives notifications, well or badly, and one that only counts connections."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Behaviour = Callable[[BaseHTTPRequestHandler], None]
FLOOD_BYTES = 2_000_000_000


class Receiver(ThreadingHTTPServer):
    """Keeps (headers, body) of each POST and answers with the next of *behaviours*, the last one for ever."""

    daemon_threads = True
    block_on_close = False

    def __init__(self, *behaviours: Behaviour) -> None:
        self.received: list[tuple[dict[str, str], bytes]] = []
        self.arrived = threading.Event()
        self.released = threading.Event()  # ends those that hang
        self.flooded = 0
        self.cut_off = threading.Event()  # the client left in the middle of a flood
        self.behaviours = list(behaviours) or [status(200)]
        super().__init__(("127.0.0.1", 0), _Handler)

    @property
    def url(self) -> str:
        """The address to post to."""
        return f"http://127.0.0.1:{self.server_address[1]}/hook"

    @property
    def payloads(self) -> list[dict[str, Any]]:
        """The bodies, parsed."""
        return [json.loads(body) for _, body in self.received]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that leaves is what some tests are about."""


class _Handler(BaseHTTPRequestHandler):
    server: Receiver
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.received.append((dict(self.headers), body))
        self.server.arrived.set()
        place = min(len(self.server.received), len(self.server.behaviours)) - 1
        self.server.behaviours[place](self)

    def log_message(self, *_: object) -> None:
        pass


def status(code: int, **headers: str) -> Behaviour:
    """Answer *code* with *headers*, no body."""

    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(code)
        for name, value in headers.items():
            handler.send_header(name, value)
        handler.send_header("Content-Length", "0")
        handler.end_headers()

    return answer


def hang(handler: BaseHTTPRequestHandler) -> None:
    """Say nothing until the test ends."""
    handler.server.released.wait(60)  # type: ignore[attr-defined]


def trickle(handler: BaseHTTPRequestHandler) -> None:
    """A header without end, a byte at a time: each one resets the time-out of a socket."""
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nX-Slow: ")
    while not handler.server.released.wait(0.05):  # type: ignore[attr-defined]
        handler.wfile.write(b"a")
        handler.wfile.flush()


def flood(handler: BaseHTTPRequestHandler) -> None:
    """200, and 2 GB of body."""
    handler.send_response(200)
    handler.send_header("Content-Length", str(FLOOD_BYTES))
    handler.end_headers()
    receiver: Receiver = handler.server  # type: ignore[assignment]
    try:
        while receiver.flooded < FLOOD_BYTES:
            receiver.flooded += handler.wfile.write(b"x" * 65536)
    except OSError:
        receiver.cut_off.set()
    handler.close_connection = True


@contextmanager
def receiving(*behaviours: Behaviour) -> Iterator[Receiver]:
    """Serve in a thread."""
    with Receiver(*behaviours) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.released.set()
            server.shutdown()
            thread.join()


class Canary:
    """Listens on this machine, on IPv4 and IPv6, and counts who comes; nobody should."""

    def __init__(self) -> None:
        self._sockets = [socket.create_server(("127.0.0.1", 0))]
        self.port = self._sockets[0].getsockname()[1]
        if socket.has_ipv6:
            with suppress(OSError):  # no IPv6 here, so nobody can come that way
                self._sockets.append(socket.create_server(("::1", self.port), family=socket.AF_INET6))

    def visits(self) -> int:
        """The number of connections so far."""
        count = 0
        for listener in self._sockets:
            listener.setblocking(False)
            try:
                while True:
                    listener.accept()[0].close()
                    count += 1
            except BlockingIOError:
                pass
        return count

    def close(self) -> None:
        for listener in self._sockets:
            listener.close()

"""A real HTTP server in a thread that looks like the REST service and fails as a test tells it to."""

from __future__ import annotations

import contextlib
import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

WAIT_S = 20.0

LABELS = {"intent": "Order Status", "topic": "Shipping/Delivery", "sentiment": "Negative", "categorization": "Late."}


@dataclass(frozen=True)
class Reply:
    """A reply; if *body* is None, it is the right answer to the request."""

    status: int = 200
    body: Any = None
    headers: dict[str, str] = field(default_factory=dict)


def error(status: int, name: str, message: str = "It is so.", **headers: str) -> Reply:
    """An error of the service's one shape."""
    sent = {header.replace("_", "-"): value for header, value in headers.items()}
    return Reply(status, {"error": {"type": name, "message": message}}, sent)


# What happens to a request: its conversation_number, and the how manieth with this number it is (from 1).
Behaviour = Callable[[str, int], Reply]


@dataclass
class ScriptedService:
    """One server; *behave* decides each answer, and POST requests that come while *open* is clear are held."""

    behave: Behaviour
    open: threading.Event = field(default_factory=threading.Event)
    requests: list[dict[str, Any]] = field(default_factory=list)
    asked: Counter[str] = field(default_factory=Counter)
    in_flight: int = 0
    held: int = 0
    most_in_flight: int = 0
    url: str = ""
    _changed: threading.Condition = field(default_factory=threading.Condition)

    def wait_until(self, condition: Callable[[], bool]) -> None:
        """Return when *condition*, of this object, holds."""
        with self._changed:
            assert self._changed.wait_for(condition, WAIT_S), f"{len(self.requests)} requests, {self.held} held"

    def close(self) -> None:
        """Hold every request that comes from now on, until *open* is set."""
        with self._changed:
            self.open.clear()

    def take(self, headers: dict[str, str], body: dict[str, Any]) -> Reply:
        """Record one request, hold it while the server is not *open*, and say what goes back."""
        with self._changed:
            number = body["conversation_number"]
            self.asked[number] += 1
            nth = self.asked[number]
            self.requests.append({"headers": headers, "body": body, "nth": nth})
            self.in_flight += 1
            self.most_in_flight = max(self.most_in_flight, self.in_flight)
            is_held = not self.open.is_set()
            self.held += is_held
            self._changed.notify_all()
        if is_held:
            self.open.wait(WAIT_S)
        with self._changed:
            self.in_flight -= 1
            self.held -= is_held
        return self.behave(number, nth)


def good(_number: str, _nth: int) -> Reply:
    """Answer every request."""
    return Reply()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        reply = self.server.state.take(dict(self.headers), body)
        self._send(reply, {**body, "classification": LABELS} if reply.body is None else reply.body)

    def do_GET(self) -> None:
        self._send(Reply(200 if self.path == "/health" else 404), {"status": "ok"})

    def _send(self, reply: Reply, content: Any) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        with contextlib.suppress(ConnectionError):
            self.send_response(reply.status)
            for name, value in {"Content-Length": str(len(data)), **reply.headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the name is the base class's
        """Say nothing."""


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128
    state: ScriptedService

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that is killed is what the tests do."""


@contextlib.contextmanager
def scripted_service(behave: Behaviour = good) -> Iterator[ScriptedService]:
    """Run a service that behaves as *behave* says, open at first."""
    state = ScriptedService(behave)
    state.open.set()
    server = _Server(("127.0.0.1", 0), _Handler)
    server.state = state
    state.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield state
    finally:
        state.open.set()
        server.shutdown()
        server.server_close()
        thread.join()

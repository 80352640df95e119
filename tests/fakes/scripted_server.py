"""A real HTTP server in a thread that does, request by request, what a test tells it to.

Where `tests.fakes.fake_ollama` behaves like Ollama, this one behaves like nothing in particular: redirects,
compressed bodies, bytes that drip, silence.
"""

from __future__ import annotations

import contextlib
import json
import random
import socket
import ssl
import struct
import threading
import urllib.error
import urllib.request
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

WAIT_S = 30.0
FORWARD_S = 300.0

GOOD_CONTENT = json.dumps(
    {
        "categorization": "Parcel is late.",
        "intent": "Order Status",
        "topic": "Shipping/Delivery",
        "sentiment": "Negative",
    }
)
MODELS = {"models": [{"name": "llama3.2:latest", "digest": "sha256:1"}, {"name": "qwen3:8b", "digest": "sha256:2"}]}


@dataclass(frozen=True)
class Request:
    """One request that the server received."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        """The body, decoded."""
        return json.loads(self.body)


Step = Callable[["Handler"], None]


def chat_reply(content: str = GOOD_CONTENT, **changes: Any) -> dict[str, Any]:
    """A complete answer of /api/chat."""
    message = {"role": "assistant", "content": content}
    return {
        "message": message,
        "done": True,
        "done_reason": "stop",
        "prompt_eval_count": 1500,
        "eval_count": 40,
        **changes,
    }


def answer(content: Any = None, status: int = 200, **headers: str) -> Step:
    """Send *content*: bytes as they are, else as JSON; None is a good chat reply."""
    body = content if isinstance(content, bytes) else json.dumps(chat_reply() if content is None else content).encode()

    def step(handler: Handler) -> None:
        handler.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()
        handler.wfile.write(body)

    return step


def chunked(size: int) -> Step:
    """Send a good reply and *size* bytes of white space, in a body without a length."""
    body = json.dumps(chat_reply()).encode()

    def step(handler: Handler) -> None:
        handler.send_response(200)
        handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()
        for piece in (body, *[b" " * 65_536] * (size // 65_536 + 1), b""):
            handler.wfile.write(b"%x\r\n%b\r\n" % (len(piece), piece))

    return step


def drip(pause_s: float) -> Step:
    """Send a good reply one byte at a time, until the client has enough of it."""
    body = json.dumps(chat_reply()).encode()

    def step(handler: Handler) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        for byte in body:
            handler.wfile.write(bytes([byte]))
            handler.wfile.flush()
            if handler.client_leaves_within(pause_s):
                return
        handler.server_state.dripped_to_the_end = True

    return step


def drip_header(pause_s: float, count: int) -> Step:
    """Send a header one byte at a time, *count* of them, until the client has enough of it; then a good reply."""

    def step(handler: Handler) -> None:
        handler.wfile.write(b"HTTP/1.1 200 OK\r\nX-Slow: ")
        for _ in range(count):
            handler.wfile.write(b"a")
            if handler.client_leaves_within(pause_s):
                return
        handler.server_state.dripped_to_the_end = True
        body = json.dumps(chat_reply(embeddings=[[1.0, 0.0]])).encode()
        handler.wfile.write(b"\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))

    return step


def forward(url: str, **changes: Any) -> Step:
    """Send the request on to the server at *url*, with *changes* of its JSON body, and send back what that answers."""

    def step(handler: Handler) -> None:
        body = json.dumps({**json.loads(handler.body), **changes}).encode() if handler.body else None
        request = urllib.request.Request(url + handler.path, body, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=FORWARD_S) as response:
                answer(response.read(), response.status)(handler)
        except urllib.error.HTTPError as refusal:
            answer(refusal.read(), refusal.code)(handler)

    return step


def hang(handler: Handler) -> None:
    """Say nothing until the client leaves."""
    handler.client_leaves_within(WAIT_S)


def reset(handler: Handler) -> None:
    """Break the connection off."""
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    handler.close_connection = True


def say(raw: bytes) -> Step:
    """Send *raw* in place of an HTTP answer, then close."""

    def step(handler: Handler) -> None:
        handler.wfile.write(raw)
        handler.close_connection = True

    return step


class Handler(BaseHTTPRequestHandler):
    """Records a request, then takes the next step of the script."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # or a body waits 40 ms for the acknowledgement of its headers
    server: Server
    body: bytes

    @property
    def server_state(self) -> ScriptedServer:
        """The server as a test sees it."""
        return self.server.state

    def do_GET(self) -> None:
        """Answer the probe of the breaker and the list of models."""
        self._serve(self.server_state.models)

    def do_POST(self) -> None:
        """Take the next step; the usual one where the script has ended."""
        state = self.server_state
        step = state.show if self.path == "/api/show" else state.script.popleft() if state.script else state.otherwise
        self._serve(step)

    def client_leaves_within(self, seconds: float) -> bool:
        """Return whether the client closes its side within *seconds*."""
        self.connection.settimeout(seconds)
        try:
            gone = self.connection.recv(1) == b""
        except TimeoutError:
            return False
        except OSError:
            gone = True
        finally:
            self.connection.settimeout(None)
        self.close_connection = True
        if gone:
            self.server_state.client_left.set()
        return gone

    def _serve(self, step: Step) -> None:
        self.body = self.rfile.read(int(self.headers.get("Content-Length", "0")))
        self.server_state.note(Request(self.command, self.path, dict(self.headers), self.body))
        with contextlib.suppress(ConnectionError):
            step(self)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the name is the base class's
        """Say nothing."""


class Server(ThreadingHTTPServer):
    """Threads that outlive the test would hold its port."""

    daemon_threads = True
    block_on_close = False
    state: ScriptedServer

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that leaves early is what the tests do."""


@dataclass
class ScriptedServer:
    """The state of one server: its *script* of POST requests, what it does *otherwise*, and what it got."""

    script: deque[Step] = field(default_factory=deque)
    otherwise: Step = field(default_factory=answer)
    models: Step = field(default_factory=lambda: answer(MODELS))
    show: Step = field(default_factory=lambda: answer({"capabilities": ["completion"]}))
    requests: list[Request] = field(default_factory=list)
    client_left: threading.Event = field(default_factory=threading.Event)
    dripped_to_the_end: bool = False
    port: int = 0
    tls: ssl.SSLContext | None = None
    _arrival: threading.Condition = field(default_factory=threading.Condition)
    _server: Server | None = None

    @property
    def url(self) -> str:
        """Its address."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def chats(self) -> list[Request]:
        """The requests for an answer, without probes."""
        return [request for request in self.requests if request.path.endswith(("/chat", "/generate", "/completions"))]

    def note(self, request: Request) -> None:
        """Record *request* and wake who waits for it."""
        with self._arrival:
            self.requests.append(request)
            self._arrival.notify_all()

    def wait_for_chats(self, count: int) -> None:
        """Return when *count* requests for an answer have come."""
        with self._arrival:
            assert self._arrival.wait_for(lambda: len(self.chats) >= count, WAIT_S), f"{len(self.chats)} requests came"

    def wait_for_requests(self, count: int) -> bool:
        """Return whether *count* requests of any kind have come; False after some seconds."""
        with self._arrival:
            return self._arrival.wait_for(lambda: len(self.requests) >= count, WAIT_S / 3)

    def start(self) -> None:
        """Listen, on the port it had before where there was one."""
        while self._server is None:
            # Below the kernel's range for outgoing connections: a client that keeps calling a port of that
            # range while nobody listens can be connected to itself.
            port = self.port or random.randrange(20_000, 32_000)
            with contextlib.suppress(OSError):
                self._server = Server(("127.0.0.1", port), Handler)
        self._server.state = self
        if self.tls is not None:
            self._server.socket = self.tls.wrap_socket(
                self._server.socket, server_side=True, do_handshake_on_connect=False
            )
        self.port = self._server.server_port
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def stop(self) -> None:
        """Stop listening; does nothing where it does not run."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None


@contextlib.contextmanager
def scripted_server(*steps: Step, tls: ssl.SSLContext | None = None) -> Iterator[ScriptedServer]:
    """Run a server with *steps* for its first POST requests."""
    server = ScriptedServer(deque(steps), tls=tls)
    server.start()
    try:
        yield server
    finally:
        server.stop()

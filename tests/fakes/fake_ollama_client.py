"""A small blocking client for the tests of the fake: what it sends and gets is in plain sight."""

import http.client
import json
import socket
from dataclasses import dataclass
from typing import Any

from tests.fakes.fake_ollama import INTENTS, SENTIMENTS, TOPICS, FakeOllama

TEXT = "Customer: my parcel is three weeks late\nAgent: I am sorry to hear that"
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "categorization": {"type": "string"},
        "intent": {"type": "string", "enum": list(INTENTS)},
        "topic": {"type": "string", "enum": list(TOPICS)},
        "sentiment": {"type": "string", "enum": list(SENTIMENTS)},
    },
    "required": ["categorization", "intent", "topic", "sentiment"],
}
_TIMEOUT_S = 20.0


@dataclass(frozen=True)
class Answer:
    """A whole HTTP answer."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        """The body, decoded; raises ValueError when it is no JSON."""
        return json.loads(self.body)

    @property
    def content(self) -> str:
        """``message.content`` of a chat answer."""
        content = self.json["message"]["content"]
        assert isinstance(content, str)
        return content

    @property
    def lines(self) -> list[Any]:
        """The objects of a stream."""
        return [json.loads(line) for line in self.body.splitlines()]


def chat_body(text: str = TEXT, **fields: Any) -> dict[str, Any]:
    """A request like those of the batch worker; *fields* replace or add, None removes."""
    body: dict[str, Any] = {
        "model": "llama3.2",
        "messages": [{"role": "system", "content": "Label it."}, {"role": "user", "content": text}],
        "stream": False,
        "format": SCHEMA,
        "options": {"temperature": 0, "num_ctx": 4096, "num_predict": 700},
    } | fields
    return {name: value for name, value in body.items() if value is not None}


def send(
    fake: FakeOllama,
    method: str,
    path: str,
    body: Any = None,
    *,
    headers: dict[str, str] | None = None,
    timeout_s: float = _TIMEOUT_S,
) -> Answer:
    """Send one request on a new connection; *body* is encoded unless it is bytes already."""
    raw = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    connection = http.client.HTTPConnection(fake.host, fake.port, timeout=timeout_s)
    try:
        connection.request(method, path, raw, headers or {})
        response = connection.getresponse()
        return Answer(response.status, dict(response.getheaders()), response.read())
    finally:
        connection.close()


def post(fake: FakeOllama, path: str, body: Any, **options: Any) -> Answer:
    """`send` with POST."""
    return send(fake, "POST", path, body, **options)


def chat(fake: FakeOllama, text: str = TEXT, **fields: Any) -> Answer:
    """One ``/api/chat`` request."""
    return post(fake, "/api/chat", chat_body(text, **fields))


def open_chat(fake: FakeOllama, text: str = TEXT, **fields: Any) -> socket.socket:
    """Send a chat request and leave the answer unread; the caller closes the socket."""
    raw = json.dumps(chat_body(text, **fields)).encode()
    opened = socket.create_connection((fake.host, fake.port), timeout=_TIMEOUT_S)
    opened.sendall(http_request("POST", "/api/chat", raw))
    return opened


def http_request(method: str, path: str, body: bytes = b"", headers: str = "") -> bytes:
    """The bytes of one keep-alive request."""
    head = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\n{headers}Content-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


def read_to_end(opened: socket.socket) -> bytes:
    """Everything until the server closes; raises ConnectionResetError when it resets."""
    received = b""
    while piece := opened.recv(65536):
        received += piece
    return received


def strike(fake: FakeOllama, kind: str, **params: Any) -> None:
    """Configure one fault, in the place of all others."""
    fake.configure(faults=[{"kind": kind, **params}])

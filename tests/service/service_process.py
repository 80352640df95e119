"""The REST service as its users run it: a separate uvicorn process, and plain HTTP to it."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.forked_process import OF_THE_BUILT_IN_CLASSIFIER, ForkedProcess, run_forked

ROOT = Path(__file__).parents[2]
START_TIMEOUT_S = 60.0
# For a service that classifies nothing: loading the built-in classifier takes most of the start.
NO_MODEL = {"OLLAMA_ENDPOINT": "http://127.0.0.1:1"}
# The service without the packages of the embedding classifier: with API_EMBEDDED it starts in a third of the time.
WITH_PHRASES = "tests.service.service_with_phrases:app"
PRELOADED = (
    *("uvicorn.loops.uvloop", "uvicorn.protocols.websockets.auto", "fastapi.telemetry._runtime"),
    *("tests.service.preloaded", "tests.service.similar_service"),
)

CONVERSATION = {
    "conversation_number": "123",
    "messages": [
        {"sender": "customer", "timestamp": "2026-11-21T10:00:00Z", "text": "Where is my parcel? It is late again."},
        {"sender": "agent", "text": "I am sorry. What is the order number?"},
    ],
}


def conversation(text: str = "Where is my parcel?", number: str = "1") -> dict[str, Any]:
    return {"conversation_number": number, "messages": [{"sender": "customer", "text": text}]}


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> str:
        """The type in an error body, whose shape is checked."""
        assert set(self.json) == {"error"}
        assert set(self.json["error"]) == {"type", "message"}
        return str(self.json["error"]["type"])


@dataclass
class ServiceProcess:
    process: ForkedProcess
    port: int
    log_path: Path
    sockets: list[socket.socket] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def log(self) -> str:
        return self.log_path.read_text(encoding="utf-8")

    def request(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None, timeout_s: float = 20
    ) -> Answer:
        """Send one request on a new connection; a dict is sent as JSON."""
        sent = dict(headers or {})
        if isinstance(body, dict | list):
            body = json.dumps(body).encode()
            sent = {"Content-Type": "application/json", **sent}
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout_s)
        try:
            connection.request(method, path, body, sent)
            response = connection.getresponse()
            got: dict[str, str] = {}
            for name, value in response.getheaders():
                got[name.lower()] = f"{got[name.lower()]}, {value}" if name.lower() in got else value
            return Answer(response.status, got, response.read())
        finally:
            connection.close()

    def get(self, path: str, headers: dict[str, str] | None = None) -> Answer:
        return self.request("GET", path, headers=headers)

    def classify(self, body: Any = None, **headers: str) -> Answer:
        """POST /classify; header names with underscores."""
        sent = {name.replace("_", "-"): value for name, value in headers.items()}
        return self.request("POST", "/classify", CONVERSATION if body is None else body, sent)

    def connect(self, data: bytes = b"") -> socket.socket:
        """Open a connection, send *data* and leave it open."""
        sock = socket.create_connection(("127.0.0.1", self.port), timeout=20)
        self.sockets.append(sock)
        if data:
            sock.sendall(data)
        return sock

    def metric(self, name: str) -> float:
        """The number of the series *name*, labels included; 0.0 where it is not there."""
        for line in self.get("/metrics").body.decode().splitlines():
            if line.startswith(f"{name} "):
                return float(line.rsplit(" ", 1)[1])
        return 0.0

    def wait_for_metric(self, name: str, value: float, timeout_s: float = 30.0) -> None:
        """Return as soon as the series has *value*."""
        end = time.monotonic() + timeout_s
        while self.metric(name) != value:
            assert time.monotonic() < end, f"{name} is {self.metric(name)}, not {value}"
            time.sleep(0.02)

    def wait_for_log(self, text: str, timeout_s: float = 30.0) -> None:
        """Return as soon as *text* is in the log: a request is written down when its answer is on its way already."""
        end = time.monotonic() + timeout_s
        while text not in self.log:
            assert time.monotonic() < end, self.log
            time.sleep(0.02)

    def terminate(self, timeout_s: float) -> int:
        """Send SIGTERM and return how the process ended."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout_s)


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def service_environment(**variables: str) -> dict[str, str]:
    """The environment of a service: that of the tests without settings of this product, and *variables*."""
    kept = {
        name: value for name, value in os.environ.items() if not name.startswith(("API_", "OLLAMA_", "LLM_", "LOG_"))
    }
    return {**kept, "PYTHONPATH": str(ROOT), **variables}


@contextmanager
def serve(folder: Path, *flags: str, app: str = "main:app", **variables: str) -> Iterator[ServiceProcess]:
    """Run plain ``uvicorn`` with *app* and *flags* in *folder* until the end of the block."""
    port = free_port()
    command = ["-m", "uvicorn", app, "--host", "127.0.0.1", "--port", str(port), *flags]
    log_path = folder / f"service-{port}.log"
    log_path.touch()
    has_encoder = variables.get("API_EMBEDDED") == "true" and app != WITH_PHRASES
    preload = (*PRELOADED, *(OF_THE_BUILT_IN_CLASSIFIER if has_encoder else ()))
    files = (log_path, log_path)
    process = ForkedProcess(command, service_environment(**variables), folder, files, preload=preload)
    service = ServiceProcess(process, port, log_path)
    try:
        wait_until_it_answers(service)
        yield service
    finally:
        for sock in service.sockets:
            sock.close()
        process.kill()
        process.wait()


def wait_until_it_answers(service: ServiceProcess) -> None:
    end = time.monotonic() + START_TIMEOUT_S
    while True:
        try:
            service.get("/health")
            return
        except OSError:
            assert service.process.poll() is None, service.log
            assert time.monotonic() < end, service.log
            time.sleep(0.05)


def run_to_the_end(folder: Path, *command: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a command that should end by itself."""
    return run_forked(command, service_environment(**variables), folder)

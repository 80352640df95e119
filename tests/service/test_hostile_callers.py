"""Callers who mean harm: slow, large, endless and deep requests. Each is ended; the others are served."""

from __future__ import annotations

import contextlib
import gzip
import json
import select
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from service.slow_clients import MAX_HEAD_BYTES
from tests.fakes.fake_ollama import FakeOllama
from tests.service.service_process import CONVERSATION, ServiceProcess, conversation, serve

HEAD = b"POST /classify HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
MEMORY_GROWTH_BYTES = 20 * 1024 * 1024


@contextlib.contextmanager
def serve_quickly(folder: Path, fake: FakeOllama, protocol: str) -> Iterator[ServiceProcess]:
    """A service that waits for a second where the default is ten."""
    settings = {"API_HEADER_TIMEOUT_S": "1", "API_BODY_TIMEOUT_S": "1", "LOG_LEVEL": "DEBUG"}
    with serve(folder, "--http", protocol, OLLAMA_ENDPOINT=fake.url, OLLAMA_MODEL="llama3.2", **settings) as process:
        process.classify()
        yield process


@pytest.fixture(scope="module")
def quick(fake: FakeOllama, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceProcess]:
    with serve_quickly(tmp_path_factory.mktemp("quick"), fake, "httptools") as process:
        yield process


def open_after(sockets: dict[socket.socket, bytes], limit_s: float) -> list[socket.socket]:
    """Return the sockets that are still open after *limit_s*, at once when all are closed; each drips its bytes."""
    start = time.monotonic()
    still_open = set(sockets)
    drops = 0
    while still_open and time.monotonic() - start < limit_s:
        if time.monotonic() - start > drops * 0.2:
            for sock in still_open:
                drip = sockets[sock]
                with contextlib.suppress(OSError):  # closed; the next read raises
                    sock.send(drip[drops % len(drip) : drops % len(drip) + 1] if drip else b"")
            drops += 1
        readable, _, _ = select.select(list(still_open), [], [], 0.1)
        for sock in readable:
            try:
                gone = not sock.recv(65_536)
            except OSError:
                gone = True
            if gone:
                still_open.discard(sock)
    return list(still_open)


SLOW = {
    "never a byte": (b"", b""),
    "half a head": (HEAD, b""),
    "a dripping head": (HEAD, b"X-Drip: a\r\n"),
    "half a body": (HEAD + b"Content-Length: 100\r\n\r\n{", b""),
    "a dripping body": (HEAD + b"Content-Length: 100\r\n\r\n{", b" "),
    "a dripping chunked body": (HEAD + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\n \r\n"),
    "half a second head": (b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\nGET /hea", b""),
    "a dripping body after its answer": (
        b"POST /nothing HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n",
        b" ",
    ),
}


@pytest.mark.parametrize("protocol", ["httptools", pytest.param("h11", marks=pytest.mark.thorough)])
def test_slow_connections_are_closed(protocol: str, fake: FakeOllama, tmp_path: Path) -> None:
    """Within a few seconds of the limit, whatever they send meanwhile; so is one that does not read its answers."""
    with serve_quickly(tmp_path, fake, protocol) as service:
        kinds = {service.connect(sent): (name, drip) for name, (sent, drip) in SLOW.items()}
        deaf = socket.socket()
        service.sockets.append(deaf)
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        deaf.connect(("127.0.0.1", service.port))
        deaf.sendall(b"GET /docs/assets/swagger-ui-bundle.js HTTP/1.1\r\nHost: localhost\r\n\r\n" * 20)
        left = open_after({sock: drip for sock, (_, drip) in kinds.items()}, 10)
        assert [kinds[sock][0] for sock in left] == []
        # The kernel goes on trying to deliver what it took; what counts is that the service has let go of it.
        end = time.monotonic() + 60
        while has_connection(service, deaf):
            assert time.monotonic() < end, "the connection is open"
            time.sleep(0.05)


def has_connection(service: ServiceProcess, client: socket.socket) -> bool:
    links = psutil.Process(service.process.pid).net_connections()
    return any(link.raddr and link.raddr.port == client.getsockname()[1] for link in links)


def test_slow_body_gets_408(quick: ServiceProcess) -> None:
    """408 in the shape of all errors, before the connection is closed."""
    with quick.connect(HEAD + b"Content-Length: 100\r\n\r\n{").makefile("rb") as reader:
        answer = reader.read()
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b"\r\nconnection: close\r\n" in answer.lower()
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["type"] == "RequestTimeoutError"


@pytest.mark.thorough
def test_two_hundred_slow_sockets_are_closed_while_others_are_served(tmp_path: Path, fake: FakeOllama) -> None:
    """With the limits that are shipped: 15 s at most, and requests go through all the while."""
    with serve(tmp_path, OLLAMA_ENDPOINT=fake.url, OLLAMA_MODEL="llama3.2") as service:
        before = psutil.Process(service.process.pid).memory_info().rss
        with contextlib.suppress(OSError):  # a head without end is cut off while it is sent
            send_all_it_takes(service.connect(), HEAD + b"X-Large: ", b"a" * 65_536, 3_000)
        kinds = list(SLOW.values()) * 25
        sockets = {service.connect(sent): drip for sent, drip in kinds}
        for _ in range(20):
            assert service.classify().status == 200
            assert service.get("/health").status == 200
        assert open_after(sockets, 60) == []
        assert service.classify().status == 200
        assert psutil.Process(service.process.pid).memory_info().rss - before < MEMORY_GROWTH_BYTES


def send_all_it_takes(sock: socket.socket, head: bytes, chunk: bytes, chunks: int) -> bytes:
    """Send like a client that reads while it sends; return the answer as soon as it is there."""
    sock.sendall(head)
    sock.setblocking(False)
    end = time.monotonic() + 60
    for _ in range(chunks):
        view = memoryview(chunk)
        while view:
            assert time.monotonic() < end, "neither answered nor closed"
            readable, writable, _ = select.select([sock], [sock], [], 30)
            if readable:
                return sock.recv(65_536)
            if writable:
                view = view[sock.send(view) :]
    sock.settimeout(5)
    return sock.recv(65_536)


@pytest.mark.parametrize(
    ("head", "chunk", "chunks", "status"),
    [
        (HEAD + b"Content-Length: 52428800\r\n\r\n", b"", 0, 413),
        (HEAD + b"Content-Length: 52428800\r\n\r\n", b"a" * 65_536, 800, 413),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\n", b"10000\r\n" + b" " * 65_536 + b"\r\n", 100_000, 413),
        (HEAD + b"Content-Length: 99999999999999999999\r\n\r\n", b"a", 1, 0),
        (HEAD + b"Content-Length: -1\r\n\r\n", b"a", 1, 400),
        (HEAD + b"X-Large: " + b"a" * 100_000 + b"\r\n", b"b" * 65_536, 10_000, 0),
        (b"GET /" + b"a" * 100_000, b"a" * 65_536, 10_000, 0),
    ],
    ids=[
        "50 MB announced",
        "50 MB",
        "chunks without end",
        "length beyond numbers",
        "negative length",
        "header without end",
        "path without end",
    ],
)
def test_oversized_request_is_rejected_before_it_is_read(
    quick: ServiceProcess, head: bytes, chunk: bytes, chunks: int, status: int
) -> None:
    """The answer (0: any refusal, or an end) comes while the client still sends, and memory does not grow."""
    before = psutil.Process(quick.process.pid).memory_info().rss
    try:
        answer = send_all_it_takes(quick.connect(), head, chunk, chunks)
    except OSError:
        answer = b""
    assert answer.startswith(f"HTTP/1.1 {status} ".encode()) if status else answer[9:10] in (b"4", b"")
    assert quick.classify().status == 200
    assert psutil.Process(quick.process.pid).memory_info().rss - before < MEMORY_GROWTH_BYTES


def test_head_beyond_the_limit_gets_431(quick: ServiceProcess) -> None:
    """One byte too many is enough; the head need not be complete."""
    start = HEAD + b"X-Large: "
    with quick.connect(start + b"a" * (MAX_HEAD_BYTES + 1 - len(start))) as sock:
        assert sock.recv(12) == b"HTTP/1.1 431"


@pytest.mark.slow
def test_malicious_bodies_are_rejected_within_bounded_memory(quick: ServiceProcess) -> None:
    """Compressed, deep, repetitive and numerous bodies get a 4xx each, and memory stays."""
    before = psutil.Process(quick.process.pid).memory_info().rss
    bombs = [
        (gzip.compress(b" " * 50_000_000), {"Content-Encoding": "gzip"}, 415),
        (b"[" * 200_000, {}, 400),
        (b'{"a":' * 50_000, {}, 400),
        (b'{"conversation_number":"1","messages":[' + b",".join([b"[]"] * 80_000) + b"]}", {}, 422),
        (json.dumps({f"k{number}": number for number in range(10_000)}).encode(), {}, 422),
        (json.dumps({"conversation_number": "1", "messages": [{}] * 10_000}).encode(), {}, 422),
        (json.dumps(conversation("\u200b" * 40_000)).encode(), {}, 422),
    ]
    for body, headers, status in bombs * 3:
        answer = quick.request("POST", "/classify", body, {"Content-Type": "application/json", **headers})
        assert answer.status == status
        assert len(answer.body) < 1_000
    assert psutil.Process(quick.process.pid).memory_info().rss - before < MEMORY_GROWTH_BYTES


def test_concurrent_bodies_stay_within_the_memory_budget(quick: ServiceProcess) -> None:
    """A hundred unfinished bodies of 250 kB do not fit: the later ones get 503, and memory is bounded."""
    before = psutil.Process(quick.process.pid).memory_info().rss
    part = HEAD + b"Content-Length: 260000\r\n\r\n" + b" " * 250_000
    sockets = [quick.connect(part) for _ in range(100)]
    answers = []
    for sock in sockets:
        try:
            answers.append(sock.recv(12))
        except OSError:
            answers.append(b"")
    assert b"HTTP/1.1 503" in answers
    assert b"HTTP/1.1 408" in answers
    assert psutil.Process(quick.process.pid).memory_info().rss - before < 2 * MEMORY_GROWTH_BYTES
    assert open_after(dict.fromkeys(sockets, b""), 10) == []
    assert quick.classify().status == 200


def test_request_content_never_appears_in_logs_or_metrics(quick: ServiceProcess, fake: FakeOllama) -> None:
    """Texts, numbers, header values, paths and queries, on the ways of success and of failure."""
    secret = "CANARY-4929"
    good = conversation(f"{secret} \n\x1b[31m late", number=secret)
    for kind in ([], [{"kind": "wrong_label"}], [{"kind": "busy_503"}], [{"kind": "overflow_400"}]):
        fake.configure(faults=kind)
        quick.classify(good, User_Agent=secret, Referer=secret, X_Request_ID=f"{secret} x", Idempotency_Key=secret)
    fake.configure(faults=[])
    quick.classify({secret: secret})
    quick.request("POST", f"/classify?{secret}={secret}", good)
    quick.get(f"/{secret}")
    quick.connect(secret.encode() + b"\r\n\r\n").recv(100)
    answered = quick.classify(CONVERSATION)
    assert answered.status == 200
    everything = quick.log + quick.get("/metrics").body.decode()
    assert secret not in everything
    assert "\x1b" not in everything

"""Each HTTP client of the product with a proxy in the environment, a server that redirects, and certificates."""

from __future__ import annotations

import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import certifi
import pytest
from pydantic import SecretStr

from error_handler import ConfigurationError, TriadError
from network import outgoing
from network.outgoing import is_inside, problem_of, route_to
from openai_batch.notifications import Mailbox, Webhook
from tests.network.outgoing_clients import CLIENTS, Call

OURS = {"content-type", "authorization", "idempotency-key", "x-request-id"}
OF_HTTP = {"host", "connection", "accept", "accept-encoding", "content-length", "transfer-encoding"}
# Of each library one: aiohttp, requests, httpx2.
SOME_CLIENTS = [
    pytest.param(call, id=name, marks=() if name in ("worker", "sync", "jobs") else pytest.mark.thorough)
    for name, call in CLIENTS.items()
]
PUBLIC = "triad.example"  # no server has this name


class Recorder:
    """A server that keeps each request and answers with *status*; with *location*, a redirect."""

    def __init__(self, status: int, location: str = "", tls: ssl.SSLContext | None = None) -> None:
        self.requests: list[tuple[str, str, dict[str, str]]] = []
        recorder = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                recorder.requests.append((self.command, self.path, {k.lower(): v for k, v in self.headers.items()}))
                self.send_response(status)
                if location:
                    self.send_header("Location", location)
                self.send_header("Content-Length", "0")
                self.send_header("Connection", "close")
                self.end_headers()

            do_GET = do_CONNECT = do_POST  # noqa: N815 - the names of the library

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads, self._server.block_on_close = True, False
        self._server.handle_error = lambda *_: None  # type: ignore[method-assign]
        if tls:
            self._server.socket = tls.wrap_socket(self._server.socket, server_side=True, do_handshake_on_connect=False)
        self.port = self._server.server_address[1]
        self.url = f"http{'s' if tls else ''}://127.0.0.1:{self.port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def proxy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Recorder]:
    """A proxy in the environment, and everything else that a library may take from there."""
    recorder = Recorder(502)
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, recorder.url)
        monkeypatch.setenv(name.lower(), recorder.url)
    monkeypatch.setenv("OPENAI_ORG_ID", "org-other")
    monkeypatch.setenv("OPENAI_PROJECT_ID", "proj-other")
    monkeypatch.setenv("OPENAI_CUSTOM_HEADERS", "X-Other: other\nAuthorization: Bearer other\nHost: other")
    (tmp_path / "netrc").write_text("default login other password other\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    yield recorder
    recorder.close()


@pytest.fixture(params=CLIENTS.values(), ids=CLIENTS)
def client(request: pytest.FixtureRequest) -> Call:
    call: Call = request.param
    return call


@pytest.mark.parametrize("allowed", [pytest.param("false", marks=pytest.mark.thorough), "true"])
def test_private_address_gets_each_request_directly_and_no_redirect_is_followed(
    client: Call, proxy: Recorder, allowed: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """No byte goes to the proxy or to the address of the redirect, and only headers of ours are sent."""
    monkeypatch.setenv("PROXY_FROM_ENVIRONMENT", allowed)
    other = Recorder(500)
    first = Recorder(307, other.url.replace("127.0.0.1", "localhost") + "/v1/files")
    with suppress(TriadError):
        client(first.url, tmp_path)
    other.close()
    first.close()
    assert not proxy.requests
    assert not other.requests
    assert first.requests
    for _, _, headers in first.requests:
        assert headers.keys() <= OURS | OF_HTTP | {"user-agent"}
        assert headers["user-agent"] == "customer-support-triad"
        assert not any("other" in value for value in headers.values())


@pytest.mark.parametrize("scheme", [pytest.param("http", marks=pytest.mark.thorough), "https"])
def test_public_address_uses_the_proxy_only_by_the_setting(
    client: Call, proxy: Recorder, scheme: str, certificate: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Without PROXY_FROM_ENVIRONMENT the proxy gets nothing."""
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))  # those of the system take long to read

    def unknown(*_: object, **__: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    resolve = socket.getaddrinfo
    monkeypatch.setattr(
        socket, "getaddrinfo", lambda host, *a, **k: (unknown if PUBLIC in str(host) else resolve)(host, *a, **k)
    )
    with pytest.raises(TriadError):
        client(f"{scheme}://{PUBLIC}", tmp_path)
    assert not proxy.requests
    monkeypatch.setenv("PROXY_FROM_ENVIRONMENT", "true")
    with suppress(TriadError):
        client(f"{scheme}://{PUBLIC}", tmp_path)
    assert all(PUBLIC in path for _, path, _ in proxy.requests)
    assert {method == "CONNECT" for method, _, _ in proxy.requests} == {scheme == "https"}


@pytest.mark.parametrize("kind", ["socks5://127.0.0.1:1080", "socks://127.0.0.1:1080", "https://127.0.0.1:3128"])
def test_unsupported_proxy_is_named_and_disturbs_no_private_address(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library would fail with an ImportError or a ValueError."""
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("ALL_PROXY", kind)
    assert route_to("http://8.8.8.8").proxy is None
    monkeypatch.setenv("PROXY_FROM_ENVIRONMENT", "true")
    assert route_to("http://127.0.0.1:11434").proxy is None
    with pytest.raises(ConfigurationError, match="ALL_PROXY"):
        route_to("http://8.8.8.8")
    monkeypatch.setenv("NO_PROXY", "8.8.8.8")
    assert route_to("http://8.8.8.8").proxy is None


def test_name_of_a_private_address_is_asked_directly(proxy: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    """A proxy cannot reach it, or must not read what goes there."""
    monkeypatch.setenv("PROXY_FROM_ENVIRONMENT", "true")
    address = (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("10.1.2.3", 0))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_: [address])
    assert route_to("http://llm.example.com").proxy is None
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_: [(*address[:4], ("93.184.215.14", 0))])
    assert route_to("http://llm.example.com").proxy == proxy.url


@pytest.mark.parametrize("host", ["ollama:11434", "gpu.internal", "[fd00::7]:8000"])
def test_private_name_is_asked_directly_even_if_it_does_not_resolve(
    host: str, proxy: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A container that is not up yet must not send its conversations through the proxy."""

    def unknown(*_: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setenv("PROXY_FROM_ENVIRONMENT", "true")
    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    assert route_to(f"http://{host}").proxy is None
    assert route_to("http://llm.example.com").proxy == proxy.url


@pytest.mark.parametrize(
    ("host", "inside"),
    [
        *(
            (host, True)
            for host in ("localhost", "LOCALHOST.", "127.0.0.1", "::1", "10.0.0.5", "192.168.1.2", "0.0.0.0")
        ),
        *((host, True) for host in ("172.31.0.1", "100.64.0.1", "169.254.1.1", "fd00::1", "fe80::1%eth0", "ollama")),
        *((host, True) for host in ("::ffff:10.0.0.5", "gpu.local", "host.docker.internal", "2130706433")),
        *((host, False) for host in ("8.8.8.8", "2606:4700::1111", "api.openai.com", "::ffff:8.8.8.8")),
    ],
)
def test_private_addresses(host: str, inside: bool) -> None:
    assert is_inside(host) is inside


def test_failed_connection_names_the_proxy_that_is_not_used(proxy: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise a network that needs its proxy looks like a wrong address."""
    assert "PROXY_FROM_ENVIRONMENT=true" in str(problem_of(OSError(), "https://api.openai.com/v1"))
    monkeypatch.setenv("PROXY_FROM_ENVIRONMENT", "true")
    assert "through the proxy of HTTPS_PROXY" in str(problem_of(OSError(), "https://api.openai.com/v1"))
    assert problem_of(OSError(), "http://127.0.0.1:11434") is None


@pytest.fixture
def server(certificate: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Recorder]:
    for name in ("SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE"):
        monkeypatch.delenv(name, raising=False)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate)
    recorder = Recorder(403, tls=context)
    yield recorder
    recorder.close()


@pytest.mark.parametrize("client", SOME_CLIENTS)
def test_untrusted_certificate_is_named_with_the_variable(client: Call, server: Recorder, tmp_path: Path) -> None:
    """Nothing is sent, and the message does not ask to start a server that runs."""
    with pytest.raises(TriadError) as caught:
        client(server.url, tmp_path)
    if client.__name__ in ("jobs", "openai_embeddings", "ollama_embeddings"):
        assert isinstance(
            caught.value, ConfigurationError
        )  # another attempt cannot help, nor can halves of the request
    assert "the certificate of https://127.0.0.1" in str(caught.value)
    assert "SSL_CERT_FILE" in str(caught.value)
    assert not server.requests


@pytest.mark.parametrize("name", ["SSL_CERT_FILE", pytest.param("REQUESTS_CA_BUNDLE", marks=pytest.mark.thorough)])
def test_certificates_of_the_environment_are_trusted(
    client: Call, server: Recorder, certificate: Path, name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(name, str(certificate))
    with suppress(TriadError):
        client(server.url, tmp_path)
    assert server.requests


def test_named_certificates_replace_those_of_the_system(certificate: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All variables count together."""
    monkeypatch.delenv("SSL_CERT_FILE", raising=False)
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(certificate))
    monkeypatch.setenv("SSL_CERT_DIR", str(certificate.parent))
    assert outgoing.trusted_certificates().cert_store_stats()["x509"] == 1


def test_certificates_of_requests_itself_are_not_trusted_as_well(
    server: Recorder, certificate: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Whoever names an authority wants no other."""
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", certifi.where())
    monkeypatch.setattr("requests.adapters.DEFAULT_CA_BUNDLE_PATH", str(certificate))
    with pytest.raises(TriadError, match="is not trusted"):
        CLIENTS["sync"](server.url, tmp_path)


def test_unreadable_file_of_certificates_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("SSL_CERT_FILE", "SSL_CERT_DIR"):
        monkeypatch.delenv(name, raising=False)
    for path in (tmp_path / "missing.pem", Path(__file__)):
        monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(path))
        with pytest.raises(ConfigurationError, match="REQUESTS_CA_BUNDLE"):
            route_to("https://127.0.0.1")
        with pytest.raises(ConfigurationError, match="REQUESTS_CA_BUNDLE"):  # at the start, not at a notification
            Webhook(SecretStr("https://127.0.0.1/hook"), None)
        with pytest.raises(ConfigurationError, match="REQUESTS_CA_BUNDLE"):
            Mailbox("a@example.com", "127.0.0.1:465", None, None)


@pytest.mark.parametrize("client", SOME_CLIENTS)
def test_other_tls_problems_have_their_sentence(
    client: Call, server: Recorder, certificate: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A certificate for another name, and a server without TLS."""
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    with pytest.raises(TriadError, match="use a name that the certificate has"):
        client(server.url.replace("127.0.0.1", "localhost"), tmp_path)
    plain = Recorder(403)
    with pytest.raises(TriadError, match=r"http:// is without TLS"):
        client(plain.url.replace("http:", "https:"), tmp_path)
    plain.close()

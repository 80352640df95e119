"""Outgoing HTTP: one constructor for each client library, and the route to a server.

Customer text goes to the address in the settings and nowhere else. No client follows redirects, keeps cookies, or takes
proxies, headers or passwords from the environment. Only PROXY_FROM_ENVIRONMENT=true allows its proxies, and never for
addresses of this machine and of private networks. The libraries are imported late, because a program needs one of them.
"""

from __future__ import annotations

import ipaddress
import os
import socket
import ssl
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from error_handler import ConfigurationError

if TYPE_CHECKING:
    import aiohttp
    import httpx2
    import requests
    from requests.adapters import HTTPAdapter

HEADERS = {"User-Agent": "customer-support-triad"}
# Headers of HTTP itself. Everything else must be told, and httpx2 makes Host from the address.
_PLAIN = frozenset(("connection", "accept", "accept-encoding", "content-type", "content-length", "transfer-encoding"))
_INSIDE = (".localhost", ".local", ".internal", ".intranet", ".lan", ".home.arpa")

# The end of a connection that worked before.
_BROKEN_OFF = frozenset(
    {"UNEXPECTED_EOF_WHILE_READING", "APPLICATION_DATA_AFTER_CLOSE_NOTIFY", "DECRYPTION_FAILED_OR_BAD_RECORD_MAC"}
)
_EXPIRED, _WRONG_NAMES = 10, (62, 64)  # X509_V_ERR_* of OpenSSL


@dataclass(frozen=True, slots=True)
class Route:
    """The way to one server: through *proxy* (None: directly), trusting the certificates of *tls* (None: no TLS)."""

    proxy: str | None = None
    tls: ssl.SSLContext | None = None

    @property
    def options(self) -> dict[str, Any]:
        """The options of each request of aiohttp."""
        return {"proxy": self.proxy, "ssl": self.tls or True, "allow_redirects": False}


def route_to(url: str) -> Route:
    """Return the route to the server of *url*.

    Raises:
        ConfigurationError: A file of certificates cannot be read, or the proxy is of a kind that is not supported.
    """
    parts = urlsplit(url)
    tls = trusted_certificates() if parts.scheme == "https" else None
    host = parts.hostname or ""
    if is_inside(host) or not _settings().proxy_from_environment:
        return Route(None, tls)
    found = _environment_proxy(parts.scheme, host)
    if found is None or _resolves_inside(host):
        return Route(None, tls)
    name, proxy = found
    if not proxy.lower().startswith("http://"):
        raise ConfigurationError(
            f"{name} names a proxy of an unsupported kind; use one of the form http://HOST:PORT, or set "
            "PROXY_FROM_ENVIRONMENT=false."
        )
    return Route(proxy, tls)


def trusted_certificates() -> ssl.SSLContext:
    """Return a TLS context that trusts SSL_CERT_FILE, SSL_CERT_DIR and REQUESTS_CA_BUNDLE; without them, the system's.

    Raises:
        ConfigurationError: One of them cannot be read.
    """
    settings = _settings()
    if not (settings.ssl_cert_file or settings.ssl_cert_dir or settings.requests_ca_bundle):
        import certifi  # noqa: PLC0415 - only for https

        context = ssl.create_default_context()
        context.load_verify_locations(certifi.where())  # small containers have no certificates of their own
        return context
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    for name in ("ssl_cert_file", "ssl_cert_dir", "requests_ca_bundle"):
        named = getattr(settings, name) or ""
        for path in filter(None, named.split(os.pathsep) if name == "ssl_cert_dir" else [named]):
            try:
                context.load_verify_locations(**{"capath" if os.path.isdir(path) else "cafile": path})
            except OSError as exc:  # ssl.SSLError is one
                raise ConfigurationError(
                    f"{name.upper()}: no certificates can be read from {path}; name a PEM file, or remove the variable."
                ) from exc
    return context


def is_inside(host: str) -> bool:
    """Return whether *host* is this machine or in a private network, as far as its name tells."""
    name = host.lower().rstrip(".").partition("%")[0]
    try:
        address = ipaddress.ip_address(name)
    except ValueError:
        return "." not in name or name.endswith(_INSIDE)
    return not (getattr(address, "ipv4_mapped", None) or address).is_global


def _resolves_inside(host: str) -> bool:
    try:
        return any(is_inside(str(entry[4][0])) for entry in socket.getaddrinfo(host, None))
    except (OSError, UnicodeError):
        return False  # only the proxy can look it up


def certificate_problem(exc: BaseException, url: str) -> str | None:
    """Return the sentence for a connection to *url* that failed by *exc* because of the certificate; else None."""
    for cause in _causes(exc):
        if not isinstance(cause, ssl.SSLCertVerificationError) or not hasattr(cause, "verify_code"):
            continue  # aiohttp's subclass has no code
        if cause.verify_code == _EXPIRED:
            remedy = "renew it"
        elif cause.verify_code in _WRONG_NAMES:
            remedy = "use a name that the certificate has"
        else:
            remedy = "set SSL_CERT_FILE (or REQUESTS_CA_BUNDLE) to the PEM file of the authority that signed it"
        return f"the certificate of {origin(url)} is not trusted ({cause.verify_message.rstrip('.')}); {remedy}"
    return None


def problem_of(exc: BaseException, url: str, setting: str = "the address") -> str | None:
    """Return the sentence for a connection to *url* that failed by *exc*, if DNS, TLS or a missing proxy explains it.

    *setting* is the name of the setting that holds the address.
    """
    if known := certificate_problem(exc, url):
        return known
    for cause in _causes(exc):
        if isinstance(cause, socket.gaierror):
            return f"the name of {origin(url)} cannot be resolved (DNS); correct {setting}, or check the network"
        reason = getattr(cause, "reason", None) or ""
        if isinstance(cause, ssl.SSLError) and reason and reason not in _BROKEN_OFF:
            reason = reason.replace("_", " ").lower()
            return f"no TLS connection to {origin(url)} ({reason}); correct {setting}: http:// is without TLS"
    parts = urlsplit(url)
    host = parts.hostname or ""
    if not is_inside(host) and (found := _environment_proxy(parts.scheme, host)):
        if not _settings().proxy_from_environment:
            return f"no connection to {origin(url)}; {found[0]} is not used unless PROXY_FROM_ENVIRONMENT=true"
        return f"no connection to {origin(url)} through the proxy of {found[0]}; check both"
    return None


def origin(url: str) -> str:
    """Return *url* without its path, which may hold a key: for messages and logs."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"


def _causes(exc: BaseException | None) -> Iterator[BaseException]:
    while exc is not None:
        yield exc
        exc = exc.__cause__ or exc.__context__


def _settings() -> Any:
    from config.network_settings import load_network_settings  # noqa: PLC0415 - not needed for a local server

    return load_network_settings()


def _environment_proxy(scheme: str, host: str) -> tuple[str, str] | None:
    from config.network_settings import environment_proxy  # noqa: PLC0415 - not needed for a local server

    return environment_proxy(scheme, host)


def aiohttp_session(connector: aiohttp.BaseConnector) -> aiohttp.ClientSession:
    """Return a session over *connector*; the caller closes it, and passes ``Route.options`` with each request.

    Nothing is decompressed, because that would hide the size of a body.
    """
    import aiohttp  # noqa: PLC0415

    return aiohttp.ClientSession(
        connector=connector,
        headers=HEADERS | {"Accept-Encoding": "identity"},
        cookie_jar=aiohttp.DummyCookieJar(),
        trust_env=False,
        auto_decompress=False,
    )


def requests_session(adapter: HTTPAdapter) -> requests.Session:
    """Return a session over *adapter*, which sends each request on its ``Route``; the caller closes it."""
    from http.cookiejar import DefaultCookiePolicy  # noqa: PLC0415

    import requests  # noqa: PLC0415

    session = requests.Session()
    session.trust_env = False
    session.headers.clear()
    session.headers.update(HEADERS | {"Accept-Encoding": "identity"})
    session.cookies.set_policy(DefaultCookiePolicy(allowed_domains=[]))
    session.mount("http://", adapter)
    session.mount("https://", adapter)
    return session


def httpx2_client(url: str, headers: Mapping[str, str], timeout: Any, limits: Any = None) -> httpx2.AsyncClient:
    """Return a client for the server of *url*; the caller closes it. *timeout* and *limits* are those of httpx2.

    It sends *headers* and none that a package above it adds, such as organisation and system. Raises as ``route_to``
    does.
    """
    import httpx2  # noqa: PLC0415

    route, told = route_to(url), {name.lower(): value for name, value in (HEADERS | dict(headers)).items()}

    class Transport(httpx2.AsyncHTTPTransport):
        async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
            # A copy, because the openai package reads its own headers again when the answer is there. Cookies stay out, too.
            plain = [(name, value) for name, value in request.headers.items() if name in _PLAIN and name not in told]
            sent = httpx2.Request(
                request.method,
                request.url,
                headers=[("host", request.url.netloc.decode()), *plain, *told.items()],
                stream=request.stream,
                extensions=request.extensions,
            )
            return await super().handle_async_request(sent)

    return httpx2.AsyncClient(
        transport=Transport(
            verify=route.tls or ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT),  # its own default takes 0.1 s, also for http
            proxy=route.proxy,
            trust_env=False,
            limits=limits or httpx2.Limits(max_connections=100, max_keepalive_connections=20),
        ),
        timeout=timeout,
        trust_env=False,
        follow_redirects=False,
    )

"""Posts notifications to the operator's webhook, and to no other address.

The address comes from the settings, never from a document. Each connection resolves and checks it once and connects
to that very result, so that DNS rebinding cannot redirect it. Redirects are not followed, and only the status of the
response is read.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import re
import socket
import time
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import orjson
from aiohttp.abc import AbstractResolver, ResolveResult
from pydantic import SecretStr

from error_handler import ConfigurationError, JobConnectionError, JobValidationError

TIMEOUT_S = 10.0  # per POST, from the lookup to the status

_HOST = re.compile(r"[A-Za-z0-9._-]{1,253}")  # libraries disagree on other characters
# Addresses of cloud credentials, in addition to the link-local 169.254.169.254.
_METADATA = frozenset(map(ipaddress.ip_address, ("fd00:ec2::254", "100.100.100.200", "192.0.0.192")))
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
_MAY_CHANGE = frozenset({408, 425, 429})

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


def signature(secret: str, at: int, body: bytes) -> str:
    """Return the ``X-Signature`` header for *body* sent *at* (unix seconds): ``t=AT,v1=HEX``."""
    digest = hmac.new(secret.encode(), f"{at}.".encode() + body, hashlib.sha256).hexdigest()
    return f"t={at},v1={digest}"


class Webhook:
    """One URL that receives POSTs."""

    def __init__(self, url: SecretStr, secret: SecretStr | None, resolver: AbstractResolver | None = None) -> None:
        """Check *url*. *secret* signs the body; *resolver* None uses the system's.

        Raises:
            ConfigurationError: *url* is malformed or not allowed.
        """
        require_webhook(url.get_secret_value())
        self._url, self._secret = url, secret
        self._resolver = resolver

    async def send(self, payload: dict[str, Any]) -> None:
        """Post *payload* as JSON.

        Raises:
            JobConnectionError: No response within TIMEOUT_S, or one that a retry may change.
            JobValidationError: The receiver refused it, or its address is not allowed.
        """
        body = orjson.dumps(payload)
        headers = {"Content-Type": "application/json"}
        if self._secret is not None:
            headers["X-Signature"] = signature(self._secret.get_secret_value(), int(time.time()), body)
        resolver = GuardedResolver(self._resolver or aiohttp.ThreadedResolver())
        connector = aiohttp.TCPConnector(resolver=resolver, use_dns_cache=False, force_close=True)
        timeout = aiohttp.ClientTimeout(total=TIMEOUT_S)
        try:
            async with (
                aiohttp.ClientSession(connector=connector, timeout=timeout, trust_env=False) as session,
                session.post(self._url.get_secret_value(), data=body, headers=headers, allow_redirects=False) as answer,
            ):
                status = answer.status
                answer.close()
        except (aiohttp.ClientError, OSError, ValueError) as exc:  # a timeout is an OSError
            # Only the class: the error's text holds the URL, and URLs hold tokens.
            raise JobConnectionError(f"the webhook did not respond ({type(exc).__name__})") from exc
        if 300 <= status < 500 and status not in _MAY_CHANGE:
            raise JobValidationError(f"the webhook refused it (HTTP {status})")
        if not 200 <= status < 300:
            raise JobConnectionError(f"the webhook failed (HTTP {status})")


class GuardedResolver(AbstractResolver):
    """Resolves names with *resolver* and refuses addresses that are not allowed; see ``is_allowed``."""

    def __init__(self, resolver: AbstractResolver) -> None:
        self._resolver = resolver

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        """Return the addresses of *host*; raise JobValidationError if one is not allowed."""
        found = await self._resolver.resolve(host, port, family)
        for entry in found:
            if not is_allowed(host, ipaddress.ip_address(entry["host"])):
                raise JobValidationError("the webhook's name resolves to an address that is not allowed")
        return found

    async def close(self) -> None:
        """Close the wrapped resolver."""
        await self._resolver.close()


def require_webhook(url: str) -> None:
    """Raise ConfigurationError if *url* is not a plain http(s) URL, or its address is not allowed."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port
    except ValueError:
        parts, host, port = urlsplit(""), "", None
    if parts.scheme not in ("http", "https") or not host or "@" in parts.netloc or parts.fragment or port == 0:
        raise ConfigurationError(
            "NOTIFICATION_WEBHOOK must be http(s)://host[:port][/path], without user and password."
        )
    literal = _literal(host)
    if literal is not None:
        if not is_allowed(host, literal):
            raise ConfigurationError("NOTIFICATION_WEBHOOK has an address that is not allowed; use the receiver's own.")
    elif not _HOST.fullmatch(host) or _is_disguised(host):
        raise ConfigurationError("NOTIFICATION_WEBHOOK: write the host as a name, as 192.0.2.1 or as [2001:db8::1].")


def is_allowed(host: str, address: Address) -> bool:
    """Return whether a webhook with the name *host* may have *address*.

    Private networks are allowed, because the operator chose the webhook. This machine is allowed under its own name
    (localhost, 127.0.0.1) only: another name that resolves to it is an attack.
    """
    meant = _inside(address)
    if meant.is_link_local or meant.is_multicast or meant.is_unspecified or meant in _METADATA:
        return False
    return not meant.is_loopback or host == "localhost" or (_literal(host) is not None and meant == address)


def _inside(address: Address) -> Address:
    """Return the IPv4 address that *address* embeds, or *address* itself."""
    if isinstance(address, ipaddress.IPv4Address):
        return address
    if address in _NAT64:
        return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    return address.ipv4_mapped or address.sixtofour or address


def _literal(host: str) -> Address | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


def _is_disguised(host: str) -> bool:
    """Return whether the system reads *host* as an IPv4 address, such as 0x7f000001, 2130706433 or 127.1."""
    try:
        socket.inet_aton(host)
    except OSError:
        return False
    return True

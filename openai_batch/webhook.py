"""Posts notifications to the operator's webhook, and nowhere else.

The address comes from the settings, never from a document. It is looked up for each connection, judged, and that very
address is connected to, so that a name cannot lead elsewhere between the two. Redirects are not followed and the
body of the answer is not read: its status is all that counts.
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

TIMEOUT_S = 10.0  # of one POST from its look-up to the status, however slowly bytes trickle

_HOST = re.compile(r"[A-Za-z0-9._-]{1,253}")  # what is not ASCII would be read differently by different libraries
# Where clouds give out credentials, beside the link-local 169.254.169.254.
_METADATA = frozenset(map(ipaddress.ip_address, ("fd00:ec2::254", "100.100.100.200", "192.0.0.192")))
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
_MAY_CHANGE = frozenset({408, 425, 429})

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


def signature(secret: str, at: int, body: bytes) -> str:
    """Return the value of ``X-Signature`` for *body*, sent *at* (unix seconds): ``t=AT,v1=HEX``."""
    digest = hmac.new(secret.encode(), f"{at}.".encode() + body, hashlib.sha256).hexdigest()
    return f"t={at},v1={digest}"


class Webhook:
    """One address that gets POSTs."""

    def __init__(self, url: SecretStr, secret: SecretStr | None, resolver: AbstractResolver | None = None) -> None:
        """Check *url*; *secret* signs what is sent. *resolver* None asks the system for addresses.

        Raises:
            ConfigurationError: It is no address that a webhook has.
        """
        require_webhook(url.get_secret_value())
        self._url, self._secret = url, secret
        self._resolver = resolver

    async def send(self, payload: dict[str, Any]) -> None:
        """Post *payload* as JSON.

        Raises:
            JobConnectionError: No answer within TIMEOUT_S, or one that another attempt may change.
            JobValidationError: The receiver refuses it, or the address is not allowed.
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
        except (aiohttp.ClientError, OSError, ValueError) as exc:  # a time-out is an OSError
            # Names of classes only: the texts of these errors hold the address, and addresses hold tokens.
            raise JobConnectionError(f"the webhook does not answer ({type(exc).__name__})") from exc
        if 300 <= status < 500 and status not in _MAY_CHANGE:
            raise JobValidationError(f"the webhook answers HTTP {status}, so it is not asked again")
        if not 200 <= status < 300:
            raise JobConnectionError(f"the webhook answers HTTP {status}")


class GuardedResolver(AbstractResolver):
    """Lets through what *resolver* finds where a webhook may be there; see ``require_allowed``."""

    def __init__(self, resolver: AbstractResolver) -> None:
        self._resolver = resolver

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        """Return the addresses of *host*; the connection goes to one of them."""
        found = await self._resolver.resolve(host, port, family)
        for entry in found:
            if not is_allowed(host, ipaddress.ip_address(entry["host"])):
                raise JobValidationError("the webhook's name leads to an address that is not allowed")
        return found

    async def close(self) -> None:
        """Close the resolver inside."""
        await self._resolver.close()


def require_webhook(url: str) -> None:
    """Raise ConfigurationError where *url* is no plain http(s) address, or leads to one that no webhook has."""
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
            raise ConfigurationError("NOTIFICATION_WEBHOOK leads to an address that no webhook has.")
    elif not _HOST.fullmatch(host) or _is_disguised(host):
        raise ConfigurationError("NOTIFICATION_WEBHOOK: write the host as a name, 192.0.2.1 or [2001:db8::1].")


def is_allowed(host: str, address: Address) -> bool:
    """Whether a webhook called *host* may be at *address*.

    Private networks are fine, for the operator has set the webhook. This machine is fine where the host says so
    (localhost, 127.0.0.1); a name that leads here has been turned.
    """
    meant = _inside(address)
    if meant.is_link_local or meant.is_multicast or meant.is_unspecified or meant in _METADATA:
        return False
    return not meant.is_loopback or host == "localhost" or (_literal(host) is not None and meant == address)


def _inside(address: Address) -> Address:
    """Return the IPv4 address that some IPv6 ones stand for."""
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
    """Whether the system reads *host* as an IPv4 address: 0x7f000001, 2130706433, 127.1."""
    try:
        socket.inet_aton(host)
    except OSError:
        return False
    return True

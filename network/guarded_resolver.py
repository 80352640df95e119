"""Resolves the names of webhooks, and refuses addresses to which none may be sent."""

from __future__ import annotations

import ipaddress
import socket

import aiohttp
from aiohttp.abc import ResolveResult

from error_handler import JobValidationError

IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address

# Addresses of cloud credentials, in addition to the link-local 169.254.169.254.
_METADATA = frozenset(map(ipaddress.ip_address, ("fd00:ec2::254", "100.100.100.200", "192.0.0.192")))
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")


class GuardedResolver(aiohttp.ThreadedResolver):
    """Resolves names and refuses addresses that are not allowed; see ``is_allowed``."""

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        """Return the addresses of *host*; raise JobValidationError if one is not allowed."""
        found = await super().resolve(host, port, family)
        if not all(is_allowed(host, ipaddress.ip_address(entry["host"])) for entry in found):
            raise JobValidationError("the webhook's name resolves to an address that is not allowed")
        return found


def is_allowed(host: str, address: IPAddress) -> bool:
    """Return whether a webhook with the name *host* may have *address*.

    Private networks are allowed, because the operator chose the webhook. This machine is allowed under its own name
    (localhost, 127.0.0.1) only: another name that resolves to it is an attack.
    """
    meant = address
    if isinstance(address, ipaddress.IPv6Address):  # it may embed an IPv4 address
        nat64 = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF) if address in _NAT64 else None
        meant = nat64 or address.ipv4_mapped or address.sixtofour or address
    if meant.is_link_local or meant.is_multicast or meant.is_unspecified or meant in _METADATA:
        return False
    return not meant.is_loopback or host == "localhost" or (literal_address(host) is not None and meant == address)


def literal_address(host: str) -> IPAddress | None:
    """Return the address that *host* is; None if it is a name."""
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None

"""Which addresses other machines can reach, and why a connection to a server failed."""

from __future__ import annotations

import ipaddress
import socket
from typing import TYPE_CHECKING

from error_handler import ConfigurationError

if TYPE_CHECKING:  # the worker needs no settings of the service
    from config.service_settings import ServiceSettings


def require_keys_outside_this_machine(host: str | None, settings: ServiceSettings) -> None:
    """Check that clients need an API key if other machines can reach *host* (empty or None: every address).

    Raises:
        ConfigurationError: They need none; the message names the setting to add.
    """
    if settings.keys is None and not settings.allow_unauthenticated and not is_loopback(host):
        raise ConfigurationError(
            f"{host or 'every address'} can be reached from outside this machine and API_KEYS is empty: set API_KEYS, listen on "
            "127.0.0.1, or set API_ALLOW_UNAUTHENTICATED=true."
        )


def is_loopback(host: str | None) -> bool:
    """Return whether only this machine reaches *host*, a name or an address; False if it cannot be resolved."""
    if not host:
        return False
    try:
        addresses = {str(entry[4][0]) for entry in socket.getaddrinfo(host, None)}
    except (OSError, UnicodeError):
        return False
    return all(ipaddress.ip_address(address.partition("%")[0]).is_loopback for address in addresses)


def is_this_machine(host: str) -> bool:
    """Return whether *host* is this machine for sure. Names are not resolved, because the answer may change later."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"

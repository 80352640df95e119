"""Whether the service would listen outside this machine."""

from __future__ import annotations

import ipaddress
import os
import socket

from config.service_settings import ServiceSettings
from error_handler import ConfigurationError


def require_keys_outside_this_machine(host: str | None, settings: ServiceSettings) -> None:
    """Refuse to listen on *host* (empty or None: everywhere) where others reach it and nobody needs a key.

    Raises:
        ConfigurationError: It says which setting to add.
    """
    if settings.keys is None and not settings.allow_unauthenticated and not is_loopback(host):
        raise ConfigurationError(
            f"{host or 'every address'} is reached from outside this machine and API_KEYS is empty: set API_KEYS, listen on "
            "127.0.0.1, or say API_ALLOW_UNAUTHENTICATED=true."
        )


def is_loopback(host: str | None) -> bool:
    """Whether only this machine reaches *host*, a name or an address; not where it cannot be found out."""
    if not host:
        return False
    try:
        addresses = {str(entry[4][0]) for entry in socket.getaddrinfo(host, None)}
    except (OSError, UnicodeError):
        return False
    return all(ipaddress.ip_address(address.partition("%")[0]).is_loopback for address in addresses)


def inherited_host(descriptor: int) -> str | None:
    """Return the address of the listening socket *descriptor*; ``localhost`` for a socket in the file system."""
    with socket.socket(fileno=os.dup(descriptor)) as listener:
        name = listener.getsockname()
    return str(name[0]) if isinstance(name, tuple) else "localhost"


def is_this_machine(host: str) -> bool:
    """Whether *host* can be nothing but this machine, without asking for its name: that could be answered otherwise later."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"

"""Shows settings without passwords, keys or tokens."""

from __future__ import annotations

import re
from typing import Any

from pydantic import SecretStr

MASK = "***"

_HOST = r"(?:[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(?::\d{1,5})?"
_HOSTS = re.compile(rf"{_HOST}(?:,{_HOST})*")


def hosts_of(uri: str) -> str:
    """Return the hosts of the MongoDB address *uri*, without user and password; masked if they cannot be determined.

    An ``@`` after the first slash may belong to an unescaped password, whose end cannot be found.
    """
    authority, *rest = re.split("[/?#]", uri.partition("://")[2], maxsplit=1)
    hosts = authority.rpartition("@")[2]
    is_sure = not any("@" in part for part in rest) and _HOSTS.fullmatch(hosts)
    return hosts if is_sure else MASK


def shown(field: str, value: Any) -> str:
    """Return the text for the setting *field*, with secrets and the options of a MongoDB address masked."""
    if value is None:
        return "not set"
    if not isinstance(value, SecretStr):
        return str(value)
    if field != "mongodb_uri":
        return MASK
    uri = value.get_secret_value()
    user = f"{MASK}@" if "@" in uri else ""
    options = f"/?{MASK}" if "?" in uri else ""
    return f"{uri.partition('://')[0]}://{user}{hosts_of(uri)}{options}"

"""Settings as people may see them: no passwords, keys or tokens. Pure."""

from __future__ import annotations

import re
from typing import Any

from pydantic import SecretStr

MASK = "***"

_HOST = r"(?:[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(?::\d{1,5})?"
_HOSTS = re.compile(rf"{_HOST}(?:,{_HOST})*")


def hosts_of(uri: str) -> str:
    """Return the hosts of the MongoDB address *uri*, without user and password; masked where that is not sure.

    An ``@`` behind the first slash may belong to a password that nobody escaped, and then nothing tells its end.
    """
    authority, *rest = re.split("[/?#]", uri.partition("://")[2], maxsplit=1)
    hosts = authority.rpartition("@")[2]
    is_sure = not any("@" in part for part in rest) and _HOSTS.fullmatch(hosts)
    return hosts if is_sure else MASK


def shown(field: str, value: Any) -> str:
    """Return the text for the setting *field*; secrets are masked, and so are the options of a MongoDB address."""
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

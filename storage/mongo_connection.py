"""Opens the client of MongoDB, and explains in one sentence why an address cannot be used.

The sentences quote option names and nothing else: the address and the driver's message may contain the password.
"""

from __future__ import annotations

import asyncio
import re
import warnings
from collections.abc import Awaitable, Callable
from typing import Any

from pymongo import AsyncMongoClient, timeout
from pymongo.errors import PyMongoError

from config import Settings
from error_handler import ConfigurationError, StoreForbiddenError
from storage.extended_json import Document
from storage.files import UNKNOWN_UUID

MAX_POOL_SIZE, MIN_POOL_SIZE = 20, 5  # connections of one process
CLOSE_WAIT_S = 2.0  # for the driver to end its connections
CONNECT_S = 10.0  # short, to report a wrong address soon; three attempts cover half a minute

EXPECTED = "MONGODB_URI is not a usable address; expected mongodb://host:27017."
ESCAPE = (
    "MONGODB_URI has a user name or password with a reserved character (such as / : ? # [ ] @ %); percent-encode both: "
    'python3 -c "import getpass, urllib.parse; print(urllib.parse.quote_plus(getpass.getpass()))".'
)
PLACEHOLDER = "MONGODB_URI still has a placeholder such as <password>; replace it, brackets included."
SRV = (
    "MONGODB_URI starts with mongodb+srv://, which takes one host name and no port; remove the port, or use mongodb://."
)

MASK = "***"
_HOST = r"(?:[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(?::\d{1,5})?"
_HOSTS = re.compile(rf"{_HOST}(?:,{_HOST})*")

# Options of other drivers and older versions, by what does the same here; None: nothing is needed instead.
_REPLACED: dict[str, str | None] = {
    **dict.fromkeys(("useunifiedtopology", "usenewurlparser", "usecreateindex", "usefindandmodify", "keepalive")),
    **dict.fromkeys(("autoreconnect", "reconnecttries", "reconnectinterval", "buffermaxentries", "family", "slaveok")),
    "ssl_cert_reqs": "tlsAllowInvalidCertificates=true",  # as CERT_NONE
    "sslvalidate": "tlsAllowInvalidCertificates=true",  # as false
    "ssl_ca_certs": "tlsCAFile",
    "sslca": "tlsCAFile",
    "ssl_certfile": "tlsCertificateKeyFile",
    "ssl_keyfile": "tlsCertificateKeyFile",
    "sslcert": "tlsCertificateKeyFile",
    "sslkey": "tlsCertificateKeyFile",
    "ssl_match_hostname": "tlsAllowInvalidHostnames=true",
    "poolsize": "maxPoolSize",
    "minsize": "minPoolSize",
}


def open_client(settings: Settings) -> AsyncMongoClient[Document]:
    """Return a client for the running event loop; raise ConfigurationError if MONGODB_URI is not a usable address."""
    uri = settings.mongodb_uri.get_secret_value()
    if problem := doubtful_address(uri):
        raise ConfigurationError(problem)
    try:
        with warnings.catch_warnings(action="error", category=UserWarning):  # misspelt options
            return AsyncMongoClient(
                uri,
                maxPoolSize=MAX_POOL_SIZE,
                minPoolSize=MIN_POOL_SIZE,
                timeoutMS=settings.mongodb_timeout_ms,
                appname="customer-support-triad",
                # One odd document must not end a run: dates after the year 9999, strings that are not UTF-8.
                datetime_conversion="DATETIME_AUTO",
                unicode_decode_error_handler="replace",
            )
    except (PyMongoError, ValueError, OSError, UserWarning) as exc:
        raise ConfigurationError(address_problem(uri, exc)) from exc


async def run_command(database: Any, command: Document, limit_s: float) -> Document:
    """Return the reply of *database* to *command* within *limit_s*; empty from mongomock, which has no commands.

    With timeoutMS, PyMongo looks for a server until that time is over: it ignores serverSelectionTimeoutMS.
    """
    try:
        with timeout(limit_s):
            reply: Document = await database.command(command)
    except NotImplementedError:
        return {}
    return reply


def hosts_of(uri: str) -> str:
    """Return the hosts of the MongoDB address *uri*, without user and password; masked if they cannot be determined.

    An ``@`` after the first slash may belong to an unescaped password, whose end cannot be found.
    """
    authority, *rest = re.split("[/?#]", uri.partition("://")[2], maxsplit=1)
    hosts = authority.rpartition("@")[2]
    is_sure = not any("@" in part for part in rest) and _HOSTS.fullmatch(hosts)
    return hosts if is_sure else MASK


async def close_client(client: Any) -> None:
    """Close *client*, and wait at most CLOSE_WAIT_S for it; the event loop ends the rest.

    PyMongo waits 20 s for its monitor if a server accepts connections but never responds.
    """
    task = asyncio.create_task(client.close())
    await asyncio.wait([task], timeout=CLOSE_WAIT_S)
    if task.done():
        task.result()


def doubtful_address(uri: str) -> str | None:
    """Return what to do about *uri* if the driver would take it, and call a host that nobody meant; else None.

    An ``@`` after the hosts belongs to a password that was not encoded, unless it stands in the value of an option.
    """
    if re.search("<[a-z_]+>", uri):
        return PLACEHOLDER
    authority, separator, rest = _parts(uri)
    text = rest.partition("?")[0] if separator == "/" else rest.partition("=")[0]
    return ESCAPE if "@" in text or authority.count("@") > 1 else None


def address_problem(uri: str, exc: Exception) -> str:
    """Return what to do about *uri*, which the driver refused with *exc*."""
    text = str(exc)
    if "@" in uri and "RFC 3986" in text:
        return ESCAPE
    if uri.startswith("mongodb+srv://") and ("port number" in text or "one host" in text):
        return SRV
    options = re.findall(r"(?:^|[?&;])([A-Za-z_]{1,40})=", _parts(uri)[2].rpartition("?")[2])
    named = {name.lower(): name for name in options}
    unknown = re.match("Unknown option: ([a-z_]+)", text)
    if unknown and (option := named.get(unknown[1])):
        replacement = _REPLACED.get(unknown[1])
        instead = f"write {replacement} instead" if replacement else "remove it"
        if unknown[1] not in _REPLACED:
            instead = "correct its spelling or remove it"
        return f"MONGODB_URI has the option {option}, which this driver (PyMongo) does not know; {instead}."
    if isinstance(exc, OSError):
        return (
            f"A file that MONGODB_URI names (tlsCAFile, tlsCertificateKeyFile) cannot be read ({type(exc).__name__})."
        )
    words = set(re.findall("[a-z_]+", text.lower()))
    if wrong := [name for lower, name in named.items() if lower in words]:
        return f"MONGODB_URI has a wrong value for {' and '.join(wrong)}; correct or remove it."
    return EXPECTED


def _parts(uri: str) -> tuple[str, str, str]:
    """Return the part of *uri* with the hosts, the character that ends it, and the rest."""
    authority, *rest = re.split("([/?])", uri.partition("://")[2], maxsplit=1)
    return (authority, *rest) if rest else (authority, "", "")  # type: ignore[return-value]


async def identity(source: Any, results_name: str, command: Callable[[Any, Document], Awaitable[Document]]) -> str:
    """Return a text that identifies *source* and its results among all servers, by the UUID of *source*.

    *command* sends a command to a database. Raise ConfigurationError if *source* is a view.
    """
    try:
        answer = await command(source.database, {"listCollections": 1, "filter": {"name": source.name}})
    except StoreForbiddenError:  # a right that nothing else needs
        return f"{source.full_name} -> {results_name} ({UNKNOWN_UUID})"
    found = answer["cursor"]["firstBatch"] if answer else []
    if found and found[0].get("type") == "view":
        raise ConfigurationError(
            f"{source.full_name} is a view, which cannot store a status; set MONGODB_SOURCE_COLLECTION to the "
            "collection that it shows."
        )
    uuid = found[0].get("info", {}).get("uuid") if found else None
    return f"{source.full_name} -> {results_name} ({uuid.hex() if uuid else 'new'})"

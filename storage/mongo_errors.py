"""Translates the driver's errors: whether another attempt can help, and one sentence for the operator.

Driver messages are left out: they may contain the address with its password, or a document.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from bson.errors import BSONError, InvalidBSON
from pymongo import errors

from error_handler import (
    ConfigurationError,
    StoreForbiddenError,
    StoreRejectedError,
    StoreUnavailableError,
    StoreUnreadableError,
    TriadError,
)

DUPLICATE_KEY = 11000
UNAUTHORIZED = 13
FORBIDDEN_CODES = frozenset({UNAUTHORIZED, 18, 8000})
VIEW_CODE = 166  # the command is not allowed on a view
UNKNOWN_ZONE_CODE = 40485
ILLEGAL_OPERATION = 20
NO_RETRYABLE_WRITES_CODES = frozenset(
    {ILLEGAL_OPERATION, 301}
)  # the first through the driver, with other meanings, too
TOO_LARGE_CODES = frozenset({10334, 17419})  # a document would grow beyond 16 MiB
VALIDATOR_CODE = 121
_REFUSALS = {VALIDATOR_CODE: "the validator of the collection does not allow it", 14: "a field has another type"}
# Server states and time limits that pass: NotPrimary, shutdown, stepdown, host unreachable, disk full, ...
TRANSIENT_CODES = frozenset(
    {6, 7, 24, 43, 50, 64, 89, 91, 112, 189, 262, 9001, 10107, 11600, 11602, 13435, 13436, 14031}
)
DRIVER_ERRORS = (errors.PyMongoError, BSONError, OverflowError, UnicodeEncodeError)

NAME_UNKNOWN = re.compile(
    "Name or service not known|nodename nor servname|getaddrinfo|name resolution|No address associated"
)
NO_CONNECTION = re.compile(
    "Connection refused|Connect call failed|No such file or directory|Network is unreachable|No route to host"
)
NO_ANSWER = "check that it runs, check MONGODB_URI, and raise MONGODB_TIMEOUT_MS if it is only slow"
# Why no server can be used, by what the driver's message contains. The first that fits counts.
_CONNECTION_PROBLEMS = (
    (NO_CONNECTION, "nothing listens there; start it, or correct MONGODB_URI"),
    (
        NAME_UNKNOWN,
        "its host name cannot be resolved; check MONGODB_URI and DNS (if a replica set announces that name, add "
        "directConnection=true)",
    ),
    (
        re.compile("(?i)hostname mismatch|IP address mismatch|doesn't match"),
        "its TLS certificate is for another host name; use that name in MONGODB_URI",
    ),
    (re.compile("certificate has expired"), "its TLS certificate has expired; renew it"),
    (
        re.compile("CERTIFICATE_VERIFY_FAILED"),
        "the authority of its TLS certificate is not known here; add tlsCAFile=FILE to MONGODB_URI",
    ),
    (
        re.compile(r"(?i)handshake|\[SSL|tlsv1"),
        "the TLS handshake fails; remove tls=true from MONGODB_URI if the server has no TLS, or add "
        "tlsCertificateKeyFile=FILE if it wants a certificate",
    ),
    (
        re.compile("named .* but this node belongs to a set named"),
        "the replica set has another name; correct replicaSet= in MONGODB_URI",
    ),
    (
        re.compile("ReplicaSetNoPrimary|No primary|No replica set members"),
        "the replica set has no primary; check its members and replicaSet= in MONGODB_URI",
    ),
    (
        re.compile("Message length|Unknown opcode"),
        "what answers there is not MongoDB; check host and port in MONGODB_URI",
    ),
    (
        re.compile("connection closed"),
        "it closed the connection; check its log, and add tls=true to MONGODB_URI if it needs TLS",
    ),
)


@contextmanager
def translated(what: str) -> Iterator[None]:
    """Raise errors of the driver as those of this product, and a cancellation that the driver swallowed.

    *what* names the operation. ``asyncio.wait_for`` of Python 3.11 swallows a cancellation that comes as its future is done
    (python/cpython#86296), and PyMongo sends with it. A run that has ended would wait for such a task forever.
    """
    task = _current_task()
    cancellations = task.cancelling() if task is not None else 0
    try:
        yield
    except DRIVER_ERRORS as exc:
        if task is not None and task.cancelling() > cancellations:
            raise asyncio.CancelledError from exc
        raise store_error(what, exc) from exc
    if task is not None and task.cancelling() > cancellations:
        raise asyncio.CancelledError


def _current_task() -> asyncio.Task[Any] | None:
    try:
        return asyncio.current_task()
    except RuntimeError:  # no event loop runs in this thread
        return None


def store_error(what: str, exc: Exception) -> TriadError:
    """Return the error of this product for *exc*, one of DRIVER_ERRORS; *what* names the operation."""
    if isinstance(exc, errors.BulkWriteError):
        return StoreRejectedError("MongoDB cannot store the document")
    if isinstance(exc, errors.OperationFailure):
        return _error_of_code(what, exc.code, exc)
    if isinstance(exc, errors.DocumentTooLarge | BSONError | OverflowError | UnicodeEncodeError):
        rejected = StoreRejectedError(f"MongoDB cannot hold the document ({what}: {type(exc).__name__})")
        unreadable = StoreUnreadableError(f"a document is not valid BSON, so the driver cannot read it ({what})")
        return unreadable if isinstance(exc, InvalidBSON) else rejected
    if isinstance(exc, errors.ConnectionFailure):
        reason = connection_problem(exc) or NO_ANSWER
        return StoreUnavailableError(f"MongoDB does not answer ({what}): {reason}.")
    if isinstance(exc, errors.ConfigurationError | errors.InvalidName):
        remedy = "check MONGODB_URI and the names"
        if "DNS" in str(exc):
            remedy = (
                "DNS has no SRV record for the name after mongodb+srv://, so correct it or use mongodb://host:27017"
            )
        return ConfigurationError(f"MongoDB cannot be used as configured ({what}); {remedy}.")
    return StoreUnavailableError(f"MongoDB failed ({what}: {type(exc).__name__}); see its log.")


def connection_problem(exc: BaseException | None) -> str | None:
    """Return why the driver found no server, with what to do; None if *exc* does not show it."""
    return next((sentence for pattern, sentence in _CONNECTION_PROBLEMS if pattern.search(str(exc))), None)


def has_no_server(exc: BaseException | None) -> bool:
    """Return whether *exc* shows that no connection was made: nothing listens, or the name is unknown."""
    return bool(NO_CONNECTION.search(str(exc)) or NAME_UNKNOWN.search(str(exc)))


def _error_of_code(what: str, code: int | None, exc: errors.OperationFailure | None = None) -> TriadError:
    if code in FORBIDDEN_CODES:
        if code != UNAUTHORIZED:
            remedy = "check user, password and authSource in MONGODB_URI"
        elif "requires authentication" in str(exc):
            remedy = "add user:password@ before the host in MONGODB_URI"
        else:
            remedy = "grant the rights that docs/operations.md lists (Indexes and rights)"
        return StoreForbiddenError(f"MongoDB refuses this user ({what}); {remedy}.")
    if code in TRANSIENT_CODES:
        return StoreUnavailableError(f"MongoDB is unavailable ({what}, code {code}); see its log.")
    if code in NO_RETRYABLE_WRITES_CODES and (code != ILLEGAL_OPERATION or "retryable" in str(exc)):
        return ConfigurationError(
            f"This server has no retryable writes ({what}, code {code}); add retryWrites=false to MONGODB_URI."
        )
    if code == VIEW_CODE:
        return ConfigurationError(
            f"A view stands where a collection is needed ({what}); statuses and results cannot be stored in a view, so "
            "name the collection that it shows: MONGODB_SOURCE_COLLECTION, MONGODB_RESULTS_COLLECTION."
        )
    if code == UNKNOWN_ZONE_CODE:
        return ConfigurationError(
            f"MongoDB does not know the time zone ({what}); --time-zone and REPORT_TIME_ZONE need a name that MongoDB knows, "
            "such as Europe/Berlin."
        )
    name = (exc.details or {}).get("codeName") if exc is not None else None
    return StoreRejectedError(f"MongoDB refuses the operation ({what}, code {code}{f', {name}' if name else ''})")


def require_only_duplicates(exc: errors.BulkWriteError) -> None:
    """Raise a StoreError unless each error of a bulk write is a duplicate key, whose document is stored already."""
    if refused_documents(exc):
        raise StoreRejectedError("MongoDB cannot store the document") from exc


def refused_documents(exc: errors.BulkWriteError) -> dict[int, int]:
    """Return, by index, the codes of the documents that MongoDB refuses for good; those that are stored do not count.

    Raise a StoreError if rights, the state of the server or durability are the problem.
    """
    if exc.details.get("writeConcernErrors"):
        raise StoreUnavailableError("MongoDB stored the results without the promised durability") from exc
    refused = {
        error["index"]: error.get("code", 0) for error in exc.details.get("writeErrors", ()) if not _is_stored(error)
    }
    codes = set(refused.values())
    for code in (codes & FORBIDDEN_CODES) or (codes & TRANSIENT_CODES):
        raise _error_of_code("write results", code) from exc
    return refused


def refusal(code: int) -> str:
    """Return why MongoDB refuses one document with *code*."""
    text = "it has no room left (16 MiB)" if code in TOO_LARGE_CODES else _REFUSALS.get(code, "MongoDB refuses it")
    return f"{text} (code {code})"


def _is_stored(error: dict[str, Any]) -> bool:
    """Return whether *error* is a duplicate of our own keys; one of a foreign unique index means that nothing is stored."""
    fields = error.get("keyPattern", {"_id": 1}).keys()  # mongomock has no keyPattern
    return error.get("code") == DUPLICATE_KEY and fields <= {"_id", "source_conversation_id"}

"""Translates the driver's errors: whether another attempt can help, and one sentence for the operator.

Driver messages are left out: they may contain the address with its password, or a document.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from bson.errors import BSONError
from pymongo import errors

from error_handler import (
    ConfigurationError,
    StoreError,
    StoreForbiddenError,
    StoreRejectedError,
    StoreUnavailableError,
    TriadError,
)

DUPLICATE_KEY = 11000
FORBIDDEN_CODES = frozenset({13, 18, 8000})
INDEX_CODES = frozenset({85, 86})
TOO_LARGE_CODES = frozenset({10334, 17419})  # a document would grow beyond 16 MiB
# Server states and time limits that pass: NotPrimary, shutdown, stepdown, host unreachable, disk full, ...
TRANSIENT_CODES = frozenset(
    {6, 7, 24, 43, 50, 64, 89, 91, 112, 189, 262, 9001, 10107, 11600, 11602, 13435, 13436, 14031}
)
DRIVER_ERRORS = (errors.PyMongoError, BSONError, OverflowError, UnicodeEncodeError)


@contextmanager
def translated(what: str) -> Iterator[None]:
    """Raise errors of the driver as those of this product; *what* names the operation."""
    try:
        yield
    except DRIVER_ERRORS as exc:
        raise store_error(what, exc) from exc


def store_error(what: str, exc: Exception) -> TriadError:
    """Return the error of this product for *exc*, one of DRIVER_ERRORS; *what* names the operation."""
    if isinstance(exc, errors.BulkWriteError):
        return StoreRejectedError("MongoDB cannot store the document")
    if isinstance(exc, errors.OperationFailure):
        return _error_of_code(what, exc.code)
    if isinstance(exc, errors.DocumentTooLarge | BSONError | OverflowError | UnicodeEncodeError):
        return StoreRejectedError(f"MongoDB cannot hold the document ({what}: {type(exc).__name__})")
    if isinstance(exc, errors.ConnectionFailure):
        return StoreUnavailableError(f"MongoDB does not answer ({what}); check that it runs and MONGODB_URI.")
    if isinstance(exc, errors.ConfigurationError | errors.InvalidName):
        return ConfigurationError(f"MongoDB cannot be used as configured ({what}); check MONGODB_URI and the names.")
    return StoreUnavailableError(f"MongoDB failed ({what}: {type(exc).__name__}); see its log.")


def _error_of_code(what: str, code: int | None) -> StoreError:
    if code in FORBIDDEN_CODES:
        return StoreForbiddenError(
            f"MongoDB refuses this user ({what}); check user, password and rights in MONGODB_URI."
        )
    if code in TRANSIENT_CODES:
        return StoreUnavailableError(f"MongoDB is unavailable ({what}, code {code}); see its log.")
    return StoreRejectedError(f"MongoDB refuses the operation ({what}, code {code})")


def require_only_duplicates(exc: errors.BulkWriteError) -> None:
    """Raise a StoreError unless each error of a bulk write is a duplicate key, whose document is stored already."""
    if exc.details.get("writeConcernErrors"):
        raise StoreUnavailableError("MongoDB stored the results without the promised durability") from exc
    codes = {error.get("code") for error in exc.details.get("writeErrors", ()) if not _is_stored(error)}
    for code in (codes & FORBIDDEN_CODES) or (codes & TRANSIENT_CODES):
        raise _error_of_code("write results", code) from exc
    if codes:
        raise StoreRejectedError("MongoDB cannot store the document") from exc


def _is_stored(error: dict[str, Any]) -> bool:
    """Return whether *error* is a duplicate of our own keys; one of a foreign unique index means that nothing is stored."""
    fields = error.get("keyPattern", {"_id": 1}).keys()  # mongomock has no keyPattern
    return error.get("code") == DUPLICATE_KEY and fields <= {"_id", "source_conversation_id"}


def index_problem(code: int | None, collection: str) -> str | None:
    """Return what to do if error *code* prevented an index of *collection*; None for an error of another kind."""
    if code == DUPLICATE_KEY:
        return (
            f"{collection} has several results for one document, so its unique index cannot be created; find them "
            f"with db.{collection}.aggregate([{{$group: {{_id: '$source_conversation_id', n: {{$sum: 1}}}}}}, "
            "{$match: {n: {$gt: 1}}}]) and remove the surplus."
        )
    if code in INDEX_CODES:
        return (
            f"{collection} has an index on the same field with other options; compare db.{collection}.getIndexes() "
            "with docs/operations.md and drop the one that differs."
        )
    return None

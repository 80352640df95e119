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
VALIDATOR_CODE = 121
_REFUSALS = {VALIDATOR_CODE: "the validator of the collection does not allow it", 14: "a field has another type"}
# Server states and time limits that pass: NotPrimary, shutdown, stepdown, host unreachable, disk full, ...
TRANSIENT_CODES = frozenset(
    {6, 7, 24, 43, 50, 64, 89, 91, 112, 189, 262, 9001, 10107, 11600, 11602, 13435, 13436, 14031}
)


@contextmanager
def translated(what: str) -> Iterator[None]:
    """Raise errors of the driver as those of this product; *what* names the operation."""
    try:
        yield
    except (errors.PyMongoError, BSONError, OverflowError, UnicodeEncodeError) as exc:
        raise _error_of(what, exc) from exc


def _error_of(what: str, exc: Exception) -> TriadError:
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

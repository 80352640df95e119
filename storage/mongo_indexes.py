"""Creates the indexes. Only the unique one of the results is required, and any index that serves is enough."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Any

from pymongo import IndexModel

from error_handler import IndexBlockedError, StoreError, StoreForbiddenError, StoreUnavailableError
from storage.mongo_errors import DUPLICATE_KEY
from storage.selection import StateFields

logger = logging.getLogger(__name__)

INDEX_CODES = frozenset({85, 86})  # an index of this name or of these fields exists already
UNIQUE_FIELD = "source_conversation_id"
CORRECTION_KEY = (UNIQUE_FIELD, "field", "reviewer")  # one decision of a reviewer on a field of a conversation
RESULT_INDEXES = (
    "conversation_number",
    "processing_metadata.batch_job_id",
    "processing_metadata.processed_at",
)
# The times of results: a period is found, and all days are compared with their counts, without reading a result.
TIMES = ("conversation.last_message_at", "created_at", "processing_metadata.processed_at")
TIMES_INDEX = "times"

Call = Callable[[str, Callable[[], Awaitable[Any]]], Awaitable[Any]]  # names an operation, and repeats it if needed


def label_indexes(fields: Iterable[str]) -> list[str]:
    """Return the indexed paths of the *fields* of a taxonomy."""
    return [f"classification.{field}" for field in fields]


def result_indexes(fields: Iterable[str]) -> list[IndexModel]:
    """Return the indexes of results with labels of *fields*, the required one first."""
    unique = IndexModel([(UNIQUE_FIELD, 1)], unique=True)
    times = IndexModel([(path, 1) for path in TIMES], name=TIMES_INDEX)
    return [unique, times, *(IndexModel([(path, 1)]) for path in (*RESULT_INDEXES, *label_indexes(fields)))]


def correction_indexes() -> list[IndexModel]:
    """Return the indexes of the corrections, the required one first."""
    unique = IndexModel([(field, 1) for field in CORRECTION_KEY], unique=True)
    return [unique, IndexModel([("reviewer", 1), ("at", -1)])]


def source_indexes(states: StateFields, priority: str, *, for_stream: bool = False) -> list[IndexModel]:
    """Return the indexes of a source with *states*; one has only documents with a *priority* above 0.

    *for_stream* adds the one that finds a pending single query among millions of finished ones; none of them has a status.
    """
    indexes = [IndexModel([(field, 1)]) for field in states.indexed]
    indexes.append(IndexModel(urgent_key(states, priority), partialFilterExpression={priority: {"$gt": 0}}))
    if for_stream and states.is_default:
        indexes.append(IndexModel([(field, 1) for field in (states.status, "processed", states.reason)]))
    return indexes


def urgent_key(states: StateFields, priority: str) -> list[tuple[str, int]]:
    """Return the key of the index of urgent documents: it has the pending ones in their order, so a look reads no others."""
    return [(states.status, 1), (priority, -1), *([("processed", 1)] if states.is_default else [])]


def lease_indexes() -> list[IndexModel]:
    """Return the index that removes expired leases."""
    return [IndexModel([("expires_at", 1)], expireAfterSeconds=0)]


def job_indexes() -> list[IndexModel]:
    """Return the indexes of the jobs of the service, the required one first: one job for a key of a caller."""
    has_key = {"key": {"$exists": True}}
    return [
        IndexModel([("caller", 1), ("key", 1)], unique=True, partialFilterExpression=has_key),
        IndexModel([("state", 1), ("webhook.state", 1)]),
        *lease_indexes(),
    ]


def job_item_indexes() -> list[IndexModel]:
    """Return the indexes of the conversations of jobs: to claim one, to read a page, to count results, to expire."""
    fields = (("state", "position", "created_at"), ("job", "position"), ("job", "state", "result.status"))
    return [*(IndexModel([(field, 1) for field in names]) for names in fields), *lease_indexes()]


async def create_indexes(collection: Any, models: list[IndexModel], call: Call) -> None:
    """Create *models* through *call*. A time-out is a warning: the run goes on, and the next one tries again.

    Raises:
        IndexBlockedError: A unique index cannot be created because of what is stored.
        StoreForbiddenError: The user may not create a unique index, and none is there.
    """
    try:
        await call("create indexes", lambda: collection.create_indexes(models))
    except StoreUnavailableError as exc:
        logger.warning("the indexes of %s are not ready: %s", collection.name, exc)
    except StoreError as exc:
        if len(models) > 1:  # one that is refused prevents them all
            for model in models:
                await create_indexes(collection, [model], call)
        elif models[0].document.get("unique"):
            await _replace_unique(collection, models[0], call, exc)
        else:
            code, name = getattr(exc.__cause__, "code", None), models[0].document["name"]
            level = logging.INFO if code in INDEX_CODES else logging.WARNING
            logger.log(level, "the index %s of %s was not created: %s", name, collection.name, exc)


async def _replace_unique(collection: Any, model: IndexModel, call: Call, refused: StoreError) -> None:
    """Look for an index that serves instead of *model*, which the server *refused*, or create it under another name."""
    fields = tuple(model.document["key"])
    with contextlib.suppress(StoreForbiddenError):
        if serves_as_unique(await call("read the indexes", collection.index_information), fields):
            return
    code, name = getattr(refused.__cause__, "code", None), f"{'_'.join(fields)}_unique"
    if code in INDEX_CODES and model.document["name"] != name:  # beside one that is not unique, from MongoDB 5.0 on
        model = IndexModel([(field, 1) for field in fields], unique=True, name=name)
        await create_indexes(collection, [model], call)
    elif problem := _problem(code, collection.name):
        raise IndexBlockedError(problem) from refused
    else:
        raise refused


def serves_as_unique(indexes: Mapping[str, Mapping[str, Any]], fields: tuple[str, ...] = (UNIQUE_FIELD,)) -> bool:
    """Return whether one of *indexes* prevents a second document with the same *fields*, whatever its name."""
    return any(
        index.get("unique")
        and tuple(field for field, _ in index["key"]) == fields
        and not index.get("partialFilterExpression")
        and not index.get("collation")
        for index in indexes.values()
    )


def _problem(code: int | None, collection: str) -> str | None:
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

"""The MongoDB client: source documents, leases, results, and the samples that commands draw.

It uses only calls that PyMongo's asyncio API and Motor share, so tests and the demo can pass a Motor or
``mongomock_motor`` client. Three facts measured on mongod 6.0 decide the design: ``{_id: {$gt: x}}`` sees only ids of
the BSON type of x, ``$expr`` sees all; an acknowledged write survives a killed server only with ``j: true``; an insert
that was cancelled or lost its connection may be stored, so writes are repeated and duplicates count as done.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from functools import partial
from inspect import isawaitable
from typing import Any, Literal, TypeVar

from pymongo import WriteConcern, timeout
from pymongo.errors import BulkWriteError

from config import Settings
from config.taxonomy import TRIAD
from domain.conversation import source_paths
from error_handler import StoreRejectedError, StoreUnreadableError
from storage.extended_json import Document, bson_encode, drop_attachments, id_key, is_doubtful
from storage.mongo_connection import CONNECT_S, close_client, hosts_of, identity, open_client, run_command
from storage.mongo_errors import DRIVER_ERRORS, require_only_duplicates, store_error, translated
from storage.mongo_indexes import create_indexes, lease_indexes, result_indexes, source_indexes
from storage.mongo_pages import (
    END_OF_IDS,
    PAGE_BYTES,
    end_of_ids,
    random_documents,
    read_alone,
    read_ids,
    replace_all,
    undecoded,
    unusable_ids,
    update_each,
    warn_of,
    warn_of_unusable,
)
from storage.selection import Selection, StateFields
from storage.subset import Subset
from utils.retry_utils import RetryPolicy, retry_async

logger = logging.getLogger(__name__)

T = TypeVar("T")
FinalStatus = Literal["processed", "failed", "skipped"]

DURABLE = WriteConcern("majority", j=True)
PATIENCE_S = 86_400.0  # for counts and indexes

_PROVENANCE = [f"processing_metadata.{name}" for name in ("input_sha256", "fingerprint", "model_used", "model_digest")]
_LABELS = ("classification", "processing_metadata.processed_at", "processing_metadata.model_used")


def range_filter(after: Sequence[Any], bound: Sequence[Any]) -> Document:
    """Return the query for ids after *after* up to *bound*, across BSON types.

    *after* and *bound* hold one id, or none if that side is open. They are lists because null is a valid id.
    """
    limits = [{"$gt": ["$_id", {"$literal": value}]} for value in after]
    limits += [{"$lte": ["$_id", {"$literal": value}]} for value in bound]
    return {"$expr": {"$and": limits}} if limits else {}


class DocumentStore:
    """The source documents, the results and the leases of one database.

    It opens a client in the running event loop unless *client* is given, and closes only the one that it opened. Every
    call is retried as *settings* say before it raises a StoreError. Selections are limited to *subset*; None is all.
    """

    def __init__(
        self, settings: Settings, *, worker_id: str = "worker", client: Any = None, subset: Subset | None = None
    ) -> None:
        self._opened_here = client is None
        self._client = client or open_client(settings)
        self._hosts = hosts_of(settings.mongodb_uri.get_secret_value())
        self._connect_s = min(settings.mongodb_timeout_ms / 1000, CONNECT_S)
        self._policy = RetryPolicy(settings.mongodb_max_retries, settings.mongodb_backoff_s)
        self._worker_id = worker_id
        self._lease = timedelta(seconds=settings.lease_s)
        self._clock_offset = timedelta()
        self.unusable: set[bytes] = set()  # the id_key of documents that were read, and no query can name
        self.unmarked: set[bytes] = set()  # of those whose status MongoDB refuses
        self._warned: set[Any] = set()
        self.states = StateFields(settings.status_field, subset.condition if subset else None)
        self._priority = settings.priority_field
        self._fields = (
            None if settings.store_original_conversation else source_paths(self.states, settings.result_metadata)
        )
        self.database = database = self._client[settings.db_name]  # its errors are the driver's: see translated
        options = self._client.codec_options.with_options(tz_aware=True)
        self._source = database.get_collection(settings.source_collection, codec_options=options)
        self._marks = database.get_collection(settings.source_collection, write_concern=DURABLE)
        self.results_name = results = settings.results_collection
        self._results = database.get_collection(results, codec_options=options, write_concern=DURABLE)
        self._leases = database.get_collection(f"{settings.source_collection}_leases")

    async def check(self) -> None:
        """Connect to the server and read its clock, which decides when leases expire."""
        hello = await self._command(f"connect to {self._hosts}", self._client.admin, {"hello": 1})
        server_time = hello.get("localTime")
        if isinstance(server_time, datetime):
            self._clock_offset = server_time.replace(tzinfo=UTC) - datetime.now(UTC)
        if hello and "setName" not in hello and "msg" not in hello:
            logger.info("MongoDB is a standalone server: writes are durable, but there is no failover")

    async def identity(self) -> str:
        """Return a text that identifies this pair of collections among all servers; see storage.mongo_connection."""
        return await identity(self._source, self._results.name, partial(self._command, "identify the collection"))

    async def ensure_result_indexes(self, fields: Iterable[str] = TRIAD.values()) -> None:
        """Create the indexes of results with labels of *fields*. Raise IndexBlockedError if stored results share a source id."""
        await create_indexes(self._results, result_indexes(fields), self._patiently)

    async def ensure_source_indexes(self, *, for_stream: bool = False) -> None:
        """Create the indexes of the source and of the leases; takes as long as the collection is large."""
        indexes = source_indexes(self.states, self._priority, for_stream=for_stream)
        await create_indexes(self._source, indexes, self._patiently)
        await create_indexes(self._leases, lease_indexes(), self._patiently)

    async def try_writes(self) -> None:
        """Send each collection an update that matches nothing, to see whether the server takes the writes of a run."""
        for collection in (self._marks, self._results, self._leases):
            update = partial(collection.update_one, {"_id": {"$in": []}}, {"$set": {self.states.status: "processing"}})
            await self._call(f"write to {collection.name}", update)

    async def upper_bound(self) -> list[Any]:
        """Return the greatest ``_id`` as a list of one, or an empty list for an empty collection."""
        try:
            last = await self._find(
                "read the last id", self._source, {}, projection={"_id": 1}, sort=[("_id", -1)], limit=1
            )
        except StoreUnreadableError:
            return [END_OF_IDS]  # an ``_id`` that is not valid BSON
        return [end_of_ids(document["_id"]) for document in last]

    async def read_page(
        self, selection: Selection, after: Sequence[Any], bound: Sequence[Any], limit: int
    ) -> list[Document]:
        """Return up to *limit* documents of *selection* in the order of ``_id``; see range_filter.

        They have what ``source_paths`` names, and together PAGE_BYTES. A document that is not valid BSON is UNREADABLE; one whose
        ``_id`` no query can name is left out.
        """
        query = {**self.states.queries[selection], **range_filter(after, bound)}
        source, fields, skipped = self._source, self._fields, 0

        def found(collection: Any, names: Document | None) -> Any:
            cursor = collection.find(query, names).sort("_id", 1).skip(skipped).limit(limit).batch_size(limit)
            # The status index would serve the filter and then sort the whole collection in memory.
            return cursor if selection == "sweep" else cursor.hint([("_id", 1)])

        while True:
            lost: dict[bytes, Any] = {}
            try:
                page = await self._call("read a page", lambda: _bounded(found(source, fields), whole=fields is None))
                number = len(page)
                doubtful = [document["_id"] for document in page if is_doubtful(document["_id"])]
                if doubtful:
                    lost = await self._call("look for ids", partial(unusable_ids, source, doubtful))
                    page = [document for document in page if id_key(document["_id"]) not in lost]
            except StoreUnreadableError:
                ids, lost = await self._call(
                    "read ids", lambda: read_ids(found(undecoded(source), {"_id": 1}), source.codec_options)
                )
                number, page = len(ids) + len(lost), await self._read_alone(ids)
            if lost:
                self.unusable |= warn_of_unusable(lost, self.unusable)
            if page or not number:
                return page
            skipped += number

    async def count(self, selection: Selection, *, whole: bool = False) -> int:
        """Return how many documents *selection* has now; if *whole*, also those outside the subset."""
        query = (self.states.whole if whole else self.states.queries)[selection]
        all_of_it = self._source.estimated_document_count  # of the metadata
        return await self._patiently("count", lambda: self._source.count_documents(query) if query else all_of_it())

    async def count_results(self) -> int:
        """Return about how many results there are, also of documents that are gone."""
        return await self._call("count results", self._results.estimated_document_count)

    async def aggregate(self, what: str, stages: list[Document]) -> list[Document]:
        """Return what *stages* make of the source documents; *what* names this in errors."""

        async def read() -> list[Document]:
            cursor: Any = self._source.aggregate(stages, allowDiskUse=True)
            cursor = await cursor if isawaitable(cursor) else cursor  # Motor returns the cursor itself
            return [document async for document in cursor]

        return await self._call(what, read)

    async def result_keys(self, document_ids: list[Any], job_id: str | None = None) -> set[bytes]:
        """Return the ``id_key`` of those *document_ids* that have a result, of *job_id* if given."""
        of_job = {} if job_id is None else {"processing_metadata.batch_job_id": job_id}
        return set(await self._result_fields(document_ids, (), of_job))

    async def write_results(self, results: list[Document], *, replace: bool = False) -> dict[int, StoreRejectedError]:
        """Store *results* durably; return, by index, those that MongoDB rejects for good.

        A document that already has a result keeps it, unless *replace*. After a StoreError, some may be stored; it is safe
        to write all of them again.
        """
        try:
            await self._call("write results", lambda: (replace_all if replace else insert_new)(self._results, results))
        except StoreRejectedError as exc:
            if len(results) == 1:
                return {0: exc}
            # One invalid document fails the whole group before it is sent; written alone, only that one fails.
            alone = [await self.write_results([result], replace=replace) for result in results]
            return {index: rejected[0] for index, rejected in enumerate(alone) if rejected}
        return {}

    async def mark_processing(self, document_ids: list[Any]) -> None:
        """Set the status of conversations to processing; single queries have none."""
        await self._update(self._source, document_ids, {"$set": {self.states.status: "processing"}})

    async def mark(self, document_ids: list[Any], status: FinalStatus, reason: str | None, *, queries: bool) -> None:
        """Set the final status of conversations, or of single queries, and its *reason* if any."""
        states, ended = self.states, {} if status == "failed" else {"processed": True}
        fields: Document = ended if queries else {states.status: status, states.processed_at: datetime.now(UTC)}
        fields |= {states.reason: reason} if reason else {}
        change: Document = {"$inc": {"processing_attempts": 1}} if queries else {}
        change |= {"$set": fields} if fields else {}
        change |= {} if reason else {"$unset": {states.reason: ""}}
        await self._update(self._marks, document_ids, change)

    async def _update(self, collection: Any, document_ids: list[Any], change: Document) -> None:
        """Update *document_ids*; those that MongoDB refuses keep their status, with a warning, and are ``unmarked``."""
        with suppress(StoreRejectedError):  # because of some documents
            query = {"_id": {"$in": document_ids}}
            await self._call("update statuses", lambda: collection.update_many(query, change))
            return
        refused = await self._call("update statuses", lambda: update_each(collection, document_ids, change))
        if refused and "$inc" in change:  # the counter is not a number: leave it alone
            rest, change = [one.document_id for one in refused], {**change}
            del change["$inc"]
            refused = await self._call("update statuses", lambda: update_each(collection, rest, change))
        self._warned |= warn_of(collection.name, refused, self._warned, is_all=len(refused) == len(document_ids) > 1)
        self.unmarked |= {id_key(one.document_id) for one in refused}

    async def claim(self, document_ids: list[Any], *, only_free: bool = False) -> set[bytes]:
        """Lease *document_ids* that are free, or whose lease has expired; return the ``id_key`` of those held now.

        *only_free* leaves those that have a lease, even one of this worker, and returns only what it has leased.
        """
        expires_at = self.server_time() + self._lease
        leases = [{"_id": value, "worker": self._worker_id, "expires_at": expires_at} for value in document_ids]
        taken = await self._call("claim documents", lambda: insert_new(self._leases, leases))
        if not taken:
            return set(map(id_key, document_ids))
        new = {id_key(value) for index, value in enumerate(document_ids) if index not in taken}
        if only_free:
            return new
        contested = [document_ids[index] for index in taken]
        free = {"$or": [{"worker": self._worker_id}, {"expires_at": {"$lt": self.server_time()}}]}
        change = {"$set": {"worker": self._worker_id, "expires_at": expires_at}}
        await self._call(
            "take over leases", lambda: self._leases.update_many({"_id": {"$in": contested}, **free}, change)
        )
        query = {"_id": {"$in": contested}, "worker": self._worker_id}
        own = await self._find("read leases", self._leases, query, projection={"_id": 1})
        return new | {id_key(lease["_id"]) for lease in own}

    async def renew_leases(self) -> None:
        """Move the expiry of every lease of this worker."""
        change = {"$set": {"expires_at": self.server_time() + self._lease}}
        await self._call("renew leases", lambda: self._leases.update_many({"worker": self._worker_id}, change))

    async def release(self, document_ids: list[Any]) -> None:
        """End this worker's leases on *document_ids*."""
        query = {"_id": {"$in": document_ids}, "worker": self._worker_id}
        await self._call("release leases", lambda: self._leases.delete_many(query))

    async def result_provenance(self, document_ids: list[Any]) -> dict[bytes, Document]:
        """Return, by ``id_key``, the hashes of those *document_ids* that have a result: of input, prompt and model."""
        return await self._result_fields(document_ids, _PROVENANCE)

    async def result_labels(self, document_ids: list[Any]) -> dict[bytes, Document]:
        """Return, by ``id_key``, the labels of those *document_ids* that have a result, with their model and time."""
        return await self._result_fields(document_ids, _LABELS)

    async def _result_fields(
        self, document_ids: list[Any], fields: Sequence[str], more: Document | None = None
    ) -> dict[bytes, Document]:
        query = {"source_conversation_id": {"$in": document_ids}, **(more or {})}
        projection = {"_id": 0, "source_conversation_id": 1, **dict.fromkeys(fields, 1)}
        found = await self._find("read results", self._results, query, projection=projection)
        return {id_key(result["source_conversation_id"]): result for result in found}

    async def sample(self, size: int, fields: Sequence[str]) -> AsyncIterator[Document]:
        """Yield what ``random_documents`` does, of the source."""
        with translated("read a sample"):
            async for document in random_documents(self._source, size, fields):
                yield document

    async def sample_ids(self, selection: Selection, size: int) -> list[Any]:
        """Return the ids of up to *size* random documents of *selection*."""
        stages = [{"$match": self.states.queries[selection]}, {"$sample": {"size": size}}, {"$project": {"_id": 1}}]
        return [document["_id"] for document in await self.aggregate("draw a sample", stages)]

    async def read_documents(self, selection: Selection, document_ids: list[Any]) -> list[Document]:
        """Return those *document_ids* that *selection* has; one that is not valid BSON is UNREADABLE. "all" has no subset."""
        selected = {} if selection == "all" else self.states.queries[selection]
        try:
            query = {"_id": {"$in": document_ids}, **selected}
            return await self._find("read documents", self._source, query, projection=self._fields)
        except StoreUnreadableError:
            return await self._read_alone(document_ids, selected)

    async def _read_alone(self, document_ids: list[Any], query: Document | None = None) -> list[Document]:
        read = partial(read_alone, self._source, document_ids, self._fields, self.states, query, query is None)
        return await self._call("read documents one by one", read)

    async def insert_documents(self, documents: list[Document]) -> int:
        """Store source *documents*; return how many were new. An existing ``_id`` is left unchanged."""
        known = await self._call("import documents", lambda: insert_new(self._marks, documents))
        return len(documents) - len(known)

    async def read_results(self, after: Sequence[Any], limit: int) -> list[Document]:
        """Return up to *limit* results in the order of their ``_id``, after the one given."""
        return await self._find("read results", self._results, range_filter(after, []), sort=[("_id", 1)], limit=limit)

    async def close(self) -> None:
        """Close the client if it was opened here."""
        if self._opened_here:
            await close_client(self._client)

    def server_time(self) -> datetime:
        """Return the time of the server's clock, which decides when leases expire; ``check`` reads it."""
        return datetime.now(UTC) + self._clock_offset

    async def _find(self, what: str, collection: Any, query: Document, **options: Any) -> list[Document]:
        """Return what *query* finds; *options* are those of ``find``."""
        return await self._call(what, lambda: collection.find(query, **options).to_list(None))

    async def _command(self, what: str, database: Any, command: Document) -> Document:
        """Return the reply to *command*; empty from mongomock, which has no commands."""
        return await self._call(what, lambda: run_command(database, command, self._connect_s))

    async def _call(self, what: str, operation: Callable[[], Awaitable[T]]) -> T:
        return await call_repeatedly(what, operation, self._policy)

    async def _patiently(self, what: str, operation: Callable[[], Awaitable[T]]) -> T:
        """Do the same without the time limit of the client, for what takes as long as a collection is large."""
        with timeout(PATIENCE_S):
            return await self._call(what, operation)


async def call_repeatedly(what: str, operation: Callable[[], Awaitable[T]], policy: RetryPolicy) -> T:
    """Return the result of *operation* on MongoDB, repeated as *policy* says; raise errors of the driver as our own."""

    task = asyncio.current_task()

    async def attempt() -> T:  # does what ``translated`` does, without a step into another module for each call
        cancellations = task.cancelling() if task is not None else 0
        try:
            result = await operation()
        except DRIVER_ERRORS as exc:
            if task is not None and task.cancelling() > cancellations:
                raise asyncio.CancelledError from exc
            raise store_error(what, exc) from exc
        if task is not None and task.cancelling() > cancellations:
            raise asyncio.CancelledError
        return result

    return await retry_async(attempt, policy, what)


async def _bounded(cursor: Any, *, whole: bool) -> list[Document]:
    """Return the documents of *cursor* up to PAGE_BYTES, at least one, and close it; if not *whole*, without attachments."""
    page, size = [], 0
    try:
        async for document in cursor:
            page.append(document)
            size += len(bson_encode(document)) if whole else drop_attachments(document)
            if size >= PAGE_BYTES:
                break
    finally:
        await cursor.close()
    return page


async def insert_new(collection: Any, documents: list[Document]) -> set[int]:
    """Insert *documents*; return the indexes of those that were stored already."""
    try:
        await collection.insert_many(documents, ordered=False)
    except BulkWriteError as exc:
        require_only_duplicates(exc)
        return {error["index"] for error in exc.details["writeErrors"]}
    return set()

"""Everything that talks to MongoDB; the only owner of pymongo.

PyMongo's own asyncio API is used, and only calls that Motor has too, so a Motor client (or
``mongomock_motor`` in unit tests and the demo) can be handed in. Facts that decide the design, all
measured on mongod 6.0: ``{_id: {$gt: x}}`` sees only ids of x's BSON type, ``$expr`` sees all; an
acknowledged write survives a killed server only with ``j: true``; an insert that was cancelled or
lost its connection may be stored, so writes are repeated and duplicates counted as done.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar

from bson.errors import BSONError
from pymongo import AsyncMongoClient, IndexModel, ReplaceOne, WriteConcern, errors
from pymongo.errors import BulkWriteError, PyMongoError

from config import Settings
from error_handler import (
    ConfigurationError,
    IndexBlockedError,
    StoreError,
    StoreForbiddenError,
    StoreRejectedError,
    StoreUnavailableError,
)
from storage import contract as facts
from storage.contract import Document, FinalStatus, Selection, range_filter, selection_filter
from storage.extended_json import id_key, id_text
from utils.aio import cancellable, close_within
from utils.retry_utils import RetryPolicy, retry_async

logger = logging.getLogger(__name__)

T = TypeVar("T")

DURABLE = WriteConcern("majority", j=True)


class DocumentStore:
    """The source documents, the results and the leases of one database.

    Opens its own client inside the running event loop unless *client* is handed in; ``close``
    closes only what was opened here. Every call is repeated as *settings* say before it raises.
    """

    def __init__(self, settings: Settings, *, worker_id: str = "worker", client: Any = None) -> None:
        self._opened_here = client is None
        self._client = client or open_client(settings)
        self._policy = RetryPolicy(settings.mongodb_max_retries, settings.mongodb_backoff_s)
        self._worker_id = worker_id
        self._lease = timedelta(seconds=settings.lease_s)
        self._clock_offset = timedelta()
        self.database = database = self._client[settings.db_name]  # its errors are the driver's: see translated
        options = self._client.codec_options.with_options(tz_aware=True)
        self._source = database.get_collection(settings.source_collection, codec_options=options)
        self._marks = database.get_collection(settings.source_collection, write_concern=DURABLE)
        self._results = database.get_collection(
            settings.results_collection, codec_options=options, write_concern=DURABLE
        )
        self._leases = database.get_collection(f"{settings.source_collection}_leases")
        self.retries = 0

    async def check(self) -> None:
        """Reach the server and learn its clock, by which leases are kept.

        Raises:
            StoreUnavailableError, StoreForbiddenError: One sentence for the operator.
        """
        hello = await self._command("connect", self._client.admin, {"hello": 1})
        server_time = hello.get("localTime")
        if isinstance(server_time, datetime):
            self._clock_offset = server_time.replace(tzinfo=UTC) - datetime.now(UTC)
        if hello and "setName" not in hello and "msg" not in hello:
            logger.info("MongoDB is a standalone server: durable, but without failover or retryable writes")

    async def identity(self) -> str:
        """Return what tells this pair of collections from all others, on any server.

        MongoDB gives each collection a UUID; one that does not exist yet has none.
        """
        command = {"listCollections": 1, "filter": {"name": self._source.name}}
        answer = await self._command("identify the collection", self.database, command)
        found = answer["cursor"]["firstBatch"] if answer else []
        uuid = found[0].get("info", {}).get("uuid") if found else None
        return f"{self._source.full_name} -> {self._results.name} ({uuid.hex() if uuid else 'new'})"

    async def ensure_result_indexes(self) -> None:
        """Create the indexes of the results; the unique one makes a second result impossible.

        Raises:
            IndexBlockedError: Stored results have the same source id; the message has the query.
        """
        unique = IndexModel([("source_conversation_id", 1)], unique=True)
        models = [unique, *(IndexModel([(field, 1)]) for field in facts.RESULT_INDEXES)]
        await self._create_indexes(self._results, models)

    async def ensure_source_indexes(self) -> None:
        """Create the indexes of the source and of the leases; may take seconds on millions of documents."""
        await self._create_indexes(self._source, [IndexModel([(field, 1)]) for field in facts.SOURCE_INDEXES])
        await self._create_indexes(self._leases, [IndexModel([("expires_at", 1)], expireAfterSeconds=0)])

    async def upper_bound(self) -> list[Any]:
        """Return the greatest ``_id`` as a list of one, or an empty list for an empty collection."""
        last = await self._call(
            "read the last id", lambda: self._source.find({}, {"_id": 1}).sort("_id", -1).limit(1).to_list(None)
        )
        return [document["_id"] for document in last]

    async def read_page(
        self, selection: Selection, after: Sequence[Any], bound: Sequence[Any], limit: int
    ) -> list[Document]:
        """Return up to *limit* documents of *selection* in the order of ``_id``; see range_filter."""
        query = {**selection_filter(selection), **range_filter(after, bound)}

        def find() -> Awaitable[list[Document]]:
            cursor = self._source.find(query).sort("_id", 1).limit(limit).batch_size(limit)
            # The status index would serve the filter and then sort the whole collection in memory.
            return (cursor if selection == "sweep" else cursor.hint([("_id", 1)])).to_list(None)

        return await self._call("read a page", find)

    async def count(self, selection: Selection) -> int:
        """Return how many documents *selection* has now."""
        query = selection_filter(selection)
        if not query:
            return await self._call("count", self._source.estimated_document_count)
        return await self._call("count", lambda: self._source.count_documents(query))

    async def foreign_statuses(self) -> list[str]:
        """Return the values of ``status`` that are not of this product; such documents are never selected."""
        known = {None, "pending", "processing", "processed", "failed", "skipped"}
        values = await self._call("read statuses", lambda: self._source.distinct("status"))
        return sorted(
            str(value) for value in values if not isinstance(value, str) or value not in known if value is not None
        )

    async def result_keys(self, document_ids: list[Any], job_id: str | None = None) -> set[bytes]:
        """Return the ``id_key`` of those *document_ids* that have a result (of *job_id* where given)."""
        query: Document = {"source_conversation_id": {"$in": document_ids}}
        if job_id is not None:
            query["processing_metadata.batch_job_id"] = job_id
        found = await self._call(
            "look for results",
            lambda: self._results.find(query, {"_id": 0, "source_conversation_id": 1}).to_list(None),
        )
        return {id_key(result["source_conversation_id"]) for result in found}

    async def write_results(self, results: list[Document], *, replace: bool = False) -> dict[int, StoreRejectedError]:
        """Store *results* durably; return, by index, those that MongoDB will never take.

        A document that already has a result keeps it, unless *replace*. Safe to repeat.

        Raises:
            StoreError: Which of them are stored is unknown; write all of them again.
        """
        try:
            await self._call("write results", lambda: self._write(results, replace))
        except StoreRejectedError as exc:
            if len(results) == 1:
                return {0: exc}
            # One bad document fails its whole group on the way out; alone, it fails alone.
            rejected: dict[int, StoreRejectedError] = {}
            for index, result in enumerate(results):
                alone = await self.write_results([result], replace=replace)
                if alone:
                    rejected[index] = alone[0]
            return rejected
        return {}

    async def _write(self, results: list[Document], replace: bool) -> None:
        try:
            if replace:
                operations = [
                    ReplaceOne(
                        {"source_conversation_id": {"$eq": result["source_conversation_id"]}},
                        {name: value for name, value in result.items() if name != "_id"},
                        upsert=True,
                    )
                    for result in results
                ]
                await self._results.bulk_write(operations, ordered=False)
            else:
                await self._results.insert_many(results, ordered=False)
        except BulkWriteError as exc:
            _require_only_duplicates(exc)

    async def mark_processing(self, document_ids: list[Any]) -> None:
        """Set the status of conversations to processing; single queries have none."""
        change = {"$set": {"status": "processing"}}
        await self._update(self._source, document_ids, change)

    async def mark(self, document_ids: list[Any], status: FinalStatus, reason: str | None, *, queries: bool) -> None:
        """Set the final status of conversations, or of single queries, with its *reason* where there is one."""
        change: Document = (
            {"$set": {"status_reason": reason}} if reason else {"$set": {}, "$unset": {"status_reason": ""}}
        )
        if queries:
            change["$inc"] = {"processing_attempts": 1}
            if status != "failed":
                change["$set"]["processed"] = True
        else:
            change["$set"] |= {"status": status, "last_processed_at": datetime.now(UTC)}
        change = {operator: fields for operator, fields in change.items() if fields}
        await self._update(self._marks, document_ids, change)

    async def _update(self, collection: Any, document_ids: list[Any], change: Document) -> None:
        """Update *document_ids*; one that has no room left for a status (16 MiB) is left as it is."""
        query = {"_id": {"$in": document_ids}}
        try:
            await self._call("update statuses", lambda: collection.update_many(query, change))
        except StoreRejectedError as exc:
            if getattr(exc.__cause__, "code", None) not in facts.TOO_LARGE_CODES:
                raise
            if len(document_ids) == 1:
                logger.warning("document %s is too large to be given its status", id_text(document_ids[0]))
                return
            for document_id in document_ids:
                await self._update(collection, [document_id], change)

    async def claim(self, document_ids: list[Any]) -> set[bytes]:
        """Lease *document_ids* to this worker; return the ``id_key`` of those that no other worker holds.

        A lease that expired, by the server's clock, is taken over.
        """
        expires_at = self._server_time() + self._lease
        leases = [{"_id": value, "worker": self._worker_id, "expires_at": expires_at} for value in document_ids]
        taken = await self._call("claim documents", lambda: self._insert_leases(leases))
        if not taken:
            return {id_key(value) for value in document_ids}
        free = {"$or": [{"worker": self._worker_id}, {"expires_at": {"$lt": self._server_time()}}]}
        change = {"$set": {"worker": self._worker_id, "expires_at": expires_at}}
        contested = [document_ids[index] for index in taken]
        query = {"_id": {"$in": contested}, **free}
        await self._call("take over leases", lambda: self._leases.update_many(query, change))
        own = await self._call(
            "read leases",
            lambda: self._leases.find({"_id": {"$in": contested}, "worker": self._worker_id}, {"_id": 1}).to_list(None),
        )
        first_hand = [value for index, value in enumerate(document_ids) if index not in taken]
        return {id_key(value) for value in (*first_hand, *(lease["_id"] for lease in own))}

    async def _insert_leases(self, leases: list[Document]) -> set[int]:
        try:
            await self._leases.insert_many(leases, ordered=False)
        except BulkWriteError as exc:
            _require_only_duplicates(exc)
            return {error["index"] for error in exc.details["writeErrors"]}
        return set()

    async def renew_leases(self) -> None:
        """Move the expiry of every lease of this worker."""
        change = {"$set": {"expires_at": self._server_time() + self._lease}}
        await self._call("renew leases", lambda: self._leases.update_many({"worker": self._worker_id}, change))

    async def release(self, document_ids: list[Any]) -> None:
        """End this worker's leases on *document_ids*."""
        query = {"_id": {"$in": document_ids}, "worker": self._worker_id}
        await self._call("release leases", lambda: self._leases.delete_many(query))

    async def insert_documents(self, documents: list[Document]) -> int:
        """Store source *documents*; return how many were new. One whose ``_id`` is taken is left alone."""
        return await self._call("import documents", lambda: self._insert_new(documents))

    async def _insert_new(self, documents: list[Document]) -> int:
        try:
            await self._marks.insert_many(documents, ordered=False)
        except BulkWriteError as exc:
            _require_only_duplicates(exc)
            return int(exc.details["nInserted"])
        return len(documents)

    async def read_results(self, after: Sequence[Any], limit: int) -> list[Document]:
        """Return up to *limit* results in the order of their ``_id``, after the one given."""
        query = range_filter(after, [])
        return await self._call(
            "read results", lambda: self._results.find(query).sort("_id", 1).limit(limit).to_list(None)
        )

    async def close(self) -> None:
        """Close the client if it was opened here."""
        if self._opened_here:
            await close_within(self._client.close(), facts.CLOSE_WAIT_S)

    def _server_time(self) -> datetime:
        return datetime.now(UTC) + self._clock_offset

    async def _create_indexes(self, collection: Any, models: list[IndexModel]) -> None:
        try:
            await self._call("create indexes", lambda: collection.create_indexes(models))
        except StoreError as exc:
            sentence = facts.index_sentence(getattr(exc.__cause__, "code", None), collection.name)
            if sentence:
                raise IndexBlockedError(sentence) from exc
            raise

    async def _command(self, what: str, database: Any, command: Document) -> Document:
        """Return the answer to *command*; empty from mongomock, which has no commands."""
        try:
            return await self._call(what, lambda: database.command(command))
        except NotImplementedError:
            return {}

    async def _call(self, what: str, operation: Callable[[], Awaitable[T]]) -> T:
        async def attempt() -> T:
            with translated(what):
                return await cancellable(operation)

        return await retry_async(attempt, self._policy, what, self._count_retry)

    def _count_retry(self) -> None:
        self.retries += 1


def open_client(settings: Settings) -> AsyncMongoClient[Document]:
    """Return a client for the running event loop; whoever opens it closes it.

    Raises:
        ConfigurationError: MONGODB_URI is not a usable address.
    """
    try:
        with warnings.catch_warnings(action="error", category=UserWarning):  # else an option with a typo is left out
            return AsyncMongoClient(
                settings.mongodb_uri.get_secret_value(),
                maxPoolSize=facts.MAX_POOL_SIZE,
                minPoolSize=facts.MIN_POOL_SIZE,
                serverSelectionTimeoutMS=min(settings.mongodb_timeout_ms, facts.SERVER_SELECTION_MS),
                timeoutMS=settings.mongodb_timeout_ms,
                appname="customer-support-triad",
                # One odd document must not end a run: dates beyond the year 9999, texts that are not UTF-8.
                datetime_conversion="DATETIME_AUTO",
                unicode_decode_error_handler="replace",
            )
    except (PyMongoError, ValueError, UserWarning) as exc:
        raise ConfigurationError("MONGODB_URI is not a usable address; it looks like mongodb://host:27017.") from exc


@contextmanager
def translated(what: str) -> Iterator[None]:
    """Raise the driver's errors as this product's, with one sentence for the operator and the cause kept.

    Driver messages are left out: they may hold the address with its password, or a document.
    """
    try:
        yield
    except errors.OperationFailure as exc:
        raise _server_error(what, exc) from exc
    except (errors.DocumentTooLarge, BSONError, OverflowError, UnicodeEncodeError) as exc:
        raise StoreRejectedError(f"MongoDB cannot hold the document ({what}: {type(exc).__name__})") from exc
    except errors.ConnectionFailure as exc:
        raise StoreUnavailableError(f"MongoDB does not answer ({what}); check that it runs and MONGODB_URI.") from exc
    except (errors.ConfigurationError, errors.InvalidName) as exc:
        raise ConfigurationError(
            f"MongoDB cannot be used as configured ({what}); check MONGODB_URI and the names."
        ) from exc
    except PyMongoError as exc:
        raise StoreUnavailableError(f"MongoDB failed ({what}: {type(exc).__name__}); its log says more.") from exc


def _server_error(what: str, exc: errors.OperationFailure) -> StoreError:
    if isinstance(exc, BulkWriteError):
        return StoreRejectedError("MongoDB cannot store the document")
    if exc.code in facts.FORBIDDEN_CODES:
        return StoreForbiddenError(
            f"MongoDB refuses this user ({what}); check user, password and rights in MONGODB_URI."
        )
    if exc.code in facts.TRANSIENT_CODES or isinstance(
        exc, errors.ExecutionTimeout | errors.WTimeoutError | errors.CursorNotFound
    ):
        return StoreUnavailableError(f"MongoDB cannot serve this now ({what}, code {exc.code}); its log says more.")
    return StoreRejectedError(f"MongoDB refuses the operation ({what}, code {exc.code})")


def _require_only_duplicates(exc: BulkWriteError) -> None:
    """Return where every error of the group is a duplicate key: those documents are stored already."""
    if exc.details.get("writeConcernErrors"):
        raise StoreUnavailableError("MongoDB stored the results without the promised durability") from exc
    problems = [error for error in exc.details.get("writeErrors", ()) if not _is_stored(error)]
    codes = {error.get("code") for error in problems}
    if problems:
        if codes & facts.FORBIDDEN_CODES:
            raise StoreForbiddenError("MongoDB refuses writes to this user; check the rights of MONGODB_URI.") from exc
        if codes & facts.TRANSIENT_CODES:
            raise StoreUnavailableError("MongoDB cannot serve this now (write results); its log says more.") from exc
        raise StoreRejectedError("MongoDB cannot store the document") from exc


def _is_stored(error: Document) -> bool:
    """Whether *error* is a duplicate of our own keys; one of a foreign unique index means that nothing is stored."""
    fields = error.get("keyPattern", {"_id": 1}).keys()  # mongomock has no keyPattern
    return error.get("code") == facts.DUPLICATE_KEY and fields <= {"_id", "source_conversation_id"}

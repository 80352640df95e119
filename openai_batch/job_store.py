"""The documents of a job in MongoDB: pages, claims and final states.

A document carries its own claim: the in-progress status and, in ``processing_info``, the custom id of the line it was
sent as. Each update matches that claim. MongoDB updates one document atomically, so two runs never hold the same
document, and an update that is repeated after a crash changes nothing.
"""

from __future__ import annotations

import asyncio
import logging
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from itertools import islice
from typing import Any, TypeVar

from config import Settings
from error_handler import JobProcessingError, StoreRejectedError, StoreUnreadableError
from mongo_client import DURABLE, call_repeatedly, range_filter
from openai_batch.batch_protocol import Line
from openai_batch.job_config import AppConfig, Document, value_at
from openai_batch.ledger import Item
from storage.extended_json import canonical, id_text, loads
from storage.mongo_connection import close_client, open_client
from storage.mongo_pages import END_OF_IDS, read_alone, read_ids, undecoded, warn_of_unusable
from storage.selection import UNREADABLE
from utils.retry_utils import RetryPolicy

logger = logging.getLogger(__name__)

T = TypeVar("T")

CONCURRENT_UPDATES = 16  # the pool has 20 connections
CLAIM_PAGE = 500
NOT_STORED = "MongoDB rejected the answer: the document would be too large, or a field has another type"


@dataclass(frozen=True, slots=True)
class Claim:
    """A document, the item that it becomes, and the line of its request with its estimated tokens."""

    document: Document
    item: Item
    line: bytes
    tokens: int


@dataclass(frozen=True, slots=True)
class Ending:
    """The end of a sent document, as *item* records it.

    *update* is the update of a completed document; None means failed, or pending again if *item* is retryable. *info*
    is added to ``processing_info``.
    """

    item: Item
    update: Mapping[str, Any] | None
    info: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Answer:
    """A usable line, its current document, and the number of the attempt (from 1)."""

    document: Document
    line: Line
    attempt: int


class Handling(ABC):
    """Makes requests of documents and updates of answers.

    The other methods serve collections that the batch worker also uses: leases, and documents that are done.
    *is_reasoning* becomes True if a line shows that the model is a reasoning model with a name that does not tell it.
    """

    is_reasoning = False

    @abstractmethod
    def request(self, document: Document) -> dict[str, Any]:
        """Return the body of the request for *document*; raise JobProcessingError if there is none."""

    @abstractmethod
    async def deliver(
        self, answers: Sequence[Answer], batch_id: str, /
    ) -> list[Mapping[str, Any] | JobProcessingError]:
        """Return, for each of *answers*, the update of its document, or why there is none."""

    async def acquire(self, documents: Sequence[Document], /) -> set[str]:
        """Lease *documents*; return the canonical ids of those that are leased now."""
        return {canonical(document["_id"]) for document in documents}

    def claim_fields(self, _document: Document, /) -> dict[str, Any]:
        """Return what ``processing_info`` keeps of *document* as it is sent."""
        return {}

    async def release(self, document_ids: Sequence[str], /) -> None:  # noqa: B027 - nothing is leased here
        """End the leases of *document_ids* (canonical)."""

    def failure_fields(self, _error: str, /) -> dict[str, Any]:
        """Return the fields to set, beside its status, on a document that ends with an error."""
        return {}

    async def done(self, _documents: Sequence[Document], /) -> dict[str, Mapping[str, Any]]:
        """Return the updates of those documents that need no request, by canonical id."""
        return {}


class JobStore:
    """The documents of one job, through its own client. Use as ``async with``."""

    def __init__(self, config: AppConfig, settings: Settings, handling: Handling) -> None:
        self.handling = handling
        self._schema = config.schema_config
        self._client = open_client(settings.model_copy(update={"mongodb_uri": config.database.uri}))
        options = self._client.codec_options.with_options(tz_aware=True)
        self._documents = self._client[config.database.name].get_collection(
            config.database.collection, codec_options=options, write_concern=DURABLE
        )
        self._policy = RetryPolicy(settings.mongodb_max_retries, settings.mongodb_backoff_s)
        self._values = self._schema.status
        self._status = self._schema.status.field_name
        self._info = self._schema.processing_info_field

    async def __aenter__(self) -> JobStore:
        return self

    async def __aexit__(self, *_: object) -> None:
        await close_client(self._client)

    async def count_pending(self) -> int:
        """Return how many documents are pending now."""
        return await self._call("count documents", lambda: self._documents.count_documents(self._pending()))

    async def pages(self, size: int) -> AsyncGenerator[list[Document]]:
        """Yield the pending documents in ``_id`` order, *size* at a time, up to the highest id at the start."""
        try:
            last = await self._call(
                "read the last id", lambda: self._documents.find({}, {"_id": 1}).sort("_id", -1).limit(1).to_list(None)
            )
            bound = [document["_id"] for document in last]
        except StoreUnreadableError:
            bound = [END_OF_IDS]
        if bound:
            async for page in self._pages(self._pending(), bound, None, size):
                yield page

    async def _pages(
        self, query: Document, last: list[Any], fields: list[str] | None, size: int
    ) -> AsyncGenerator[list[Document]]:
        after: list[Any] = []
        lost: set[bytes] = set()  # documents that no query can name; they are read again and again

        def found(documents: Any, names: list[str] | None) -> Any:
            # Hinted: with the index of another field the server would sort the whole collection in memory.
            cursor = documents.find({"$and": [query, range_filter(after, last)]}, names)
            return cursor.sort("_id", 1).limit(size + len(lost)).hint([("_id", 1)])

        while True:
            known = len(lost)
            try:
                page = await self._call("read a page", lambda: found(self._documents, fields).to_list(None))
            except StoreUnreadableError:
                ids, unnamed = await self._call(
                    "read ids",
                    lambda: read_ids(found(undecoded(self._documents), ["_id"]), self._documents.codec_options),
                )
                lost |= warn_of_unusable(unnamed, lost)
                read = partial(read_alone, self._documents, ids, fields)
                page = await self._call("read documents one by one", read)
            if page:
                after = [page[-1]["_id"]]
                yield page
            elif len(lost) == known:
                return

    def _pending(self) -> dict[str, Any]:
        wanted = [self._values.pending_value, None] if self._values.missing_is_pending else [self._values.pending_value]
        return {"$and": [{self._status: {"$in": wanted}}, self._schema.query_template]}

    def _pending_one(self, document: Document) -> dict[str, Any]:
        return {"_id": {"$eq": document["_id"]}, **self._pending()}

    def _claimed_one(self, document_id: Any, custom_id: str) -> dict[str, Any]:
        status = self._values.in_progress_value
        return {"_id": {"$eq": document_id}, self._status: status, f"{self._info}.custom_id": custom_id}

    def has_claim(self, document: Document, custom_id: str) -> bool:
        """Return whether *document* waits for the answer to *custom_id*, or has it already."""
        status = value_at(document, self._status, None)
        own = value_at(document, f"{self._info}.custom_id", None) == custom_id
        return own and status in (self._values.in_progress_value, self._values.completed_value)

    async def count_claims(self, items: Iterable[Item]) -> int:
        """Return how many of *items* still have the claim on their document."""
        left, claimed = iter(items), 0
        while page := list(islice(left, CLAIM_PAGE)):
            query = {
                "_id": {"$in": [loads(item.document_id) for item in page]},
                self._status: self._values.in_progress_value,
                f"{self._info}.custom_id": {"$in": [item.custom_id for item in page]},
            }
            claimed += await self._call("count claims", partial(self._documents.count_documents, query))
        return claimed

    async def claim(self, claims: Sequence[Claim], job_id: str) -> list[Claim]:
        """Claim the documents of *claims* for *job_id*; return the claims that no other run made first."""
        free = await self._lease(claims)
        taken = await self._each(lambda claim: self._claim(claim, job_id), free)
        await self.handling.release([claim.item.document_id for claim, own in zip(free, taken, strict=True) if not own])
        return [claim for claim, own in zip(free, taken, strict=True) if own]

    async def _claim(self, claim: Claim, job_id: str) -> bool:
        document, custom_id = claim.document, claim.item.custom_id
        info: dict[str, Any] = {"job_id": job_id, "custom_id": custom_id, "attempts": claim.item.attempt}
        info |= {"claimed_at": datetime.now(UTC), **self.handling.claim_fields(document)}
        fields = {self._status: self._values.in_progress_value, **self._info_change(document, info)}
        try:
            outcome = await self._update("claim a document", self._pending_one(document), {"$set": fields})
        except StoreRejectedError as exc:
            await self.refuse(document, JobProcessingError(f"MongoDB rejected the claim ({exc})", is_final=True))
            return False
        if outcome.modified_count:
            return True
        # The first update may have succeeded although its acknowledgement was lost.
        mine = self._claimed_one(document["_id"], custom_id)
        return bool(await self._call("look for a claim", lambda: self._documents.count_documents(mine, limit=1)))

    async def _lease(self, claims: Sequence[Claim]) -> Sequence[Claim]:
        """Return those of *claims* whose documents could be leased and need a request; complete the done ones."""
        if not claims:
            return claims
        held = await self.handling.acquire([claim.document for claim in claims])
        claims = [claim for claim in claims if claim.item.document_id in held]
        done = await self.handling.done([claim.document for claim in claims])
        for claim in claims:
            if claim.item.document_id in done:
                change = self._change(done[claim.item.document_id], {self._status: self._values.completed_value})
                await self._accepted("complete a document", self._pending_one(claim.document), change)
        await self.handling.release(list(done))
        return [claim for claim in claims if claim.item.document_id not in done]

    async def claims_of(self, job_id: str) -> AsyncGenerator[list[tuple[str, str]]]:
        """Yield the documents that *job_id* has in progress, as pages of (document id, custom id)."""
        query = {self._status: self._values.in_progress_value, f"{self._info}.job_id": job_id}
        fields = ["_id", f"{self._info}.custom_id"]
        async for page in self._pages(query, [], fields, CLAIM_PAGE):
            yield [(canonical(document["_id"]), str(value_at(document, fields[1]))) for document in page]

    async def has_trace_of(self, job_id: str) -> bool:
        """Return whether any document, whatever its status, was sent by *job_id*."""
        query = {f"{self._info}.job_id": job_id}
        return bool(await self._call("look for the job", lambda: self._documents.count_documents(query, limit=1)))

    async def give_back(self, claims: Sequence[tuple[str, str]]) -> None:
        """Make claimed documents (document id, custom id) pending again and remove every trace of the claim."""
        names = ("job_id", "custom_id", "attempts", "claimed_at", "input_sha256")
        unset = {f"{self._info}.{name}": "" for name in names}
        change = {"$set": {self._status: self._values.pending_value}, "$unset": unset}

        async def release(claim: tuple[str, str]) -> None:
            await self._accepted("give a document back", self._claimed_one(loads(claim[0]), claim[1]), change)

        await self._each(release, claims)
        await self.handling.release([document_id for document_id, _ in claims])

    async def read(self, document_ids: Sequence[str]) -> dict[str, Document]:
        """Return the documents of *document_ids* (canonical Extended JSON) that still exist and can be read."""
        ids = [loads(value) for value in document_ids]
        try:
            found = await self._call(
                "read documents", lambda: self._documents.find({"_id": {"$in": ids}}).to_list(None)
            )
        except StoreUnreadableError:
            read = [
                await self._call("read a document", partial(read_alone, self._documents, [one], None)) for one in ids
            ]
            found = [document for page in read for document in page if UNREADABLE not in document]
        return {canonical(document["_id"]): document for document in found}

    async def refuse(self, document: Document, problem: JobProcessingError) -> bool:
        """End a pending *document* that gets no request, as failed or skipped; return False if it was not pending."""
        value = (self._values.skipped_value if problem.is_skip else None) or self._values.failed_value
        info = self._info_change(document, {"error": str(problem), "failed_at": datetime.now(UTC)})
        reason = {**info, **self.handling.failure_fields(str(problem))}
        for fields in (reason, {}):  # without the reason if MongoDB rejects it
            change = {"$set": {self._status: value, **fields}}
            modified = await self._accepted("fail a document", self._pending_one(document), change)
            if modified is not None:
                return bool(modified)
        return False

    async def end(self, endings: Sequence[Ending]) -> set[str]:
        """Write *endings*; if its claim no longer matches, one was written before and is skipped.

        Returns the custom ids of those that MongoDB rejected: their documents are failed.
        """
        modified = dict(
            zip((ending.item.custom_id for ending in endings), await self._each(self._end, endings), strict=True)
        )
        ended = [ending.item for ending in endings]
        busy = {item.document_id for item in ended if modified[item.custom_id] == 0 and await self._is_busy(item)}
        # Before the ledger: after a crash in between this is repeated.
        await self.handling.release([item.document_id for item in ended if item.document_id not in busy])
        return {custom_id for custom_id, number in modified.items() if number is None}

    async def _is_busy(self, item: Item) -> bool:
        """Return whether another request for the document of *item* is under way; then it keeps its lease."""
        query = {"_id": {"$eq": loads(item.document_id)}, self._status: self._values.in_progress_value}
        return bool(await self._call("look for a claim", lambda: self._documents.count_documents(query, limit=1)))

    async def _end(self, ending: Ending) -> int | None:
        """Write *ending*; return how many documents that modified, None if MongoDB rejects it: the document is failed."""
        document_id = loads(ending.item.document_id)
        query = self._claimed_one(document_id, ending.item.custom_id)
        fields = self._info_fields(ending.info)
        if ending.update is not None:
            change = self._change(ending.update, {self._status: self._values.completed_value, **fields})
            change.setdefault("$unset", {})[f"{self._info}.error"] = ""
        elif ending.item.retryable:
            change = {"$set": {self._status: self._values.pending_value, **fields}}
        else:
            change = self._failure(ending.info)
        modified = await self._accepted("write an answer", query, change)
        if modified is not None:
            return modified
        info = {**ending.info, "error": NOT_STORED, "failed_at": datetime.now(UTC)}
        await self._accepted("fail a document", query, self._failure(info))
        return None

    def _failure(self, info: Mapping[str, Any]) -> dict[str, Any]:
        fields = {**self._info_fields(info), **self.handling.failure_fields(str(info.get("error")))}
        return {"$set": {self._status: self._values.failed_value, **fields}}

    @staticmethod
    def _change(update: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
        """Return a copy of *update* that also sets *fields*."""
        change = {operator: dict(changes) for operator, changes in update.items()}
        change.setdefault("$set", {}).update(fields)
        return change

    def _info_fields(self, info: Mapping[str, Any]) -> dict[str, Any]:
        return {f"{self._info}.{name}": value for name, value in info.items()}

    def _info_change(self, document: Document, info: Mapping[str, Any]) -> dict[str, Any]:
        """Return the ``$set`` fields for *info*; a null, text or list in the place of ``processing_info`` is replaced."""
        is_usable = isinstance(value_at(document, self._info, default={}), Mapping)
        return self._info_fields(info) if is_usable else {self._info: info}

    async def _accepted(self, what: str, query: Document, change: Document) -> int | None:
        """Return how many documents *change* modified; None, with a warning, if MongoDB rejects it."""
        try:
            return int((await self._update(what, query, change)).modified_count)
        except StoreRejectedError as exc:
            logger.warning("document %s: %s", id_text(query["_id"]["$eq"]), exc)
            return None

    async def _update(self, what: str, query: Document, change: Document) -> Any:
        return await self._call(what, lambda: self._documents.update_one(query, change))

    async def _each(self, change: Callable[[Any], Awaitable[T]], values: Iterable[Any]) -> list[T]:
        """Return what *change* returns for each of *values*; all of them are done before an error is raised."""
        slots = asyncio.Semaphore(CONCURRENT_UPDATES)

        async def one(value: Any) -> T:
            async with slots:
                return await change(value)

        tasks = [asyncio.ensure_future(one(value)) for value in values]
        await asyncio.gather(*tasks, return_exceptions=True)
        return [task.result() for task in tasks]

    async def _call(self, what: str, operation: Callable[[], Awaitable[T]]) -> T:
        return await call_repeatedly(what, operation, self._policy)

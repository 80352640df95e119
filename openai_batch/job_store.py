"""The documents of a job: pages, claims and ends. Every change is made only where the claim still stands.

A document carries its claim itself: the in-progress status and, in ``processing_info``, the custom id of the line
that it was sent as. MongoDB changes one document atomically, so two runs never have the same one, and a change
that is made twice, after a crash, changes nothing the second time.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Protocol, TypeVar

from config import Settings
from error_handler import JobProcessingError, StoreRejectedError
from mongo_client import range_filter
from openai_batch.job_config import AppConfig, Document
from storage.extended_json import canonical, id_text, loads
from storage.mongo_connection import DURABLE, close_client, open_client
from storage.mongo_errors import translated
from utils.retry_utils import RetryPolicy, retry_async

logger = logging.getLogger(__name__)

T = TypeVar("T")

AT_ONCE = 16  # updates in flight; the pool has 20 connections


@dataclass(frozen=True, slots=True)
class Claim:
    """One document that a line is made of. *attempt* counts from 1."""

    document: Document
    custom_id: str
    attempt: int


@dataclass(frozen=True, slots=True)
class Ending:
    """How a sent document ends. *document_id* is canonical Extended JSON.

    *update* holds the changes of a completed one. *is_final* tells a failed one from one that goes back to pending.
    *info* is added to ``processing_info``.
    """

    document_id: str
    custom_id: str
    update: Mapping[str, Any] | None
    is_final: bool
    info: Mapping[str, Any]


class Leases(Protocol):
    """What keeps others, who know nothing of claims, off the documents of a job, and tells which are done already."""

    async def hold(self, documents: Sequence[Document], /) -> set[str]:
        """Return the canonical ids of those of *documents* that are this job's now."""
        ...

    async def let_go(self, document_ids: Sequence[str], /) -> None:
        """Let others have *document_ids*."""
        ...

    def noted(self, error: str, /) -> dict[str, Any]:
        """Return the fields that a document is given beside its status when it ends with *error*."""
        ...

    async def done(self, documents: Sequence[Document], /) -> dict[str, Mapping[str, Any]]:
        """Return the updates of those of *documents* that need no request, by canonical id."""
        ...


class JobStore:
    """The documents of one job. Use as ``async with``: it opens its own client. *leases* may be set until the first use."""

    def __init__(self, config: AppConfig, settings: Settings) -> None:
        self.leases: Leases | None = None
        self._schema = config.schema_config
        self._client = open_client(settings.model_copy(update={"mongodb_uri": config.database.uri}))
        options = self._client.codec_options.with_options(tz_aware=True)
        self._documents = self._client[config.database.name].get_collection(
            config.database.collection, codec_options=options, write_concern=DURABLE
        )
        self._policy = RetryPolicy(settings.mongodb_max_retries, settings.mongodb_backoff_s)
        self._status = self._schema.status.field_name
        self._info = self._schema.processing_info_field

    async def __aenter__(self) -> JobStore:
        return self

    async def __aexit__(self, *_: object) -> None:
        await close_client(self._client)

    @property
    def source(self) -> str:
        """Database, collection and status field: what the ledger belongs to."""
        return f"{self._documents.full_name} by {self._status}"

    async def count_pending(self) -> int:
        """Return how many documents are pending now."""
        return await self._call("count documents", lambda: self._documents.count_documents(self._pending()))

    async def pages(self, size: int) -> AsyncGenerator[list[Document]]:
        """Yield the pending documents up to the greatest id there is now, in the order of ids, *size* at a time."""
        last = await self._call(
            "read the last id", lambda: self._documents.find({}, {"_id": 1}).sort("_id", -1).limit(1).to_list(None)
        )
        after: list[Any] = []
        while last:
            query = {"$and": [self._pending(), range_filter(after, [last[0]["_id"]])]}
            page = await self._page(query, None, size)
            if not page:
                return
            after = [page[-1]["_id"]]
            yield page

    async def _page(self, query: Document, fields: Document | None, size: int) -> list[Document]:
        def find() -> Awaitable[list[Document]]:
            # The index of another field would serve the query and then sort the whole collection in memory.
            return self._documents.find(query, fields).sort("_id", 1).limit(size).hint([("_id", 1)]).to_list(None)

        return await self._call("read a page", find)

    def _pending(self) -> dict[str, Any]:
        status = self._schema.status
        wanted = [status.pending_value, None] if status.missing_is_pending else [status.pending_value]
        own = {self._status: {"$in": wanted}}
        return {"$and": [own, self._schema.query_template]} if self._schema.query_template else own

    async def claim(self, claims: Sequence[Claim], job_id: str) -> list[Claim]:
        """Take *claims* for *job_id*; return those that nobody else took first."""
        status = self._schema.status

        async def take(claim: Claim) -> bool:
            info: dict[str, Any] = {
                "job_id": job_id,
                "custom_id": claim.custom_id,
                "attempts": claim.attempt,
                "claimed_at": datetime.now(UTC),
            }
            query = {"_id": {"$eq": claim.document["_id"]}, **self._pending()}
            change = {"$set": {self._status: status.in_progress_value, **self._info_change(claim.document, info)}}
            try:
                outcome = await self._update("claim a document", query, change)
            except StoreRejectedError as exc:
                problem = JobProcessingError(f"MongoDB lets nobody mark the document ({exc})", is_final=True)
                await self.refuse(claim.document, problem)
                return False
            if outcome.modified_count:
                return True
            # An answer that was lost: it may be ours all the same.
            mine = {"_id": {"$eq": claim.document["_id"]}, **self._claimed(claim.custom_id)}
            return bool(await self._call("look for a claim", lambda: self._documents.count_documents(mine, limit=1)))

        free = await self._free(claims)
        taken = await self._each(take, free)
        own = [claim for claim, is_own in zip(free, taken, strict=True) if is_own]
        if self.leases is not None:
            ids = {claim.custom_id: canonical(claim.document["_id"]) for claim in free}
            kept = {claim.custom_id for claim in own}
            await self.leases.let_go([document_id for custom_id, document_id in ids.items() if custom_id not in kept])
        return own

    async def _free(self, claims: Sequence[Claim]) -> Sequence[Claim]:
        """Return those of *claims* that are leased now and not done; what is done gets its status."""
        if self.leases is None or not claims:
            return claims
        held = await self.leases.hold([claim.document for claim in claims])
        claims = [claim for claim in claims if canonical(claim.document["_id"]) in held]
        done = await self.leases.done([claim.document for claim in claims])
        for claim in claims:
            update = done.get(canonical(claim.document["_id"]))
            if update is not None:
                change = {operator: dict(fields) for operator, fields in update.items()}
                change.setdefault("$set", {})[self._status] = self._schema.status.completed_value
                await self._update("end a document", {"_id": {"$eq": claim.document["_id"]}, **self._pending()}, change)
        await self.leases.let_go(list(done))
        return [claim for claim in claims if canonical(claim.document["_id"]) not in done]

    async def left_claims(self, job_id: str) -> AsyncGenerator[list[tuple[str, str]]]:
        """Yield the documents in progress of *job_id* as pages of (document id, custom id)."""
        query = {self._status: self._schema.status.in_progress_value, f"{self._info}.job_id": job_id}
        fields = {"_id": 1, f"{self._info}.custom_id": 1}
        after: list[Any] = []
        while True:
            page = await self._page({"$and": [query, range_filter(after, [])]}, fields, 500)
            if not page:
                return
            after = [page[-1]["_id"]]
            yield [(canonical(document["_id"]), str(_at(document, f"{self._info}.custom_id"))) for document in page]

    async def give_back(self, claims: Iterable[tuple[str, str]]) -> None:
        """Make claimed documents (document id, custom id) pending again, as if they had never been taken."""
        fields = ("job_id", "custom_id", "attempts", "claimed_at")

        async def release(claim: tuple[str, str]) -> None:
            query = {"_id": {"$eq": loads(claim[0])}, **self._claimed(claim[1])}
            change = {
                "$set": {self._status: self._schema.status.pending_value},
                "$unset": {f"{self._info}.{name}": "" for name in fields},
            }
            await self._update("give a document back", query, change)

        given = list(claims)
        await self._each(release, given)
        if self.leases is not None:
            await self.leases.let_go([document_id for document_id, _ in given])

    async def read(self, document_ids: Sequence[str]) -> dict[str, Document]:
        """Return the documents of *document_ids* (canonical Extended JSON) that are still there."""
        ids = [loads(value) for value in document_ids]
        found = await self._call("read documents", lambda: self._documents.find({"_id": {"$in": ids}}).to_list(None))
        return {canonical(document["_id"]): document for document in found}

    async def refuse(self, document: Document, problem: JobProcessingError) -> bool:
        """End a pending *document* that no request can be made of, as failed or skipped; False where it was not pending."""
        status = self._schema.status
        info = {"error": str(problem), "failed_at": datetime.now(UTC)}
        value = (status.skipped_value if problem.is_skip else None) or status.failed_value
        query = {"_id": {"$eq": document["_id"]}, **self._pending()}
        noted = self.leases.noted(str(problem)) if self.leases is not None else {}
        for fields in (
            {**self._info_change(document, info), **noted},
            {},
        ):  # with the reason, or, where that cannot be, without
            try:
                outcome = await self._update("fail a document", query, {"$set": {self._status: value, **fields}})
                return bool(outcome.modified_count)
            except StoreRejectedError:
                logger.warning("document %s does not take its reason", id_text(document["_id"]))
        return False

    async def end(self, endings: Sequence[Ending]) -> set[str]:
        """Write *endings*; one whose claim does not stand any more was written before, and is left alone.

        Returns the custom ids of those that MongoDB does not take: their documents are failed.
        """
        status = self._schema.status

        async def write(ending: Ending) -> str | None:
            query = {"_id": {"$eq": loads(ending.document_id)}, **self._claimed(ending.custom_id)}
            change = {operator: dict(fields) for operator, fields in (ending.update or {}).items()}
            value = status.failed_value if ending.is_final else status.pending_value
            if ending.update is not None:
                value = status.completed_value
            change.setdefault("$set", {}).update({self._status: value, **self._info_fields(ending.info)})
            if ending.update is None and ending.is_final and self.leases is not None:
                change["$set"].update(self.leases.noted(str(ending.info.get("error"))))
            if ending.update is not None:
                change.setdefault("$unset", {})[f"{self._info}.error"] = ""
            try:
                await self._update("write an answer", query, change)
            except StoreRejectedError:
                await self._write_failure(ending, query)
                return ending.custom_id
            return None

        rejected = {custom_id for custom_id in await self._each(write, endings) if custom_id is not None}
        if self.leases is not None:  # the ledger is told after this: a crash in between brings it here again
            await self.leases.let_go([ending.document_id for ending in endings])
        return rejected

    async def _write_failure(self, ending: Ending, query: Document) -> None:
        """MongoDB takes the answer not: too large, or its field is of another type. The document says so."""
        error = "MongoDB does not take the answer: the document would be too large, or a field is of another type"
        info = {**ending.info, "error": error, "failed_at": datetime.now(UTC)}
        change = {"$set": {self._status: self._schema.status.failed_value, **self._info_fields(info)}}
        try:
            await self._update("fail a document", query, change)
        except StoreRejectedError:
            logger.warning("document %s has no room for its status", id_text(loads(ending.document_id)))

    def _claimed(self, custom_id: str) -> dict[str, Any]:
        return {self._status: self._schema.status.in_progress_value, f"{self._info}.custom_id": custom_id}

    def _info_fields(self, info: Mapping[str, Any]) -> dict[str, Any]:
        return {f"{self._info}.{name}": value for name, value in info.items()}

    def _info_change(self, document: Document, info: Mapping[str, Any]) -> dict[str, Any]:
        """Return what sets *info* in *document*; null, a text or a list in its place is replaced."""
        present = _at(document, self._info)
        is_there = isinstance(present, Mapping) or not _has(document, self._info)
        return self._info_fields(info) if is_there else {self._info: dict(info)}

    async def _update(self, what: str, query: Document, change: Document) -> Any:
        return await self._call(what, lambda: self._documents.update_one(query, change))

    async def _each(self, change: Callable[[Any], Awaitable[T]], values: Sequence[Any]) -> list[T]:
        slots = asyncio.Semaphore(AT_ONCE)

        async def one(value: Any) -> T:
            async with slots:
                return await change(value)

        done = await asyncio.gather(*(one(value) for value in values), return_exceptions=True)
        for outcome in done:
            if isinstance(outcome, BaseException):
                raise outcome
        return [outcome for outcome in done if not isinstance(outcome, BaseException)]

    async def _call(self, what: str, operation: Callable[[], Awaitable[T]]) -> T:
        async def attempt() -> T:
            with translated(what):
                return await operation()

        return await retry_async(attempt, self._policy, what)


def _has(document: Mapping[str, Any], path: str) -> bool:
    parent, _, name = path.rpartition(".")
    found = _at(document, parent) if parent else document
    return isinstance(found, Mapping) and name in found


def _at(document: Mapping[str, Any], path: str) -> Any:
    value: Any = document
    for name in path.split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
    return value

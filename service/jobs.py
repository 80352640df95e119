"""Jobs: conversations that are accepted now and labelled in the background, with the bodies of requests and answers."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Callable, Coroutine
from contextlib import AsyncExitStack
from datetime import datetime
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from config import Settings
from config.service_settings import ServiceSettings
from error_handler import ConfigurationError, RequestError, StoreError
from mongo_client import DocumentStore
from service import errors
from service.batch import DONE, EXAMPLE_ITEMS, PENDING, Conversations, ItemResult, require_distinct_ids
from service.idempotency import fingerprint
from service.job_runner import JobRunner
from service.job_store import JobStore
from service.metrics import ServiceMetrics
from service.model import ModelService
from service.review import MONGODB_ATTEMPTS, MONGODB_TIMEOUT_MS
from service.webhooks import MAX_URL_CHARACTERS, url_pattern
from storage.extended_json import Document

logger = logging.getLogger(__name__)

T = TypeVar("T")

LEASE_S = 15.0  # longer than the deadline of a call by this much, to store its result
RETRY_AFTER_S = 30  # if too many jobs are not done
DEFAULT_PAGE, MAX_PAGE = 100, 1000
_EXAMPLE_ID = "5f0e3c1b7a9d4e2f8b6c5d4e3f2a1b0c"


class JobRequest(BaseModel):
    """The conversations of a job."""

    model_config = ConfigDict(
        extra="forbid", strict=True, json_schema_extra={"examples": [{"conversations": EXAMPLE_ITEMS}]}
    )

    conversations: Conversations = Field(min_length=1, description="each id at most once")
    webhook: str | None = Field(
        None, max_length=MAX_URL_CHARACTERS, description="URL of an allowed origin that is called when the job is done"
    )


class JobState(BaseModel):
    """A job, without its results."""

    job: str = Field(description="its id", examples=[_EXAMPLE_ID])
    status: Literal["open", "done"] = Field(description="done: each conversation has labels or an error")
    total: int = Field(description="conversations")
    succeeded: int = Field(description="conversations with labels")
    failed: int = Field(description="conversations with an error")
    created_at: datetime = Field(description="when it was accepted")
    finished_at: datetime | None = Field(None, description="when it was done")
    expires_at: datetime = Field(description="when it is removed, with its results")
    webhook: Literal["pending", "delivered", "failed"] | None = Field(None, description="if the job has one")


class JobPage(JobState):
    """A job, and a page of its results in the order of the request."""

    results: list[ItemResult]
    next_offset: int | None = Field(None, description="the offset of the next page; left out on the last one")


class PageQuery(BaseModel):
    """Which results to return."""

    model_config = ConfigDict(extra="forbid")

    offset: int = Field(0, ge=0, le=1_000_000, description="position of the first one, from 0")
    limit: int = Field(DEFAULT_PAGE, ge=1, le=MAX_PAGE, description="maximum number")


class JobService:
    """The jobs for the callers of the service, within the deadlines of their requests."""

    def __init__(self, store: JobStore, runner: JobRunner, model: ModelService, settings: ServiceSettings) -> None:
        self._store = store
        self._runner = runner
        self._deadlines = model.deadlines
        self._settings = settings
        self._adding = asyncio.Lock()  # so that requests at once do not exceed the limit

    async def create(self, wanted: JobRequest, caller: str, key: str | None, deadline: float) -> tuple[JobState, bool]:
        """Store the job durably; return it, and whether an earlier request with *key* made it.

        Raises:
            RequestError: INVALID, DUPLICATE_ID, TOO_MANY_JOBS, KEY_REUSED, STORE_AWAY, TOO_SLOW.
        """
        most = self._settings.job_max_conversations
        if len(wanted.conversations) > most:
            raise RequestError(errors.INVALID, f"conversations: at most {most} are allowed; send several jobs.")
        require_distinct_ids(wanted.conversations)
        self._require_allowed(wanted.webhook)
        return await self._within(deadline, self._create(wanted, caller, key))

    async def _create(self, wanted: JobRequest, caller: str, key: str | None) -> tuple[JobState, bool]:
        head: Document = {"caller": caller, "fingerprint": fingerprint(wanted)}
        if wanted.webhook is not None:
            head["webhook"] = {"url": wanted.webhook, "state": "pending", "attempts": 0}
        requests = [item.model_dump(exclude_unset=True) for item in wanted.conversations]
        await self._runner.prepare()
        async with self._adding:
            if key is not None and self._settings.idempotency_retention_s:
                head["key"] = key
                if (earlier := await self._earlier(head)) is not None:
                    return earlier, True
            if len(await self._store.open_jobs()) >= self._settings.max_open_jobs:
                raise RequestError(errors.TOO_MANY_JOBS, retry_after_s=RETRY_AFTER_S)
            job = await self._store.add(head, requests)
        self._runner.wake()
        if job is None and (earlier := await self._earlier(head)) is not None:  # another service was faster
            return earlier, True
        if job is None:
            raise errors.unavailable(errors.STORE_AWAY)
        return _state(job, {None: job["total"]}), False

    async def _earlier(self, head: Document) -> JobState | None:
        """Return the job with the key of *head*; raise RequestError (KEY_REUSED) if its body was another one."""
        found = await self._store.find({"caller": head["caller"], "key": head["key"]})
        if found is None:
            return None
        if found["fingerprint"] != head["fingerprint"]:
            raise RequestError(errors.KEY_REUSED)
        return _state(found, await self._store.counts(found["_id"]))

    async def read(self, job: str, caller: str, query: PageQuery, deadline: float) -> JobPage:
        """Return *job* of *caller* with a page of results; raise RequestError (JOB_NOT_FOUND, STORE_AWAY, TOO_SLOW)."""

        async def work() -> JobPage:
            found = await self._store.find({"_id": job, "caller": caller})
            counts = await self._store.counts(job)
            if found is None or sum(counts.values()) < found["total"]:  # its expiry or removal has begun
                raise RequestError(errors.JOB_NOT_FOUND)
            page = await self._store.page(job, query.offset, query.limit)
            end = query.offset + query.limit
            return JobPage(
                **_state(found, counts).model_dump(),
                results=[_item_result(item) for item in page],
                next_offset=end if end < found["total"] else None,
            )

        return await self._within(deadline, work())

    async def remove(self, job: str, caller: str, deadline: float) -> None:
        """Stop *job* of *caller* and remove it with its results; raise RequestError as ``read`` does."""
        if not await self._within(deadline, self._store.remove(job, caller)):
            raise RequestError(errors.JOB_NOT_FOUND)

    def _require_allowed(self, url: str | None) -> None:
        origins = self._settings.allowed_origins
        if url is not None and not (origins and re.fullmatch(url_pattern(origins), url)):
            raise RequestError(
                errors.INVALID, "webhook: its origin is not in API_WEBHOOK_ORIGINS, or it is no plain URL."
            )

    async def _within(self, deadline: float, work: Coroutine[Any, Any, T]) -> T:
        try:
            return await self._deadlines.until(deadline, work)
        except (StoreError, ConfigurationError) as exc:
            logger.warning("jobs: %s", exc)
            raise errors.unavailable(errors.STORE_AWAY) from exc


def _state(job: Document, counts: dict[int | None, int]) -> JobState:
    open_ones, succeeded = counts.get(None, 0), counts.get(DONE, 0)
    return JobState(
        job=job["_id"],
        status=job["state"],
        total=job["total"],
        succeeded=succeeded,
        failed=job["total"] - open_ones - succeeded,
        created_at=job["created_at"],
        finished_at=job.get("finished_at"),
        expires_at=job["expires_at"],
        webhook=job["webhook"]["state"] if "webhook" in job else None,
    )


def _item_result(item: Document) -> ItemResult:
    if "result" in item:
        return ItemResult(**item["result"])
    request = item["request"]
    return ItemResult(id=request.get("id"), conversation_number=request["conversation_number"], status=PENDING)


async def open_jobs(
    settings: Settings,
    service_settings: ServiceSettings,
    model: ModelService,
    metrics: ServiceMetrics,
    is_stopping: Callable[[], bool],
    stack: AsyncExitStack,
) -> JobService | None:
    """Return the jobs, which are worked off until *stack* ends; None, with a warning, if MONGODB_URI cannot be used."""
    patience = {
        "mongodb_max_retries": min(settings.mongodb_max_retries, MONGODB_ATTEMPTS),
        "mongodb_timeout_ms": min(settings.mongodb_timeout_ms, MONGODB_TIMEOUT_MS),
    }
    impatient = settings.model_copy(update=patience)
    try:
        documents = DocumentStore(impatient)
    except ConfigurationError as exc:
        logger.warning("POST /jobs answers 503: %s", exc)
        return None
    stack.push_async_callback(documents.close)
    lease_s = service_settings.request_timeout_s + LEASE_S
    store = JobStore(documents, impatient, service_settings.job_retention_s, lease_s)
    runner = JobRunner(store, model, service_settings, metrics)
    await stack.enter_async_context(runner.running(is_stopping))
    return JobService(store, runner, model, service_settings)

"""Works off the jobs in the background: in slots that no request waits for, and with leases, so that several services can.

A conversation is claimed when a slot is free, and its lease is longer than the deadline of its call. So no lease is
renewed: one that expires belongs to a process that died.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import orjson
from pydantic import ValidationError

from config.service_settings import ServiceSettings
from error_handler import ConfigurationError, JobConnectionError, JobValidationError, RequestError, StoreError
from service import errors
from service.batch import DONE, BatchItem, ItemResult, failed, labelled
from service.contract import conversation_of
from service.job_store import DELIVERED, GIVEN_UP, ClaimedItem, DueWebhook, JobStore
from service.metrics import ServiceMetrics
from service.model import ModelService
from service.webhooks import host_of, send_webhook, url_pattern

logger = logging.getLogger(__name__)

ATTEMPTS = 3  # of one conversation; an outage of the model server does not count
POLL_S = 5.0  # for jobs of other processes, and what they left
AFTER_OUTAGE_S = 5.0  # of the model server
AFTER_STORE_FAILURE_S = 30.0
GIVE_BACK_S = 2.0  # at the end of the process
WEBHOOK_ATTEMPTS = 14  # within about two hours; the waits double up to one hour
WEBHOOK_POLL_S = 1.0


class JobRunner:
    """Works off the jobs of *store* inside ``running``."""

    def __init__(
        self, store: JobStore, model: ModelService, settings: ServiceSettings, metrics: ServiceMetrics
    ) -> None:
        self._store = store
        self._model = model
        self._settings = settings
        self._metrics = metrics
        self._added = asyncio.Event()
        self._working: set[asyncio.Task[None]] = set()
        self._preparing = asyncio.Lock()
        self._is_prepared = False

    def wake(self) -> None:
        """Look for work now; a job was added."""
        self._added.set()

    async def prepare(self) -> None:
        """Create what the jobs need in MongoDB, once; raise StoreError or ConfigurationError."""
        async with self._preparing:
            if not self._is_prepared:
                await self._store.prepare()
                self._is_prepared = True

    @asynccontextmanager
    async def running(self, is_stopping: Callable[[], bool]) -> AsyncIterator[None]:
        """Work within the block; at its end, what is in work is given back. *is_stopping* ends the start of new work."""
        tasks = [asyncio.create_task(self._work_off(is_stopping), name="jobs")]
        if self._settings.allowed_origins:
            tasks.append(asyncio.create_task(self._send_webhooks(), name="webhooks"))
        for task in tasks:
            task.add_done_callback(_log_failure)
        try:
            yield
        finally:
            tasks += self._working
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)

    async def _work_off(self, is_stopping: Callable[[], bool]) -> None:
        while not is_stopping():
            self._added.clear()
            try:
                await self.prepare()
                self._model.require_model()
                if await self._start_one():
                    continue
                for job in await self._store.open_jobs():  # of a process that died before it could finish them
                    await self._finish(job)
            except (StoreError, ConfigurationError) as exc:
                logger.info("jobs wait for MongoDB (API_EXPOSE_JOBS=off if there are none): %s", exc)
                await self._pause(AFTER_STORE_FAILURE_S)
            except RequestError:  # the model is away; its check logs that
                await asyncio.sleep(AFTER_OUTAGE_S)
            else:
                await self._pause(POLL_S)

    async def _pause(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._added.wait()

    async def _start_one(self) -> bool:
        """Start the work on one conversation when a slot is free; return False if there is none."""
        if not await self._store.has_work():
            return False
        slots, item = self._model.slots, None
        await slots.acquire_in_background()
        try:
            item = await self._store.claim()
        finally:
            if item is None:
                slots.release_in_background()
        if item is None:
            return False
        task = asyncio.create_task(self._work(item), name="job-conversation")
        self._working.add(task)
        task.add_done_callback(self._ended)
        return True

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._working.discard(task)
        self._model.slots.release_in_background()
        _log_failure(task)  # the lease expires, and after ATTEMPTS the conversation fails

    async def _work(self, item: ClaimedItem) -> None:
        try:
            result = await self._result(item)
            if result is not None and await self._store.settle(item, result.model_dump(exclude_none=True)):
                self._metrics.job_conversations.labels("succeeded" if result.status == DONE else "failed").inc()
                await self._finish(item.job)
        except (StoreError, ConfigurationError) as exc:
            logger.warning("job %s: the lease of a conversation expires and it is done again: %s", item.job, exc)
        except asyncio.CancelledError:
            with contextlib.suppress(StoreError, ConfigurationError, TimeoutError):
                async with asyncio.timeout(GIVE_BACK_S):
                    await self._store.give_back(item, 0.0, counts=False)
            raise

    async def _result(self, item: ClaimedItem) -> ItemResult | None:
        """Return the result of *item*; None if it was given back for another attempt."""
        try:
            request = BatchItem.model_validate(item.request)
        except ValidationError:
            named = BatchItem.model_construct(**item.request)
            return failed(
                named, RequestError(errors.INVALID, "Another version of the service stored it; send it again.")
            )
        if item.attempts > ATTEMPTS:  # the process died each time
            return failed(request, RequestError(errors.INTERNAL))
        deadline = asyncio.get_running_loop().time() + self._settings.request_timeout_s
        try:
            conversation = conversation_of(request, self._settings)
            return labelled(request, await self._model.classify_in_background(conversation, deadline))
        except RequestError as problem:
            if problem.kind.status == 503:
                await self._store.give_back(item, AFTER_OUTAGE_S, counts=False)
                return None
            if problem.kind.status in (502, 504) and item.attempts < ATTEMPTS:
                await self._store.give_back(item, 2.0**item.attempts, counts=True)
                return None
            return failed(request, problem)

    async def _finish(self, job: str) -> None:
        if await self._store.finish(job):
            logger.info("job %s is done", job)

    async def _send_webhooks(self) -> None:
        while True:
            try:
                await self.prepare()
                while (due := await self._store.next_webhook()) is not None:
                    await self._send(due)
            except (StoreError, ConfigurationError):  # the other task logs it
                await asyncio.sleep(AFTER_STORE_FAILURE_S)
            await asyncio.sleep(WEBHOOK_POLL_S)

    async def _send(self, due: DueWebhook) -> None:
        """Send a webhook at least once: its attempt was stored before, its success is stored after."""
        job = str(due.job["_id"])
        state = GIVEN_UP
        try:
            if not re.fullmatch(url_pattern(self._settings.allowed_origins), due.url):
                raise JobValidationError("its origin is not in API_WEBHOOK_ORIGINS any more")
            await send_webhook(due.url, self._settings.signing_key, f"job_{job}", await self._payload(due))
            state = DELIVERED
        except (JobConnectionError, JobValidationError, ConfigurationError) as exc:
            is_final = isinstance(exc, JobValidationError) or due.attempts >= WEBHOOK_ATTEMPTS
            what = "given up" if is_final else "tried again later"
            logger.warning(
                "webhook of job %s to %s: attempt %d: %s; %s", job, host_of(due.url), due.attempts, exc, what
            )
            if not is_final:
                return
        await self._store.settle_webhook(job, state)
        self._metrics.webhooks.labels(state).inc()

    async def _payload(self, due: DueWebhook) -> bytes:
        counts = await self._store.counts(due.job["_id"])
        succeeded = counts.get(DONE, 0)
        data = {
            "job": due.job["_id"],
            "total": due.job["total"],
            "succeeded": succeeded,
            "failed": due.job["total"] - succeeded,
        }
        return orjson.dumps({"type": "job.done", "timestamp": due.job["finished_at"], "data": data})


def _log_failure(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (exc := task.exception()) is not None:
        logger.error("the task %s ended", task.get_name(), exc_info=exc)

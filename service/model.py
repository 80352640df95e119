"""The model behind POST /classify: bounded, within deadlines, and quick to fail during an outage."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import async_llm_wrapper
from async_llm_wrapper import SharedWindow
from classifier import Classifier
from config import Settings, load_prompt_taxonomy
from config.service_settings import ServiceSettings
from domain.conversation import Conversation
from embedded.choice import open_classifier
from error_handler import (
    ConfigurationError,
    ErrorKind,
    LLMError,
    LLMModelError,
    Reason,
    RequestError,
    SkippedDocumentError,
)
from model_server.breaker import BreakerPolicy
from model_server.models import chat_target
from service import errors
from service.admission import AdmissionQueue, Deadlines
from service.metrics import ServiceMetrics
from worker.reply_choice import classifier_for

if TYPE_CHECKING:
    from worker.server_pool import ServerPool

logger = logging.getLogger(__name__)

# A caller is waiting. The one quick retry is for a kept-alive connection that the server has closed.
SERVICE_ATTEMPTS, SERVICE_BACKOFF_S = 2, 0.1
SERVICE_PROBE_CAP_S = 2.0

CHECK_TIMEOUT_S = 5.0
START_WAIT_S = 2.0  # the start waits this long for the model to load; loading continues in the background
CHECK_AGAIN_S = 1.0  # also how long the result of a check is reused


@dataclass(frozen=True, slots=True)
class Verdict:
    """The labels of one conversation, the model that gave them, and how long that took."""

    labels: dict[str, str | list[str]]
    model: str
    queue_s: float
    model_s: float
    is_complete: bool = True  # whether the model saw the whole conversation


class ModelService:
    """The model, or a built-in classifier, with a limit on concurrent calls, a queue and deadlines."""

    def __init__(self, settings: Settings, service_settings: ServiceSettings, metrics: ServiceMetrics) -> None:
        """Prepare without opening anything.

        Raises:
            ConfigurationError: The taxonomy or the name of the model is invalid.
        """
        self._settings = settings.model_copy(
            update={
                "llm_timeout_s": min(settings.llm_timeout_s, service_settings.request_timeout_s),
                "llm_max_attempts": min(settings.llm_max_attempts, SERVICE_ATTEMPTS),
                "llm_backoff_s": min(settings.llm_backoff_s, SERVICE_BACKOFF_S),
            }
        )
        self.taxonomy = taxonomy = load_prompt_taxonomy(settings)
        self._classifier = Classifier(taxonomy, settings.on_long)  # until the model is found
        self._built_in = open_classifier(taxonomy) if service_settings.embedded else None
        self._target = chat_target(settings, settings.model or "")
        self._metrics = metrics
        self._client: async_llm_wrapper.AsyncLLMClient | ServerPool | None = None
        self._window: SharedWindow | ServerPool | None = None
        self._most = service_settings.max_concurrent
        self._checking = asyncio.Lock()
        self._checked_at = -math.inf
        self._found = self._built_in is not None
        self._problem: ErrorKind | None = None if self._found else errors.MODEL_AWAY
        servers = 1 if service_settings.embedded else len(settings.ollama_endpoints)
        self.slots = AdmissionQueue(servers * self._most, service_settings.queue_size)
        self.deadlines = Deadlines()
        watch = metrics.watch
        watch("triad_model_calls_in_flight", "Model calls in flight", lambda: self.slots.running)
        watch("triad_queue_length", "Requests waiting for a slot", lambda: self.slots.waiting)
        watch("triad_breaker_open", "1 while the model server is unavailable", lambda: self.is_breaker_open)
        watch("triad_model_found", "1 once the model has been found on the model server", lambda: self._found)

    @property
    def model(self) -> str:
        """The name of the model that gives the labels."""
        return self._target.model if self._built_in is None else self._built_in.model

    @property
    def is_breaker_open(self) -> bool:
        """True if the circuit breaker is open: the model server is unavailable."""
        return self._client is not None and self._client.breaker.is_open

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Classify within the block. A background task looks for the model until it is found."""
        if self._built_in is not None:
            yield
            return
        async with self._open_client() as (client, window):
            self._client, self._window = client, window
            await self.check()
            finder = asyncio.create_task(self._find_model(window), name="find-model")
            try:
                if self._problem is errors.MODEL_LOADING:
                    await asyncio.wait([finder], timeout=START_WAIT_S)
                yield
            finally:
                finder.cancel()
                await asyncio.wait([finder])
                await window.close()
                await client.breaker.close()

    @asynccontextmanager
    async def _open_client(
        self,
    ) -> AsyncIterator[tuple[async_llm_wrapper.AsyncLLMClient | ServerPool, SharedWindow | ServerPool]]:
        """Open the client of the model server and its window, or the pool of several, which is both."""
        if len(self._settings.ollama_endpoints) > 1:
            from worker.server_pool import open_pool  # noqa: PLC0415 - few services have several servers

            async with open_pool(self._settings, self._most, fails_fast=True) as pool:
                self._metrics.watch_servers(pool.states)
                yield pool, pool
            return
        async with async_llm_wrapper.open_session(self.slots.size) as session:
            policy = BreakerPolicy(probe_cap_s=SERVICE_PROBE_CAP_S, outage_limit_s=math.inf, fails_fast=True)
            client = async_llm_wrapper.AsyncLLMClient(self._settings, self._target, session, policy)
            yield client, SharedWindow(client, self._settings.ollama_num_ctx)

    async def check(self) -> ErrorKind | None:
        """Return what keeps the model from answering, or None. Asks the server at most once per CHECK_AGAIN_S."""
        if self._client is None:
            return None
        async with self._checking:
            if time.monotonic() - self._checked_at < CHECK_AGAIN_S:
                return self._problem
            problem, reason = await self._probe(self._client)
            if problem is not self._problem or self._checked_at == -math.inf:
                logger.log(logging.INFO if problem is None else logging.WARNING, "model: %s", reason)
            self._problem, self._checked_at = problem, time.monotonic()
            self._found = self._found or problem is None
            return problem

    async def _probe(self, client: async_llm_wrapper.AsyncLLMClient | ServerPool) -> tuple[ErrorKind | None, str]:
        try:
            async with asyncio.timeout(CHECK_TIMEOUT_S):
                target = await client.prepare(self._settings)
        except (ConfigurationError, LLMModelError) as exc:
            return errors.MODEL_MISSING, str(exc)
        except (LLMError, TimeoutError) as exc:
            return errors.MODEL_AWAY, str(exc) or f"no answer within {CHECK_TIMEOUT_S:.0f} s"
        if not self._found:
            self._classifier = classifier_for(self._settings, target, self.taxonomy)
        if self._window is not None and not self._window.is_loaded:
            return errors.MODEL_LOADING, f"{target.model} at {target.address} is available and not loaded yet"
        return None, f"{target.model} at {target.address} is ready"

    async def _find_model(self, window: SharedWindow | ServerPool) -> None:
        while await self.check() is not None:
            if self._problem is errors.MODEL_LOADING:
                try:
                    await window.load()
                    self._checked_at = -math.inf
                    continue
                except LLMError as exc:
                    logger.warning("model: loading failed: %s", exc)
            await asyncio.sleep(CHECK_AGAIN_S)

    def require_room(self) -> None:
        """Raise the RequestError that ``classify`` would raise at once, before the body is read."""
        self.require_model()
        self.slots.require_room()

    def require_model(self) -> None:
        """Raise RequestError (MODEL_AWAY, MODEL_MISSING, MODEL_LOADING) if the model cannot be asked now."""
        if not self._found:
            raise errors.unavailable(self._problem or errors.MODEL_AWAY)
        if self.is_breaker_open:
            raise errors.unavailable(errors.MODEL_AWAY)

    async def classify(self, conversation: Conversation, deadline: float, *, patiently: bool = False) -> Verdict:
        """Return the labels of *conversation* before *deadline* (of the running loop's clock).

        Cancelling it ends the model call and frees the slot. *patiently* also waits while the queue is full.

        Raises:
            RequestError: Listed in docs/service.md.
        """
        self.require_model()
        return await self.deadlines.until(deadline, self._classify(conversation, deadline, patiently))

    async def classify_in_background(self, conversation: Conversation, deadline: float) -> Verdict:
        """Do the same in a slot that the caller holds (``slots.acquire_in_background``)."""
        self.require_model()
        return await self.deadlines.until(deadline, self._ask(conversation, deadline, 0.0))

    async def _classify(self, conversation: Conversation, deadline: float, patiently: bool) -> Verdict:
        asked_at = time.monotonic()
        await self.slots.acquire(patiently=patiently)
        started_at = time.monotonic()
        queue_s = started_at - asked_at
        self._metrics.queue_time.observe(queue_s)
        try:
            return await self._ask(conversation, deadline, queue_s)
        finally:
            self.slots.release(time.monotonic() - started_at)

    async def _ask(self, conversation: Conversation, deadline: float, queue_s: float) -> Verdict:
        started_at = time.monotonic()
        try:
            labels, is_complete, model = await self._labels(conversation)
        except asyncio.CancelledError:
            if asyncio.get_running_loop().time() >= deadline:
                self._metrics.model_failures.labels(str(Reason.TIMEOUT)).inc()
            raise
        finally:
            model_s = time.monotonic() - started_at
            self._metrics.model_time.observe(model_s)
        return Verdict(labels, model, queue_s, model_s, is_complete)

    async def _labels(self, conversation: Conversation) -> tuple[dict[str, str | list[str]], bool, str]:
        """Return the labels, whether the model saw the whole conversation, and the model."""
        if self._built_in is not None:
            answer = await asyncio.to_thread(self._built_in.answer, conversation)
            return answer.classification.as_dict(), True, answer.model
        if self._client is None or self._window is None:
            raise errors.unavailable(errors.MODEL_AWAY)
        try:
            await self._window.renew()
            outcome = await self._window.classify(self._classifier, conversation, 0)
        except LLMError as exc:
            self._metrics.model_failures.labels(str(exc.reason)).inc()
            problem = errors.request_error(exc)
            logger.warning("classification failed: %s: %s", problem.kind.name, exc)
            raise problem from exc
        except SkippedDocumentError as exc:
            raise RequestError(errors.TOO_LONG) from exc
        self._metrics.tokens.labels("prompt").inc(outcome.prompt_tokens or 0)
        self._metrics.tokens.labels("reply").inc(outcome.reply_tokens or 0)
        return outcome.classification.as_dict(), outcome.input_complete, self.model

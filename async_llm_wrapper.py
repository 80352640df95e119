"""The asynchronous client of the model server (aiohttp), for the batch worker and the service."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import logging
import math
import os
import time
from collections.abc import Awaitable, Callable, Generator
from dataclasses import replace
from typing import TypeVar

from classifier import Classifier, classification_flow
from config import Settings
from config.loading import changed_environment
from domain.conversation import Conversation, Message, Outcome
from error_handler import LLMError, LLMFormError, LLMTimeoutError, LLMUnavailableError
from logger import REQUEST_ID_HEADER, request_id
from model_server import models as served_models
from model_server import protocol
from model_server.breaker import BreakerPolicy, CircuitBreaker
from model_server.chat import ReloadWatch, chat_flow, connection_error
from model_server.concurrency import ConcurrencyLimit
from model_server.protocol import ChatReply, ChatTarget, ServerRequest
from model_server.scores import LabelTokens, has_slots, score_flow, slots_flow
from model_server.window import Say, WindowChoice, choose_window, warm_up
from network.outgoing import aiohttp_session, route_to
from utils.retry_utils import RetryPolicy, retry_async

# aiohttp reads the certificates of the system twice, for TLS contexts that no Route uses: a tenth of the start of a run.
with changed_environment(SSL_CERT_FILE=os.devnull, SSL_CERT_DIR=os.devnull):
    import aiohttp

logger = logging.getLogger(__name__)
Q = TypeVar("Q")
A = TypeVar("A")
R = TypeVar("R")

CONNECT_TIMEOUT_S = 5.0
PROBE_TIMEOUT_S = 5.0
CHECK_EVERY_S = 10.0  # the longest time that a reload by another client goes unnoticed


def open_session(max_concurrent: int) -> aiohttp.ClientSession:
    """Return a session for one model server; see network.outgoing. The caller closes it."""
    return aiohttp_session(aiohttp.TCPConnector(limit=max_concurrent + 2, keepalive_timeout=60))


class AsyncLLMClient:
    """Asks one model. The caller owns *session*.

    Failed calls are repeated as *settings* say. While the server is away, calls wait in the breaker and keep their
    attempts. *limit* learns from each request. *on_answer* gets each complete answer, in the calling task.
    """

    def __init__(
        self,
        settings: Settings,
        target: ChatTarget,
        session: aiohttp.ClientSession,
        breaker_policy: BreakerPolicy | None = None,
        limit: ConcurrencyLimit | None = None,
        on_answer: Callable[[ChatReply], None] | None = None,
    ) -> None:
        self.target = target
        self.breaker = CircuitBreaker(
            self.is_alive, breaker_policy or BreakerPolicy(outage_limit_s=settings.outage_limit_s)
        )
        self._settings = settings
        self._session = session
        self._route_options = route_to(target.server_url).options
        self._target_headers = target.headers  # a target that has learnt something has the same key
        self._limit = limit
        self._on_answer = on_answer
        self._policy = RetryPolicy(settings.llm_max_attempts, settings.llm_backoff_s)
        self.reloads = ReloadWatch()
        self.label_tokens: dict[bytes, LabelTokens] = {}
        self._slots: asyncio.LifoQueue[int] | None = None  # those of the server that no conversation has

    async def chat(
        self, messages: list[Message], schema_json: bytes, attempt: int = 0, *, scores: bool = False
    ) -> ChatReply:
        """Return the model's answer to *messages*; *attempt* (from 0) varies the seed. *scores*: see ``score_flow``.

        Raises:
            LLMError: After the last attempt; see model_server.protocol.parse_chat_response.
        """
        # Partials, no recursive closure: a closure that refers to itself keeps its prompt until the garbage collector runs.
        ask = functools.partial(self._ask, messages, schema_json, None if scores else attempt)
        observed = ask if self._limit is None else functools.partial(self._limit.observed, ask)
        guarded = functools.partial(self.breaker.call, observed)
        answer = await retry_async(guarded, self._policy, "model call")
        if self._on_answer is not None:
            self._on_answer(answer)
        return answer

    async def is_alive(self) -> bool:
        """Return whether the server answers at all. The breaker's probe: it never raises LLMError."""
        try:
            await self.send(served_models.models_request(self.target, PROBE_TIMEOUT_S))
        except LLMError:
            return False
        return True

    async def list_models(self) -> list[served_models.ServedModel]:
        """Return the models on the server, remote ones included. Raises LLMUnavailableError if it does not list them."""
        request = served_models.models_request(self.target, self._settings.llm_timeout_s)
        return served_models.listed_models(self.target, *await self.send(request))

    async def version(self) -> str | None:
        """Return Ollama's version, None if unknown. Raises LLMUnavailableError if the server is away."""
        url = f"{self.target.server_url}/api/version"
        request = ServerRequest("GET", url, None, self._settings.llm_timeout_s)
        return served_models.parse_version(*await self.send(request))

    async def finds_ollama(self) -> bool:
        """Return whether an Ollama answers at the address of a server with OpenAI's protocol."""
        return await drive(served_models.find_ollama(self.target), self.send) is not None

    async def show(self, model: str) -> served_models.ModelFacts:
        """Return what Ollama reports about *model*; other servers tell nothing. Raises LLMUnavailableError if it is away."""
        if self.target.protocol == "openai_chat":
            return served_models.ModelFacts()
        request = served_models.show_request(self.target.server_url, model, self._settings.llm_timeout_s)
        return served_models.parse_show(*await self.send(request))

    async def loaded(self) -> served_models.LoadedModel | None:
        """Return how Ollama holds the model in memory, None if it does not. Raises LLMUnavailableError if it is away."""
        request = served_models.loaded_request(self.target.server_url)
        return served_models.find_loaded(self.target.model, *await self.send(request))

    async def prepare(self, settings: Settings) -> ChatTarget:
        """Find the model that *settings* name on the server, and return the target.

        Raises:
            LLMUnavailableError: The server does not answer.
            ConfigurationError: The server does not have the model; the message lists its models.
        """
        self.target = await drive(served_models.find_target(self.target, settings), self.send)
        return self.target

    async def warm_up(self, choice: WindowChoice, say: Say) -> ChatTarget:
        """Load the model and return the target with the window it then has; see model_server.window.warm_up.

        Raises:
            LLMError: The model does not load, or the server does not answer.
        """
        self.target = await drive(warm_up(self.target, self._settings, choice, say), self.send)
        self.reloads.is_warm = True
        return self.target

    async def send(self, request: ServerRequest) -> tuple[int, bytes]:
        """Return status and body of the answer to *request*. A connection that times out counts as refused.

        Raises:
            LLMTimeoutError, LLMConnectionError, LLMUnavailableError: There is no complete answer.
        """
        # aiohttp's timeouts are ClientErrors as well, so they are caught first.
        try:
            async with self._session.request(
                request.method,
                request.url,
                data=request.body,
                headers=self._headers(),
                timeout=_timeout(request.timeout_s),
                **self._route_options,
            ) as response:
                return response.status, await _read_bounded(response)
        except aiohttp.ConnectionTimeoutError as exc:
            raise connection_error(self.target, exc, was_made=False) from exc
        except TimeoutError as exc:
            raise LLMTimeoutError("the model server did not answer within the timeout (LLM_TIMEOUT_S)") from exc
        except (aiohttp.ClientConnectionError, aiohttp.ClientPayloadError, ConnectionError) as exc:
            was_made = not isinstance(exc, aiohttp.ClientConnectorError)
            raise connection_error(self.target, exc, was_made=was_made) from exc
        except aiohttp.ClientError as exc:
            raise LLMUnavailableError("the model server does not speak HTTP as expected") from exc

    async def _ask(self, messages: list[Message], schema_json: bytes, attempt: int | None) -> ChatReply:
        timeout_s = self._settings.llm_timeout_s
        if attempt is None:
            return await self._score(messages, schema_json, timeout_s)
        return await drive(chat_flow(self, messages, schema_json, attempt, timeout_s), self.send)

    async def _score(self, messages: list[Message], schema_json: bytes, timeout_s: float) -> ChatReply:
        """Read the labels. If the server has slots, in one that no other conversation of this client has; wait for one."""
        if not has_slots(self.target):
            return await drive(score_flow(self, messages, schema_json, timeout_s), self.send)
        if self._slots is None:
            free: asyncio.LifoQueue[int] = asyncio.LifoQueue()
            for slot in range(await drive(slots_flow(self, timeout_s), self.send)):
                free.put_nowait(slot)
            self._slots = self._slots or free  # another call may have been faster
        slots = self._slots
        slot = await slots.get()
        try:
            return await drive(score_flow(self, messages, schema_json, timeout_s, slot), self.send)
        finally:
            slots.put_nowait(slot)

    def _headers(self) -> dict[str, str]:
        current = request_id.get()
        return self._target_headers if current is None else {**self._target_headers, REQUEST_ID_HEADER: current}


@functools.lru_cache(maxsize=8)
def _timeout(total_s: float) -> aiohttp.ClientTimeout:
    return aiohttp.ClientTimeout(total=total_s, sock_connect=CONNECT_TIMEOUT_S)


async def _read_bounded(response: aiohttp.ClientResponse) -> bytes:
    if response.content_length is not None and response.content_length <= protocol.MAX_BODY_BYTES:
        return await response.read()
    chunks = bytearray()
    async for chunk in response.content.iter_chunked(65_536):
        chunks += chunk
        if len(chunks) > protocol.MAX_BODY_BYTES:
            raise LLMUnavailableError(f"the model server's answer is larger than {protocol.MAX_BODY_BYTES} bytes")
    return bytes(chunks)


async def ollama_classify_async(
    conversation: Conversation, client: AsyncLLMClient, classifier: Classifier, attempt: int = 0
) -> Outcome:
    """Return the labels of *conversation*; an unusable answer is followed by one repair turn.

    If the server refuses the reply style of *classifier*, the question is repeated in the next longer one.

    *attempt* counts earlier attempts of this document (from 0) and varies the seed.

    Raises:
        LLMError: The server gave no answer, or no usable one.
        SkippedDocumentError: The conversation is longer than the window, and ON_LONG is skip.
    """
    calls = itertools.count(2 * attempt)

    async def classify(used: Classifier) -> Outcome:
        flow = classification_flow(conversation, client, used)
        scores = used.reply_style == "score"
        return await drive(flow, lambda messages: client.chat(messages, used.schema_json, next(calls), scores=scores))

    while True:  # each LLMFormError leaves a style less
        with contextlib.suppress(LLMFormError):
            return await classify(classifier.for_target(client.target))


async def drive(flow: Generator[Q, A, R], ask: Callable[[Q], Awaitable[A]]) -> R:
    """Return what *flow* returns; each question that it yields gets the answer, or the error, of *ask*."""
    try:
        question = next(flow)
        while True:
            try:
                answer = await ask(question)
            except LLMError as problem:
                question = flow.throw(problem)
            else:
                question = flow.send(answer)
    except StopIteration as finished:
        return finished.value  # type: ignore[no-any-return]


class SharedWindow:
    """Keeps the target of *client* in step with the window of the loaded model; *asked* is the window setting or None.

    *chosen* is the window of the run, None if its documents are not known. A larger one that another program loads is used.
    """

    def __init__(self, client: AsyncLLMClient, asked: int | None, chosen: WindowChoice | None = None) -> None:
        self._client = client
        self._asked = asked
        self._chosen = chosen
        self._checked_at_s = -math.inf
        self._checking = asyncio.Lock()
        self._loading: asyncio.Task[None] | None = None
        self._was_listed = False
        self.is_loaded = False

    @property
    def target(self) -> ChatTarget:
        """The target of the client, with what it has learned."""
        return self._client.target

    async def load(self, say: Say = logger.info) -> None:
        """Load the model if it is not loaded yet, however long that takes. Raises LLMError if it does not load."""
        given = (await self._client.warm_up(self._choice(), say)).num_ctx
        if self._chosen is not None:
            self._chosen = self._chosen.given(given)
        self._checked_at_s = time.monotonic()
        self.is_loaded = True

    def adopt(self, num_ctx: int) -> None:
        """Use the larger window *num_ctx* from the next call on, unless the operator set one; that call loads the model."""
        if self._asked is None and self._chosen is not None and num_ctx > self._client.target.num_ctx:
            logger.info("another worker needs a window of %d tokens; using that from now on", num_ctx)
            self._chosen = replace(self._chosen, num_ctx=num_ctx)
            self._client.target = replace(self._client.target, num_ctx=num_ctx)
            self._checked_at_s = (
                time.monotonic()
            )  # until the model is loaded again, a check would take the old window back

    async def renew(self) -> None:
        """Check, at most every CHECK_EVERY_S, that the model is still loaded and with which window. Await before a call.

        An unloaded model is loaded again first, by one task for all callers; a caller that leaves does not stop it.

        Raises:
            LLMError: The model does not load.
        """
        if self._client.target.protocol == "openai_chat":
            return
        if self._is_due:
            async with self._checking:
                if self._is_due:
                    # Calls wait for the first check: the default window could load the model again. Later ones use the last answer.
                    if self._checked_at_s > -math.inf:
                        self._checked_at_s = time.monotonic()
                    await self._check()
                    self._checked_at_s = time.monotonic()
        if (loading := self._loading) is not None:
            await asyncio.wait([loading])  # awaiting the task itself would cancel this caller with it
            if not loading.cancelled():
                loading.result()

    async def classify(self, classifier: Classifier, conversation: Conversation, attempt: int) -> Outcome:
        """Renew the window, then return what ``ollama_classify_async`` returns."""
        with contextlib.suppress(LLMError):  # the call that follows reports it
            await self.renew()
        return await ollama_classify_async(conversation, self._client, classifier, attempt)

    async def close(self) -> None:
        """Cancel a load that is under way."""
        if self._loading is not None:
            self._loading.cancel()
            await asyncio.wait([self._loading])

    @property
    def _is_due(self) -> bool:
        return self._loading is None and time.monotonic() - self._checked_at_s >= CHECK_EVERY_S

    def _choice(self) -> WindowChoice:
        return self._chosen or choose_window(None, self._client.target.context_limit, self._asked)

    async def _check(self) -> None:
        target = self._client.target
        try:
            status, body = await self._client.send(served_models.loaded_request(target.server_url))
            loaded = served_models.find_loaded(target.model, status, body)
        except LLMError:
            return  # the next call reports the problem
        if status == 200 and loaded is None:
            # A server that does not list the model that it has just loaded never will.
            if self._loading is None and (self._was_listed or not self.is_loaded):
                self._loading = asyncio.create_task(self.load(), name="load-model")
                self._loading.add_done_callback(self._loaded)
            return
        self._was_listed = self._was_listed or loaded is not None
        num_ctx = self._choice().beside(loaded)
        if num_ctx != target.num_ctx:
            logger.info("the model is loaded with a window of %d tokens; using that from now on", num_ctx)
            self._client.target = replace(self._client.target, num_ctx=num_ctx)

    def _loaded(self, task: asyncio.Task[None]) -> None:
        self._loading = None
        if not task.cancelled() and (problem := task.exception()) is not None:
            logger.warning("the model does not load: %s", problem)

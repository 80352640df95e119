"""The model server, asynchronously (aiohttp): for the batch worker and the service."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import logging
import math
import time
from collections.abc import Callable
from dataclasses import replace

import aiohttp

from classifier import FittedAnswer, FlowParts, ReplyParser, build_outcome, classify_with_truncation
from config import Settings
from domain.conversation import Conversation, Outcome
from error_handler import (
    LLMConnectionError,
    LLMContextError,
    LLMError,
    LLMReplyError,
    LLMTimeoutError,
    LLMUnavailableError,
)
from logger import REQUEST_ID_HEADER, request_id
from model_server import models as served_models
from model_server import protocol
from model_server.breaker import BreakerPolicy, CircuitBreaker
from model_server.concurrency import ConcurrencyLimit
from model_server.protocol import ChatReply, ChatTarget
from model_server.tokens import least_prompt_tokens
from model_server.warm_up import (
    Adopt,
    Say,
    ServerRequest,
    adopt_larger,
    find_loaded,
    look,
    reuse_loaded_window,
    warm_up,
)
from model_server.window import TranscriptTruncator, WindowChoice, choose_window
from prompt_builder import Message, PromptBuilder
from utils.retry_utils import RetryPolicy, retry_async

CONNECT_TIMEOUT_S = 5.0
PROBE_TIMEOUT_S = 5.0


def open_session(max_concurrent: int) -> aiohttp.ClientSession:
    """Return a session for one model server; whoever opens it closes it.

    No cookies, no proxy from the environment (it would also catch loopback), no decompression
    (it would hide a body's size).
    """
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=max_concurrent + 2, keepalive_timeout=60),
        cookie_jar=aiohttp.DummyCookieJar(),
        trust_env=False,
        auto_decompress=False,
    )


class AsyncLLMClient:
    """Asks one model; *session* stays the caller's.

    Each call is repeated as *settings* say; while the server is away, calls wait in the breaker
    and keep their attempts. *limit* learns from each request; *on_answer* is told of each complete
    answer, in the task that asked.
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
        self._limit = limit
        self._on_answer = on_answer
        self._session = session
        self._timeout = aiohttp.ClientTimeout(total=settings.llm_timeout_s, sock_connect=CONNECT_TIMEOUT_S)
        self._policy = RetryPolicy(settings.llm_max_attempts, settings.llm_backoff_s)
        breaker_policy = breaker_policy or BreakerPolicy(outage_limit_s=settings.outage_limit_s)
        self.breaker = CircuitBreaker(self.is_alive, breaker_policy)
        self.retries = 0
        self._settings = settings
        self._fitter: TranscriptTruncator | None = None

    def fitter(self, prompts: PromptBuilder) -> TranscriptTruncator:
        """Return what fits conversations into the window; the first *prompts* decide what it learns about."""
        if self._fitter is None:
            self._fitter = TranscriptTruncator(prompts.system_prompt, self._settings.on_long)
        return self._fitter

    async def chat(self, messages: list[Message], schema_json: bytes, attempt: int = 0) -> ChatReply:
        """Return the model's answer to *messages*; *attempt* (from 0) varies the seed.

        Raises:
            LLMError: After the last attempt; see model_server.protocol.parse_chat_response.
        """
        target = self.target
        characters = sum(len(message["content"]) for message in messages)
        least = functools.partial(least_prompt_tokens, messages)
        protocol.require_fit(target, characters)

        async def send() -> ChatReply:
            # Not by calling itself: it would hold on to itself, and each prompt stay until garbage is looked for.
            asked = target if self.target.logprobs else replace(target, logprobs=False)
            body = protocol.build_chat_body(asked, messages, schema_json, attempt)
            status, reply = await self._request("POST", asked.url, body)
            if protocol.refuses_logprobs(asked, status, reply):
                self.target = replace(self.target, logprobs=False)
                asked = replace(asked, logprobs=False)
                body = protocol.build_chat_body(asked, messages, schema_json, attempt)
                status, reply = await self._request("POST", asked.url, body)
            return protocol.parse_chat_response(asked, status, reply, characters, least)

        limit = self._limit
        observed = send if limit is None else lambda: limit.observed(send)
        answer = await retry_async(lambda: self.breaker.call(observed), self._policy, "model call", self._count_retry)
        if self._on_answer is not None:
            self._on_answer(answer)
        return answer

    async def is_alive(self) -> bool:
        """Whether the server answers at all; a probe for the breaker that never raises LLMError."""
        url = served_models.models_url(self.target.protocol, self.target.server_url)
        try:
            await self._request("GET", url, timeout=aiohttp.ClientTimeout(total=PROBE_TIMEOUT_S))
        except LLMError:
            return False
        return True

    async def list_models(self) -> list[served_models.ServedModel]:
        """Return the models that the server has, remote ones included.

        Raises:
            LLMUnavailableError: The server does not answer, or not with such a list.
        """
        url = served_models.models_url(self.target.protocol, self.target.server_url)
        return served_models.parse_models(self.target.protocol, *await self._request("GET", url))

    async def version(self) -> str | None:
        """Return Ollama's version; None where the server tells none. Raises LLMUnavailableError where it is away."""
        return served_models.parse_version(*await self._request("GET", f"{self.target.server_url}/api/version"))

    async def show(self, model: str) -> served_models.ModelFacts:
        """Return what Ollama says about *model*. Raises LLMUnavailableError where it is away."""
        url = f"{self.target.server_url}/api/show"
        return served_models.parse_show(*await self._request("POST", url, served_models.show_body(model)))

    async def loaded(self) -> list[served_models.LoadedModel]:
        """Return the models that Ollama holds in memory now. Raises LLMUnavailableError where it is away."""
        return served_models.parse_loaded(*await self._request("GET", f"{self.target.server_url}/api/ps"))

    async def prepare(self, settings: Settings) -> ChatTarget:
        """Ask the server for its models, settle on the one that *settings* name, and return the target.

        Raises:
            LLMUnavailableError: The server does not answer.
            ConfigurationError: It does not have the model; the message lists what it has.
        """
        target = self.target
        model = served_models.choose_model(settings, await self.list_models())
        facts = served_models.ModelFacts()
        if target.protocol != "openai_chat":
            show = await self._request("POST", f"{target.server_url}/api/show", served_models.show_body(model.name))
            facts = served_models.parse_show(*show)
        self.target = protocol.with_model(target, model, facts)
        return self.target

    async def warm_up(self, choice: WindowChoice, say: Say, adopt: Adopt = adopt_larger) -> ChatTarget:
        """Load the model, alone, and return the target with the window it then has; see model_server.warm_up.

        Raises:
            LLMError: It does not load, or the server does not answer.
        """
        flow = warm_up(self.target, self._settings, choice, say, adopt)
        try:
            request = next(flow)
            while True:
                request = flow.send(await self.send(request))
        except StopIteration as finished:
            self.target = finished.value
        return self.target

    async def send(self, request: ServerRequest) -> tuple[int, bytes]:
        """Return status and body of the answer to *request*.

        Raises:
            LLMUnavailableError: There is none.
        """
        timeout = aiohttp.ClientTimeout(total=request.timeout_s, sock_connect=CONNECT_TIMEOUT_S)
        return await self._request(request.method, request.url, request.body, timeout)

    def _count_retry(self) -> None:
        self.retries += 1

    def _headers(self) -> dict[str, str]:
        current = request_id.get()
        return self.target.headers if current is None else {**self.target.headers, REQUEST_ID_HEADER: current}

    async def _request(
        self, method: str, url: str, body: bytes | None = None, timeout: aiohttp.ClientTimeout | None = None
    ) -> tuple[int, bytes]:
        """Send one request and return status and body.

        aiohttp's time-outs are also ClientErrors, so they come first. A server that cannot even be
        reached in time is away, like one that refuses.
        """
        try:
            async with self._session.request(
                method,
                url,
                data=body,
                headers=self._headers(),
                timeout=timeout or self._timeout,
                allow_redirects=False,
            ) as response:
                return response.status, await _read_bounded(response)
        except aiohttp.ConnectionTimeoutError as exc:
            raise LLMConnectionError(protocol.unreachable_message(self.target)) from exc
        except TimeoutError as exc:
            raise LLMTimeoutError("the model server did not answer within the time-out (LLM_TIMEOUT_S)") from exc
        except (aiohttp.ClientConnectionError, aiohttp.ClientPayloadError, ConnectionError) as exc:
            raise LLMConnectionError(protocol.unreachable_message(self.target)) from exc
        except aiohttp.ClientError as exc:
            raise LLMUnavailableError("the model server does not speak HTTP as expected") from exc


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
    conversation: Conversation, client: AsyncLLMClient, prompts: PromptBuilder, parser: ReplyParser, attempt: int = 0
) -> Outcome:
    """Return the labels of *conversation*, asking again once where the answer is unusable.

    *attempt* counts earlier rounds of this document (from 0) and varies the seed.

    Raises:
        LLMError: The server gave no answer, or none that is usable; nothing was stored.
        SkippedDocumentError: It is longer than the window, and ON_LONG says skip.
    """
    start = time.monotonic()
    flow = classify_with_truncation(
        conversation, FlowParts(prompts, parser, client.fitter(prompts), lambda: client.target)
    )
    messages = next(flow)
    for call in itertools.count(2 * attempt):
        try:
            messages = flow.send(await client.chat(messages, parser.schema_json, call))
        except StopIteration as finished:
            plan = protocol.plan_fingerprint(client.target, prompts.system_prompt, parser.schema_json)
            duration_s = time.monotonic() - start
            outcome = build_outcome(finished.value.answer, conversation, client.target, plan, duration_s)
            fitted: FittedAnswer = finished.value
            return fitted.complete(outcome, call - 2 * attempt + 1)
        except (LLMContextError, LLMReplyError) as problem:
            messages = flow.throw(problem)
    raise AssertionError("the flow returns or raises")


logger = logging.getLogger(__name__)

LOOK_EVERY_S = 10.0  # also how long a reload by somebody else goes unnoticed


class SharedWindow:
    """Keeps the target of *client* in step with what is loaded; *asked* is the window an operator set, or None."""

    def __init__(self, client: AsyncLLMClient, asked: int | None) -> None:
        self._client = client
        self._asked = asked
        self._looked_at = -math.inf
        self._loading: asyncio.Task[None] | None = None
        self.is_loaded = False

    async def load(self) -> None:
        """Load the model, however long that takes, or find it loaded.

        Raises:
            LLMError: It does not load.
        """
        await self._client.warm_up(self._choice(), logger.info, reuse_loaded_window)
        self._looked_at = time.monotonic()
        self.is_loaded = True

    async def renew(self) -> None:
        """Look, at most every LOOK_EVERY_S, whether the model is still loaded, and with which window; to be awaited
        before a call.

        A model that was unloaded is loaded again first, by one task for all callers: one that leaves does not end it.

        Raises:
            LLMError: It does not load.
        """
        if self._client.target.protocol == "openai_chat":
            return
        if self._loading is None and time.monotonic() - self._looked_at >= LOOK_EVERY_S:
            self._looked_at = time.monotonic()
            await self._look()
        if self._loading is not None:
            await asyncio.shield(self._loading)

    async def classify(
        self, prompts: PromptBuilder, parser: ReplyParser, conversation: Conversation, attempt: int
    ) -> Outcome:
        """Renew the window, then return what ``ollama_classify_async`` returns."""
        with contextlib.suppress(LLMError):  # the call that follows reports it
            await self.renew()
        return await ollama_classify_async(conversation, self._client, prompts, parser, attempt)

    async def close(self) -> None:
        """End a load that is under way."""
        if self._loading is not None:
            self._loading.cancel()
            await asyncio.wait([self._loading])

    def _choice(self) -> WindowChoice:
        return choose_window([], self._client.target.context_limit, self._asked)

    async def _look(self) -> None:
        target = self._client.target
        try:
            status, body = await self._client.send(look(target))
            loaded = find_loaded(target, status, body)
        except LLMError:
            return  # the call that follows says what is wrong
        if status == 200 and loaded is None:
            if self._loading is None:
                self._loading = asyncio.create_task(self.load(), name="load-model")
                self._loading.add_done_callback(self._loaded)
            return
        num_ctx = reuse_loaded_window(self._choice(), loaded)
        if num_ctx != target.num_ctx:
            logger.info("the model is loaded with a window of %d tokens, which is used from now on", num_ctx)
            self._client.target = replace(self._client.target, num_ctx=num_ctx)

    def _loaded(self, task: asyncio.Task[None]) -> None:
        self._loading = None
        if not task.cancelled() and (problem := task.exception()) is not None:
            logger.warning("model: it does not load: %s", problem)

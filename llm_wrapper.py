"""The model server, synchronously (requests): for scripts, notebooks and blocking callers."""

from __future__ import annotations

import functools
import http.client
import io
import itertools
import math
import socket
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import requests
import tenacity
import urllib3
from requests.adapters import HTTPAdapter
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.exceptions import HTTPError, ReadTimeoutError

from classifier import FittedAnswer, FlowParts, ReplyParser, build_outcome, classify_with_truncation
from config import Settings
from domain.conversation import Conversation, Outcome
from error_handler import (
    LLMConnectionError,
    LLMContextError,
    LLMReplyError,
    LLMTimeoutError,
    LLMUnavailableError,
)
from model_server import models as served_models
from model_server import protocol
from model_server.protocol import ChatReply, ChatTarget
from model_server.tokens import least_prompt_tokens
from model_server.warm_up import Adopt, Say, ServerRequest, adopt_larger, warm_up
from model_server.window import TranscriptTruncator, WindowChoice
from prompt_builder import Message, PromptBuilder
from utils.retry_utils import RetryPolicy, tenacity_options

CONNECT_TIMEOUT_S = 5.0


class _UntilDeadline(io.RawIOBase):
    """What comes from *connection* until its time-out is over, which else would begin anew with each byte that comes."""

    def __init__(self, connection: socket.socket, source: io.RawIOBase) -> None:
        self._connection = connection
        self._source = source
        timeout_s = connection.gettimeout()
        self._deadline = math.inf if timeout_s is None else time.monotonic() + timeout_s

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        left_s = self._deadline - time.monotonic()
        if left_s <= 0:
            raise TimeoutError("the whole answer did not come in time")
        self._connection.settimeout(None if left_s == math.inf else left_s)
        return self._source.readinto(buffer)

    def close(self) -> None:
        self._source.close()
        super().close()


class _BoundedResponse(http.client.HTTPResponse):
    """An answer whose header and body together take no longer than the time-out that its connection has at its begin."""

    def __init__(self, sock: socket.socket, *arguments: Any, **options: Any) -> None:
        super().__init__(sock, *arguments, **options)
        self.fp = io.BufferedReader(_UntilDeadline(sock, self.fp.detach()))


class _Connection(HTTPConnection):
    response_class = _BoundedResponse


class _TLSConnection(HTTPSConnection):
    response_class = _BoundedResponse


class _Pool(urllib3.HTTPConnectionPool):
    ConnectionCls = _Connection


class _TLSPool(urllib3.HTTPSConnectionPool):
    ConnectionCls = _TLSConnection


def open_session() -> requests.Session:
    """Return a session for one model server, in which time-outs are of whole answers; whoever opens it closes it.

    No proxy or credentials from the environment: they would also catch loopback.
    """
    session = requests.Session()
    session.trust_env = False
    for prefix in ("http://", "https://"):
        adapter = HTTPAdapter()
        adapter.poolmanager.pool_classes_by_scheme = {"http": _Pool, "https": _TLSPool}
        session.mount(prefix, adapter)
    return session


def exchange(
    session: requests.Session,
    request: ServerRequest,
    headers: Mapping[str, str],
    most_bytes: int = protocol.MAX_BODY_BYTES,
) -> tuple[int, bytes]:
    """Send *request* and return status and body, the whole within its time-out; redirects are not followed.

    *session* is of ``open_session``. read1 returns what has come, and does not decompress it. A server that cannot even
    be reached in time is away, like one that refuses.

    Raises:
        LLMTimeoutError, LLMConnectionError, LLMUnavailableError: There is no whole answer.
    """
    try:
        with session.request(
            request.method,
            request.url,
            data=request.body,
            headers=headers,
            # requests hands it on as it is: what the answer may take is what connecting and sending have left of it.
            timeout=urllib3.Timeout(connect=CONNECT_TIMEOUT_S, total=request.timeout_s),  # type: ignore[arg-type]
            allow_redirects=False,
            stream=True,
        ) as response:
            received = bytearray()
            while chunk := response.raw.read1(65_536, decode_content=False):
                received += chunk
                if len(received) > most_bytes:
                    raise LLMUnavailableError(f"the model server's answer is larger than {most_bytes} bytes")
            return response.status_code, bytes(received)
    except (requests.ReadTimeout, ReadTimeoutError) as exc:
        raise LLMTimeoutError("the model server did not answer within the time-out (LLM_TIMEOUT_S)") from exc
    except (requests.ConnectionError, HTTPError) as exc:
        raise LLMConnectionError("no connection to the model server") from exc
    except requests.RequestException as exc:
        raise LLMUnavailableError("the model server does not speak HTTP as expected") from exc


class LLMClient:
    """Asks one model; *session* stays the caller's. One call at a time per client."""

    def __init__(self, settings: Settings, target: ChatTarget, session: requests.Session) -> None:
        self.target = target
        self._session = session
        self._timeout_s = settings.llm_timeout_s
        self._policy = RetryPolicy(settings.llm_max_attempts, settings.llm_backoff_s)
        self._settings = settings
        self._fitter: TranscriptTruncator | None = None

    def fitter(self, prompts: PromptBuilder) -> TranscriptTruncator:
        """Return what fits conversations into the window; the first *prompts* decide what it learns about."""
        if self._fitter is None:
            self._fitter = TranscriptTruncator(prompts.system_prompt, self._settings.on_long)
        return self._fitter

    def chat(self, messages: list[Message], schema_json: bytes, attempt: int = 0) -> ChatReply:
        """Return the model's answer to *messages*; *attempt* (from 0) varies the seed.

        Raises:
            LLMError: After the last attempt; see model_server.protocol.parse_chat_response.
        """
        target = self.target
        characters = sum(len(message["content"]) for message in messages)
        least = functools.partial(least_prompt_tokens, messages)
        protocol.require_fit(target, characters)
        for trial in tenacity.Retrying(**tenacity_options(self._policy, "model call")):
            with trial:
                asked = target if self.target.logprobs else replace(target, logprobs=False)
                body = protocol.build_chat_body(asked, messages, schema_json, attempt)
                status, reply = self._request("POST", asked.url, body)
                if protocol.refuses_logprobs(asked, status, reply):
                    self.target = replace(self.target, logprobs=False)
                    asked = replace(asked, logprobs=False)
                    body = protocol.build_chat_body(asked, messages, schema_json, attempt)
                    status, reply = self._request("POST", asked.url, body)
                return protocol.parse_chat_response(asked, status, reply, characters, least)
        raise AssertionError("tenacity returns or raises")

    def prepare(self, settings: Settings) -> ChatTarget:
        """Ask the server for its models, settle on the one that *settings* name, and return the target.

        Raises:
            LLMUnavailableError: The server does not answer.
            ConfigurationError: It does not have the model; the message lists what it has.
        """
        target = self.target
        models = served_models.parse_models(
            target.protocol, *self._request("GET", served_models.models_url(target.protocol, target.server_url))
        )
        model = served_models.choose_model(settings, models)
        facts = served_models.ModelFacts()
        if target.protocol != "openai_chat":
            show = self._request("POST", f"{target.server_url}/api/show", served_models.show_body(model.name))
            facts = served_models.parse_show(*show)
        self.target = protocol.with_model(target, model, facts)
        return self.target

    def warm_up(self, choice: WindowChoice, say: Say, adopt: Adopt = adopt_larger) -> ChatTarget:
        """Load the model, alone, and return the target with the window it then has; see model_server.warm_up.

        Raises:
            LLMError: It does not load, or the server does not answer.
        """
        flow = warm_up(self.target, self._settings, choice, say, adopt)
        try:
            request = next(flow)
            while True:
                request = flow.send(self.send(request))
        except StopIteration as finished:
            self.target = finished.value
        return self.target

    def send(self, request: ServerRequest) -> tuple[int, bytes]:
        """Return status and body of the answer to *request*.

        Raises:
            LLMUnavailableError: There is none.
        """
        return self._request(request.method, request.url, request.body, request.timeout_s)

    def _request(
        self, method: str, url: str, body: bytes | None = None, timeout_s: float | None = None
    ) -> tuple[int, bytes]:
        """Send one request and return status and body; see ``exchange``."""
        request = ServerRequest(method, url, body, timeout_s or self._timeout_s)
        try:
            return exchange(self._session, request, self.target.headers)
        except LLMConnectionError as exc:
            raise LLMConnectionError(protocol.unreachable_message(self.target)) from exc


def ollama_classify(
    conversation: Conversation, client: LLMClient, prompts: PromptBuilder, parser: ReplyParser, attempt: int = 0
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
            messages = flow.send(client.chat(messages, parser.schema_json, call))
        except StopIteration as finished:
            plan = protocol.plan_fingerprint(client.target, prompts.system_prompt, parser.schema_json)
            duration_s = time.monotonic() - start
            outcome = build_outcome(finished.value.answer, conversation, client.target, plan, duration_s)
            fitted: FittedAnswer = finished.value
            return fitted.complete(outcome, call - 2 * attempt + 1)
        except (LLMContextError, LLMReplyError) as problem:
            messages = flow.throw(problem)
    raise AssertionError("the flow returns or raises")

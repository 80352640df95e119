"""The synchronous client of the model server (requests), for scripts, notebooks and blocking callers."""

from __future__ import annotations

import contextlib
import http.client
import io
import itertools
import socket
import time
from collections.abc import Callable, Generator, Mapping
from typing import Any, TypeVar
from urllib.parse import urlsplit

import requests
import tenacity
import urllib3
from requests.adapters import HTTPAdapter
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.exceptions import ConnectTimeoutError, HTTPError, NewConnectionError, ReadTimeoutError

from classifier import Classifier, classification_flow
from config import Settings
from domain.conversation import Conversation, Message, Outcome
from error_handler import (
    LLMAbsentError,
    LLMConnectionError,
    LLMError,
    LLMFormError,
    LLMTimeoutError,
    LLMUnavailableError,
)
from model_server import protocol
from model_server.chat import ReloadWatch, chat_flow, connection_error
from model_server.models import find_target
from model_server.protocol import ChatReply, ChatTarget, ServerRequest
from model_server.scores import LabelTokens, score_flow
from model_server.window import Say, WindowChoice, warm_up
from network.outgoing import Route, problem_of, requests_session, route_to
from utils.retry_utils import RetryPolicy, tenacity_options

CONNECT_TIMEOUT_S = 5.0

Q = TypeVar("Q")
A = TypeVar("A")
R = TypeVar("R")


class _DeadlineReader(io.RawIOBase):
    """Socket reader with a total deadline, the current timeout of *connection*, instead of a per-read timeout."""

    def __init__(self, connection: socket.socket, source: io.RawIOBase) -> None:
        self._connection = connection
        self._source = source
        self._deadline = time.monotonic() + (connection.gettimeout() or 0.0)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        left_s = self._deadline - time.monotonic()
        if left_s <= 0:
            raise TimeoutError("the answer did not arrive in full before the deadline")
        self._connection.settimeout(left_s)
        return self._source.readinto(buffer)

    def close(self) -> None:
        self._source.close()
        super().close()


class _BoundedResponse(http.client.HTTPResponse):
    """A response whose header and body share one deadline."""

    def __init__(self, sock: socket.socket, *arguments: Any, **options: Any) -> None:
        super().__init__(sock, *arguments, **options)
        self.fp = io.BufferedReader(_DeadlineReader(sock, self.fp.detach()))


class _Connection(HTTPConnection):
    response_class = _BoundedResponse


class _TLSConnection(HTTPSConnection):
    response_class = _BoundedResponse


class _Pool(urllib3.HTTPConnectionPool):
    ConnectionCls = _Connection


class _TLSPool(urllib3.HTTPSConnectionPool):
    ConnectionCls = _TLSConnection


POOLS = {"http": _Pool, "https": _TLSPool}


class _Adapter(HTTPAdapter):
    """Sends each request on the route to its server."""

    def __init__(self) -> None:
        self._routes: dict[str, Route] = {}
        super().__init__()
        self.poolmanager.pool_classes_by_scheme = POOLS

    def send(self, request: requests.PreparedRequest, *arguments: Any, **options: Any) -> requests.Response:
        proxy = self._route(request).proxy
        options["proxies"] = {"http": proxy, "https": proxy} if proxy else {}
        return super().send(request, *arguments, **options)

    def proxy_manager_for(self, proxy: str, **options: Any) -> Any:
        manager = super().proxy_manager_for(proxy, **options)
        manager.pool_classes_by_scheme = POOLS
        return manager

    def build_connection_pool_key_attributes(
        self, request: requests.PreparedRequest, verify: Any, cert: Any = None
    ) -> Any:
        host, pool = super().build_connection_pool_key_attributes(request, verify, cert)
        tls = self._route(request).tls
        return host, (pool | {"ssl_context": tls} if tls else pool)

    def cert_verify(self, conn: Any, url: str, verify: Any, cert: Any) -> None:
        """Leave the certificates to the context of the route; those of requests itself would be trusted as well."""

    def _route(self, request: requests.PreparedRequest) -> Route:
        parts = urlsplit(request.url or "")
        origin = f"{parts.scheme}://{parts.netloc}"
        if origin not in self._routes:
            self._routes[origin] = route_to(origin)
        return self._routes[origin]


def open_session() -> requests.Session:
    """Return a session whose timeouts limit whole answers; see network.outgoing. The caller closes it."""
    return requests_session(_Adapter())


def exchange(
    session: requests.Session,
    request: ServerRequest,
    headers: Mapping[str, str],
    most_bytes: int = protocol.MAX_BODY_BYTES,
) -> tuple[int, bytes]:
    """Send *request* and return status and body, within its timeout. Redirects are not followed.

    *session* comes from ``open_session``. A connection that times out counts as refused.

    Raises:
        LLMTimeoutError, LLMAbsentError, LLMConnectionError, LLMUnavailableError: There is no complete answer.
    """
    try:
        with session.request(
            request.method,
            request.url,
            data=request.body,
            headers=headers,
            # requests passes this on to urllib3: connecting, sending and receiving share the total.
            timeout=urllib3.Timeout(connect=CONNECT_TIMEOUT_S, total=request.timeout_s),  # type: ignore[arg-type]
            allow_redirects=False,
            stream=True,
        ) as response:
            received = bytearray()
            # read1 returns what has arrived, without decompressing it.
            while chunk := response.raw.read1(65_536, decode_content=False):
                received += chunk
                if len(received) > most_bytes:
                    raise LLMUnavailableError(f"the model server's answer is larger than {most_bytes} bytes")
            return response.status_code, bytes(received)
    except (requests.ReadTimeout, ReadTimeoutError) as exc:
        raise LLMTimeoutError("the model server did not answer within the timeout (LLM_TIMEOUT_S)") from exc
    except (requests.ConnectionError, HTTPError) as exc:
        kind = LLMAbsentError if _is_without_connection(exc) else LLMConnectionError
        raise kind(problem_of(exc, request.url) or "no connection to the model server") from exc
    except requests.RequestException as exc:
        raise LLMUnavailableError("the model server does not speak HTTP as expected") from exc


def _is_without_connection(exc: BaseException) -> bool:
    problem = getattr(exc.args[0], "reason", exc) if exc.args else exc  # requests wraps an error of urllib3 around it
    return isinstance(problem, ConnectTimeoutError | NewConnectionError)


class LLMClient:
    """Asks one model. The caller owns *session*. One call at a time per client."""

    def __init__(self, settings: Settings, target: ChatTarget, session: requests.Session) -> None:
        self.target = target
        self._session = session
        self._policy = RetryPolicy(settings.llm_max_attempts, settings.llm_backoff_s)
        self._settings = settings
        self.reloads = ReloadWatch()
        self.label_tokens: dict[bytes, LabelTokens] = {}

    def chat(self, messages: list[Message], schema_json: bytes, attempt: int = 0, *, scores: bool = False) -> ChatReply:
        """Return the model's answer to *messages*; *attempt* (from 0) varies the seed. *scores*: see ``score_flow``.

        Raises:
            LLMError: After the last attempt.
        """
        retrying = tenacity.Retrying(**tenacity_options(self._policy, "model call"))
        return retrying(self._ask, messages, schema_json, None if scores else attempt)

    def prepare(self, settings: Settings) -> ChatTarget:
        """Find the model that *settings* name on the server, and return the target; see ``find_target``."""
        self.target = _drive(find_target(self.target, settings), self.send)
        return self.target

    def warm_up(self, choice: WindowChoice, say: Say) -> ChatTarget:
        """Load the model and return the target with the window it then has; see model_server.window.warm_up."""
        self.target = _drive(warm_up(self.target, self._settings, choice, say), self.send)
        self.reloads.is_warm = True
        return self.target

    def send(self, request: ServerRequest) -> tuple[int, bytes]:
        """Return status and body of the answer to *request*; see ``exchange``."""
        try:
            return exchange(self._session, request, self.target.headers)
        except LLMConnectionError as exc:
            raise connection_error(self.target, exc, was_made=not isinstance(exc, LLMAbsentError)) from exc

    def _ask(self, messages: list[Message], schema_json: bytes, attempt: int | None) -> ChatReply:
        timeout_s = self._settings.llm_timeout_s
        if attempt is None:
            return _drive(score_flow(self, messages, schema_json, timeout_s), self.send)
        return _drive(chat_flow(self, messages, schema_json, attempt, timeout_s), self.send)


def ollama_classify(conversation: Conversation, client: LLMClient, classifier: Classifier, attempt: int = 0) -> Outcome:
    """Return the labels of *conversation*, as ``async_llm_wrapper.ollama_classify_async`` does."""
    calls = itertools.count(2 * attempt)

    def classify(used: Classifier) -> Outcome:
        flow = classification_flow(conversation, client, used)
        scores = used.reply_style == "score"
        return _drive(flow, lambda messages: client.chat(messages, used.schema_json, next(calls), scores=scores))

    while True:  # each LLMFormError leaves a style less
        with contextlib.suppress(LLMFormError):
            return classify(classifier.for_target(client.target))


def _drive(flow: Generator[Q, A, R], ask: Callable[[Q], A]) -> R:
    """Return what *flow* returns; each question that it yields gets the answer, or the error, of *ask*."""
    try:
        question = next(flow)
        while True:
            try:
                answer = ask(question)
            except LLMError as problem:
                question = flow.throw(problem)
            else:
                question = flow.send(answer)
    except StopIteration as finished:
        return finished.value  # type: ignore[no-any-return]

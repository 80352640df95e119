"""Embeddings of OpenAI, or of any server with the same API.

The synchronous client of the package has a timeout for each read, not for the whole call. An asyncio timeout bounds all of
it: name, connection, header, body. So the asynchronous client is used, with an event loop in its own thread.
"""

from __future__ import annotations

import asyncio
import binascii
import re
import threading
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, TypeVar
from urllib.parse import urlsplit

import httpx2
import numpy as np
import openai
import orjson
import pybase64
import uvloop

from config.index_settings import IndexSettings
from config.openai_settings import OpenAISettings
from domain.text import encodable
from embedding_index.providers.contract import Answer, ModelIdentity, RequestLimits, Vectors
from embedding_index.token_counts import EstimatedCounter, openai_counter
from error_handler import (
    ConfigurationError,
    IndexingError,
    ProviderBusyError,
    ProviderRejectedError,
    ProviderUnavailableError,
    UnusableVectorsError,
)
from utils.network import is_this_machine

LIMITS = RequestLimits(inputs=2048, input_tokens=8192, request_tokens=300_000)
SHORTENED = "text-embedding-3"  # prefix of the models whose vectors can be shortened
WHOLE = {"text-embedding-3-small": 1536, "text-embedding-3-large": 3072}  # asking for the whole length changes nothing
CONNECT_TIMEOUT_S = 10.0
STREAMED = {
    "Content-Type": "application/json",
    "X-Stainless-Raw-Response": "stream",  # tells the package, not the server, to return the open response
}
MAX_ANSWER_BYTES = 512 * 1024 * 1024  # 2048 vectors of 8192 numbers, written in decimal, are 350 MB
MOST_WAIT_S = 3600.0
READ_AFTER_S = 0.005  # the next call is sent first: building it and reading this answer need the same thread

# Headers that a request may have, beside the package's own x-stainless-*. The package adds those of OPENAI_ORG_ID,
# OPENAI_PROJECT_ID and OPENAI_CUSTOM_HEADERS, which are no settings of this product.
HEADERS = frozenset(
    {"host", "accept", "accept-encoding", "connection", "content-type", "content-length", "authorization", "user-agent"}
)

_NOT_A_NUMBER = re.compile(rb"[\[,]\s*-?(?:NaN|Infinity)")
T = TypeVar("T")


class OpenAIProvider:
    """Vectors of one model; thread-safe. ``close`` it.

    *identity.dimensions* is EMBEDDING_DIMENSIONS, or None until the first answer was checked.
    """

    def __init__(self, index: IndexSettings, access: OpenAISettings) -> None:
        """Prepare the client; nothing is sent.

        Raises:
            ConfigurationError: There is no key, or the model's vectors cannot be shortened.
        """
        if access.api_key is None:
            raise ConfigurationError(
                "OPENAI_API_KEY is not set; EMBEDDING_PROVIDER=openai needs it (for a server of your own without keys, any "
                "value will do)."
            )
        if index.dimensions is not None and not index.model.startswith(SHORTENED):
            raise ConfigurationError(
                f"vectors of {index.model} cannot be shortened: remove EMBEDDING_DIMENSIONS, or choose a model "
                f"{SHORTENED}-... with EMBEDDING_MODEL."
            )
        dimensions = None if index.dimensions == WHOLE.get(index.model) else index.dimensions
        self.identity = ModelIdentity("openai", index.model, dimensions)
        self.limits = LIMITS
        self.max_concurrent = index.max_concurrent
        self.leaves_house = not is_this_machine(urlsplit(access.base_url).hostname or "")
        self._count = openai_counter(index.model) or EstimatedCounter()
        self._timeout_s = index.timeout_s
        key = access.api_key.get_secret_value()
        self._client = openai.AsyncOpenAI(
            api_key=key,
            base_url=access.base_url,
            max_retries=0,  # a retry by the package, after a lost answer, would be billed twice
            default_headers={"Authorization": f"Bearer {key}"},  # else OPENAI_CUSTOM_HEADERS could replace it
            # Not the package's aiohttp transport: it has other errors, refuses long headers and sends cookies.
            http_client=httpx2.AsyncClient(
                timeout=httpx2.Timeout(index.timeout_s, connect=min(CONNECT_TIMEOUT_S, index.timeout_s)),
                limits=httpx2.Limits(
                    max_connections=None, max_keepalive_connections=None
                ),  # as many as there are threads
                trust_env=self.leaves_house,  # a proxy of the environment would also be used for loopback
                follow_redirects=False,  # a redirect would send the texts to another address
                event_hooks={"request": [_keep_own_headers]},
            ),
        )
        self._loop = uvloop.new_event_loop()  # takes a quarter less CPU time for answers of 0.8 MB
        self._thread = threading.Thread(target=self._loop.run_forever, name="openai-embeddings", daemon=True)
        self._thread.start()

    def count_tokens(self, text: str) -> int:
        """Return the tokens of *text*: as billed if the tokenizer is installed, else an upper estimate."""
        return self._count(text)

    def embed(self, texts: Sequence[str], on_answer: Callable[[], None] | None = None) -> Answer:
        """Return the vectors of *texts* in their order; see ``Provider.embed``. EMBEDDING_TIMEOUT_S bounds the whole call.

        Raises:
            UnusableVectorsError: Vectors cannot be assigned to texts, or one is not readable. It was billed.
        """
        # Base64 has a third of the bytes of decimal numbers; the package would decode it into lists.
        request: dict[str, object] = {"model": self.identity.model, "encoding_format": "base64"}
        if self.identity.dimensions is not None:
            request["dimensions"] = self.identity.dimensions
        content = orjson.dumps({**request, "input": [encodable(text) for text in texts]})
        answer = _parse(self._run(self._ask(content, on_answer)), len(texts))
        if answer.tokens is not None and isinstance(self._count, EstimatedCounter):
            self._count.learn(texts, answer.tokens)
        return answer

    def close(self) -> None:
        """Close the connections and end the thread. Calls in flight end with ProviderUnavailableError."""
        if self._loop.is_closed():
            return
        self._run(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    async def _close(self) -> None:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await self._client.close()

    async def _ask(self, content: bytes, on_answer: Callable[[], None] | None) -> bytes:
        """Return the body of the answer to one request."""
        try:
            async with asyncio.timeout(self._timeout_s):
                return await self._exchange(content, on_answer)
        except TimeoutError as exc:
            raise ProviderUnavailableError(
                "OpenAI did not answer in time; raise EMBEDDING_TIMEOUT_S or lower EMBEDDING_BATCH_SIZE"
            ) from exc
        except asyncio.CancelledError as exc:
            raise ProviderUnavailableError("the call to OpenAI was cancelled because the provider was closed") from exc
        except openai.APIStatusError as exc:
            raise _refusal(exc, self.identity.model) from exc
        except (openai.OpenAIError, httpx2.HTTPError, httpx2.StreamError) as exc:
            raise ProviderUnavailableError(
                f"no complete answer from OpenAI ({type(exc).__name__}); check the network and OPENAI_BASE_URL"
            ) from exc

    async def _exchange(self, content: bytes, on_answer: Callable[[], None] | None) -> bytes:
        # ``post``, because ``embeddings.create`` checks the type of each input: 100 of them cost more than the rest of a
        # call.
        response = await self._client.post(
            "/embeddings", content=content, cast_to=httpx2.Response, options={"headers": STREAMED}
        )
        received = bytearray()
        try:
            async for chunk in response.aiter_bytes():
                if not received and on_answer is not None:
                    on_answer()
                    await asyncio.sleep(READ_AFTER_S)
                received += chunk
                if len(received) > MAX_ANSWER_BYTES:
                    raise ProviderUnavailableError(f"OpenAI's answer is larger than {MAX_ANSWER_BYTES} bytes")
        finally:
            await response.aclose()
        return bytes(received)


async def _keep_own_headers(request: httpx2.Request) -> None:
    for name in set(request.headers) - HEADERS:
        if not name.startswith("x-stainless-"):
            del request.headers[name]


def _refusal(exc: openai.APIStatusError, model: str) -> IndexingError | ConfigurationError:
    """Return the error for a status. Messages of the server are left out: they may quote an input."""
    status = exc.status_code
    if status == 429 and "insufficient_quota" in (exc.code, exc.type):
        return ConfigurationError("the OpenAI account has no quota left; add credit, then run the same command again.")
    if status == 429:
        return ProviderBusyError("OpenAI asks to wait (HTTP 429)", _wait_s(exc.response.headers))
    if status in (401, 403):
        return ConfigurationError(
            f"OpenAI refuses the key, or the model {model} for it (HTTP {status}); check OPENAI_API_KEY, EMBEDDING_MODEL "
            "and OPENAI_BASE_URL."
        )
    if exc.param == "dimensions":
        return ConfigurationError(
            f"{model} does not accept this EMBEDDING_DIMENSIONS; choose a smaller one, or remove it."
        )
    if status in (404, 405) or status < 400:
        return ConfigurationError(
            f"OpenAI has no embedding model {model} at this address (HTTP {status}); check EMBEDDING_MODEL and OPENAI_BASE_URL."
        )
    return _failure(exc)


def _failure(exc: openai.APIStatusError) -> IndexingError:
    status = exc.status_code
    if status >= 500 or status in (408, 409, 425):
        return ProviderUnavailableError(f"OpenAI failed (HTTP {status})")
    code = f", {exc.code}" if exc.code and re.fullmatch(r"[a-z_]{1,60}", exc.code) else ""
    return ProviderRejectedError(f"OpenAI refuses the request (HTTP {status}{code})")


def _wait_s(headers: httpx2.Headers) -> float | None:
    """Return the seconds that the server asks to wait, at most an hour; None if it does not say."""
    for name, unit_s in (("retry-after-ms", 0.001), ("retry-after", 1.0)):
        value = headers.get(name, "")
        if re.fullmatch(r"\d{1,9}(\.\d{1,9})?", value):
            return min(MOST_WAIT_S, float(value) * unit_s)
    return None


def _parse(body: bytes, inputs: int) -> Answer:
    """Return the vectors in *body* in the order of the *inputs*, by their index."""
    try:
        fields = orjson.loads(body)
    except orjson.JSONDecodeError as exc:
        if _NOT_A_NUMBER.search(body):
            raise UnusableVectorsError("a vector of the answer contains a value that is no number") from exc
        raise ProviderUnavailableError("OpenAI's answer is not JSON; check OPENAI_BASE_URL") from exc
    data = fields.get("data") if isinstance(fields, dict) else None
    if not isinstance(data, list) or not all(isinstance(entry, dict) for entry in data):
        raise ProviderUnavailableError("OpenAI's answer has an unknown format; check OPENAI_BASE_URL")
    by_index = {entry["index"]: entry.get("embedding") for entry in data if type(entry.get("index")) is int}
    if len(data) != inputs or by_index.keys() != set(range(inputs)):
        raise UnusableVectorsError(
            f"the answer has {len(data)} vectors, {len(by_index)} numbers of inputs, for {inputs}"
        )
    usage = fields.get("usage")
    tokens = usage.get("prompt_tokens") if isinstance(usage, dict) else None
    return Answer(
        [_vector(by_index[place]) for place in range(inputs)], tokens if type(tokens) is int and tokens >= 0 else None
    )


def _vector(embedding: Any) -> Vectors:
    """Return the numbers of *embedding*: base64 of little-endian floats, or a list from servers without base64."""
    try:
        if isinstance(embedding, str):
            return np.frombuffer(pybase64.b64decode(embedding, validate=True), "<f4").astype(np.float32, copy=False)
        if isinstance(embedding, list):
            vector = np.asarray(embedding, np.float32)
            if vector.ndim == 1:
                return vector
    except (binascii.Error, ValueError, TypeError, OverflowError) as exc:
        raise UnusableVectorsError("a vector of the answer cannot be read") from exc
    raise UnusableVectorsError("a vector of the answer is no list of numbers")

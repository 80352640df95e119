"""Embeddings of OpenAI, or of any server with the same API.

The client is asynchronous, with an event loop in its own thread, because an asyncio timeout limits a whole call (name,
connection, header, body), while a synchronous client limits each read. A failed call is never sent again here: a lost answer
is billed.
"""

from __future__ import annotations

import asyncio
import functools
import importlib.util
import re
import threading
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, TypeVar, cast
from urllib.parse import urlsplit

import httpx2
import numpy as np
import orjson
import pybase64
import uvloop

from config.index_settings import IndexSettings
from config.openai_settings import OpenAISettings
from domain.server_reason import server_reason
from domain.text import encodable
from embedding_index.providers.contract import Answer, ModelIdentity, RequestLimits, Vectors, estimated_tokens
from error_handler import (
    ConfigurationError,
    IndexingError,
    ProviderBusyError,
    ProviderRejectedError,
    ProviderUnavailableError,
    UnusableVectorsError,
)
from network.addresses import is_this_machine
from network.outgoing import certificate_problem, httpx2_client, problem_of

LIMITS = RequestLimits(inputs=2048, input_tokens=8192, request_tokens=300_000)
SHORTENED = "text-embedding-3"  # prefix of the models whose vectors can be shortened
WHOLE = {"text-embedding-3-small": 1536, "text-embedding-3-large": 3072}  # asking for the whole length changes nothing
COUNTED_MODELS = ("text-embedding-3-small", "text-embedding-3-large", "text-embedding-ada-002")  # all by cl100k_base
COUNTED_CHARACTERS = 50_000  # at once: bpe_openai refuses texts of more than 200,000 tokens
CONNECT_TIMEOUT_S = 10.0
MAX_ANSWER_BYTES = 512 * 1024 * 1024  # 2048 vectors of 8192 numbers, written in decimal, are 350 MB
MOST_WAIT_S = 3600.0
READ_AFTER_S = 0.005  # the next call is sent first: building it and reading this answer need the same thread

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
                "OPENAI_API_KEY is not set; EMBEDDING_PROVIDER=openai needs it (any value if your own server has no keys)."
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
        self.is_external = not is_this_machine(urlsplit(access.base_url).hostname or "")
        self._key = access.api_key.get_secret_value()
        self._url = f"{access.base_url.rstrip('/')}/embeddings"
        self._count = openai_counter(index.model) or estimated_tokens
        self._timeout_s = index.timeout_s
        self._client = httpx2_client(
            self._url,
            {"Authorization": f"Bearer {self._key}", "Content-Type": "application/json"},
            timeout=httpx2.Timeout(index.timeout_s, connect=min(CONNECT_TIMEOUT_S, index.timeout_s)),
            limits=httpx2.Limits(max_connections=None, max_keepalive_connections=None),  # as many as there are threads
        )
        self._loop = uvloop.new_event_loop()  # takes a quarter less CPU time for answers of 0.8 MB
        self._thread = threading.Thread(target=self._loop.run_forever, name="openai-embeddings", daemon=True)
        self._thread.start()

    def count_tokens(self, text: str) -> int:
        """Return the tokens of *text*: as billed if the tokenizer is installed, else an upper estimate."""
        return self._count(text)

    def embed(self, texts: Sequence[str], on_answer: Callable[[], None] | None = None) -> Answer:
        """Return the vectors of *texts* in their order; see ``Provider.embed``. EMBEDDING_TIMEOUT_S limits the whole call.

        Raises:
            UnusableVectorsError: Vectors cannot be assigned to texts, or one is not readable. It was billed.
        """
        # Base64 has a third of the bytes of decimal numbers.
        request: dict[str, object] = {"model": self.identity.model, "encoding_format": "base64"}
        if self.identity.dimensions is not None:
            request["dimensions"] = self.identity.dimensions
        content = orjson.dumps({**request, "input": [encodable(text) for text in texts]})
        return _parse(self._run(self._ask(content, texts, on_answer)), len(texts))

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
        await self._client.aclose()

    async def _ask(self, content: bytes, texts: Sequence[str], on_answer: Callable[[], None] | None) -> bytes:
        try:
            async with asyncio.timeout(self._timeout_s):
                return await self._exchange(content, texts, on_answer)
        except TimeoutError as exc:
            raise ProviderUnavailableError(
                "OpenAI did not answer in time; raise EMBEDDING_TIMEOUT_S or lower EMBEDDING_BATCH_SIZE"
            ) from exc
        except asyncio.CancelledError as exc:
            raise ProviderUnavailableError("the call to OpenAI was cancelled because the provider was closed") from exc
        except (httpx2.HTTPError, httpx2.StreamError, httpx2.InvalidURL) as exc:
            if untrusted := certificate_problem(exc, self._url):
                raise ConfigurationError(f"{untrusted}.") from exc
            raise ProviderUnavailableError(
                problem_of(exc, self._url, "OPENAI_BASE_URL")
                or f"no complete answer from OpenAI ({type(exc).__name__}); check the network and OPENAI_BASE_URL"
            ) from exc

    async def _exchange(self, content: bytes, texts: Sequence[str], on_answer: Callable[[], None] | None) -> bytes:
        received = bytearray()
        async with self._client.stream("POST", self._url, content=content) as response:
            async for chunk in response.aiter_bytes():
                if not received and on_answer is not None and response.is_success:
                    on_answer()
                    await asyncio.sleep(READ_AFTER_S)
                received += chunk
                if len(received) > MAX_ANSWER_BYTES:
                    raise ProviderUnavailableError(f"OpenAI's answer is larger than {MAX_ANSWER_BYTES} bytes")
        if not response.is_success:
            said = server_reason(bytes(received), texts, secret=self._key)
            raise _refusal(
                response.status_code, response.headers, _error_fields(bytes(received)), self.identity.model, said
            )
        return bytes(received)


def _refusal(
    status: int, headers: httpx2.Headers, error: dict[str, Any], model: str, said: str
) -> IndexingError | ConfigurationError:
    """Return the error for a status and the fields of its body; *said* is its reason without the inputs."""
    if status == 429 and "insufficient_quota" in (error.get("code"), error.get("type")):
        return ConfigurationError(
            f"the OpenAI account has no quota left; add credit, then run the same command again{said}."
        )
    if status == 429:
        return ProviderBusyError(f"OpenAI asks to wait (HTTP 429){said}", _wait_s(headers))
    if status in (401, 403):
        return ConfigurationError(
            f"OpenAI refuses the key, or the model {model} for it (HTTP {status}); check OPENAI_API_KEY, EMBEDDING_MODEL "
            f"and OPENAI_BASE_URL{said}."
        )
    if error.get("param") == "dimensions":
        return ConfigurationError(
            f"{model} does not accept this EMBEDDING_DIMENSIONS; choose a smaller one, or remove it{said}."
        )
    if status in (404, 405) or status < 400:
        return ConfigurationError(
            f"OpenAI has no embedding model {model} at this address (HTTP {status}); check EMBEDDING_MODEL and OPENAI_BASE_URL{said}."
        )
    return _failure(status, error.get("code"), said)


def _failure(status: int, code: object, said: str) -> IndexingError:
    if status >= 500 or status in (408, 409, 425):
        return ProviderUnavailableError(f"OpenAI failed (HTTP {status}){said}")
    shown = f", {code}" if isinstance(code, str) and re.fullmatch(r"[a-z_]{1,60}", code) else ""
    return ProviderRejectedError(f"OpenAI refuses the request (HTTP {status}{shown}){said}")


def _error_fields(body: bytes) -> dict[str, Any]:
    """Return ``error`` of the body of a refusal; empty if it has none."""
    try:
        return dict(orjson.loads(body)["error"])
    except (ValueError, TypeError, LookupError):
        return {}


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


def _vector(embedding: Any) -> Sequence[float] | Vectors:
    """Return the numbers of *embedding*: base64 of little-endian floats, or a list from servers without base64."""
    if not isinstance(embedding, str):
        return cast("Sequence[float]", embedding)
    try:
        return np.frombuffer(pybase64.b64decode(embedding, validate=True), "<f4")
    except ValueError as exc:
        raise UnusableVectorsError("a vector of the answer is not base64 of numbers") from exc


def openai_counter(model: str) -> Callable[[str], int] | None:
    """Return a function that counts the tokens of *model* as OpenAI bills them, at least 1.

    None if its tokenizer is unknown or bpe_openai is not installed. The first count loads the tables (1 s).
    """
    if model not in COUNTED_MODELS or importlib.util.find_spec("bpe_openai") is None:
        return None

    def count(text: str) -> int:
        encode, text = _encoder(), encodable(text)
        pieces = range(0, len(text), COUNTED_CHARACTERS)
        return max(1, sum(len(encode(text[start : start + COUNTED_CHARACTERS])) for start in pieces))

    return count


@functools.cache  # get_encoding builds the tables at each call
def _encoder() -> Callable[[str], list[int]]:
    import bpe_openai  # noqa: PLC0415 - takes a second, and only OpenAI needs it

    encode: Callable[[str], list[int]] = bpe_openai.get_encoding("cl100k_base").encode_ordinary
    return encode

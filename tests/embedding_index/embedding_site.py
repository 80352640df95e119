"""A provider over the official OpenAI package, a ledger and a run, for tests and benchmarks against the fake OpenAI.

As a script it is one run in a separate process that a test can kill:
``python tests/embedding_index/embedding_site.py URL LEDGER COUNT CONCURRENCY BATCH_SIZE``.
"""

from __future__ import annotations

import base64
import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import openai

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from config.index_settings import load_index_settings
from config.openai_settings import load_openai_settings
from database_docs.items import content_hash
from embedding_index.embedding_run import EmbeddingRun, RunOptions
from embedding_index.providers.contract import Answer, ModelIdentity, RequestLimits
from embedding_index.providers.openai_embeddings import OpenAIProvider
from embedding_index.vector_ledger import VectorLedger
from error_handler import (
    ConfigurationError,
    ProviderBusyError,
    ProviderRejectedError,
    ProviderUnavailableError,
    UnusableVectorsError,
)
from tests.fakes.fake_openai_server.answers import estimate_tokens

OPENAI_LIMITS = RequestLimits(inputs=2048, input_tokens=8192, request_tokens=300_000)


def open_openai(url: str, access: dict[str, Any] | None = None, **settings: Any) -> OpenAIProvider:
    """The real provider, for the server at *url*; close it."""
    index = load_index_settings(None, provider="openai", **settings)
    return OpenAIProvider(index, load_openai_settings(None, base_url=url, **({"api_key": "sk-test"} | (access or {}))))


class FakeProvider:
    """Embeds with the server at *url*; counts as the fake does, unless *count* does so otherwise."""

    def __init__(
        self,
        url: str,
        *,
        max_concurrent: int = 4,
        limits: RequestLimits = OPENAI_LIMITS,
        dimensions: int | None = None,
        count: Callable[[str], int] = estimate_tokens,
        timeout_s: float = 20.0,
    ) -> None:
        self.identity = ModelIdentity("openai", "text-embedding-3-small", dimensions)
        self.limits = limits
        self.max_concurrent = max_concurrent
        self.count_tokens = count
        # Loading certificates, which the fake does not need, takes longer than most tests.
        plain = openai.DefaultHttpxClient(verify=False)
        self._client = openai.OpenAI(
            base_url=url, api_key="sk-test", max_retries=0, timeout=timeout_s, http_client=plain
        )

    def embed(self, texts: Sequence[str], on_answer: Any = None) -> Answer:
        """One call; vectors in the order of their index, as many as came."""
        try:
            # The raw answer: the package would make a Python number of each number of each vector.
            raw = self._client.embeddings.with_raw_response.create(
                model=self.identity.model, input=list(texts), encoding_format="base64"
            )
            answer = json.loads(raw.content)
        except openai.RateLimitError as exc:
            wait_s = exc.response.headers.get("retry-after")
            raise ProviderBusyError("rate limit", float(wait_s) if wait_s else None) from exc
        except openai.AuthenticationError as exc:
            raise ConfigurationError("the key is wrong; set OPENAI_API_KEY.") from exc
        except openai.BadRequestError as exc:
            raise ProviderRejectedError(f"HTTP 400: {exc.body['message'][:300]}") from exc  # type: ignore[index]
        except (openai.APIConnectionError, openai.InternalServerError, openai.APIResponseValidationError) as exc:
            raise ProviderUnavailableError(f"{type(exc).__name__}") from exc
        entries = sorted(answer["data"], key=lambda entry: entry["index"])
        if [entry["index"] for entry in entries] != list(range(len(entries))):
            raise UnusableVectorsError("the answer does not say which vector belongs to which text.")
        vectors = [np.frombuffer(base64.b64decode(entry["embedding"]), "<f4") for entry in entries]
        return Answer(vectors, answer["usage"]["prompt_tokens"])

    def close(self) -> None:
        """Close the connections."""
        self._client.close()


def keyed(texts: Sequence[str]) -> dict[str, str]:
    """*texts* by their hash."""
    return {content_hash(text): text for text in texts}


def short_texts(count: int) -> list[str]:
    """*count* different texts of about ten tokens."""
    return [f"Conversation {number:06d}: my card was charged twice" for number in range(count)]


def texts_with_long_ones(count: int) -> list[str]:
    """Each tenth has five pieces where an input may have 100 tokens."""
    return [f"{text}. " * 9 if place % 10 == 0 else text for place, text in enumerate(short_texts(count))]


class KilledAt:
    """Stands before or behind a method, and kills the process at its *passage*."""

    def __init__(self, method: Callable[..., Any], passage: int, *, is_after: bool) -> None:
        self._method = method
        self._left = passage
        self._lock = threading.Lock()
        self._is_after = is_after

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        with self._lock:
            self._left -= 1
            is_last = self._left == 0
        if self._is_after:
            result = self._method(*arguments, **named)
        if is_last:
            os.kill(os.getpid(), signal.SIGKILL)
        return result if self._is_after else self._method(*arguments, **named)


def main(arguments: Sequence[str]) -> None:
    """Embed; a sixth argument ``embed:after:3`` kills this process behind the third call."""
    url, path, count, concurrency, batch_size, *kill = arguments
    provider = FakeProvider(url, max_concurrent=int(concurrency), limits=RequestLimits(2048, 100, 300_000))
    with VectorLedger(Path(path)) as ledger:
        if kill:
            name, place, passage = kill[0].split(":")
            target: Any = provider if name == "embed" else ledger
            setattr(target, name, KilledAt(getattr(target, name), int(passage), is_after=place == "after"))
        run = EmbeddingRun(provider, ledger, RunOptions(batch_size=int(batch_size), first_wait_s=0.01))
        problems = [end.problem for end in run.run(keyed(texts_with_long_ones(int(count)))) if end.problem]
        counts = run.counts
    provider.close()
    print(json.dumps({"calls": counts.calls, "embedded": counts.embedded, "problems": problems}))


if __name__ == "__main__":
    main(sys.argv[1:])

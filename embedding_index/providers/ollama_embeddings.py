"""Embeddings of Ollama's ``/api/embed``.

Source: github.com/ollama/ollama, server/routes.go (EmbedHandler, ShowHandler), v0.33. One bad input fails the whole call;
the route answers 400 for faults inside the server as well; without ``truncate: false`` it truncates silently.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, NoReturn
from urllib.parse import urlsplit

import orjson

from config.index_settings import IndexSettings
from config.settings import Settings
from domain.server_reason import server_reason
from domain.text import encodable
from embedding_index.providers.contract import Answer, ModelIdentity, RequestLimits, estimated_tokens
from error_handler import (
    ConfigurationError,
    IndexingError,
    LLMAbsentError,
    LLMConnectionError,
    LLMTimeoutError,
    LLMUnavailableError,
    ProviderBusyError,
    ProviderRejectedError,
    ProviderUnavailableError,
    UnusableVectorsError,
)
from llm_wrapper import exchange, open_session
from model_server.models import is_cloud_name, parse_show, show_body
from model_server.protocol import SEE_LOG, ServerRequest, count, json_object
from model_server.tokens import least_tokens
from network.addresses import is_this_machine
from network.outgoing import certificate_problem, problem_of

MOST_INPUTS = 2048  # Ollama has no limit of its own
UNKNOWN_CONTEXT = 2048  # tokens, if the server does not tell
MOST_CONTEXT = 8192  # tokens; a larger context takes memory for all of it
SHOW_TIMEOUT_S = 30.0
MAX_ANSWER_BYTES = 512 * 1024 * 1024
CONCURRENT = 2  # Ollama computes one call at a time per embedding model; the second waits in its queue

# A truncated input has fewer tokens than words. Short inputs are never truncated, and their ratio is unreliable.
LEAST_SHARE, LEAST_CHECKED = 0.9, 256
_LONG_RUN = re.compile(r"[^\W_]{48,}")  # WordPiece makes one token of a string that is no word

_TOO_LONG = ("input length exceeds", "context length", "exceed_context_size", "context size")
_INPUT_FAULTS = ("nan or inf", "invalid input type", *_TOO_LONG)
_MODEL_FAULTS = ("does not support", "invalid model name", "model is required")
_SERVER_FAULTS = ("runner", "eof", "terminated", "memory", "connection", "load", "timed out", "canceled", "busy")

HEADERS = {"Content-Type": "application/json", "Accept-Encoding": "identity"}


class OllamaProvider:
    """Vectors of one model of an Ollama server; thread-safe. ``close`` it.

    *identity.dimensions* is None until the first answer was checked.
    """

    def __init__(self, index: IndexSettings, settings: Settings) -> None:
        """Ask the server for the model and its context length.

        Raises:
            ConfigurationError: It does not have the model, or the model runs elsewhere.
            ProviderUnavailableError: It does not answer.
        """
        if index.dimensions is not None:
            raise ConfigurationError("EMBEDDING_DIMENSIONS works with models of OpenAI only; remove it.")
        self._url = settings.ollama_endpoints[0]
        self._model = index.model
        self._timeout_s = index.timeout_s
        # The default of EMBEDDING_CONCURRENCY is meant for OpenAI.
        was_set = "max_concurrent" in index.model_fields_set
        self.max_concurrent = index.max_concurrent if was_set else min(CONCURRENT, index.max_concurrent)
        self.is_external = not is_this_machine(urlsplit(self._url).hostname or "")
        self.identity = ModelIdentity("ollama", index.model.removesuffix(":latest"))
        keep_alive = settings.ollama_keep_alive
        self._session = open_session()
        try:
            context = self._context_length()
        except (IndexingError, ConfigurationError):
            self.close()
            raise
        self.limits = RequestLimits(MOST_INPUTS, context, None)
        # The same for each call: a change reloads the model.
        self._fields: dict[str, Any] = {
            "model": self._model,
            "truncate": False,
            "keep_alive": int(keep_alive) if keep_alive.lstrip("-").isdigit() else keep_alive,
            "options": {"num_ctx": context},
        }

    def count_tokens(self, text: str) -> int:
        """Return the most tokens that *text* is likely to have."""
        return estimated_tokens(text)

    def embed(self, texts: Sequence[str], on_answer: Callable[[], None] | None = None) -> Answer:
        """Return the vectors of *texts*; see ``Provider.embed``. EMBEDDING_TIMEOUT_S bounds the whole answer.

        Raises:
            UnusableVectorsError: The answer does not consist of numbers, or the server truncated an input.
        """
        inputs = [encodable(text) for text in texts]
        body = orjson.dumps({**self._fields, "input": inputs})
        status, answer = self._request("/api/embed", body, self._timeout_s)
        if status != 200:
            self._refuse(status, answer, inputs)
        if on_answer is not None:
            on_answer()
        fields = _fields(answer)
        vectors = fields.get("embeddings")
        if not isinstance(vectors, list):
            raise ProviderUnavailableError("Ollama answers in an unknown form; check OLLAMA_ENDPOINT")
        tokens = count(fields.get("prompt_eval_count"))
        if tokens is not None:
            least = sum(least_tokens(_LONG_RUN.sub("x", text)) for text in inputs)
            if least >= LEAST_CHECKED and tokens < LEAST_SHARE * least:
                raise UnusableVectorsError(
                    f"Ollama saw {tokens} tokens of at least {least}: it truncated an input although it was told not to; update it"
                )
        return Answer(vectors, tokens)

    def close(self) -> None:
        """Close the connections."""
        self._session.close()

    def _context_length(self) -> int:
        model = self._model
        if is_cloud_name(model):
            raise _elsewhere(model)
        status, body = self._request("/api/show", show_body(model), min(SHOW_TIMEOUT_S, self._timeout_s))
        if status == 404 or (status == 400 and b"invalid model name" in body[:4000]):
            raise ConfigurationError(
                f"Ollama at {self._url} has no model {model}; run: ollama pull {model} (or set EMBEDDING_MODEL)."
            )
        if status != 200:
            self._refuse(status, body)
        shown = _fields(body)
        if shown.get("remote_host") or shown.get("remote_model"):
            raise _elsewhere(model)
        return min(MOST_CONTEXT, parse_show(status, body).context_length or UNKNOWN_CONTEXT)

    def _request(self, path: str, body: bytes, timeout_s: float) -> tuple[int, bytes]:
        request = ServerRequest("POST", f"{self._url}{path}", body, timeout_s)
        try:
            return exchange(self._session, request, HEADERS, MAX_ANSWER_BYTES)
        except LLMTimeoutError as exc:
            raise ProviderUnavailableError(
                f"Ollama did not answer within {timeout_s:g} s; raise EMBEDDING_TIMEOUT_S or lower EMBEDDING_BATCH_SIZE"
            ) from exc
        except LLMConnectionError as exc:
            if untrusted := certificate_problem(exc, self._url):
                raise ConfigurationError(f"{untrusted}.") from exc
            problem = problem_of(exc, self._url, "OLLAMA_ENDPOINT")
            if problem is None and not isinstance(exc, LLMAbsentError):
                problem = f"Ollama at {self._url} closed the connection before its answer was complete; check OLLAMA_ENDPOINT and its log"
            raise ProviderUnavailableError(
                problem or f"no connection to Ollama at {self._url}; start it (ollama serve) or correct OLLAMA_ENDPOINT"
            ) from exc
        except LLMUnavailableError as exc:
            raise ProviderUnavailableError(
                f"the server at {self._url} does not answer like Ollama; check OLLAMA_ENDPOINT"
            ) from exc

    def _refuse(self, status: int, body: bytes, inputs: Sequence[str] = ()) -> NoReturn:
        """Raise the error for an answer, with its reason if that does not quote *inputs*."""
        said = server_reason(body, inputs) or SEE_LOG
        text = body[:4000].decode("utf-8", "replace").lower()
        if status in (429, 503):
            raise ProviderBusyError(f"Ollama is busy (HTTP {status}){said}")
        if status == 404 and "model" in text:
            raise ConfigurationError(
                f"Ollama at {self._url} has no model {self._model} any more; run: ollama pull {self._model}{said}."
            )
        # A chat model: 501 from 0.30 on (from the llama-server inside), 400 or 500 before.
        if "not support embeddings" in text or (status == 400 and any(sign in text for sign in _MODEL_FAULTS)):
            raise ConfigurationError(
                f"{self._model} makes no embeddings in Ollama; set EMBEDDING_MODEL to one that does, such as nomic-embed-text{said}."
            )
        if status == 400 and any(sign in text for sign in _INPUT_FAULTS):
            is_long = any(sign in text for sign in _TOO_LONG)
            why = "an input is longer than the model's context" if is_long else "it makes no vector of an input"
            raise ProviderRejectedError(f"Ollama refuses the request: {why}{said}")
        is_fault = status == 400 and any(sign in text for sign in _SERVER_FAULTS)
        if is_fault or status >= 500 or status in (408, 425, 499):
            raise ProviderUnavailableError(f"Ollama failed (HTTP {status}){said}")
        if status in (401, 403, 404, 405) or status < 400:
            raise ConfigurationError(
                f"{self._url}/api/embed is refused (HTTP {status}); check OLLAMA_ENDPOINT and the access rights of that server{said}."
            )
        raise ProviderRejectedError(f"Ollama refuses the request (HTTP {status}){said}")


def _elsewhere(model: str) -> ConfigurationError:
    return ConfigurationError(
        f"{model} runs in Ollama's cloud, so texts would leave your network; choose a local model."
    )


def _fields(body: bytes) -> dict[str, Any]:
    try:
        return json_object(body)
    except LLMUnavailableError as exc:
        raise ProviderUnavailableError("Ollama's answer is not JSON, or incomplete; check OLLAMA_ENDPOINT") from exc

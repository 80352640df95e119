"""Builds chat requests and parses their answers, for both wrappers. No I/O, no clock, no retries.

Protocols: Ollama's ``/api/chat`` and ``/api/generate``, and OpenAI's ``/v1/chat/completions`` (vLLM, llama.cpp,
LM Studio). Facts about Ollama: github.com/ollama/ollama, api/types.go, server/routes.go and docs/api, read at v0.33.
"""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import orjson

from config.settings import Protocol
from domain.conversation import Message
from error_handler import (
    LLMBusyError,
    LLMContextError,
    LLMModelError,
    LLMRejectedError,
    LLMReplyError,
    LLMUnavailableError,
    Reason,
)
from model_server.tokens import least_prompt_tokens

T = TypeVar("T")

SEED = 20_250_924
DEFAULT_NUM_CTX = 8192  # until a window is chosen, and if there are no documents to measure
NUM_PREDICT = 700  # most tokens of an answer; without a limit Ollama lets a runaway answer fill ten windows
TOP_LOGPROBS = 20  # the maximum of Ollama and OpenAI
NANOSECONDS = 1e9
MAX_BODY_BYTES = 4 * 1024 * 1024  # a reply has a few kB; a larger one is refused
LEAST_SHARE = 0.9  # of the fewest tokens a prompt can have; a lower count proves a cut prompt
MAX_CHARACTERS_PER_TOKEN = 6.0  # of a whole prompt; English has about 4.5, other scripts fewer


@dataclass(frozen=True, slots=True)
class ServerRequest:
    """One request to the model server; *timeout_s* limits all of it."""

    method: str
    url: str
    body: bytes | None
    timeout_s: float


@dataclass(frozen=True, slots=True)
class ChatTarget:
    """The server, the model and its options: constant during a run, so that Ollama never reloads the model.

    *digest*, *disable_thinking* and *context_limit* (the model's own limit, tokens) come from the server. *logprobs*
    requests the probabilities of the answer's tokens, which adds about 100 kB to an answer.
    """

    protocol: Protocol
    url: str
    server_url: str
    model: str
    api_key: str | None = field(repr=False)
    num_ctx: int
    keep_alive: str
    digest: str | None = None
    disable_thinking: bool = False
    logprobs: bool = False
    context_limit: int | None = None

    @property
    def headers(self) -> dict[str, str]:
        """Headers of each request. They refuse compression, which would hide the size of an answer."""
        headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
        if self.api_key:
            headers["Authorization"] = f"Bearer {self.api_key}"
        return headers


@dataclass(frozen=True, slots=True)
class ChatReply:
    """A complete answer. Fields are None if the server does not report them.

    *queue_wait_s* is the time in the server's queue, *load_s* the time to load the model, *total_s* the time from the
    request's arrival at the server to its answer. *tokens* are the server's log probabilities, for domain.confidence.
    """

    text: str
    prompt_tokens: int | None
    reply_tokens: int | None
    queue_wait_s: float | None = None
    load_s: float | None = None
    tokens: tuple[Any, ...] = field(default=(), repr=False)
    total_s: float | None = None


def build_load_body(target: ChatTarget) -> bytes:
    """Return the body that loads the model with the options of ``build_chat_body``, without a question."""
    return build_chat_body(replace(target, protocol="ollama_chat"), [], b"null")


def build_chat_body(target: ChatTarget, messages: list[Message], schema_json: bytes, attempt: int = 0) -> bytes:
    """Return the body of a chat request. *schema_json* is the JSON Schema of the answer.

    *attempt* (from 0) changes the seed, so that a repeated request can get another answer.
    """
    schema = orjson.Fragment(schema_json)
    body: dict[str, Any] = {"model": target.model, "stream": False}
    if target.logprobs:  # the same fields in each protocol, ignored by older servers
        body |= {"logprobs": True, "top_logprobs": TOP_LOGPROBS}
    if target.protocol == "openai_chat":
        answer_format = {"type": "json_schema", "json_schema": {"name": "triad", "strict": True, "schema": schema}}
        body |= {"messages": messages, "response_format": answer_format, **_options(target, attempt)}
        return orjson.dumps(body)
    if target.protocol == "ollama_chat":
        body["messages"] = messages
    else:
        body["system"] = messages[0]["content"]
        body["prompt"] = "\n\n".join(message["content"] for message in messages[1:])
    if target.disable_thinking:
        body["think"] = False
    body |= {
        "format": schema,
        "options": _options(target, attempt),
        "keep_alive": int(target.keep_alive) if target.keep_alive.lstrip("-").isdigit() else target.keep_alive,
        "truncate": False,
        "shift": False,
    }
    return orjson.dumps(body)


def refuses_logprobs(target: ChatTarget, status: int, body: bytes) -> bool:
    """Return whether a response refuses the request because of the log probabilities that *target* asks for."""
    return target.logprobs and status in (400, 422) and b"logprobs" in body[:4000]


def _options(target: ChatTarget, attempt: int) -> dict[str, Any]:
    if target.protocol == "openai_chat":
        return {"temperature": 0, "seed": SEED + attempt, "max_tokens": NUM_PREDICT}
    return {"temperature": 0, "seed": SEED + attempt, "num_ctx": target.num_ctx, "num_predict": NUM_PREDICT}


def parse_load_response(target: ChatTarget, status: int, body: bytes) -> None:
    """Raise LLMError, as ``parse_chat_response`` does, unless the answer to ``build_load_body`` confirms the load."""
    if status != 200:
        _raise_for_status(target, status, body)
    if json_object(body).get("done_reason") != "load":
        raise LLMUnavailableError("the model server did not confirm that it loaded the model; see its log")


def parse_chat_response(target: ChatTarget, status: int, body: bytes, messages: Sequence[Message]) -> ChatReply:
    """Return the answer in an HTTP response to *messages*.

    Raises:
        LLMUnavailableError, LLMBusyError: Another attempt may help.
        LLMRejectedError, LLMContextError, LLMModelError: The server will never answer this request.
        LLMReplyError: Status 200 without a usable answer: context_overflow (the prompt was cut), cut_off or empty.
    """
    if status != 200:
        _raise_for_status(target, status, body)
    fields = json_object(body)
    if isinstance(fields.get("error"), str | dict):
        raise LLMUnavailableError("the model server answered 200 with an error in the body")
    if target.protocol == "openai_chat":
        return _parse_openai(fields)
    prompt_tokens = count(fields.get("prompt_eval_count"))
    if prompt_tokens is not None:
        _require_whole_prompt(target, prompt_tokens, messages)
    return _parse_ollama(target, fields)


def queue_wait_s(fields: dict[str, Any]) -> float | None:
    """Return how long Ollama queued the request whose answer holds *fields*; None if it does not report its times.

    It is the total time minus loading, reading the prompt and writing the answer. Ollama leaves out times of zero.
    """
    total_ns = count(fields.get("total_duration"))
    if total_ns is None:
        return None
    parts = (count(fields.get(f"{part}_duration")) or 0 for part in ("load", "prompt_eval", "eval"))
    return max(0, total_ns - sum(parts)) / NANOSECONDS


def _parse_ollama(target: ChatTarget, fields: dict[str, Any]) -> ChatReply:
    text = part(fields, "message", dict).get("content") if target.protocol == "ollama_chat" else fields.get("response")
    # If the engine aborts (repeated tokens), the server still answers 200 (ollama/ollama#18359).
    text = _whole_text(text, fields.get("done_reason"), is_aborted=fields.get("done") is not True)
    total_ns, load_ns = count(fields.get("total_duration")), count(fields.get("load_duration")) or 0
    return ChatReply(
        text,
        count(fields.get("prompt_eval_count")),
        count(fields.get("eval_count")),
        queue_wait_s(fields),
        None if total_ns is None else load_ns / NANOSECONDS,
        tuple(part(fields, "logprobs", list)),
        None if total_ns is None else total_ns / NANOSECONDS,
    )


def _parse_openai(fields: dict[str, Any]) -> ChatReply:
    choice = next((choice for choice in part(fields, "choices", list) if isinstance(choice, dict)), {})
    finish = choice.get("finish_reason")
    text = _whole_text(part(choice, "message", dict).get("content"), finish, is_aborted=finish is None)
    usage, tokens = part(fields, "usage", dict), part(part(choice, "logprobs", dict), "content", list)
    counts = count(usage.get("prompt_tokens")), count(usage.get("completion_tokens"))
    return ChatReply(text, *counts, tokens=tuple(tokens))


def _whole_text(text: Any, finish: Any, *, is_aborted: bool) -> str:
    if is_aborted:
        raise LLMReplyError("the server aborted the answer", Reason.CUT_OFF)
    if finish == "length":
        raise LLMReplyError("the answer was cut off", Reason.CUT_OFF)
    if not isinstance(text, str) or not text.strip():
        raise LLMReplyError("the answer is empty", Reason.EMPTY)
    return text


def is_half_window(target: ChatTarget, prompt_tokens: int) -> bool:
    """Return whether *prompt_tokens* is what Ollama (from 0.30 on) leaves of a prompt that it cuts: half of the window."""
    return abs(prompt_tokens - target.num_ctx // 2 - 2) <= 2


def _require_whole_prompt(target: ChatTarget, prompt_tokens: int, messages: Sequence[Message]) -> None:
    """Refuse an answer if its token count proves that the prompt was cut.

    Ollama cuts to the whole window (up to 0.24) or to half of it (from 0.30 on) and answers 200. A whole prompt that
    leaves no room for the answer is refused as well: its beginning was shifted out during generation.
    """
    characters = sum(len(message["content"]) for message in messages)
    is_too_short = characters > MAX_CHARACTERS_PER_TOKEN * prompt_tokens
    if prompt_tokens + NUM_PREDICT > target.num_ctx or (is_half_window(target, prompt_tokens) and is_too_short):
        raise LLMReplyError(
            f"the server counted {prompt_tokens} prompt tokens for a window of {target.num_ctx}: the prompt was cut, or it "
            "leaves no room for the answer",
            Reason.CONTEXT_OVERFLOW,
        )
    least = least_prompt_tokens(messages, int(prompt_tokens / LEAST_SHARE))
    if prompt_tokens < LEAST_SHARE * least:
        raise LLMReplyError(
            f"the server counted {prompt_tokens} prompt tokens instead of at least {least}: it cut the prompt",
            Reason.CONTEXT_OVERFLOW,
        )


# Ollama's errors if the model can never answer: it is an embedding model, or the name is not valid.
_MODEL_SIGNS = ("does not support", "invalid model name", "model is required")


def _raise_for_status(target: ChatTarget, status: int, body: bytes) -> None:
    text = body[:4000].decode("utf-8", "replace")
    lowered = text.lower()
    if status in (429, 503):
        raise LLMBusyError(f"the model server is busy (HTTP {status})")
    if status in (401, 403):
        raise LLMModelError(f"the model server refused the credentials (HTTP {status}); check LLM_API_KEY")
    if status < 400:
        raise LLMModelError(
            f"the model server redirects {target.url} to another address (HTTP {status}), which is not followed because "
            "customer text would go there; set the final address"
        )
    if status in (404, 405) or (status == 400 and any(sign in lowered for sign in _MODEL_SIGNS)):
        raise LLMModelError(
            f"the model server has no model {target.model} for chats at {target.url} (HTTP {status}); "
            "check the model's name and the address"
        )
    if any(sign in lowered for sign in ("exceed_context_size", "context length", "context size", "context window")):
        raise LLMContextError(
            "the conversation is longer than the model's context window; raise OLLAMA_NUM_CTX",
            prompt_tokens=_number(_PROMPT_TOKENS, text),
            window_tokens=_number(_WINDOW_TOKENS, text),
        )
    if "memory" in lowered and status >= 500:
        raise LLMBusyError(f"the model server is out of memory (HTTP {status})")
    if status >= 500 or status in (408, 425, 499):
        raise LLMUnavailableError(f"the model server failed (HTTP {status})")
    raise LLMRejectedError(f"the model server refused the request (HTTP {status})")


# llama.cpp reports both as JSON, which Ollama quotes as a string inside JSON; vLLM reports them in a sentence.
_PROMPT_TOKENS = re.compile(r'n_prompt_tokens\\*"\s*:\s*(\d{1,9})|\((\d{1,9}) in the messages')
_WINDOW_TOKENS = re.compile(r'n_ctx\\*"\s*:\s*(\d{1,9})|maximum context length is (\d{1,9})')


def _number(pattern: re.Pattern[str], text: str) -> int | None:
    found = pattern.search(text)
    return int(found[1] or found[2]) if found else None


def unreachable_message(target: ChatTarget) -> str:
    """Return the error message for a connection that was refused, reset or cut off."""
    setting = "LLM_API_URL" if target.protocol == "openai_chat" else "OLLAMA_ENDPOINT"
    return f"no connection to the model server at {target.server_url}; start it (ollama serve) or correct {setting}"


@functools.lru_cache(maxsize=8)
def plan_fingerprint(target: ChatTarget, system_prompt: str, schema_json: bytes) -> str:
    """Return the SHA-256 of everything except the conversation that decides an answer.

    The window is left out: each run chooses it, and a result says if its conversation was truncated.
    """
    options = orjson.dumps({**_options(target, 0), "num_ctx": None}, option=orjson.OPT_SORT_KEYS)
    parts = [target.protocol, target.model, target.digest or "", options.decode(), system_prompt, schema_json.decode()]
    return hashlib.sha256(orjson.dumps(parts)).hexdigest()


def json_object(body: bytes) -> dict[str, Any]:
    """Return the JSON object in *body*; raise LLMUnavailableError if there is none."""
    try:
        fields = orjson.loads(body)
    except orjson.JSONDecodeError as exc:
        raise LLMUnavailableError("the model server's answer is not JSON, or was cut off") from exc
    if not isinstance(fields, dict):
        raise LLMUnavailableError("the model server's answer is not a JSON object")
    return fields


def part(fields: dict[str, Any], name: str, kind: type[T]) -> T:
    """Return the field *name* if it is a *kind*, otherwise an empty one."""
    value = fields.get(name)
    return value if isinstance(value, kind) else kind()


def count(value: Any) -> int | None:
    """Return *value* if it is a whole number of at least 0, else None."""
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None

"""The wire protocols of the model servers, as pure functions: build the request, read the answer.

Three are spoken: Ollama's ``/api/chat`` and ``/api/generate``, and OpenAI's
``/v1/chat/completions`` (vLLM, llama.cpp, LM Studio). No I/O, no clock, no retries here; both
wrappers share these functions. Facts about Ollama: github.com/ollama/ollama, api/types.go,
server/routes.go and docs/api, read at v0.33.
"""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import orjson

from config.settings import Protocol, Settings
from error_handler import (
    ConfigurationError,
    LLMBusyError,
    LLMContextError,
    LLMModelError,
    LLMRejectedError,
    LLMReplyError,
    LLMUnavailableError,
    Reason,
)
from model_server.models import ModelFacts, ServedModel, count, is_cloud_name, json_object

SEED = 20_250_924
DEFAULT_NUM_CTX = 8192  # until a window was chosen
NUM_PREDICT = 700  # tokens of an answer; without it Ollama lets a runaway answer fill ten windows
TOP_LOGPROBS = 20  # the most that Ollama and OpenAI take
NANOSECONDS = 1e9
MAX_BODY_BYTES = 4 * 1024 * 1024  # a reply is a few kB; more than this is refused unread
LEAST_SHARE = 0.9  # of the fewest tokens a prompt can have; a count below betrays a cut
MAX_CHARACTERS_PER_TOKEN = 6.0  # of whole prompts; English has about 4.5, other scripts fewer

Message = dict[str, str]


@dataclass(frozen=True, slots=True)
class ChatTarget:
    """Where and how the model is asked: the same for each call of a run, so it is never reloaded.

    *digest*, *disable_thinking* and *context_limit* (the model's own, in tokens) are known after the server was
    asked for its models. *logprobs* asks for the probabilities of the answer's tokens as well, which costs the
    server some work and the wire some 100 kB.
    """

    protocol: Protocol
    url: str
    server_url: str
    model: str
    api_key: str | None
    num_ctx: int
    keep_alive: str
    digest: str | None = None
    disable_thinking: bool = False
    logprobs: bool = False
    context_limit: int | None = None

    def __repr__(self) -> str:
        return f"ChatTarget({self.protocol}, {self.url}, {self.model})"

    @property
    def headers(self) -> dict[str, str]:
        """Headers of each request. No compression: a compressed answer hides its size."""
        headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
        if self.api_key:
            headers["Authorization"] = f"Bearer {self.api_key}"
        return headers


@dataclass(frozen=True, slots=True)
class ChatReply:
    """A complete answer; None where the server does not tell.

    *queue_wait_s* is how long the request waited for a slot of the server: its total time less loading, reading
    the prompt and writing the answer. *load_s* above some milliseconds tells that the model was loaded for it.
    *tokens* are the log probabilities as the server sent them, unread; domain.confidence knows their form.
    """

    text: str
    prompt_tokens: int | None
    reply_tokens: int | None
    queue_wait_s: float | None = None
    load_s: float | None = None
    tokens: tuple[Any, ...] = field(default=(), repr=False)
    total_s: float | None = None  # from the request's arrival at the server to its answer


def chat_target(settings: Settings, model: str) -> ChatTarget:
    """Return the target that *settings* describe, for *model*.

    Raises:
        ConfigurationError: *model* is a cloud model: customer text would leave the house.
    """
    if is_cloud_name(model):
        raise ConfigurationError(
            f"{model} runs in Ollama's cloud, so customer text would leave this house; name a local model."
        )
    return ChatTarget(
        protocol=settings.protocol,
        url=settings.chat_url,
        server_url=settings.server_url,
        model=model,
        api_key=settings.llm_api_key.get_secret_value() if settings.llm_api_key and settings.llm_api_url else None,
        num_ctx=settings.ollama_num_ctx or DEFAULT_NUM_CTX,
        keep_alive=settings.ollama_keep_alive,
    )


def build_load_body(target: ChatTarget) -> bytes:
    """Return the body that loads the model for the very requests of ``build_chat_body``, and asks nothing."""
    return build_chat_body(replace(target, protocol="ollama_chat"), [], b"null")


def build_chat_body(target: ChatTarget, messages: list[Message], schema_json: bytes, attempt: int = 0) -> bytes:
    """Return the body of a chat request.

    *schema_json* is the JSON Schema of the answer. *attempt* (from 0) moves the seed, so that
    asking again is not asking for the same answer.
    """
    schema = orjson.Fragment(schema_json)
    if target.protocol == "openai_chat":
        body: dict[str, Any] = {
            "model": target.model,
            "messages": messages,
            "stream": False,
            **_options(target, attempt),
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "triad", "strict": True, "schema": schema},
            },
            **_logprobs(target),
        }
        return orjson.dumps(body)
    body = {"model": target.model}
    if target.protocol == "ollama_chat":
        body["messages"] = messages
    else:
        body["system"] = messages[0]["content"]
        body["prompt"] = "\n\n".join(message["content"] for message in messages[1:])
    body |= {
        "stream": False,
        "format": schema,
        "options": _options(target, attempt),
        "keep_alive": int(target.keep_alive) if target.keep_alive.lstrip("-").isdigit() else target.keep_alive,
        "truncate": False,
        "shift": False,
        **_logprobs(target),
    }
    if target.disable_thinking:
        body["think"] = False
    return orjson.dumps(body)


def _logprobs(target: ChatTarget) -> dict[str, Any]:
    """Return the fields that ask for log probabilities, the same in each protocol; servers too old ignore them."""
    return {"logprobs": True, "top_logprobs": TOP_LOGPROBS} if target.logprobs else {}


def refuses_logprobs(target: ChatTarget, status: int, body: bytes) -> bool:
    """Whether a response says that the log probabilities that *target* asks for are why it refuses the request."""
    return target.logprobs and status in (400, 422) and b"logprobs" in body[:4000]


def _options(target: ChatTarget, attempt: int) -> dict[str, Any]:
    if target.protocol == "openai_chat":
        return {"temperature": 0, "seed": SEED + attempt, "max_tokens": NUM_PREDICT}
    return {"temperature": 0, "seed": SEED + attempt, "num_ctx": target.num_ctx, "num_predict": NUM_PREDICT}


def require_fit(target: ChatTarget, prompt_characters: int) -> None:
    """Raise LLMContextError where a prompt of *prompt_characters* surely overflows the window.

    Ollama alone has a window that the request sets; other servers are left to refuse by themselves.
    """
    least_tokens = int(prompt_characters / MAX_CHARACTERS_PER_TOKEN)
    if target.protocol != "openai_chat" and least_tokens + NUM_PREDICT > target.num_ctx:
        raise LLMContextError(
            f"the conversation needs at least {least_tokens} tokens and the context window holds {target.num_ctx}; "
            "raise OLLAMA_NUM_CTX if the model allows it"
        )


def parse_load_response(target: ChatTarget, status: int, body: bytes) -> None:
    """Return where the answer to ``build_load_body`` says that the model is loaded.

    Raises:
        LLMError: As ``parse_chat_response``.
    """
    if status != 200:
        _raise_for_status(target, status, body)
    if json_object(body).get("done_reason") != "load":
        raise LLMUnavailableError("the model server did not say that it loaded the model; see its log")


def parse_chat_response(
    target: ChatTarget,
    status: int,
    body: bytes,
    prompt_characters: int,
    least_tokens: Callable[[int], int] = lambda _enough: 0,
) -> ChatReply:
    """Return the answer in an HTTP response to a prompt of *prompt_characters*.

    *least_tokens* tells how many tokens the prompt has at least: token_estimate.least_prompt_tokens with its messages.

    Raises:
        LLMUnavailableError, LLMBusyError: Another attempt may help.
        LLMRejectedError, LLMContextError, LLMModelError: This request will never be answered.
        LLMReplyError: Status 200 and still no answer: cut_off, empty or context_overflow. The last wins where the
            prompt was cut: asking again would be cut again.
    """
    if status != 200:
        _raise_for_status(target, status, body)
    fields = json_object(body)
    if isinstance(fields.get("error"), str | dict):
        raise LLMUnavailableError("the model server answered 200 with an error in the body")
    if target.protocol == "openai_chat":
        return _parse_openai(fields)
    prompt_tokens = count(fields.get("prompt_eval_count"))
    _require_whole_prompt(target, prompt_tokens, prompt_characters)
    if prompt_tokens is not None:
        least = least_tokens(int(prompt_tokens / LEAST_SHARE))
        if prompt_tokens < LEAST_SHARE * least:
            raise LLMReplyError(
                f"the server saw {prompt_tokens} prompt tokens of at least {least}: it cut the prompt",
                Reason.CONTEXT_OVERFLOW,
            )
    return _parse_ollama(target, fields)


_DURATIONS = ("load_duration", "prompt_eval_duration", "eval_duration")


def _parse_ollama(target: ChatTarget, fields: dict[str, Any]) -> ChatReply:
    if target.protocol == "ollama_chat":
        message = fields.get("message")
        text = message.get("content") if isinstance(message, dict) else None
    else:
        text = fields.get("response")
    if fields.get("done") is not True:
        # The engine gave up (repeated tokens) and the server still says 200 (ollama/ollama#18359).
        raise LLMReplyError("the server ended the generation before it was done", Reason.CUT_OFF)
    text = _whole_text(text, fields.get("done_reason"))
    counts = count(fields.get("prompt_eval_count")), count(fields.get("eval_count"))
    tokens = _tokens(fields)
    total_ns = count(fields.get("total_duration"))
    if total_ns is None:
        return ChatReply(text, *counts, tokens=tokens)
    # Ollama leaves out what is zero.
    load_ns, *rest_ns = (count(fields.get(name)) or 0 for name in _DURATIONS)
    queue_wait_ns = max(0, total_ns - load_ns - sum(rest_ns))
    return ChatReply(text, *counts, queue_wait_ns / NANOSECONDS, load_ns / NANOSECONDS, tokens, total_ns / NANOSECONDS)


def _parse_openai(fields: dict[str, Any]) -> ChatReply:
    choices = fields.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices and isinstance(choices[0], dict) else {}
    message = choice.get("message")
    usage = fields.get("usage")
    usage = usage if isinstance(usage, dict) else {}
    if choice.get("finish_reason") is None:
        raise LLMReplyError("the server ended the generation before it was done", Reason.CUT_OFF)
    text = _whole_text(message.get("content") if isinstance(message, dict) else None, choice["finish_reason"])
    logprobs = choice.get("logprobs")
    tokens = _tokens(logprobs, "content") if isinstance(logprobs, dict) else ()
    return ChatReply(text, count(usage.get("prompt_tokens")), count(usage.get("completion_tokens")), tokens=tokens)


def _tokens(fields: dict[str, Any], name: str = "logprobs") -> tuple[Any, ...]:
    entries = fields.get(name)
    return tuple(entries) if isinstance(entries, list) else ()


def _whole_text(text: Any, finish: Any) -> str:
    if finish == "length":
        raise LLMReplyError("the answer was cut off", Reason.CUT_OFF)
    if not isinstance(text, str) or not text.strip():
        raise LLMReplyError("the answer is empty", Reason.EMPTY)
    return text


def _require_whole_prompt(target: ChatTarget, prompt_tokens: int | None, prompt_characters: int) -> None:
    """Refuse an answer whose token count says that the prompt was cut.

    Servers cut to the whole window (<= 0.24) or to half of it plus the kept tokens (>= 0.30) and
    answer 200. A whole prompt that leaves no room for the answer is refused as well: what follows
    it was generated with its beginning shifted out.
    """
    if prompt_tokens is None:
        return
    half_window = abs(prompt_tokens - target.num_ctx // 2 - 2) <= 2
    if prompt_tokens + NUM_PREDICT > target.num_ctx or (
        half_window and prompt_characters > MAX_CHARACTERS_PER_TOKEN * prompt_tokens
    ):
        raise LLMReplyError(
            f"the server saw {prompt_tokens} prompt tokens, which betrays a cut prompt at a window of {target.num_ctx}",
            Reason.CONTEXT_OVERFLOW,
        )


# What Ollama says where no document can be answered: the model is an embedding model, or its name is none.
_MODEL_SIGNS = ("does not support", "invalid model name", "model is required")


def _raise_for_status(target: ChatTarget, status: int, body: bytes) -> None:
    text = body[:4000].decode("utf-8", "replace")
    lowered = text.lower()
    if status in (429, 503):
        raise LLMBusyError(f"the model server is busy (HTTP {status})")
    if status in (401, 403):
        raise LLMModelError(f"the model server refuses the credentials (HTTP {status}); check LLM_API_KEY")
    if status in (404, 405) or status < 400 or (status == 400 and any(sign in lowered for sign in _MODEL_SIGNS)):
        raise LLMModelError(
            f"the model server has no model {target.model} for chats at {target.url} (HTTP {status}); "
            "check the model's name and the address"
        )
    if any(sign in lowered for sign in ("exceed_context_size", "context length", "context size", "context window")):
        raise LLMContextError(
            "the conversation is longer than the model's context window; raise OLLAMA_NUM_CTX",
            prompt_tokens=_told(_PROMPT_TOKENS, text),
            window_tokens=_told(_WINDOW_TOKENS, text),
        )
    if "memory" in lowered and status >= 500:
        raise LLMBusyError(f"the model server is out of memory (HTTP {status})")
    if status >= 500 or status in (408, 425, 499):
        raise LLMUnavailableError(f"the model server failed (HTTP {status})")
    raise LLMRejectedError(f"the model server refuses the request (HTTP {status})")


# llama.cpp tells both as JSON, which Ollama passes on as a text inside JSON; vLLM tells them in a sentence.
_PROMPT_TOKENS = re.compile(r'n_prompt_tokens\\*"\s*:\s*(\d{1,9})|\((\d{1,9}) in the messages')
_WINDOW_TOKENS = re.compile(r'n_ctx\\*"\s*:\s*(\d{1,9})|maximum context length is (\d{1,9})')


def _told(pattern: re.Pattern[str], text: str) -> int | None:
    found = pattern.search(text)
    return int(found[1] or found[2]) if found else None


def unreachable_message(target: ChatTarget) -> str:
    """Return the sentence for a connection that was refused, reset or cut off."""
    setting = "LLM_API_URL" if target.protocol == "openai_chat" else "OLLAMA_ENDPOINT"
    return f"no connection to the model server at {target.server_url}; start it (ollama serve) or correct {setting}"


@functools.lru_cache(maxsize=8)
def plan_fingerprint(target: ChatTarget, system_prompt: str, schema_json: bytes) -> str:
    """Return the SHA-256 of everything but the conversation that decides an answer.

    The window does not: it is chosen anew for each run, and a conversation it could not hold says so in its result.
    """
    options = orjson.dumps({**_options(target, 0), "num_ctx": None}, option=orjson.OPT_SORT_KEYS)
    parts = [target.protocol, target.model, target.digest or "", options.decode(), system_prompt, schema_json.decode()]
    return hashlib.sha256(orjson.dumps(parts)).hexdigest()


def with_model(target: ChatTarget, model: ServedModel, facts: ModelFacts) -> ChatTarget:
    """Return *target* with what the server said about its model."""
    return replace(target, digest=model.digest, disable_thinking=facts.can_think, context_limit=facts.context_length)

"""Builds chat requests and parses their answers, for both wrappers. No I/O, no clock, no retries.

Protocols: Ollama's chat and generate routes, and OpenAI's ``/v1/chat/completions`` (vLLM, llama.cpp, LM Studio).
Facts about Ollama: github.com/ollama/ollama, api/types.go, server/routes.go and docs/api, read at v0.33.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import orjson

from config.settings import Protocol
from domain.conversation import Message
from domain.server_reason import server_reason
from error_handler import (
    LLMBusyError,
    LLMModelError,
    LLMRejectedError,
    LLMReplyError,
    LLMUnavailableError,
    Reason,
)
from model_server.grammar import bound_answer
from model_server.refusals import context_refusal
from model_server.tokens import least_prompt_tokens
from network.outgoing import origin

T = TypeVar("T")

SEED = 20_250_924
LLAMA_CPP, VLLM = "llamacpp", "vllm"  # owned_by of the models that their own servers list
DEFAULT_NUM_CTX = 8192  # until a window is chosen, and if there are no documents to measure
NUM_PREDICT = 700  # most tokens of an answer; without a limit Ollama lets a runaway answer fill ten windows
THINKING_TOKENS = 1000  # more for models that cannot be kept from thinking; at the level low they take up to 500
TOP_LOGPROBS = 20  # the maximum of Ollama and OpenAI
NANOSECONDS = 1e9
MAX_BODY_BYTES = 4 * 1024 * 1024  # a reply has a few kB; a larger one is refused
LEAST_SHARE = 0.9  # of the fewest tokens a prompt can have; a lower count proves a cut prompt
SEE_LOG = "; its log may say why"
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

    *digest*, *disable_thinking* and *context_limit* (the model's own limit, tokens) come from the server. *think_level*
    is sent instead of ``think: false`` to models that cannot be kept from thinking. *logprobs* requests the
    probabilities of the answer's tokens, which adds about 100 kB to an answer. *merges_system*: the model has no system
    role. *refused* names the optional fields, ``max_tokens`` and ``scores`` that an OpenAI-compatible server does not take.
    *refuses_arrays*: the server takes no JSON schema of an array. *engine*: its ``owned_by``, empty if unknown.
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
    think_level: str = ""
    logprobs: bool = False
    context_limit: int | None = None
    merges_system: bool = False
    refused: frozenset[str] = frozenset()
    refuses_arrays: bool = False
    engine: str = ""

    @property
    def address(self) -> str:
        """The address of the server as messages and logs show it."""
        return origin(self.server_url)

    @property
    def thinking_switches(self) -> dict[str, Any]:
        """The fields that switch thinking off in OpenAI's protocol; gpt-oss knows no "none", but "low"."""
        if not self.disable_thinking:
            return {}
        switches = {"chat_template_kwargs": {"enable_thinking": False, "thinking": False}, "reasoning_effort": "none"}
        sent = {name: value for name, value in switches.items() if name not in self.refused}
        if "reasoning_effort" in self.refused and "low" not in self.refused:
            sent["reasoning_effort"] = "low"
        return sent

    @property
    def thinking_tokens(self) -> int:
        """The room for thoughts."""
        return THINKING_TOKENS if self.think_level or "max_tokens" in self.refused else 0

    @property
    def headers(self) -> dict[str, str]:
        """Headers of each request."""
        key = {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}
        return {"Content-Type": "application/json", **key}


@dataclass(frozen=True, slots=True)
class ChatReply:
    """A complete answer. Fields are None if the server does not report them.

    *queue_wait_s* is the time in the server's queue, *load_s* that to load the model, *total_s* that from arrival to answer.
    *tokens* are log probabilities, for domain.confidence; *scores* those of the labels (0 to 1, by field) in the style score.
    """

    text: str
    prompt_tokens: int | None
    reply_tokens: int | None
    queue_wait_s: float | None = None
    load_s: float | None = None
    tokens: tuple[Any, ...] = field(default=(), repr=False)
    total_s: float | None = None
    scores: tuple[float, ...] = ()


def build_chat_body(target: ChatTarget, messages: list[Message], schema_json: bytes, attempt: int = 0) -> bytes:
    """Return the body of a chat request. *schema_json* is the JSON Schema of the answer.

    *attempt* (from 0) changes the seed, so that a repeated request can get another answer.
    """
    schema = orjson.Fragment(schema_json)
    body: dict[str, Any] = {"model": target.model, "stream": False}
    if target.logprobs:  # the same fields in each protocol, ignored by older servers
        body |= {"logprobs": True, "top_logprobs": TOP_LOGPROBS}
    if target.merges_system and len(messages) > 1:
        messages = without_system(messages)
    if target.protocol == "openai_chat":
        body |= bound_answer(schema_json, takes_grammar=target.engine == LLAMA_CPP and "grammar" not in target.refused)
        body |= {"messages": messages, **_options(target, attempt), **target.thinking_switches}
        return orjson.dumps(body)
    if target.protocol == "ollama_chat":
        body["messages"] = messages
    else:
        system = [message["content"] for message in messages[:1] if message["role"] == "system"]
        body |= {"system": system[0]} if system else {}
        body["prompt"] = "\n\n".join(message["content"] for message in messages[len(system) :])
    if target.disable_thinking:
        body["think"] = target.think_level or False
    body |= {
        "format": schema,
        "options": _options(target, attempt),
        "keep_alive": int(target.keep_alive) if target.keep_alive.lstrip("-").isdigit() else target.keep_alive,
        "truncate": False,
        "shift": False,
    }
    return orjson.dumps(body)


def without_system(messages: list[Message]) -> list[Message]:
    """Return *messages* with the rules at the beginning of the first user turn, for models without a system role."""
    rules, first = messages[0]["content"], messages[1]["content"]
    return [{"role": "user", "content": f"{rules}\n\n{first}"}, *messages[2:]]


def _options(target: ChatTarget, attempt: int) -> dict[str, Any]:
    most = NUM_PREDICT + target.thinking_tokens
    if target.protocol == "openai_chat":
        limit = "max_completion_tokens" if "max_tokens" in target.refused else "max_tokens"
        options = {"temperature": 0, "seed": SEED + attempt, limit: most}
        return {name: value for name, value in options.items() if name not in target.refused}
    return {"temperature": 0, "seed": SEED + attempt, "num_ctx": target.num_ctx, "num_predict": most}


def parse_load_response(target: ChatTarget, status: int, body: bytes) -> None:
    """Raise LLMError, as ``parse_chat_response`` does, if the answer to ``build_load_body`` denies the load."""
    if status != 200:
        _raise_for_status(target, status, body, [])
    fields = json_object(body)
    # Servers that only emulate Ollama answer an empty chat like any other.
    if fields.get("done_reason") == "unload" or isinstance(fields.get("error"), str | dict):
        raise LLMUnavailableError("the model server did not load the model; see its log")


def parse_chat_response(target: ChatTarget, status: int, body: bytes, messages: Sequence[Message]) -> ChatReply:
    """Return the answer in an HTTP response to *messages*.

    Raises:
        LLMUnavailableError, LLMBusyError: Another attempt may help.
        LLMRejectedError, LLMContextError, LLMModelError: The server will never answer this request.
        LLMReplyError: Status 200 without a usable answer: context_overflow (the prompt was cut), cut_off or empty.
    """
    if status != 200:
        _raise_for_status(target, status, body, messages)
    fields = json_object(body)
    if problem := error_in_body(fields):
        code = count(problem.get("code")) if isinstance(problem, dict) else None
        if code is not None and 400 <= code < 600:
            _raise_for_status(target, code, body, messages)
        if context := context_refusal(body[:4000].decode("utf-8", "replace"), NUM_PREDICT):
            raise context
        said = reason_given(target, body, messages)
        raise LLMUnavailableError(f"the model server answered 200 with an error in the body{said}")
    if target.protocol == "openai_chat":
        return _parse_openai(fields)
    prompt_tokens = count(fields.get("prompt_eval_count"))
    if prompt_tokens is not None:
        _require_whole_prompt(target, prompt_tokens, messages)
    return _parse_ollama(target, fields)


def error_in_body(fields: dict[str, Any]) -> str | dict[str, Any] | None:
    """Return the error in the body of an answer, whatever its status: of the answer, or of its first choice."""
    if fields.get("object") == "error":
        return fields
    found = fields.get("error") or ("choices" in fields and first_choice(fields).get("error"))
    return found if isinstance(found, str | dict) else None


def first_choice(fields: dict[str, Any]) -> dict[str, Any]:
    """Return the first choice of an answer in OpenAI's protocol, empty if there is none."""
    return next((choice for choice in part(fields, "choices", list) if isinstance(choice, dict)), {})


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
    message = part(fields, "message", dict) if target.protocol == "ollama_chat" else fields
    text = answer_text(message, "content" if target.protocol == "ollama_chat" else "response")
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
    choice = first_choice(fields)
    finish = choice.get("finish_reason")
    text = _whole_text(answer_text(part(choice, "message", dict), "content"), finish, is_aborted=finish is None)
    usage, tokens = part(fields, "usage", dict), part(part(choice, "logprobs", dict), "content", list)
    counts = count(usage.get("prompt_tokens")), count(usage.get("completion_tokens"))
    return ChatReply(text, *counts, tokens=tuple(tokens))


def answer_text(message: dict[str, Any], name: str) -> Any:
    """Return the answer in the field *name*, or in a field for reasoning if that holds one JSON value and nothing else.

    Some servers with a schema and a parser for reasoning file the whole answer there.
    """
    text = message.get(name)
    if isinstance(text, list):  # parts, some of them thoughts
        pieces = [piece for piece in text if isinstance(piece, dict) and piece.get("type") in ("text", "output_text")]
        text = "".join(part(piece, "text", str) for piece in pieces)
    if isinstance(text, str) and text.strip():
        return text
    thoughts = reasoning(message).strip()
    return thoughts if thoughts[:1] + thoughts[-1:] in ("{}", "[]") else text


def reasoning(message: dict[str, Any]) -> str:
    """Return the text of the fields in which servers put reasoning."""
    found = (message.get(name) for name in ("reasoning_content", "reasoning", "thinking"))
    return next((text for text in found if isinstance(text, str) and text.strip()), "")


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
    if prompt_tokens + NUM_PREDICT + target.thinking_tokens > target.num_ctx or (
        is_half_window(target, prompt_tokens)
        and sum(len(message["content"]) for message in messages) > MAX_CHARACTERS_PER_TOKEN * prompt_tokens
    ):
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


def reason_given(target: ChatTarget, body: bytes, messages: Sequence[Message] = ()) -> str:
    """Return the reason in the body of a refusal of *messages*, or where to look for it, to be put after an error message."""
    rules = "\n".join(message["content"] for message in messages if message["role"] == "system")
    private = [message["content"] for message in messages if message["role"] != "system"]
    return server_reason(body, private, instructions=rules, secret=target.api_key) or SEE_LOG


def _raise_for_status(target: ChatTarget, status: int, body: bytes, messages: Sequence[Message]) -> None:
    said = reason_given(target, body, messages)
    lowered = body[:4000].decode("utf-8", "replace").lower()
    if status in (429, 503):
        raise LLMBusyError(f"the model server is busy (HTTP {status}){said}")
    if status in (401, 403):
        wrong = "refused the key" if target.api_key else "requires a key"
        raise LLMModelError(f"the model server {wrong} (HTTP {status}); check LLM_API_KEY{said}")
    if status < 400:
        raise LLMModelError(
            f"the model server redirects {target.url} to another address (HTTP {status}), which is not followed because "
            "customer text would go there; set the final address"
        )
    if status in (404, 405) or (status == 400 and any(sign in lowered for sign in _MODEL_SIGNS)):
        raise LLMModelError(
            f"the model server has no model {target.model} for chats at {target.url} (HTTP {status}); "
            f"check the model's name and the address{said}"
        )
    if context := context_refusal(lowered, NUM_PREDICT):
        raise context
    if "memory" in lowered and status >= 500:
        raise LLMBusyError(f"the model server is out of memory (HTTP {status}){said}")
    if status >= 500 or status in (408, 425, 499):
        raise LLMUnavailableError(f"the model server failed (HTTP {status}){said}")
    raise LLMRejectedError(f"the model server refused the request (HTTP {status}){said}")


@functools.lru_cache(maxsize=8)
def plan_fingerprint(target: ChatTarget, system_prompt: str, schema_json: bytes) -> str:
    """Return the SHA-256 of everything except the conversation that decides an answer.

    The window is left out: each run chooses it, and a result says if its conversation was truncated. So is what it learns.
    """
    options = {**_options(replace(target, think_level="", refused=frozenset()), 0), "num_ctx": None}
    fixed = orjson.dumps(options, option=orjson.OPT_SORT_KEYS).decode()
    parts = [target.protocol, target.model, target.digest or "", fixed, system_prompt, schema_json.decode()]
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
    return value if type(value) is int and value >= 0 else None

"""The answer of the model, and its form in each API."""

import time
from collections.abc import Callable
from typing import Any

import orjson

from .labels import estimate_tokens
from .payloads import Call

JSON_TYPE = b"application/json; charset=utf-8"
V1_JSON_TYPE = b"application/json"
NDJSON_TYPE = b"application/x-ndjson"
SSE_TYPE = b"text/event-stream"
TEXT_TYPE = b"text/plain; charset=utf-8"

# What a grammar made from a schema leaves open: white space and blank lines between the tokens, and after the last one.
# Before the first key, between two pairs, between key and value, at the end.
_LAYOUTS = (
    ("{", ",", ":", "}"),
    ("{", ", ", ": ", "}"),
    ("{\n  ", ",\n  ", ": ", "\n}"),
    ("{\n\n\t", "\n,\n\n\t", " : ", "\n\n}\n\n  "),
)

_V1_ERROR_TYPES = {400: "invalid_request_error", 404: "not_found_error"}


class Clock:
    """Wall-clock strings, made once per second."""

    def __init__(self) -> None:
        self._second = -1
        self._created = ""
        self._date = b""

    def _refresh(self, second: int) -> None:
        now = time.gmtime(second)
        self._second = second
        self._created = time.strftime("%Y-%m-%dT%H:%M:%S", now)
        self._date = time.strftime("%a, %d %b %Y %H:%M:%S GMT", now).encode()

    def created_at(self, shift_s: float = 0.0) -> str:
        """RFC 3339 in UTC with nanoseconds, *shift_s* seconds off."""
        second, nanosecond = divmod(time.time_ns() + int(shift_s * 1e9), 1_000_000_000)
        if shift_s:
            return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second)) + f".{nanosecond:09d}Z"
        if second != self._second:
            self._refresh(second)
        return f"{self._created}.{nanosecond:09d}Z"

    def http_date(self) -> bytes:
        """Value of the Date header."""
        second = int(time.time())
        if second != self._second:
            self._refresh(second)
        return self._date


class Reply:
    """One answer before it is rendered. Faults change it; *fields* is the object behind *content*."""

    __slots__ = (
        "content",
        "counters",
        "created_shift_s",
        "done",
        "done_reason",
        "eval_ns",
        "fields",
        "load_ns",
        "logprobs",
        "message_null",
        "prompt_eval_ns",
        "prompt_tokens",
        "reply_tokens",
        "rewrite",
        "thinking",
        "total_ns",
    )

    def __init__(
        self, fields: dict[str, Any], thinking: str, prompt_tokens: int, layout: int = 0, *, is_array: bool = False
    ) -> None:
        self.fields = fields
        self.content = _spread_array(fields, layout) if is_array else _spread(fields, layout)
        self.thinking = thinking
        self.done: bool | None = True
        self.done_reason: str | None = "stop"
        self.prompt_tokens = prompt_tokens
        self.reply_tokens: int | None = None
        self.counters = True
        self.created_shift_s = 0.0
        self.logprobs: list[dict[str, Any]] | None = None
        self.message_null = False
        self.rewrite: Callable[[bytes], bytes] | None = None
        self.total_ns = self.load_ns = self.prompt_eval_ns = self.eval_ns = 0

    def limit(self, num_predict: int, room_tokens: int | None) -> None:
        """Cut the content to the token budget, as generation would: ``done_reason`` becomes length."""
        tokens = estimate_tokens(len(self.content) + len(self.thinking))
        budget = num_predict if num_predict > 0 else tokens
        if room_tokens is not None:
            budget = min(budget, room_tokens)
        if budget < tokens:
            kept = max(0, budget * 4 - len(self.thinking))
            self.content = self.content[:kept]
            self.thinking = self.thinking[: budget * 4]
            self.done_reason = "length"
            tokens = budget
        self.reply_tokens = tokens

    def metrics(self) -> dict[str, int]:
        """The metric fields, nanoseconds for the durations; zeros are left out, as Go's omitempty does."""
        if not self.counters:
            return {}
        tokens = self.reply_tokens
        fields = {
            "total_duration": self.total_ns,
            "load_duration": self.load_ns,
            "prompt_eval_count": self.prompt_tokens,
            "prompt_eval_duration": self.prompt_eval_ns,
            "eval_count": estimate_tokens(len(self.content) + len(self.thinking)) if tokens is None else tokens,
            "eval_duration": self.eval_ns,
        }
        return {name: value for name, value in fields.items() if value}


def _spread(fields: dict[str, Any], layout: int) -> str:
    """The JSON of *fields*, spaced in one of the ways of `_LAYOUTS`."""
    start, comma, colon, end = _LAYOUTS[layout % len(_LAYOUTS)]
    pairs = (f"{orjson.dumps(name).decode()}{colon}{orjson.dumps(value).decode()}" for name, value in fields.items())
    return start + comma.join(pairs) + end


def _spread_array(fields: dict[str, Any], layout: int) -> str:
    """The JSON array of the values of *fields*, spaced likewise."""
    start, comma, _, end = _LAYOUTS[layout % len(_LAYOUTS)]
    values = comma.join(orjson.dumps(value).decode() for value in fields.values())
    return start.replace("{", "[") + values + end.replace("}", "]")


def error_body(message: str) -> bytes:
    """``{"error": message}`` as Go's encoder writes it."""
    raw = orjson.dumps({"error": message})
    return raw.replace(b"&", b"\\u0026").replace(b"<", b"\\u003c").replace(b">", b"\\u003e")


def v1_error_body(status: int, message: str) -> bytes:
    """The OpenAI shape of an error, with the newline of json.Encoder."""
    kind = _V1_ERROR_TYPES.get(status, "api_error")
    return orjson.dumps({"error": {"message": message, "type": kind, "param": None, "code": None}}) + b"\n"


def overflow_message(prompt_tokens: int, num_ctx: int) -> str:
    """llama-server's error object, which Ollama passes on as a string."""
    sentence = f"request ({prompt_tokens} tokens) exceeds the available context size ({num_ctx} tokens)"
    error = {
        "code": 400,
        "message": f"{sentence}, try increasing it",
        "type": "exceed_context_size_error",
        "n_prompt_tokens": prompt_tokens,
        "n_ctx": num_ctx,
    }
    return orjson.dumps({"error": error}).decode()


def render(call: Call, reply: Reply, created_at: str) -> bytes:
    """The body of a non-streamed answer."""
    if call.api == "openai":
        return orjson.dumps(_chat_completion(call, reply)) + b"\n"
    body: dict[str, Any] = {"model": call.model, "created_at": created_at}
    if call.api == "generate":
        body["response"] = reply.content
        if reply.thinking:
            body["thinking"] = reply.thinking
    elif reply.message_null:
        body["message"] = None
    else:
        message = {"role": "assistant", "content": reply.content}
        if reply.thinking:
            message["thinking"] = reply.thinking
        body["message"] = message
    _add_end(call, reply, body)
    return orjson.dumps(body)


def _add_end(call: Call, reply: Reply, body: dict[str, Any]) -> None:
    if reply.done is not None:
        body["done"] = reply.done
    if reply.done:
        if reply.done_reason:
            body["done_reason"] = reply.done_reason
        if call.api == "generate":
            body["context"] = [1, 2, 3]
    if reply.done is not False:
        body.update(reply.metrics())
    if reply.logprobs:
        body["logprobs"] = reply.logprobs


def _chat_completion(call: Call, reply: Reply) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": reply.content}
    if reply.thinking:
        message["reasoning"] = reply.thinking
    reason = reply.done_reason if reply.done else None
    choice = {"index": 0, "message": None if reply.message_null else message, "finish_reason": reason}
    if reply.logprobs:
        choice["logprobs"] = {"content": reply.logprobs}
    return {
        **_openai_head("chat.completion", call),
        "choices": [choice],
        "usage": _usage(reply),
    }


def _openai_head(kind: str, call: Call) -> dict[str, Any]:
    return {
        "id": "chatcmpl-123",
        "object": kind,
        "created": int(time.time()),
        "model": call.model,
        "system_fingerprint": "fp_ollama",
    }


def _usage(reply: Reply) -> dict[str, int]:
    metrics = reply.metrics() if reply.done is not False else {}
    prompt, answer = metrics.get("prompt_eval_count", 0), metrics.get("eval_count", 0)
    return {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer}


def stream_pieces(reply: Reply, count: int) -> list[tuple[str, str]]:
    """``(thinking, content)`` of each middle object of a stream; at least one."""
    pieces = [(reply.thinking, "")] if reply.thinking else []
    size = max(1, -(-len(reply.content) // max(1, count)))
    pieces += [("", reply.content[at : at + size]) for at in range(0, len(reply.content), size)]
    return pieces or [("", "")]


def render_piece(call: Call, thinking: str, content: str, created_at: str) -> bytes:
    """One middle line of a stream."""
    if call.api == "openai":
        delta: dict[str, Any] = {"role": "assistant", "content": content}
        if thinking:
            delta["reasoning"] = thinking
        return _event(call, delta, None)
    body: dict[str, Any] = {"model": call.model, "created_at": created_at}
    if call.api == "generate":
        body["response"] = content
        if thinking:
            body["thinking"] = thinking
    else:
        message = {"role": "assistant", "content": content}
        if thinking:
            message["thinking"] = thinking
        body["message"] = message
    body["done"] = False
    return orjson.dumps(body) + b"\n"


def render_stream_end(call: Call, reply: Reply, created_at: str) -> bytes:
    """The last line of a stream, with the metrics."""
    if call.api == "openai":
        end = _event(call, {}, reply.done_reason or "stop")
        if call.include_usage:
            usage = {**_openai_head("chat.completion.chunk", call), "choices": [], "usage": _usage(reply)}
            end += b"data: " + orjson.dumps(usage) + b"\n\n"
        return end + b"data: [DONE]\n\n"
    body: dict[str, Any] = {"model": call.model, "created_at": created_at}
    body |= {"response": ""} if call.api == "generate" else {"message": {"role": "assistant", "content": ""}}
    _add_end(call, reply, body)
    return orjson.dumps(body) + b"\n"


def _event(call: Call, delta: dict[str, Any], finish_reason: str | None) -> bytes:
    chunk = _openai_head("chat.completion.chunk", call)
    chunk["choices"] = [{"index": 0, "delta": delta, "finish_reason": finish_reason}]
    return b"data: " + orjson.dumps(chunk) + b"\n\n"

"""Reading of request bodies the way Ollama's Go code reads them, with its error messages."""

import json
import re
from collections.abc import Mapping
from typing import Any, NoReturn

import orjson

from .durations import FOREVER_S, parse_duration
from .labels import text_digest

_EMPTY: Mapping[str, Any] = {}
_MODEL_NAME = re.compile(r"[\w.\-/:@]+")
_SURROGATES = re.compile("[\ud800-\udfff]")
_THINK_LEVELS = ("high", "medium", "low", "max")

_NUMBER: frozenset[type] = frozenset({int, float, type(None)})
_INTEGER_OPTIONS = (
    *("num_ctx", "num_batch", "num_gpu", "main_gpu", "num_thread", "draft_num_predict"),
    *("num_keep", "seed", "num_predict", "top_k", "repeat_last_n"),
)
_FLOAT_OPTIONS = (
    *("temperature", "top_p", "min_p", "typical_p"),
    *("repeat_penalty", "presence_penalty", "frequency_penalty"),
)
_OPTION_TYPES: dict[str, tuple[frozenset[type], str]] = {
    **{name: (_NUMBER, "integer") for name in _INTEGER_OPTIONS},
    **{name: (_NUMBER, "float32") for name in _FLOAT_OPTIONS},
    "use_mmap": (frozenset({bool, type(None)}), "boolean"),
    "stop": (frozenset({list, type(None)}), "array"),
}


class ApiError(Exception):
    """An answer with an error status and Ollama's body for it."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.message = message


class Call:
    """One inference request after parsing; the same for chat, generate and /v1."""

    __slots__ = (
        "api",
        "chars",
        "digest",
        "dimensions",
        "format_sent",
        "include_usage",
        "json_mode",
        "keep_alive_s",
        "last_text",
        "logprobs",
        "longest_text",
        "message_count",
        "messages",
        "model",
        "options",
        "schema",
        "shift",
        "stream",
        "text",
        "think",
        "top_logprobs",
        "truncate",
        "user_texts",
    )

    def __init__(self, api: str, fields: dict[str, Any]) -> None:
        self.api = api
        self.model = _typed(fields, "model", str, "", api)
        self.stream = _typed(fields, "stream", bool, True, api)
        self.truncate = _typed(fields, "truncate", bool, None, api)
        self.shift = _typed(fields, "shift", bool, None, api)
        self.options: Mapping[str, Any] = _typed(fields, "options", dict, _EMPTY, api)
        self.think = parse_think(fields.get("think"))
        self.keep_alive_s = parse_keep_alive(fields.get("keep_alive"))
        wanted = fields.get("format")
        self.format_sent = wanted is not None and wanted != ""
        self.schema: dict[str, Any] | None = wanted if isinstance(wanted, dict) else None
        self.json_mode: Any = wanted
        self.include_usage = False
        self.logprobs = fields.get("logprobs") is True
        self.top_logprobs: Any = fields.get("top_logprobs") or 0
        self.dimensions = 0
        self.message_count = 0
        self.messages: list[dict[str, Any]] = []
        self.user_texts: list[str] = []
        self.chars = 0
        self.text = self.last_text = self.longest_text = ""
        self.digest = b""

    def check_format(self) -> None:
        """Raise the 500 that an unusable ``format`` gets once the model is loaded."""
        if self.format_sent and self.schema is None and self.json_mode != "json":
            raw = json.dumps(orjson.dumps(self.json_mode).decode())
            raise ApiError(500, f'invalid format: {raw}; expected "json" or a valid JSON Schema object')

    def select_text(self, rule: str | int) -> None:
        """Count the characters, and choose the user message that labels, faults and counts go by."""
        texts: list[str] = []
        chars = 0
        for message in self.messages:
            content = message["content"]
            chars += len(content)
            if message["role"] == "user":
                texts.append(content)
        self.chars = chars
        self.message_count = len(self.messages)
        self.user_texts = texts
        if texts:
            self.last_text = texts[-1]
            self.longest_text = texts[0] if len(texts) == 1 else max(texts, key=len)
        if rule == "longest":
            self.text = self.longest_text
        elif isinstance(rule, int):
            self.text = texts[min(rule, len(texts) - 1)] if texts else ""
        else:
            self.text = self.last_text
        self.digest = text_digest(self.text)


def load_json(body: bytes, go_type: str) -> dict[str, Any]:
    """Decode *body* as gin's ShouldBindJSON would.

    Raises:
        ApiError: 400 with Go's message; the common mistakes word for word.
    """
    try:
        value = orjson.loads(body)
    except orjson.JSONDecodeError:
        value = _load_leniently(body)
    if isinstance(value, dict):
        return value
    if value is None:
        return {}
    raise ApiError(400, f"json: cannot unmarshal {go_kind(value)} into Go value of type api.{go_type}")


def _load_leniently(body: bytes) -> Any:
    """Parse JSON that Go accepts and orjson does not: lone surrogates, invalid UTF-8, text after the first value."""
    text = body.decode("utf-8", "replace").lstrip(" \t\r\n")
    if not text:
        raise ApiError(400, "missing request body")
    try:
        value, _ = json.JSONDecoder(parse_constant=_refuse_constant).raw_decode(text)
        return orjson.loads(_SURROGATES.sub("\ufffd", json.dumps(value, ensure_ascii=False)))
    except json.JSONDecodeError as exc:
        raise ApiError(400, _go_syntax_error(exc)) from exc
    except RecursionError as exc:
        raise ApiError(400, "exceeded max depth") from exc


def _refuse_constant(name: str) -> NoReturn:
    raise ApiError(400, f"invalid character '{name[0]}' looking for beginning of value")


def _go_syntax_error(exc: json.JSONDecodeError) -> str:
    if exc.msg.startswith("Unterminated string") or exc.pos >= len(exc.doc):
        return "unexpected EOF"
    where = {
        "Expecting value": "looking for beginning of value",
        "Expecting property name enclosed in double quotes": "looking for beginning of object key string",
        "Expecting ':' delimiter": "after object key",
        "Expecting ',' delimiter": "after object key:value pair",
        "Invalid control character at": "in string literal",
    }.get(exc.msg, "in string escape code")
    shown = exc.doc[exc.pos].encode("unicode_escape").decode()
    return f"invalid character '{shown}' {where}"


def go_kind(value: Any) -> str:
    """Go's name for the JSON type of *value*."""
    kinds = {bool: "bool", int: "number", float: "number", str: "string", list: "array", dict: "object"}
    return kinds.get(type(value), "null")


def _typed(fields: dict[str, Any], name: str, kind: type, default: Any, api: str) -> Any:
    value = fields.get(name)
    if value is None:
        return default
    if type(value) is not kind:
        go_type = {str: "string", bool: "bool", dict: "map[string]interface {}", list: "[]api.Message"}[kind]
        struct = {"chat": "ChatRequest", "generate": "GenerateRequest", "embed": "EmbedRequest"}.get(
            api, "ChatCompletionRequest"
        )
        raise ApiError(
            400,
            f"json: cannot unmarshal {go_kind(value)} into Go struct field {struct}.{name} of type {go_type}",
        )
    return value


def parse_think(value: Any) -> bool | str | None:
    """``think`` as sent, checked.

    Raises:
        ApiError: 400, neither a bool nor a known level.
    """
    if value is None or isinstance(value, bool) or value in _THINK_LEVELS:
        return value  # type: ignore[no-any-return]
    if isinstance(value, str):
        raise ApiError(
            400,
            f'invalid think value: {json.dumps(value)} (must be "high", "medium", "low", "max", true, or false)',
        )
    raise ApiError(400, 'think must be a boolean or string ("high", "medium", "low", "max", true, or false)')


def parse_keep_alive(value: Any) -> float | None:
    """Seconds to stay loaded; None when the request does not say, `FOREVER_S` for a negative number.

    Raises:
        ApiError: 400, not a number and not a Go duration.
    """
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        kind = {"bool": "bool", "array": "[]interface {}", "object": "map[string]interface {}"}[go_kind(value)]
        raise ApiError(400, f"Unsupported type: '{kind}'")
    if not isinstance(value, str):
        return FOREVER_S if value < 0 else float(value)
    try:
        return parse_duration(value)
    except ValueError as exc:
        raise ApiError(400, str(exc)) from exc


def check_name(model: str) -> None:
    """Raise the 400 that a name gets which cannot be that of a model."""
    if _MODEL_NAME.fullmatch(model) is None:
        raise ApiError(400, "invalid model name")


def check_options(options: Mapping[str, Any]) -> None:
    """Raise Ollama's 500 for a known option of the wrong type; unknown options are ignored, as there."""
    for name, value in options.items():
        rule = _OPTION_TYPES.get(name)
        if rule is not None and type(value) not in rule[0]:
            raise ApiError(500, f'option "{name}" must be of type {rule[1]}')


def parse_chat(body: bytes) -> Call:
    """A ``/api/chat`` body.

    Raises:
        ApiError: 400 for what ShouldBindJSON refuses.
    """
    fields = load_json(body, "ChatRequest")
    call = Call("chat", fields)
    call.messages = _checked_messages(_typed(fields, "messages", list, [], "chat"))
    top_logprobs = fields.get("top_logprobs") or 0
    if not isinstance(top_logprobs, int) or not 0 <= top_logprobs <= 20:
        raise ApiError(400, "top_logprobs must be between 0 and 20")
    return call


def _checked_messages(messages: list[Any]) -> list[dict[str, Any]]:
    for message in messages:
        if type(message) is not dict:
            raise ApiError(
                400,
                f"json: cannot unmarshal {go_kind(message)} into Go struct field ChatRequest.messages"
                " of type api.Message",
            )
        for name in ("role", "content"):
            value = message.get(name)
            if value is None:
                message[name] = ""
            elif type(value) is not str:
                raise ApiError(
                    400,
                    f"json: cannot unmarshal {go_kind(value)} into Go struct field Alias.{name} of type string",
                )
        message["role"] = message["role"].lower()
    return messages


def parse_generate(body: bytes) -> Call:
    """A ``/api/generate`` body; the prompt counts as the one user message.

    Raises:
        ApiError: 400 for what ShouldBindJSON refuses.
    """
    fields = load_json(body, "GenerateRequest")
    call = Call("generate", fields)
    system = _typed(fields, "system", str, "", "generate")
    prompt = _typed(fields, "prompt", str, "", "generate")
    if system:
        call.messages.append({"role": "system", "content": system})
    if prompt:
        call.messages.append({"role": "user", "content": prompt})
    return call


def parse_openai(body: bytes) -> Call:
    """A ``/v1/chat/completions`` body, translated as the middleware does: options, num_ctx, keep_alive,
    truncate, shift and max_completion_tokens are ignored.

    Raises:
        ApiError: 400 for what the middleware refuses.
    """
    fields = load_json(body, "ChatCompletionRequest")
    messages = _typed(fields, "messages", list, [], "openai")
    if not messages:
        raise ApiError(400, "[] is too short - 'messages'")
    options = {"temperature": 1.0, "top_p": 1.0}
    for theirs, ours in (("max_tokens", "num_predict"), ("temperature", "temperature"), ("top_p", "top_p")):
        if fields.get(theirs) is not None:
            options[ours] = fields[theirs]
    call = Call(
        "openai",
        {
            "model": fields.get("model"),
            "stream": bool(fields.get("stream")),
            "options": options,
            "think": _think_from_effort(fields),
            "format": _format_from_openai(fields.get("response_format")),
            "logprobs": fields.get("logprobs"),
            "top_logprobs": fields.get("top_logprobs"),
        },
    )
    call.messages = _checked_messages([part for message in messages for part in _flattened(message)])
    call.include_usage = bool((fields.get("stream_options") or {}).get("include_usage"))
    return call


def _flattened(message: Any) -> list[Any]:
    """A message with a list of parts becomes one message per text part."""
    content = message.get("content") if isinstance(message, dict) else None
    if not isinstance(content, list):
        return [message]
    if not all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in content):
        raise ApiError(400, "invalid message format")
    return [{"role": message.get("role"), "content": part["text"]} for part in content]


def _format_from_openai(response_format: Any) -> Any:
    if not isinstance(response_format, dict):
        return None
    if response_format.get("type") == "json_object":
        return "json"
    schema = response_format.get("json_schema")
    return schema.get("schema") if isinstance(schema, dict) else None


def _think_from_effort(fields: dict[str, Any]) -> bool | str | None:
    effort = (fields.get("reasoning") or {}).get("effort") or fields.get("reasoning_effort") or ""
    known: dict[str, bool | str | None] = {
        "": None,
        "none": False,
        "minimal": "low",
        "xhigh": "max",
        "ultra": "max",
    }
    known |= {level: level for level in _THINK_LEVELS}
    if effort not in known:
        levels = '"minimal", "low", "medium", "high", "xhigh", "ultra", "max", or "none"'
        raise ApiError(400, f"invalid reasoning value: {json.dumps(effort)} (must be {levels})")
    return known[effort]


def parse_embed(body: bytes) -> tuple[Call, list[str]]:
    """A ``/api/embed`` body and its texts.

    Raises:
        ApiError: 400 for what the handler refuses.
    """
    fields = load_json(body, "EmbedRequest")
    call = Call("embed", fields)
    source = fields.get("input")
    texts = [source] if isinstance(source, str) and source else source if isinstance(source, list) else []
    if not isinstance(source, str | list | None) or not all(isinstance(text, str) for text in texts):
        raise ApiError(400, "invalid input type")
    dimensions = fields.get("dimensions")
    call.dimensions = dimensions if isinstance(dimensions, int) else 0
    return call, texts

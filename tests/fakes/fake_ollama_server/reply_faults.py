"""The faults that change what the model answered: one function per kind."""

import json
from collections.abc import Callable, Mapping
from typing import Any

import orjson

from .replies import Reply

_MARK = "\ue000MARK\ue001"
_MARK_BYTES = _MARK.encode()
Params = Mapping[str, Any]
ReplyFault = Callable[[Reply, Params, int], None]


def apply_reply_fault(kind: str, reply: Reply, params: Params, num_ctx: int) -> None:
    """Change *reply* in place; a kind that does not touch the answer leaves it alone."""
    function = _FUNCTIONS.get(kind)
    if function is not None:
        function(reply, params, num_ctx)


def _dump(fields: Mapping[str, Any]) -> str:
    return orjson.dumps(fields).decode()


def _spoil(reply: Reply, field: str, encoded_value: str) -> None:
    """Put *encoded_value*, JSON text or what only looks like it, in the place of *field*."""
    fields = {**reply.fields, field: _MARK}
    reply.content = _dump(fields).replace(f'"{_MARK}"', encoded_value)


def _in_categorization(reply: Reply, escape: str, params: Params) -> None:
    """Put *escape* before the last word of the categorization, escaped in the inner or in the outer JSON."""
    text = str(reply.fields.get("categorization", ""))
    field = "categorization" if "categorization" in reply.fields else next(iter(reply.fields))
    if params.get("where", "content") == "outer":
        reply.content = _dump({**reply.fields, field: text + _MARK})
        reply.rewrite = lambda body: body.replace(_MARK_BYTES, escape.encode())
    else:
        reply.content = _dump({**reply.fields, field: text + _MARK}).replace(_MARK, escape)


def _done_false(reply: Reply, params: Params, num_ctx: int) -> None:
    reply.done, reply.done_reason = False, None
    if params.get("cut", True):
        reply.content = reply.content[: len(reply.content) // 2]


def _missing_done(reply: Reply, params: Params, num_ctx: int) -> None:
    reply.done = None


def _empty_content(reply: Reply, params: Params, num_ctx: int) -> None:
    reply.content = ""


def _thinking_only(reply: Reply, params: Params, num_ctx: int) -> None:
    reply.content, reply.thinking = "", "The customer says that"
    reply.done_reason = params.get("done_reason", "stop")


def _length(reply: Reply, params: Params, num_ctx: int) -> None:
    reply.done_reason = "length"
    if params.get("cut", True):
        reply.content = reply.content[: len(reply.content) // 2]


def _done_reason_load(reply: Reply, params: Params, num_ctx: int) -> None:
    reply.content, reply.done_reason, reply.counters = "", "load", False


def _invalid_json(reply: Reply, params: Params, num_ctx: int) -> None:
    reply.content = "{" + ", ".join(f"{name}: {value}" for name, value in reply.fields.items()) + ",}"


def _prose(reply: Reply, params: Params, num_ctx: int) -> None:
    reply.content = f"Here is the JSON you asked for:\n\n{reply.content}\n\nLet me know if you need {{more}}."


def _code_fence(reply: Reply, params: Params, num_ctx: int) -> None:
    reply.content = f"```json\n{reply.content}\n```"


def _wrong_label(reply: Reply, params: Params, num_ctx: int) -> None:
    reply.content = _dump({**reply.fields, params.get("field", "intent"): params.get("value", "Existential Dread")})


def _missing_field(reply: Reply, params: Params, num_ctx: int) -> None:
    field = params.get("field", "topic")
    reply.content = _dump({name: value for name, value in reply.fields.items() if name != field})


def _extra_field(reply: Reply, params: Params, num_ctx: int) -> None:
    reply.content = _dump({**reply.fields, params.get("field", "confidence"): params.get("value", 0.93)})


def _duplicate_keys(reply: Reply, params: Params, num_ctx: int) -> None:
    field = params.get("field", "intent")
    first = json.dumps({field: params.get("first", "Other")})
    reply.content = first[:-1] + "," + reply.content[1:]


def _nan(reply: Reply, params: Params, num_ctx: int) -> None:
    _spoil(reply, params.get("field", "intent"), "NaN")


def _number_label(reply: Reply, params: Params, num_ctx: int) -> None:
    _spoil(reply, params.get("field", "intent"), "7")


def _huge(reply: Reply, params: Params, num_ctx: int) -> None:
    field = params.get("field", "categorization")
    reply.content = _dump({**reply.fields, field: "x" * int(params.get("bytes", 10_000_000))})


def _deep_json(reply: Reply, params: Params, num_ctx: int) -> None:
    depth = int(params.get("depth", 1000))
    nested = "[" * depth + "]" * depth
    if params.get("where", "content") == "outer":
        reply.rewrite = lambda _body: nested.encode()
    else:
        _spoil(reply, params.get("field", "categorization"), nested)


def _lone_surrogate(reply: Reply, params: Params, num_ctx: int) -> None:
    _in_categorization(reply, "\\ud83d", params)


def _nul(reply: Reply, params: Params, num_ctx: int) -> None:
    _in_categorization(reply, "\\u0000", params)


def _control_chars(reply: Reply, params: Params, num_ctx: int) -> None:
    _in_categorization(reply, "\\u0007\\u001b[31m\\n\\u202e", params)


def _raw_control_chars(reply: Reply, params: Params, num_ctx: int) -> None:
    _in_categorization(reply, "\x07\n\x1b", {})


def _bom(reply: Reply, params: Params, num_ctx: int) -> None:
    if params.get("where", "content") == "outer":
        reply.rewrite = lambda body: b"\xef\xbb\xbf" + body
    else:
        reply.content = "\ufeff" + reply.content


def _padded_json(reply: Reply, params: Params, num_ctx: int) -> None:
    padding = " \n\t" * int(params.get("repeat", 500))
    reply.content = json.dumps(reply.fields, separators=(padding + ",", ":" + padding))


def _unconstrained(reply: Reply, params: Params, num_ctx: int) -> None:
    reply.content = "The customer is " + ", ".join(str(value) for value in reply.fields.values()) + "."


def _half_window(reply: Reply, params: Params, num_ctx: int) -> None:
    reply.prompt_tokens = num_ctx // 2 + 2


def _no_counters(reply: Reply, params: Params, num_ctx: int) -> None:
    reply.counters = False


def _message_null(reply: Reply, params: Params, num_ctx: int) -> None:
    reply.message_null = True


def _clock_jump(reply: Reply, params: Params, num_ctx: int) -> None:
    reply.created_shift_s = float(params.get("seconds", -3600))


_FUNCTIONS: dict[str, ReplyFault] = {
    "done_false": _done_false,
    "missing_done": _missing_done,
    "empty_content": _empty_content,
    "thinking_only": _thinking_only,
    "length": _length,
    "done_reason_load": _done_reason_load,
    "invalid_json": _invalid_json,
    "prose": _prose,
    "code_fence": _code_fence,
    "wrong_label": _wrong_label,
    "missing_field": _missing_field,
    "extra_field": _extra_field,
    "duplicate_keys": _duplicate_keys,
    "nan": _nan,
    "number_label": _number_label,
    "huge": _huge,
    "deep_json": _deep_json,
    "lone_surrogate": _lone_surrogate,
    "nul": _nul,
    "bom": _bom,
    "control_chars": _control_chars,
    "raw_control_chars": _raw_control_chars,
    "padded_json": _padded_json,
    "unconstrained": _unconstrained,
    "half_window": _half_window,
    "no_counters": _no_counters,
    "message_null": _message_null,
    "clock_jump": _clock_jump,
}

"""One chat request, and what a client learns from its answer for the rest of its run. No I/O: both wrappers drive it."""

from __future__ import annotations

import logging
from collections.abc import Generator
from dataclasses import replace
from typing import Any, Protocol

import orjson

from domain.conversation import Message
from error_handler import LLMError
from model_server.abilities import ReloadWatch, require_schemas, thinking_lesson
from model_server.protocol import (
    ChatReply,
    ChatTarget,
    ServerRequest,
    build_chat_body,
    error_in_body,
    first_choice,
    parse_chat_response,
    part,
    reasoning,
    refuses_logprobs,
)
from model_server.refusals import refused_fields, refuses_system_role

logger = logging.getLogger(__name__)

_NO_LESSON = (401, 403, 404, 429, 503)  # statuses that say nothing about the fields of a request
_THOUGHTS = ("<think", "</think>", "<|channel|>analysis", "[think]")


class TargetOwner(Protocol):
    """A client whose *target* changes with what it learns."""

    target: ChatTarget
    reloads: ReloadWatch


def chat_flow(
    client: TargetOwner, messages: list[Message], schema_json: bytes, attempt: int, timeout_s: float
) -> Generator[ServerRequest, tuple[int, bytes], ChatReply]:
    """Ask once: yield the request, receive status and body, return the answer.

    If the response shows that the server or the model lacks something, the target of *client* changes for the rest of the
    run, and a response that is of no use is followed by another request. Each change takes something away, so the
    requests end.

    Raises:
        LLMOutdatedError: The server takes no JSON schema.
        LLMError: See model_server.protocol.parse_chat_response.
    """
    while True:
        target, was_warm = client.target, client.reloads.is_warm
        answer = yield ServerRequest(
            "POST", target.url, build_chat_body(target, messages, schema_json, attempt), timeout_s
        )
        require_schemas(target, *answer)
        changes = lesson(target, *answer)
        if changes:
            client.target = replace(client.target, **changes)
            logger.info("learned about %s at %s: %s", target.model, target.server_url, ", ".join(sorted(changes)))
        try:
            reply = parse_chat_response(target, *answer, messages)
        except LLMError:
            if not changes:
                raise
        else:
            client.reloads.note(target, reply, was_warm=was_warm)
            return reply


def lesson(target: ChatTarget, status: int, body: bytes) -> dict[str, Any]:
    """Return the fields of *target* that must change because of a response; empty if it teaches nothing."""
    if refuses_logprobs(target, status, body):
        return {"logprobs": False}
    if status in _NO_LESSON:
        return {}
    if changes := thinking_lesson(target, status, body):
        return changes
    fields = _object(body)
    if status == 200 and not error_in_body(fields):
        thinks = target.protocol == "openai_chat" and not target.disable_thinking and _shows_thoughts(fields)
        return {"disable_thinking": True} if thinks else {}
    text = body[:4000].decode("utf-8", "replace")
    if not target.merges_system and refuses_system_role(text):
        return {"merges_system": True}
    switches = target.thinking_switches if target.protocol == "openai_chat" else {}
    refused = refused_fields(text, set(switches))
    if switches.get("reasoning_effort") == "low":
        refused = {"low" if name == "reasoning_effort" else name for name in refused}
    return {"refused": target.refused | refused} if refused else {}


def _shows_thoughts(fields: dict[str, Any]) -> bool:
    message = part(first_choice(fields), "message", dict)
    start = part(message, "content", str)[:20_000].lstrip().lower()
    return bool(reasoning(message)) or any(sign in start for sign in _THOUGHTS)


def _object(body: bytes) -> dict[str, Any]:
    try:
        fields = orjson.loads(body)
    except orjson.JSONDecodeError:
        return {}
    return fields if isinstance(fields, dict) else {}

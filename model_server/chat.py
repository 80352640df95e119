"""One chat request, and what a client learns from its answer for the rest of its run. No I/O: both wrappers drive it."""

from __future__ import annotations

import logging
import re
from collections.abc import Generator
from dataclasses import replace
from typing import Any, Protocol

from domain.conversation import Message
from error_handler import (
    LLMAbsentError,
    LLMConnectionError,
    LLMError,
    LLMFormError,
    LLMOutdatedError,
    LLMUnavailableError,
)
from model_server.protocol import (
    LLAMA_CPP,
    ChatReply,
    ChatTarget,
    ServerRequest,
    build_chat_body,
    error_in_body,
    first_choice,
    json_object,
    parse_chat_response,
    part,
    reasoning,
)
from model_server.refusals import refused_fields, refused_options, refuses_schema, refuses_system_role
from network.outgoing import problem_of

logger = logging.getLogger(__name__)

RELOAD_S = 0.5  # servers report shorter loads for a model that is loaded already
FIRST_VERSION = (0, 5)  # of Ollama with a JSON schema in ``format``
THINK_LEVEL = "low"  # the least of those models that take levels only

# The field by its name, never the word alone: some servers quote the request, and with it customer text.
_REFUSES_THINK = re.compile(
    rb"does not support thinking|invalid think value|think must be|\.think of type|[\"'`]think[\"'`\\]"
)
_REFUSES_SCHEMA = re.compile(rb"\.format of type string")

_NO_LESSON = (401, 403, 404, 429, 503)  # statuses that say nothing about the fields of a request
_THOUGHTS = ("<think", "</think>", "<|channel|>analysis", "[think]")


class ReloadWatch:
    """Warns once if the server loads the model again between two answers.

    *is_warm* tells that the model has been loaded; set it after a load, and pass it as it was when a call was sent.
    """

    def __init__(self) -> None:
        self.is_warm = False
        self._has_warned = False

    def note(self, target: ChatTarget, reply: ChatReply, *, was_warm: bool) -> None:
        """Look at the load time that *reply* reports."""
        self.is_warm = True
        if not was_warm or self._has_warned or (reply.load_s or 0.0) < RELOAD_S:
            return
        self._has_warned = True
        logger.warning(
            "%s was loaded again before an answer (%.1f s): another client asks for it with another num_ctx or without "
            '"shift": false, another model takes its memory, or OLLAMA_KEEP_ALIVE is short; see docs/local-inference.md',
            target.model,
            reply.load_s,
        )


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
        LLMFormError: It takes no JSON schema of an array. The target notes that.
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
            logger.info("learned about %s at %s: %s", target.model, target.address, ", ".join(sorted(changes)))
        try:
            reply = parse_chat_response(target, *answer, messages)
        except LLMError:
            if not changes:
                learn_form(client, schema_json, *answer)
                raise
        else:
            client.reloads.note(target, reply, was_warm=was_warm)
            return reply


def learn_form(client: TargetOwner, schema_json: bytes, status: int, body: bytes) -> None:
    """Raise LLMFormError, and note it in the target of *client*, if a response refuses the schema of an array."""
    target = client.target
    is_array = json_object(schema_json).get("type") == "array"
    if status not in (400, 422, 500, 501) or not is_array or not refuses_schema(body[:4000].decode("utf-8", "replace")):
        return
    problem = f"{target.model} at {target.address} takes no array as answer; the reply style is now labels"
    if not target.refuses_arrays:
        client.target = replace(target, refuses_arrays=True)
        logger.warning("%s. To avoid the first refusal, set REPLY_STYLE=labels", problem)
    raise LLMFormError(problem)


def refuses_logprobs(target: ChatTarget, status: int, body: bytes) -> bool:
    """Return whether a response refuses the request because of the log probabilities that *target* asks for."""
    return target.logprobs and status in (400, 422) and b"logprobs" in body[:4000]


def lesson(target: ChatTarget, status: int, body: bytes) -> dict[str, Any]:
    """Return the fields of *target* that must change because of a response; empty if it teaches nothing."""
    if refuses_logprobs(target, status, body):
        return {"logprobs": False}
    if status in _NO_LESSON:
        return {}
    changes = thinking_lesson(target, status, body)
    if changes or (status == 200 and target.protocol != "openai_chat" and b'"error"' not in body):  # nearly all answers
        return changes
    fields = _object(body)
    if status == 200 and not error_in_body(fields):
        thinks = target.protocol == "openai_chat" and not target.disable_thinking and _shows_thoughts(fields)
        return {"disable_thinking": True} if thinks else {}
    return _refusal_lesson(target, body[:4000].decode("utf-8", "replace"))


def _refusal_lesson(target: ChatTarget, text: str) -> dict[str, Any]:
    """Return what the refusal *text* teaches about roles, and about the fields of OpenAI's protocol."""
    if not target.merges_system and refuses_system_role(text):
        return {"merges_system": True}
    if target.protocol != "openai_chat":
        return {}
    switches = target.thinking_switches
    refused = refused_options(text) - target.refused or refused_fields(text, set(switches))
    if target.engine == LLAMA_CPP and "grammar" in text.lower():
        refused |= {"grammar"} - target.refused
    if switches.get("reasoning_effort") == "low":
        refused = {"low" if name == "reasoning_effort" else name for name in refused}
    return {"refused": target.refused | refused} if refused else {}


def _shows_thoughts(fields: dict[str, Any]) -> bool:
    message = part(first_choice(fields), "message", dict)
    start = part(message, "content", str)[:20_000].lstrip().lower()
    return bool(reasoning(message)) or any(sign in start for sign in _THOUGHTS)


def _object(body: bytes) -> dict[str, Any]:
    try:
        return json_object(body)
    except LLMUnavailableError:
        return {}


def require_schemas(target: ChatTarget, status: int, body: bytes) -> None:
    """Raise LLMOutdatedError if a response shows that the server cannot bind answers to a JSON schema."""
    if status == 400 and _REFUSES_SCHEMA.search(body[:4000]):
        raise LLMOutdatedError(
            f"the Ollama at {target.address} is too old: it takes no JSON schema as format; update it to version "
            f"{'.'.join(map(str, FIRST_VERSION))}.0 or later"
        )


def thinking_lesson(sent: ChatTarget, status: int, body: bytes) -> dict[str, Any]:
    """Return the fields of the target that Ollama's answer to a request for *sent* corrects: how thinking is limited."""
    if sent.protocol == "openai_chat" or not sent.disable_thinking:
        return {}
    if status in (400, 422) and _REFUSES_THINK.search(body[:4000]):
        return {"think_level": ""} if sent.think_level else {"disable_thinking": False}
    if status == 200 and not sent.think_level and b'"thinking"' in body and _only_thought(body):
        return {"think_level": THINK_LEVEL}
    return {}


def _only_thought(body: bytes) -> bool:
    """Return whether the answer in *body* has thoughts, and ended before or within the text itself."""
    fields = _object(body)
    message = part(fields, "message", dict) or fields
    text = message.get("content", message.get("response"))
    return bool(message.get("thinking")) and (fields.get("done_reason") == "length" or not text)


def takes_levels_only(model: str, architecture: str) -> bool:
    """Return whether *model* ignores ``think: false`` and takes levels only, as Ollama's documentation says of gpt-oss."""
    return architecture == "gptoss" or model.rsplit("/", 1)[-1].startswith("gpt-oss")


def is_outdated(version: str | None) -> bool:
    """Return whether *version* of Ollama is known and takes no JSON schema."""
    found = re.match(r"v?(\d+)\.(\d+)", version or "")
    return found is not None and (0, 0) < (int(found[1]), int(found[2])) < FIRST_VERSION


def connection_error(target: ChatTarget, exc: BaseException, *, was_made: bool) -> LLMConnectionError:
    """Return the error for a connection that was refused or, if it *was_made*, reset or cut off by *exc*."""
    is_ollama, server = target.protocol != "openai_chat", f"the model server at {target.address}"
    setting = "OLLAMA_ENDPOINT" if is_ollama else "LLM_API_URL"
    if (known := problem_of(exc, target.server_url, setting)) is not None:
        return LLMConnectionError(known)
    if was_made:
        return LLMConnectionError(f"{server} closed the connection before its answer was complete; its log may say why")
    return LLMAbsentError(f"no connection to {server}; start it{' (ollama serve)' * is_ollama} or correct {setting}")

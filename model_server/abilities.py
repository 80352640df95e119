"""What a model server turns out to be able to do: learned from its answers, once per run. No I/O.

``/api/show`` is read first (model_server.models). This module is for what it does not tell: servers that refuse a field,
models that think in spite of ``think: false``, versions without JSON schemas, and clients that make the model load again.
"""

from __future__ import annotations

import logging
import re
from typing import Any

from error_handler import LLMOutdatedError, LLMUnavailableError
from model_server.protocol import ChatReply, ChatTarget, json_object, part

RELOAD_S = 0.5  # servers report shorter loads for a model that is loaded already
FIRST_VERSION = (0, 5)  # of Ollama with a JSON schema in ``format``
THINK_LEVEL = "low"  # the least of those models that take levels only

# The field by its name, never the word alone: some servers quote the request, and with it customer text.
_REFUSES_THINK = re.compile(
    rb"does not support thinking|invalid think value|think must be|\.think of type|[\"'`]think[\"'`\\]"
)
_REFUSES_SCHEMA = re.compile(rb"\.format of type string")

logger = logging.getLogger(__name__)


def require_schemas(target: ChatTarget, status: int, body: bytes) -> None:
    """Raise LLMOutdatedError if a response shows that the server cannot bind answers to a JSON schema."""
    if status == 400 and _REFUSES_SCHEMA.search(body[:4000]):
        raise LLMOutdatedError(
            f"the Ollama at {target.server_url} is too old: it takes no JSON schema as format; update it to version "
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
    try:
        fields = json_object(body)
    except LLMUnavailableError:
        return False
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

"""Checks for ``cli.py doctor`` whether the model server reuses the constant part of the prompt.

Two short calls begin with the same random line and the constant prompt. The random line is new, so the first call is read as
a whole, whatever the server did before. The second call differs only in its conversation.
"""

from __future__ import annotations

import json
import secrets
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from async_llm_wrapper import AsyncLLMClient, drive
from commands.diagnosis.findings import Finding, ok, warning
from config import Settings
from domain.conversation import chat_messages
from error_handler import ConfigurationError, LLMReplyError
from model_server.chat import chat_flow
from model_server.protocol import NANOSECONDS, ServerRequest, count, json_object, part
from worker.reply_choice import classifier_for

REUSED = 0.5  # least share of the second prompt that must be cached, or of the time that must be saved
LEAST_S = 0.02  # a first prompt that is read faster shows nothing, and costs nothing

TRANSCRIPTS = ("Customer: Where is my parcel?", "Customer: How do I change my address?")
# One label keeps the answer short.
SCHEMA_JSON = json.dumps(
    {
        "type": "object",
        "properties": {"topic": {"type": "string", "enum": ["Other"]}},
        "required": ["topic"],
        "additionalProperties": False,
    }
).encode()


@dataclass(frozen=True, slots=True)
class PromptWork:
    """The server's report on reading one prompt: tokens, tokens from the cache, seconds. None if not reported."""

    prompt_tokens: int | None
    cached_tokens: int | None
    prompt_s: float | None


def prompt_work(fields: dict[str, Any]) -> PromptWork:
    """Return the work that the answer *fields* reports: Ollama's duration, or the counts of OpenAI's protocol."""
    duration_ns = count(fields.get("prompt_eval_duration"))
    usage, timings = part(fields, "usage", dict), part(fields, "timings", dict)
    prompt_tokens, cached = count(usage.get("prompt_tokens")), count(timings.get("cache_n"))
    if cached is None:
        cached = count(part(usage, "prompt_tokens_details", dict).get("cached_tokens"))
    return PromptWork(prompt_tokens, cached, None if duration_ns is None else duration_ns / NANOSECONDS)


async def check_prefix(client: AsyncLLMClient, settings: Settings) -> Finding | None:
    """Return whether the second call reused the prefix; None if the server reports nothing that shows it.

    Raises:
        LLMError: The server gave no answer.
    """
    try:
        prompt = classifier_for(settings, client.target).system_prompt
    except ConfigurationError:
        return None  # the section Labels reports it
    constant = f"{secrets.token_hex(16)}\n{prompt}"
    first, second = [await _call(client, constant, transcript, settings.llm_timeout_s) for transcript in TRANSCRIPTS]
    return judge(first, second, client.target.protocol != "openai_chat")


async def _call(client: AsyncLLMClient, constant: str, transcript: str, timeout_s: float) -> PromptWork:
    work = PromptWork(None, None, None)

    async def send(request: ServerRequest) -> tuple[int, bytes]:
        nonlocal work
        status, body = await client.send(request)
        work = prompt_work(json_object(body)) if status == 200 else work
        return status, body

    with suppress(LLMReplyError):  # the test conversation checks the answers
        await drive(chat_flow(client, chat_messages(constant, transcript), SCHEMA_JSON, 0, timeout_s), send)
    return work


def judge(first: PromptWork, second: PromptWork, is_ollama: bool) -> Finding | None:
    """Return a finding about two calls with the same prefix; None if their reports do not show whether it was reused."""
    if second.prompt_tokens and second.cached_tokens is not None:
        numbers: dict[str, Any] = {"prompt_tokens": second.prompt_tokens, "cached_tokens": second.cached_tokens}
        share = second.cached_tokens / second.prompt_tokens
        seen = f"{second.cached_tokens} of the {second.prompt_tokens} prompt tokens of a second call were cached"
    elif first.prompt_s is not None and second.prompt_s is not None and first.prompt_s >= LEAST_S:
        numbers = {"first_prompt_s": round(first.prompt_s, 4), "second_prompt_s": round(second.prompt_s, 4)}
        share = 1 - second.prompt_s / first.prompt_s
        seen = f"reading the prompt took {first.prompt_s:.2f} s, and {second.prompt_s:.2f} s for a second call"
    else:
        return None
    if share >= REUSED:
        return ok(f"The server reuses the constant part of the prompt: {seen}.", **numbers)
    return warning(
        f"The server reads the constant part of the prompt again for each call: {seen}.", _remedy(is_ollama), **numbers
    )


def _remedy(is_ollama: bool) -> str:
    busy = "If other clients use the server, run the diagnosis again when it is idle. Otherwise"
    if is_ollama:
        return f"{busy} use a model without sliding-window or hybrid attention, in GGUF format instead of MLX."
    return (
        f"{busy} enable prefix caching (vLLM: --enable-prefix-caching; llama.cpp: without --no-cache-prompt), or use a model "
        "without sliding-window or hybrid attention (llama.cpp also has --swa-full)."
    )

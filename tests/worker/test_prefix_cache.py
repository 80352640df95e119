"""The constant part of the prompt stays in the prefix cache of llama.cpp, with both wrappers and several slots."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path

import pytest

import async_llm_wrapper
import llm_wrapper
from aggregator import aggregate_conversation
from benchmarks.documents import short_conversations
from classifier import Classifier
from config import Settings, load_settings, load_taxonomy
from domain.conversation import Conversation
from model_server.models import chat_target
from model_server.protocol import ServerRequest
from tests.fakes.tiny_engine import TinyEngine
from tests.fakes.trained_model import MISSING, NAME, model_path, trained_engine

CACHED_SHARE = 0.9
WINDOW = 4096

Calls = list[tuple[int, int]]  # cached tokens and prompt tokens of each answer, in the order of the answers


def note(calls: Calls, answer: tuple[int, bytes]) -> None:
    fields = json.loads(answer[1])
    calls.append((fields["timings"]["cache_n"], fields["usage"]["prompt_tokens"]))


def require_cached(calls: Sequence[tuple[int, int]]) -> None:
    assert all(cached >= CACHED_SHARE * prompt for cached, prompt in calls), calls


def settings_for(engine: TinyEngine) -> Settings:
    return load_settings(
        None, llm_api_url=f"{engine.url}/v1/chat/completions", llm_model=NAME, llm_timeout_s=300, llm_max_attempts=1
    )


def documents(count: int) -> list[Conversation]:
    return [aggregate_conversation(document) for document in short_conversations(count)]


def classify_one_by_one(engine: TinyEngine, number: int) -> Calls:
    """Return the calls of the synchronous wrapper for *number* conversations."""
    settings, calls = settings_for(engine), Calls()

    class Client(llm_wrapper.LLMClient):
        def send(self, request: ServerRequest) -> tuple[int, bytes]:
            note(calls, answer := super().send(request))
            return answer

    with llm_wrapper.open_session() as session:
        client, classifier = Client(settings, chat_target(settings, NAME), session), Classifier(load_taxonomy())
        for conversation in documents(number):
            llm_wrapper.ollama_classify(conversation, client, classifier)
    return calls


async def classify_together(engine: TinyEngine, at_once: int, rounds: int) -> Calls:
    """Return the calls of the asynchronous wrapper for *rounds* of *at_once* conversations at once."""
    settings, calls = settings_for(engine), Calls()

    class Client(async_llm_wrapper.AsyncLLMClient):
        async def send(self, request: ServerRequest) -> tuple[int, bytes]:
            note(calls, answer := await super().send(request))
            return answer

    async with async_llm_wrapper.open_session(at_once) as session:
        client, classifier = Client(settings, chat_target(settings, NAME), session), Classifier(load_taxonomy())
        left = documents(at_once * rounds)
        for start in range(0, len(left), at_once):
            await asyncio.gather(
                *(
                    async_llm_wrapper.ollama_classify_async(conversation, client, classifier)
                    for conversation in left[start : start + at_once]
                )
            )
        await client.breaker.close()
    return calls


async def require_cached_calls(engine: TinyEngine, slots: int) -> None:
    """The first round reads the prompt in each slot; all calls after it find it there, whichever wrapper sends them."""
    calls = await classify_together(engine, slots, rounds=2)
    assert len(calls) == 2 * slots
    assert calls[0][0] == 0
    require_cached([*calls[slots:], *classify_one_by_one(engine, 2)])


@pytest.mark.slow
@pytest.mark.parametrize("slots", [1, pytest.param(2, marks=pytest.mark.thorough)])
async def test_second_call_reads_the_constant_prompt_from_the_cache(tiny_model: Path, slots: int) -> None:
    with TinyEngine(tiny_model, slots=slots, name=NAME) as engine:
        await require_cached_calls(engine, slots)


@pytest.mark.thorough
@pytest.mark.timeout(600)
async def test_trained_model_reads_the_constant_prompt_from_the_cache() -> None:
    if (model := model_path()) is None:
        pytest.skip(MISSING)
    with trained_engine(model, context_tokens=WINDOW, slots=2) as engine:
        await require_cached_calls(engine, 2)

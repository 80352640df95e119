"""What the doctor says about the prefix cache, against the fake Ollama, a scripted server and a real llama.cpp."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from commands.diagnosis.findings import Finding
from commands.diagnosis.model import diagnose_model
from commands.diagnosis.prefix import TRANSCRIPTS
from config import Settings, load_settings
from tests.commands.found import the_one
from tests.fakes.fake_ollama import FakeOllama, text_sha256
from tests.fakes.scripted_server import GOOD_CONTENT, answer, forward, scripted_server
from tests.fakes.tiny_engine import MODEL_NAME, TinyEngine

REUSES, READS_AGAIN = "reuses the constant part", "reads the constant part of the prompt again"


@pytest.fixture(scope="module")
def fake() -> Iterator[FakeOllama]:
    with FakeOllama(slots=1, latency_s=0.1) as server:
        yield server


async def findings(settings: Settings) -> list[Finding]:
    async def no_documents() -> list[int]:
        return []

    return [finding async for finding in diagnose_model(settings, no_documents, 1, lambda _: None)]


async def with_ollama(fake: FakeOllama, **knobs: Any) -> list[Finding]:
    fake.renew()
    fake.configure(**knobs)
    return await findings(load_settings(None, ollama_endpoint=fake.url, ollama_model="llama3.2"))


async def with_server(url: str) -> list[Finding]:
    return await findings(load_settings(None, llm_api_url=f"{url}/v1/chat/completions", llm_model=MODEL_NAME))


async def test_prefix_that_is_read_again_is_a_warning(fake: FakeOllama) -> None:
    again = the_one(await with_ollama(fake, prefix_cache=False), READS_AGAIN)
    assert again.level == "warning"
    assert "sliding-window" in again.remedy
    assert again.numbers["second_prompt_s"] > 0.5 * again.numbers["first_prompt_s"]
    reused = the_one(await with_ollama(fake), REUSES)
    assert reused.level == "ok"
    assert reused.numbers["second_prompt_s"] < 0.5 * reused.numbers["first_prompt_s"]


async def test_prefix_of_an_earlier_run_in_the_cache_is_no_warning(fake: FakeOllama) -> None:
    """The first call is read as a whole even if a run has just used the same prompt."""
    await with_ollama(fake)
    settings = load_settings(None, ollama_endpoint=fake.url, ollama_model="llama3.2")
    assert the_one(await findings(settings), REUSES).level == "ok"


@pytest.mark.parametrize("knobs", [{"faults": [{"kind": "no_counters"}]}, {"latency_s": 0.0}], ids=str)
async def test_nothing_is_claimed_without_a_report(fake: FakeOllama, knobs: dict[str, Any]) -> None:
    """Neither of a server that reports no durations, nor of durations that are too short to compare."""
    assert not [
        finding for finding in await with_ollama(fake, prefix_cache=False, **knobs) if "constant" in str(finding)
    ]


async def test_prefix_is_tested_without_text_of_customers(fake: FakeOllama) -> None:
    """The user messages are the constants of the diagnosis, and the two calls differ in nothing else."""
    await with_ollama(fake)
    *_, first, second = [record for record in fake.requests() if record["message_count"]][:4]
    seen = {record["last_sha256"] for record in (first, second)}
    assert seen == {text_sha256(f"<conversation>\n{text}\n</conversation>") for text in TRANSCRIPTS}


@pytest.mark.thorough
async def test_llama_cpp_reports_cached_tokens(tiny_model: Path) -> None:
    with TinyEngine(tiny_model, slots=1) as engine, scripted_server() as server:
        server.models = forward(engine.url)
        for cache, level, words in ((False, "warning", READS_AGAIN), (True, "ok", REUSES)):
            server.script.clear()
            server.script.extend([forward(engine.url, cache_prompt=cache)] * 20)
            found = the_one(await with_server(server.url), words)
            assert found.level == level
            assert (found.numbers["cached_tokens"] > 0.9 * found.numbers["prompt_tokens"]) is cache


@pytest.mark.parametrize(
    ("details", "words"), [({"cached_tokens": 0}, READS_AGAIN), ({"cached_tokens": 1408}, REUSES), (None, "")]
)
async def test_openai_usage_reports_cached_tokens(details: dict[str, int] | None, words: str) -> None:
    usage = {"prompt_tokens": 1500, "completion_tokens": 40, "prompt_tokens_details": details}
    body = {"choices": [{"message": {"content": GOOD_CONTENT}, "finish_reason": "stop"}], "usage": usage}
    with scripted_server(*[answer(body)] * 20) as server:
        server.models = answer({"data": [{"id": MODEL_NAME}]})
        found = await with_server(server.url)
    if words:
        assert the_one(found, words).numbers == {
            "prompt_tokens": 1500,
            "cached_tokens": (details or {})["cached_tokens"],
        }
    else:
        assert "constant" not in str(found)

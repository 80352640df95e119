"""The doctor's findings about a model server, with the fake Ollama and a real llama.cpp."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from aggregator import aggregate_conversation
from commands.diagnosis.findings import Finding
from commands.diagnosis.model import LOAD_TIMEOUT_S, TEST_DOCUMENT, diagnose_model, unencrypted
from config import Settings, load_settings, load_taxonomy
from prompt_builder import chat_messages
from tests.cases import mostly_thorough
from tests.commands.found import the_one
from tests.fakes.fake_ollama import FakeOllama, expected_labels, text_sha256
from tests.fakes.fake_ollama_client import chat
from tests.fakes.scripted_server import GOOD_CONTENT, MODELS, Handler, ScriptedServer, answer, scripted_server
from tests.fakes.tiny_engine import MODEL_NAME, TinyEngine


@pytest.fixture(scope="module")
def running_fake() -> Iterator[FakeOllama]:
    with FakeOllama(slots=4, latency_s=0.1) as server:
        yield server


@pytest.fixture
def fake(running_fake: FakeOllama) -> FakeOllama:
    running_fake.renew()
    return running_fake


async def no_documents() -> list[int]:
    return []


async def findings(settings: Settings, at_most: int = 0) -> list[Finding]:
    """Return what is said; the model is asked only where *at_most* is given."""
    return [finding async for finding in diagnose_model(settings, no_documents, at_most, lambda _: None)]


def settings_for(fake: FakeOllama, **given: Any) -> Settings:
    return load_settings(None, **{"ollama_endpoint": fake.url, "ollama_model": "llama3.2", **given})


def levels(found: list[Finding]) -> set[str]:
    return {finding.level for finding in found}


# Reaching it, and the model


async def test_a_healthy_server_has_no_remedies(fake: FakeOllama) -> None:
    found = await findings(settings_for(fake), at_most=8)
    assert levels(found) == {"ok"}, found
    assert the_one(found, "answers at").numbers == {"version": "0.33.0", "local_models": 3, "remote_models": 1}
    described = the_one(found, "The server has llama3.2:latest")
    assert described.sentence.startswith(
        "The server has llama3.2:latest: 3.2B parameters, quantisation Q4_K_M, digest "
    )
    assert described.numbers["context_length"] == 131_072
    assert len(described.numbers["digest"]) == 64


async def test_a_server_that_is_down_is_one_error(fake: FakeOllama) -> None:
    settings = settings_for(fake)
    fake.stop()
    (only,) = await findings(settings, at_most=4)
    assert only.level == "error"
    assert only.sentence.startswith(f"No connection to the model server at {fake.url}")
    assert "ollama serve" in only.remedy


@pytest.mark.parametrize("status", mostly_thorough([401, 400, 403, 404, 422, 500, 502, 503], 5))
@pytest.mark.parametrize("path", ["/api/chat", "/api/generate", "/v1/chat/completions"])
async def test_refusal_has_the_reason_of_the_server(server: ScriptedServer, status: int, path: str) -> None:
    """And never the advice to start a server that answers; without a reason, its log is named."""
    server.models = answer(MODELS | {"data": [{"id": "llama3.2"}]})
    settings = load_settings(None, llm_api_url=server.url + path, llm_model="llama3.2")
    for body, words in (
        (b'{"error": {"message": "response_format is off"}}', "says: response_format is off"),
        (b"", "log"),
    ):
        server.script.clear()
        server.script.extend([answer(body, status)] * 2)
        refused = (await findings(settings, at_most=1))[-1]
        assert refused.level == "error"
        assert words in refused.sentence
        assert not re.search("start (it|the server)", f"{refused.sentence} {refused.remedy}", re.IGNORECASE)


async def test_refused_list_of_models_has_the_reason(server: ScriptedServer) -> None:
    server.models = answer(b"<html><title>Sign in - Corporate Proxy</title></html>", 403, Content_Type="text/html")
    (only,) = await findings(load_settings(None, ollama_endpoint=server.url, ollama_model="llama3.2"))
    assert only.sentence.endswith("(HTTP 403); the server says: a web page, Sign in - Corporate Proxy.")
    assert "Start" not in only.remedy


async def test_remedy_for_a_remote_server_that_is_down() -> None:
    found = await findings(load_settings(None, ollama_endpoint="http://gpu.example.invalid:11434"))
    assert [finding.level for finding in found] == ["warning", "error"]
    assert "gpu.example.invalid:11434 cannot be resolved (DNS); correct OLLAMA_ENDPOINT" in found[-1].sentence
    assert "Start" not in found[-1].remedy


async def test_a_port_of_another_program_is_an_error(fake: FakeOllama) -> None:
    (only,) = await findings(load_settings(None, ollama_endpoint=f"{fake.url}/elsewhere", ollama_model="llama3.2"))
    assert only.level == "error"
    assert "did not list its models (HTTP 404)" in only.sentence


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (None, "No model is set"),
        ("mistral", "has no model mistral"),
        ("gpt-oss:120b-cloud", "runs in Ollama's cloud"),
        ("x:cloud", "runs in Ollama's cloud"),
        ("disguised", "runs in Ollama's cloud"),
    ],
)
async def test_unusable_model_is_an_error_without_a_request(fake: FakeOllama, model: str | None, words: str) -> None:
    remote = {"name": "disguised", "remote_host": "https://ollama.com:443", "remote_model": "large"}
    fake.configure(models=["llama3.2", "gpt-oss:120b-cloud", remote])
    found = await findings(load_settings(None, ollama_endpoint=fake.url, ollama_model=model), at_most=4)
    assert [finding.level for finding in found] == ["ok", "error"]
    assert words in found[-1].sentence
    assert found[-1].remedy
    assert "2 in a cloud, which are refused" in found[0].sentence
    assert (fake.stats()["chat_requests"], fake.stats()["cloud_requests"]) == (0, 0)


async def test_a_model_for_embeddings_is_an_error(fake: FakeOllama) -> None:
    found = await findings(settings_for(fake, ollama_model="nomic-embed-text"))
    assert the_one(found, "cannot chat").level == "error"


async def test_thinking_is_disabled(fake: FakeOllama) -> None:
    found = await findings(settings_for(fake, ollama_model="qwen3:8b"), at_most=2)
    assert "think: false" in the_one(found, "can reason").sentence
    assert {request["think"] for request in fake.requests()} == {False}
    assert not [one for one in await findings(settings_for(fake)) if "think" in one.sentence]


@pytest.mark.parametrize(
    ("url", "level"),
    [
        ("http://192.0.2.7:11434", "warning"),
        ("https://192.0.2.7:11434", None),
        ("http://127.0.0.1:1", None),
        ("http://localhost:1", None),
        ("http://[::1]:1", None),
    ],
)
def test_unencrypted_remote_server_is_a_warning(url: str, level: str | None) -> None:
    found = unencrypted(load_settings(None, ollama_endpoint=url))
    assert (found and found.level) == level


def test_path_of_the_server_is_not_printed() -> None:
    """It may be a key of a gateway, and people paste the output of ``doctor``."""
    found = unencrypted(load_settings(None, ollama_endpoint="http://192.0.2.1:1/sk-secret"))
    assert found is not None
    assert found.sentence.startswith("http://192.0.2.1:1 is another machine")


# Window, memory, load


async def test_a_window_beyond_the_model_is_a_warning_before_the_load(fake: FakeOllama) -> None:
    """A run takes no more than the model has, and so does the diagnosis; without a setting there is nothing to say."""
    fake.configure(models=[{"name": "small", "context_length": 4096}])
    found = await findings(settings_for(fake, ollama_model="small", ollama_num_ctx=8192), at_most=1)
    set_too_high = the_one(found, "the model's limit; 8192 were set")
    assert (set_too_high.level, set_too_high.numbers["asked"]) == ("warning", 8192)
    assert "OLLAMA_NUM_CTX=4096" in set_too_high.remedy
    assert the_one(found, "whole window of 4096").level == "ok"
    chosen = await findings(settings_for(fake, ollama_model="small"), at_most=1)
    assert "window" not in " ".join(finding.sentence for finding in chosen if finding.level != "ok")


async def test_smaller_window_of_the_server_is_a_warning(fake: FakeOllama) -> None:
    fake.configure(most_ctx=5000)
    found = await findings(settings_for(fake), at_most=1)
    given = the_one(found, "gives a window of 5000 tokens instead of 8192")
    assert given.level == "warning"
    assert given.numbers == {"asked": 8192, "given": 5000, "limit": 131_072}
    assert "OLLAMA_NUM_CTX=5000" in given.remedy
    assert the_one(await findings(settings_for(fake)), "loaded with a window of 5000 tokens; a run uses that")


async def test_larger_loaded_window_is_reused_as_in_a_run(fake: FakeOllama) -> None:
    """Only a window that the operator set is insisted on; each change between two loads the model again."""
    chat(fake, options={"num_ctx": 16_384}, shift=False)
    found = await findings(settings_for(fake), at_most=2)
    assert the_one(found, "loaded with a window of 16384 tokens; a run uses that").level == "ok"
    assert (fake.stats()["loads"], fake.stats()["reloads"]) == (1, 0)
    insisted = settings_for(fake, ollama_num_ctx=8192)
    assert the_one(await findings(insisted), "loaded with 16384 tokens; a window of 8192").level == "warning"
    await findings(insisted, at_most=1)
    assert the_one(await findings(insisted), "whole window of 8192").level == "ok"


@pytest.mark.parametrize(
    ("vram_bytes", "level", "words"),
    [
        (4_000_000_000, "ok", "fits into GPU memory (4.0 GB)"),
        (3_000_000_000, "warning", "25% of the model (4.0 GB) is outside"),
        (0, "warning", "runs on the CPU only"),
    ],
)
async def test_a_model_that_does_not_fit_into_the_gpu_is_a_warning(
    fake: FakeOllama, vram_bytes: int, level: str, words: str
) -> None:
    sizes = {"size_bytes": 4_000_000_000, "kv_bytes_per_token": 0, "vram_bytes": vram_bytes}
    fake.configure(models=[{"name": "m", **sizes}])
    finding = the_one(await findings(settings_for(fake, ollama_model="m"), at_most=1), words)
    assert finding.level == level
    assert finding.numbers == {"size_bytes": 4_000_000_000, "vram_bytes": vram_bytes}


async def test_a_load_longer_than_the_time_out_is_a_warning_and_is_not_aborted(fake: FakeOllama) -> None:
    """A client that leaves aborts the load it began; the doctor waits, and says what a run would do."""
    fake.configure(load_delay_s=3.0)
    found = await findings(settings_for(fake, llm_timeout_s=2.0), at_most=1)
    slow = the_one(found, "to load the model")
    assert slow.level == "warning"
    assert slow.numbers["load_s"] >= 0.9
    assert "LLM_TIMEOUT_S" in slow.remedy
    stats = fake.stats()
    assert (stats["loads"], stats["load_aborts"]) == (1, 0)
    assert LOAD_TIMEOUT_S > 300


async def test_a_model_that_does_not_load_is_an_error_with_nothing_after_it(fake: FakeOllama) -> None:
    fake.configure(load_error="llama-server process has terminated: exit status 2")
    found = await findings(settings_for(fake), at_most=4)
    assert "does not answer" in found[-1].sentence
    assert found[-1].level == "error"
    assert fake.stats()["chat_requests"] == 1


async def test_server_without_memory_is_reported(fake: FakeOllama) -> None:
    fake.configure(load_error="model requires more system memory (20 GiB) than is available (8 GiB)")
    assert "smaller model" in (await findings(settings_for(fake), at_most=4))[-1].remedy


async def test_without_a_probe_the_model_is_neither_asked_nor_loaded(fake: FakeOllama) -> None:
    found = await findings(settings_for(fake))
    assert "is not loaded;" in the_one(found, "loaded").sentence
    assert (fake.stats()["chat_requests"], fake.stats()["loads"]) == (0, 0)


# The test conversation


async def test_a_test_conversation_is_asked_as_in_a_run(fake: FakeOllama) -> None:
    finding = the_one(await findings(settings_for(fake), at_most=1), "test conversation got valid labels")
    assert set(finding.numbers) >= {"intent", "topic", "sentiment", "prompt_tokens", "duration_s"}
    assert finding.numbers["attempts"] == 1
    message = chat_messages("", aggregate_conversation(TEST_DOCUMENT).transcript)[-1]["content"]
    assert fake.stats()["calls_by_sha"][text_sha256(message)] == 1
    assert all(request["options"]["num_ctx"] == 8192 for request in fake.requests())
    labels = expected_labels(message, *(load_taxonomy().names(name) for name in ("intent", "topic", "sentiment")))
    assert {name: finding.numbers[name] for name in ("intent", "topic", "sentiment")}.items() <= labels.items()


@pytest.mark.parametrize(
    ("kind", "reason"), [("wrong_label", "label_outside"), ("missing_field", "wrong_shape"), ("length", "cut_off")]
)
async def test_unusable_answers_are_an_error_with_the_reason(fake: FakeOllama, kind: str, reason: str) -> None:
    fake.configure(faults=[{"kind": kind, "when": {"indexes": [1, 2]}}])
    finding = the_one(await findings(settings_for(fake), at_most=1), "are invalid")
    assert finding.level == "error"
    assert f"({reason}: " in finding.sentence


async def test_repeated_test_call_is_a_warning(fake: FakeOllama) -> None:
    fake.configure(faults=[{"kind": "wrong_label", "when": {"indexes": [1]}}])
    finding = the_one(await findings(settings_for(fake), at_most=1), "only on the second attempt")
    assert (finding.level, finding.numbers["attempts"]) == ("warning", 2)


async def test_no_answer_to_the_test_conversation_does_not_hide_the_slots(fake: FakeOllama) -> None:
    fake.configure(faults=[{"kind": "html_502", "when": {"indexes": [1]}}])
    found = await findings(settings_for(fake), at_most=2)
    assert the_one(found, "test conversation got no answer").level == "error"
    assert the_one(found, "The server runs")


# Slots


@pytest.mark.parametrize(
    ("slots", "max_concurrent", "level", "advice"),
    [
        pytest.param(1, 5, "warning", "--max-concurrent 2", marks=pytest.mark.thorough),
        pytest.param(4, 5, "ok", "", marks=pytest.mark.thorough),
        (4, 6, "warning", "--max-concurrent 5"),
        pytest.param(4, 4, "ok", "", marks=pytest.mark.thorough),
        pytest.param(4, 2, "warning", "--max-concurrent 5", marks=pytest.mark.thorough),
    ],
)
async def test_slots_are_measured_and_judged_by_the_setting(
    fake: FakeOllama, slots: int, max_concurrent: int, level: str, advice: str
) -> None:
    fake.configure(slots=slots, latency_s=0.3)
    finding = the_one(await findings(settings_for(fake, max_concurrent=max_concurrent), at_most=8), "The server runs")
    assert (finding.numbers["slots"], finding.numbers["slots_is_minimum"]) == (slots, False)
    assert (finding.numbers["queue_wait_from"], finding.numbers["max_concurrent"]) == ("server", max_concurrent)
    assert finding.level == level, finding
    assert finding.remedy.startswith(advice)


async def test_more_slots_than_were_tried_are_a_minimum(fake: FakeOllama) -> None:
    fake.configure(slots=8)
    finding = the_one(await findings(settings_for(fake, max_concurrent=5), at_most=2), "at least 2 calls at once")
    assert finding.level == "ok"


async def test_probe_ends_at_the_first_call_that_waits(fake: FakeOllama) -> None:
    """With one slot: load, test conversation, two for the prefix cache, warm-up, and two rounds each of 1 and 2."""
    fake.configure(slots=1)
    await findings(settings_for(fake), at_most=8)
    assert fake.stats()["chat_requests"] == 5 + 2 * (1 + 2)


async def test_busy_server_is_reported(fake: FakeOllama) -> None:
    """With one slot and two other clients that ask again and again, each request of the probe waits for both."""
    fake.configure(slots=1)
    stop = threading.Event()

    def ask() -> None:
        while not stop.is_set():
            chat(fake, options={"num_ctx": 8192}, shift=False)

    with ThreadPoolExecutor(2) as others:
        for _ in range(2):
            others.submit(ask)
        try:
            fake.wait_for("chat_requests", 2)
            found = await findings(settings_for(fake), at_most=4)
        finally:
            stop.set()
    assert the_one(found, "other clients are using the server").level == "warning"
    assert not [finding for finding in found if "The server runs" in finding.sentence]


async def test_server_that_fails_under_the_probe_is_a_warning(fake: FakeOllama) -> None:
    fake.configure(faults=[{"kind": "busy_503", "when": {"indexes": [8]}}])
    found = await findings(settings_for(fake), at_most=8)
    assert the_one(found, "The probe stopped with 2 at once").level == "warning"


# OpenAI's protocol


@pytest.mark.thorough
async def test_openai_server_is_judged_by_latency(tiny_model: Path) -> None:
    with TinyEngine(tiny_model, slots=2) as engine:
        url = f"{engine.url}/v1/chat/completions"
        found = await findings(load_settings(None, llm_api_url=url, llm_model=MODEL_NAME, max_concurrent=2), at_most=2)
    assert the_one(found, "The model server answers").numbers["version"] is None
    assert the_one(found, f"The server has {MODEL_NAME}: this protocol reports no details").level == "ok"
    assert the_one(found, "test conversation").level == "ok"
    assert the_one(found, "The server runs").numbers["queue_wait_from"] == "latency"
    assert "window" not in str(found)


@pytest.mark.thorough
async def test_missing_key_is_reported(tiny_model: Path) -> None:
    with TinyEngine(tiny_model, api_key="a-key-of-the-test") as engine:
        url = f"{engine.url}/v1/chat/completions"
        given: dict[str, Any] = {"llm_api_url": url, "llm_model": MODEL_NAME}
        found = await findings(load_settings(None, **given, llm_api_key="a-wrong-key"), at_most=1)
        assert found[-1].level == "error"
        assert "HTTP 401); check LLM_API_KEY; the server says: Invalid API Key" in found[-1].sentence
        assert "a-wrong-key" not in str(found)
        assert "error" not in levels(await findings(load_settings(None, **given, llm_api_key="a-key-of-the-test"), 1))


async def test_model_that_cannot_be_kept_from_thinking_is_named(fake: FakeOllama) -> None:
    """If its thoughts take all the room, another model is the remedy, not a larger one."""
    fake.configure(models=[{"name": "gpt-oss:20b", "capabilities": ["completion", "thinking"]}])
    settings = settings_for(fake, ollama_model="gpt-oss:20b")
    found = await findings(settings, at_most=1)
    assert the_one(found, "cannot be kept from reasoning").level == "warning"
    assert the_one(found, "got valid labels").level == "ok"
    assert {record["think"] for record in fake.requests() if record["message_count"]} == {"low"}
    fake.configure(faults=[{"kind": "thinking_only"}])
    assert "use another model" in the_one(await findings(settings, at_most=1), "are invalid").remedy


async def test_ollama_without_schemas_is_named_with_the_version_needed(fake: FakeOllama) -> None:
    fake.configure(version="0.4.7")
    found = the_one(await findings(settings_for(fake)), "takes no JSON schema")
    assert found.level == "warning"
    assert "0.5.0 or later" in found.remedy
    assert found.numbers["version"] == "0.4.7"


async def test_ollama_behind_v1_is_a_warning(fake: FakeOllama) -> None:
    """It is recognised by its own route; the remedy names the setting."""
    found = await findings(load_settings(None, llm_api_url=f"{fake.url}/v1/chat/completions", llm_model="llama3.2"))
    recognised = the_one(found, "This is an Ollama")
    assert (recognised.level, recognised.remedy) == ("warning", "Set OLLAMA_ENDPOINT instead of LLM_API_URL.")


async def test_thinking_server_without_a_model_list_passes() -> None:
    """doctor tries the named model, with reasoning switched off, and reports it."""

    def step(handler: Handler) -> None:
        thinks = "chat_template_kwargs" not in handler.server_state.requests[-1].json
        message = {"content": "<think>hm" if thinks else GOOD_CONTENT}
        choice = {"message": message, "finish_reason": "length" if thinks else "stop"}
        answer({"choices": [choice], "usage": {"prompt_tokens": 1500}})(handler)

    with scripted_server(*[step] * 40) as server:
        server.models = answer({"detail": "Not Found"}, 404)
        settings = load_settings(None, llm_api_url=f"{server.url}/v1/chat/completions", llm_model="m1")
        found = await findings(settings, at_most=2)
    assert the_one(found, "answers at").sentence.endswith("and lists no models.")
    assert "chat_template_kwargs" in the_one(found, "The model reasons").sentence
    assert "error" not in levels(found), found


async def test_named_model_is_tried_if_the_server_has_no_list_of_models() -> None:
    """A server that emulates a part of Ollama has no ``/api/tags``; the doctor goes on with the model that is set."""
    with scripted_server() as server:
        server.models = answer({"error": "not found"}, 404)
        server.script.extend([answer()] * 8)
        settings = load_settings(None, ollama_endpoint=server.url, ollama_model="llama3.2")
        found = await findings(settings, at_most=1)
        assert "error" not in levels(found), found
        assert the_one(found, "The first answer took")
        unnamed = await findings(load_settings(None, ollama_endpoint=server.url), at_most=1)
        assert [finding.level for finding in unnamed] == ["error"]

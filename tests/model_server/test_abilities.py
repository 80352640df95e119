"""Abilities of a model server that are read from it, or learned from its first refusal."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from async_llm_wrapper import AsyncLLMClient, SharedWindow, open_session
from batch_processor import find_model
from config import Settings, load_settings
from error_handler import ConfigurationError, LLMOutdatedError
from llm_wrapper import LLMClient
from llm_wrapper import open_session as open_sync_session
from model_server import chat
from model_server.chat import is_outdated, lesson
from model_server.models import ModelFacts, ServedModel, chat_target, parse_models, parse_show, with_model
from model_server.protocol import NUM_PREDICT, THINKING_TOKENS, ChatReply, ChatTarget, build_chat_body, plan_fingerprint
from model_server.window import choose_window
from tests.fakes.fake_ollama import FakeOllama
from tests.fakes.fake_ollama_client import post
from tests.fakes.scripted_server import ScriptedServer, Step, answer, chat_reply
from tests.worker.site import Site, conversation

TARGET = ChatTarget("ollama_chat", "http://m:1/api/chat", "http://m:1", "m", None, 8192, "10m", disable_thinking=True)
MESSAGES = [{"role": "user", "content": "Customer: where is it?"}]
TOO_OLD = {"error": "json: cannot unmarshal object into Go struct field ChatRequest.format of type string"}
THOUGHTS = {"role": "assistant", "content": "", "thinking": "hm " * 50}
CUT_OFF = chat_reply(message=THOUGHTS, done_reason="length")


def settings_for(url: str, model: str | None = "llama3.2") -> Settings:
    return load_settings(dotenv=None, ollama_endpoint=url, ollama_model=model, llm_max_attempts=1)


def body_of(target: ChatTarget) -> dict[str, Any]:
    body: dict[str, Any] = json.loads(build_chat_body(target, MESSAGES, b"{}"))
    return body


def test_gpt_oss_is_asked_for_the_least_thinking_with_room_for_it() -> None:
    """Its name or its architecture tells; the fingerprint of its results is that of a model that learns it later."""
    facts = ModelFacts(frozenset({"completion", "thinking"}))
    for model, known in (("gpt-oss:20b", facts), ("mine:latest", replace(facts, architecture="gptoss"))):
        target = with_model(replace(TARGET, model=model), ServedModel(model), known)
        body = body_of(target)
        assert (body["think"], body["options"]["num_predict"]) == ("low", NUM_PREDICT + THINKING_TOKENS)
        assert plan_fingerprint(target, "p", b"{}") == plan_fingerprint(replace(target, think_level=""), "p", b"{}")
    assert body_of(with_model(TARGET, ServedModel("qwen3:8b"), facts))["think"] is False


@pytest.mark.parametrize(
    ("level", "status", "fields", "changes"),
    [
        ("", 200, CUT_OFF, {"think_level": "low"}),
        ("", 200, chat_reply(message=THOUGHTS), {"think_level": "low"}),
        ("", 200, chat_reply(message={**THOUGHTS, "content": "{}"}), None),
        ("", 200, chat_reply(done_reason="length"), None),
        ("low", 200, CUT_OFF, None),
        ("low", 400, {"error": '"m" does not support thinking'}, {"think_level": ""}),
        (
            "low",
            400,
            {"error": "json: cannot unmarshal string into Go struct field ChatRequest.think of type bool"},
            {"think_level": ""},
        ),
        ("", 400, {"error": '"m" does not support thinking'}, {"disable_thinking": False}),
        (
            "",
            422,
            {"detail": [{"type": "extra_forbidden", "loc": ["body", "think"], "input": False}]},
            {"disable_thinking": False},
        ),
        ("", 400, {"error": "I think the customer's text is wrong"}, None),
        ("", 500, {"error": '"m" does not support thinking'}, None),
    ],
)
def test_switch_for_thinking_is_learned(
    level: str, status: int, fields: dict[str, Any], changes: dict[str, Any] | None
) -> None:
    sent = replace(TARGET, think_level=level)
    assert lesson(sent, status, json.dumps(fields).encode()) == (changes or {})
    if "message" in fields:
        flat = {**fields, **fields["message"], "response": fields["message"]["content"]}
        del flat["message"], flat["content"]
        generate = replace(sent, protocol="ollama_generate")
        assert lesson(generate, status, json.dumps(flat).encode()) == (changes or {})


def test_model_that_ignores_think_false_is_learned_once_per_run(server: ScriptedServer) -> None:
    server.show = answer({"capabilities": ["completion", "thinking"]})
    server.script.extend([answer(CUT_OFF), answer(), answer()])
    settings = settings_for(server.url)
    with open_sync_session() as session:
        client = LLMClient(settings, chat_target(settings, "llama3.2"), session)
        client.prepare(settings)
        for _ in range(2):
            client.chat(MESSAGES, b"{}")
    assert [request.json["think"] for request in server.chats] == [False, "low", "low"]


async def test_ollama_without_schemas_is_named_with_the_version_needed(server: ScriptedServer) -> None:
    server.script.append(answer(TOO_OLD, 400))
    settings = settings_for(server.url)
    async with open_session(1) as session:
        client = AsyncLLMClient(settings, chat_target(settings, "llama3.2"), session)
        with pytest.raises(LLMOutdatedError, match=r"too old.*0\.5\.0 or later"):
            await client.chat(MESSAGES, b"{}")
    assert len(server.chats) == 1


def test_run_with_an_outdated_ollama_ends_and_leaves_its_documents_pending(site: Site, server: ScriptedServer) -> None:
    site.source.insert_many([conversation(number) for number in range(3)])
    server.script.extend([answer({"done": True, "done_reason": "load"}), *[answer(TOO_OLD, 400)] * 3])
    ended = site.run(OLLAMA_ENDPOINT=server.url)
    assert ended.code == 2, ended.err
    assert "0.5.0 or later" in ended.err
    assert site.files("quarantine/*") == []
    server.script.clear()
    assert site.run(OLLAMA_ENDPOINT=server.url).code == 0
    assert site.results.count_documents({}) == 3


@pytest.mark.parametrize(
    ("version", "expected"),
    [
        *(("0.4.7", True), ("0.3.14", True), ("v0.1.48", True), ("0.5.0", False), ("0.33.0-rc2", False)),
        *(("1.0", False), ("0.0.0", False), ("custom", False), (None, False)),
    ],
)
def test_versions_of_ollama_without_schemas(version: str | None, expected: bool) -> None:
    """An unset version number of a build of one's own says nothing."""
    assert is_outdated(version) is expected


@pytest.mark.parametrize(
    "load",
    [
        answer({"done": True, "done_reason": "stop", "message": {"content": ""}}),
        answer({"error": "messages must not be empty"}, 400),
        answer({"detail": "messages: at least one"}, 422),
    ],
)
@pytest.mark.parametrize("missing", [answer({"error": "not found"}, 404), answer(b"<html>a page for people</html>")])
async def test_server_without_a_load_reply_and_other_routes_is_used(
    server: ScriptedServer, load: Step, missing: Step
) -> None:
    """It knows the list of models and the chat only."""
    server.show, listed = missing, server.models
    server.models = lambda handler: (listed if handler.path == "/api/tags" else missing)(handler)
    server.script.append(load)
    settings = settings_for(server.url)
    async with open_session(1) as session:
        client = AsyncLLMClient(settings, chat_target(settings, "llama3.2"), session)
        await client.prepare(settings)
        await client.warm_up(choose_window([], None), lambda _: None)
        assert (await client.chat(MESSAGES, b"{}")).text
    assert client.target.num_ctx == 8192


async def test_model_that_is_never_listed_is_loaded_once(
    server: ScriptedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("async_llm_wrapper.CHECK_EVERY_S", 0.0)
    server.models = answer({"models": []})
    settings = settings_for(server.url)
    async with open_session(1) as session:
        client = AsyncLLMClient(settings, chat_target(settings, "llama3.2"), session)
        window = SharedWindow(client, None)
        for _ in range(3):
            await window.renew()
        await window.close()
    assert len(server.chats) == 1


@pytest.mark.parametrize("status", [404, 405, 501])
async def test_named_model_of_a_server_without_a_list_is_tried(server: ScriptedServer, status: int) -> None:
    server.models = server.show = answer({"error": "not found"}, status)
    settings = settings_for(server.url)
    async with open_session(1) as session:
        client = AsyncLLMClient(settings, chat_target(settings, "llama3.2"), session)
        assert (await client.prepare(settings)).model == "llama3.2"
    assert await find_model(settings_for(server.url, None)) is None


@pytest.mark.parametrize(
    ("entry", "chats"),
    [
        ({"name": "a", "capabilities": ["completion"]}, True),
        ({"name": "a", "capabilities": ["embedding"]}, False),
        ({"name": "nomic-embed-text:latest"}, False),
        ({"name": "all-minilm"}, False),
        ({"name": "bge-m3:latest"}, False),
        ({"name": "mine", "details": {"family": "nomic-bert"}}, False),
        ({"name": "mine", "details": {"family": "llama"}}, True),
        ({"name": "gemma3:4b"}, True),
    ],
)
def test_embedding_models_are_recognised_in_the_list(entry: dict[str, Any], chats: bool) -> None:
    (model,) = parse_models("ollama_chat", 200, json.dumps({"models": [entry]}).encode())
    assert model.chats is chats


def test_pooling_shows_an_embedding_model_before_ollama_told_capabilities() -> None:
    shown = {"model_info": {"general.architecture": "qwen3", "qwen3.pooling_type": 3}}
    assert not parse_show(200, json.dumps(shown).encode()).can_chat
    assert parse_show(404, b"{}").can_chat


@pytest.mark.parametrize(
    ("models", "found"),
    [
        (["nomic-embed-text:latest", "llama3.2:latest"], "llama3.2:latest"),
        (["nomic-embed-text:latest"], None),
        ([{"name": "mine:latest", "capabilities": ["embedding"]}, {"name": "yours:latest"}], "yours:latest"),
        ([], None),
    ],
)
async def test_only_a_model_that_can_chat_is_chosen(models: list[Any], found: str | None) -> None:
    with FakeOllama(models=models) as fake:
        assert await find_model(settings_for(fake.url, None)) == found


async def test_embedding_model_by_name_is_refused_before_the_run() -> None:
    with FakeOllama() as fake:
        with pytest.raises(ConfigurationError, match=r"is an embedding model.*one of: llama3.2:latest, qwen3:8b"):
            await find_model(settings_for(fake.url, "nomic-embed-text"))
        assert fake.stats()["load_requests"] == 0


async def test_reload_by_another_client_is_told_once(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without ``shift: false`` Ollama starts its runner again, and ``/api/ps`` does not show it."""
    monkeypatch.setattr(chat, "RELOAD_S", 0.05)
    with FakeOllama(load_delay_s=0.1) as fake:
        settings = settings_for(fake.url)
        async with open_session(1) as session:
            client = AsyncLLMClient(settings, chat_target(settings, "llama3.2"), session)
            await client.prepare(settings)
            await client.warm_up(choose_window([], None), lambda _: None)
            for _ in range(3):
                await client.chat(MESSAGES, b'{"type": "object"}')
                assert ("shift" in caplog.text) is (fake.stats()["reloads"] > 0)
                other = {"model": "llama3.2", "stream": False, "messages": MESSAGES, "options": {"num_ctx": 8192}}
                post(fake, "/api/chat", other)
    assert caplog.text.count('"shift": false') == 1


def test_first_load_is_no_reload(caplog: pytest.LogCaptureFixture) -> None:
    watch = chat.ReloadWatch()
    reply = ChatReply("{}", None, None, load_s=30.0)
    watch.note(TARGET, reply, was_warm=watch.is_warm)
    assert not caplog.records

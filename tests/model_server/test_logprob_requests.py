"""Asking for log probabilities: what is sent, what is read, who asks, and what follows a refusal."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import async_llm_wrapper
import llm_wrapper
from config import load_settings
from error_handler import LLMRejectedError
from model_server.chat import refuses_logprobs
from model_server.models import chat_target
from model_server.protocol import ChatTarget, build_chat_body, parse_chat_response, plan_fingerprint
from tests.fakes.fake_ollama import FakeOllama
from tests.fakes.fake_ollama_client import chat, chat_body, post
from tests.fakes.scripted_server import ScriptedServer, answer, chat_reply, scripted_server
from tests.service.service_process import conversation, serve

TARGET = ChatTarget("ollama_chat", "http://m:1/api/chat", "http://m:1", "llama3.2", None, 8192, "10m", logprobs=True)
GENERATE = replace(TARGET, protocol="ollama_generate", url="http://m:1/api/generate")
OPENAI = replace(TARGET, protocol="openai_chat", url="http://m:1/v1/chat/completions")
MESSAGES = [{"role": "system", "content": "Label it."}, {"role": "user", "content": "Customer: where is it?"}]
ENTRIES = [{"token": "{", "logprob": -0.1, "bytes": [123], "top_logprobs": []}]
REFUSAL = {"error": "logprobs is not supported"}
every_protocol = pytest.mark.parametrize("target", [TARGET, GENERATE, OPENAI], ids=lambda target: target.protocol)


@pytest.fixture
def fake() -> Iterator[FakeOllama]:
    with FakeOllama() as server:
        yield server


@every_protocol
def test_two_fields_request_logprobs(target: ChatTarget) -> None:
    """Nothing else in the body changes, so answers and fingerprints stay the same."""
    asked, plain = (json.loads(build_chat_body(t, MESSAGES, b"{}")) for t in (target, replace(target, logprobs=False)))
    assert asked == {**plain, "logprobs": True, "top_logprobs": 20}
    assert plan_fingerprint(target, "p", b"{}") == plan_fingerprint(replace(target, logprobs=False), "p", b"{}")


def reply_of(target: ChatTarget, logprobs: Any) -> dict[str, Any]:
    if target.protocol == "openai_chat":
        choice = {"message": {"content": "{}"}, "finish_reason": "stop", "logprobs": logprobs}
        return {"choices": [choice]}
    return chat_reply("{}", response="{}", logprobs=logprobs)


@every_protocol
def test_logprobs_are_returned_unchanged(target: ChatTarget) -> None:
    logprobs = {"content": ENTRIES} if target.protocol == "openai_chat" else ENTRIES
    body = json.dumps(reply_of(target, logprobs)).encode()
    assert parse_chat_response(target, 200, body, MESSAGES).tokens == tuple(ENTRIES)


@every_protocol
@pytest.mark.parametrize("logprobs", [None, 7, "x", {}, {"content": None}, {"content": "x"}], ids=str)
def test_malformed_logprobs_are_ignored(target: ChatTarget, logprobs: Any) -> None:
    body = json.dumps(reply_of(target, logprobs)).encode()
    assert parse_chat_response(target, 200, body, MESSAGES).tokens == ()


@pytest.mark.parametrize(
    ("status", "body", "asked", "refused"),
    [
        (400, b'{"error":"logprobs is not supported"}', True, True),
        (422, b'{"detail":[{"loc":["body","top_logprobs"]}]}', True, True),
        (400, b'{"error":"logprobs is not supported"}', False, False),
        (400, b'{"error":"model is required"}', True, False),
        (500, b'{"error":"logprobs"}', True, False),
        (200, b'{"logprobs":[]}', True, False),
    ],
)
def test_refusal_of_logprobs_is_recognised(status: int, body: bytes, asked: bool, refused: bool) -> None:
    assert refuses_logprobs(replace(TARGET, logprobs=asked), status, body) is refused


def ask(server: ScriptedServer, *, is_async: bool, times: int) -> None:
    """Ask *times* times through one client that wants log probabilities."""
    settings = load_settings(None, ollama_endpoint=server.url, ollama_model="llama3.2", llm_backoff_s=0)
    target = replace(chat_target(settings, "llama3.2"), logprobs=True)
    if not is_async:
        with llm_wrapper.open_session() as session:
            client = llm_wrapper.LLMClient(settings, target, session)
            for _ in range(times):
                client.chat(MESSAGES, b"{}")
        return

    async def run() -> None:
        async with async_llm_wrapper.open_session(2) as session:
            client = async_llm_wrapper.AsyncLLMClient(settings, target, session)
            for _ in range(times):
                await client.chat(MESSAGES, b"{}")
            await client.breaker.close()

    asyncio.run(run())


@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
def test_logprobs_are_not_requested_after_a_refusal(is_async: bool) -> None:
    """It takes one more request, but no wait and no attempt; other clients find out themselves."""
    with scripted_server(answer(REFUSAL, 400)) as server:
        ask(server, is_async=is_async, times=3)
        assert ["logprobs" in request.json for request in server.chats] == [True, False, False, False]
        ask(server, is_async=is_async, times=1)
        assert "logprobs" in server.chats[-1].json


@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
def test_refusal_for_another_reason_is_raised(is_async: bool) -> None:
    """Also if it answers the second request."""
    with scripted_server(answer(REFUSAL, 400), answer({"error": "logprobs or something"}, 400)) as server:
        with pytest.raises(LLMRejectedError):
            ask(server, is_async=is_async, times=1)
        assert len(server.chats) == 2


@pytest.mark.thorough
def test_service_does_not_request_logprobs(fake: FakeOllama, tmp_path: Path) -> None:
    """It would store nothing of it: a server that refuses them sees no reason to."""
    fake.configure(logprobs="refuse")
    with serve(tmp_path, OLLAMA_ENDPOINT=fake.url, OLLAMA_MODEL="llama3.2") as process:
        assert process.classify(conversation()).status == 200
    assert [request["outcome"] for request in fake.requests()] == ["200"]


def test_fake_returns_logprobs_only_if_configured(fake: FakeOllama) -> None:
    assert "logprobs" not in chat(fake, logprobs=True, top_logprobs=20).json
    fake.configure(logprobs={"*": 0.9})
    assert "logprobs" not in chat(fake).json


@pytest.mark.parametrize("path", ["/api/chat", "/v1/chat/completions"])
def test_fake_logprobs_have_the_shape_of_ollama(fake: FakeOllama, path: str) -> None:
    """The bytes of the tokens are the answer, and no list is longer than was asked for."""
    fake.configure(logprobs={"*": 0.9})
    body = post(fake, path, chat_body(logprobs=True, top_logprobs=5)).json
    if path == "/api/chat":
        entries, content = body["logprobs"], body["message"]["content"]
    else:
        [choice] = body["choices"]
        entries, content = choice["logprobs"]["content"], choice["message"]["content"]
    assert b"".join(bytes(entry["bytes"]) for entry in entries).decode() == content
    for entry in entries:
        assert set(entry) == {"token", "logprob", "bytes", "top_logprobs"}
        assert len(entry["top_logprobs"]) <= 5
        assert all(set(other) == {"token", "logprob", "bytes"} for other in entry["top_logprobs"])

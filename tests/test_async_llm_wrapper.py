"""The parts that only the asynchronous wrapper has: cancellation, and a breaker that waits for a server that is away."""

from __future__ import annotations

import asyncio
from typing import Any

import aiohttp
import pytest

from async_llm_wrapper import AsyncLLMClient, open_session
from config import load_settings
from error_handler import LLMConnectionError
from model_server.breaker import BreakerPolicy
from model_server.models import chat_target
from tests.fakes.scripted_server import GOOD_CONTENT, ScriptedServer, Step, answer, hang, reset, say

MESSAGES = [{"role": "system", "content": "Label it."}, {"role": "user", "content": "Customer: where is it?"}]
SCHEMA = b"{}"
BUSY, DOWN = answer({"error": "server busy"}, 503), answer({"error": "model runner has unexpectedly stopped"}, 500)


def client_of(server: ScriptedServer, session: aiohttp.ClientSession, **given: Any) -> AsyncLLMClient:
    """A client that loses no time with waits, whose breaker never gives up."""
    settings = load_settings(None, **{"ollama_endpoint": server.url, "llm_backoff_s": 0, **given})
    policy = BreakerPolicy(first_probe_s=0.01, probe_cap_s=0.02)
    return AsyncLLMClient(settings, chat_target(settings, "llama3.2"), session, policy)


async def test_cancelled_request_frees_the_slot(server: ScriptedServer) -> None:
    """The server sees the client leave, so its slot is free again."""
    server.script.append(hang)
    async with open_session(1) as session:
        call = asyncio.create_task(client_of(server, session).chat(MESSAGES, SCHEMA))
        await asyncio.to_thread(server.wait_for_chats, 1)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        assert await asyncio.to_thread(server.client_left.wait, 5)
    assert len(server.chats) == 1


async def test_cancelled_backoff_sends_nothing_more(server: ScriptedServer, caplog: pytest.LogCaptureFixture) -> None:
    """The wait is given up at once, and no further request follows."""
    server.script.append(BUSY)
    async with open_session(1) as session:
        client = client_of(server, session, llm_backoff_s=60)
        call = asyncio.create_task(client.chat(MESSAGES, SCHEMA))
        async with asyncio.timeout(5):
            while "attempt 1 failed" not in caplog.text:
                await asyncio.sleep(0.005)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
    assert len(server.chats) == 1


async def test_calls_wait_during_an_outage_and_keep_their_attempts(
    server: ScriptedServer, caplog: pytest.LogCaptureFixture
) -> None:
    """With one attempt each, all of them are answered after the outage."""
    server.stop()
    async with open_session(8) as session:
        client = client_of(server, session, llm_max_attempts=1)
        calls = [asyncio.create_task(client.chat(MESSAGES, SCHEMA)) for _ in range(8)]
        async with asyncio.timeout(10):
            while not client.breaker.is_open:
                await asyncio.sleep(0.005)
            server.start()
            replies = await asyncio.gather(*calls)
        await client.breaker.close()
    assert {reply.text for reply in replies} == {GOOD_CONTENT}
    assert (client.breaker.openings, len(server.chats)) == (1, 8)
    assert "attempt 1 failed" not in caplog.text


async def test_lost_connection_to_a_live_server_costs_attempts(server: ScriptedServer) -> None:
    """Then the request may be at fault, and must not be repeated without end."""
    server.script.extend([reset] * 3)
    async with open_session(1) as session:
        client = client_of(server, session)
        with pytest.raises(LLMConnectionError):
            await client.chat(MESSAGES, SCHEMA)
    assert (len(server.chats), client.breaker.openings) == (3, 0)


@pytest.mark.parametrize(
    ("step", "alive"),
    [
        pytest.param(answer({"models": []}), True, id="models"),
        pytest.param(DOWN, True, id="500"),
        pytest.param(answer(b"<html>", 404), True, id="404"),
        pytest.param(reset, False, id="reset"),
        pytest.param(say(b"SSH-2.0\r\n"), False, id="not-http"),
    ],
)
async def test_any_answer_counts_as_alive(server: ScriptedServer, step: Step, alive: bool) -> None:
    """Any answer is a sign of life; whatever else happens is none, and no error."""
    server.models = step
    async with open_session(1) as session:
        client = client_of(server, session)
        assert await client.is_alive() is alive

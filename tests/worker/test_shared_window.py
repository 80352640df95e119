"""Workers on one model server agree on the context window, so that none makes the server load the model again."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from pymongo import AsyncMongoClient

from async_llm_wrapper import AsyncLLMClient, SharedWindow, open_session
from config import load_settings
from error_handler import StoreForbiddenError
from model_server.models import chat_target
from model_server.window import choose_window
from storage import window_agreement
from storage.service_lease import server_name
from storage.window_agreement import COLLECTION, UsedWindow
from tests.fakes.fake_ollama import FakeOllama
from tests.worker.long_conversations import long_conversation
from tests.worker.site import Site, conversation, model_of, until
from worker.shared_window import loaded_window


def used_by(client: Any, db_name: str, worker: str, server: str = "host:1", model: str = "m") -> UsedWindow:
    return UsedWindow(client[db_name], worker, server, model)


async def test_largest_window_of_running_workers_counts(mongodb_uri: str, db_name: str) -> None:
    """Only of the same model on the same server."""
    async with AsyncMongoClient[dict[str, Any]](mongodb_uri) as client:
        one, two = used_by(client, db_name, "one"), used_by(client, db_name, "two")
        await one.renew(8192)
        assert (await one.of_others(), await two.of_others()) == (None, 8192)
        await two.renew(16_384)
        assert await one.of_others() == 16_384
        assert await used_by(client, db_name, "three").of_others() == 16_384
        assert await used_by(client, db_name, "three", model="other").of_others() is None
        assert await used_by(client, db_name, "three", server="host:2").of_others() is None
        await two.end()
        assert await one.of_others() is None


async def test_window_that_nobody_renews_does_not_count(
    mongodb_uri: str, db_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(window_agreement, "LIVES_S", 0)
    async with AsyncMongoClient[dict[str, Any]](mongodb_uri) as client:
        await used_by(client, db_name, "one").renew(16_384)
        assert await used_by(client, db_name, "two").of_others() is None


def test_documents_that_are_not_known_need_no_other_window() -> None:
    """A worker with an empty database uses what another has loaded."""
    assert choose_window([], None).least_beside_others == choose_window(None, None).least_beside_others == 4096
    assert choose_window([3000] * 94 + [9000] * 6, None).least_beside_others == 16_384
    beside = choose_window([3000] * 96 + [9000] * 4, None)
    assert (beside.num_ctx, beside.least_beside_others) == (16_384, 4096)


def used(site: Site) -> list[int]:
    """Return the windows of the calls, each change once."""
    windows = [record["options"]["num_ctx"] for record in model_of(site).requests()]
    return [size for place, size in enumerate(windows) if not place or windows[place - 1] != size]


def test_second_worker_uses_the_window_of_the_first(site: Site) -> None:
    """4 % of its conversations do not fit into it. They are truncated and marked; the model is not loaded again."""
    site.source.insert_many(
        [conversation(number) for number in range(96)] + [long_conversation(number, 200) for number in range(96, 100)]
    )
    site.database[COLLECTION].insert_one(agreement_of(site, 4096))
    ended = site.run()
    assert ended.code == 0, ended.err
    assert "another worker uses llama3.2 with a window of 4096 tokens; using that" in ended.err
    assert used(site) == [4096]
    assert site.results.count_documents({"processing_metadata.input_complete": False}) == 4


@pytest.mark.thorough
def test_larger_window_is_announced_before_the_model_is_loaded_with_it(site: Site) -> None:
    """The first worker changes over at its next call, so the model is loaded twice, and not once for each alternation."""
    site.source.insert_many([conversation(number) for number in range(80)])
    model_of(site).configure(latency_s=0.3)
    other = site.sibling("second")
    with site.start(MAX_CONCURRENT="2") as first:
        until(lambda: model_of(site).stats()["chat_requests"] > 2)
        site.database["long"].insert_many([long_conversation(number, 100) for number in range(100, 105)])
        ended = other.run(MONGODB_SOURCE_COLLECTION="long", MONGODB_RESULTS_COLLECTION="long_results")
        assert ended.code == 0, ended.err
        assert "it changes to 8192 within" in ended.err
        assert first.ended().code == 0
    assert used(site) == [4096, 8192]
    assert model_of(site).stats()["reloads"] == 1


async def test_running_worker_adopts_a_larger_window(
    mongodb_uri: str, db_name: str, model: FakeOllama, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its next call has it, unless the operator set the window."""
    monkeypatch.setattr("worker.shared_window.RENEW_S", 0.01)
    settings = load_settings(None, ollama_model="llama3.2", ollama_endpoint=model.url)
    target = chat_target(settings, "llama3.2")
    async with (
        AsyncMongoClient[dict[str, Any]](mongodb_uri) as client,
        open_session(1) as session,
        AsyncExitStack() as stack,
    ):
        asked = AsyncLLMClient(settings, target, session)
        window = await loaded_window(stack, client[db_name], asked, choose_window([3000], None), print)
        assert window.target.num_ctx == 4096
        await used_by(client, db_name, "other", server_name(target.server_url), "llama3.2").renew(16_384)
        async with asyncio.timeout(20):
            while window.target.num_ctx == 4096:
                await asyncio.sleep(0.01)
        assert window.target.num_ctx == 16_384
        fixed = SharedWindow(asked, 4096, choose_window(None, None, 4096))
        fixed.adopt(32_768)
        assert fixed.target.num_ctx == 16_384


def test_setting_of_the_operator_stays_and_the_conflict_is_named(site: Site) -> None:
    site.source.insert_one(conversation(1))
    site.database[COLLECTION].insert_one(agreement_of(site, 4096))
    ended = site.run(OLLAMA_NUM_CTX="16384")
    assert "OLLAMA_NUM_CTX is 16384 here" in ended.err
    assert used(site) == [16_384]


def test_worker_without_the_right_chooses_alone(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    async def refused(_: UsedWindow) -> None:
        raise StoreForbiddenError("not authorized")

    monkeypatch.setattr(UsedWindow, "of_others", refused)
    site.source.insert_one(conversation(1))
    ended = site.run()
    assert ended.code == 0
    assert used(site) == [4096]


def test_nothing_of_a_run_is_left(site: Site) -> None:
    """The next run is alone."""
    site.source.insert_one(conversation(1))
    assert site.run().code == 0
    assert site.database[COLLECTION].count_documents({}) == 0


def agreement_of(site: Site, num_ctx: int) -> dict[str, Any]:
    """Return what another worker that is running has stored."""
    place = {"worker": "other", "server": server_name(model_of(site).url), "model": "llama3.2"}
    return {**place, "num_ctx": num_ctx, "renewed_at": datetime.now(UTC) + timedelta(hours=1)}


async def test_smaller_window_that_the_server_gives_stays(
    mongodb_uri: str, db_name: str, model: FakeOllama, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The agreement holds what the worker asked for, and its calls use what it got."""
    monkeypatch.setattr("worker.shared_window.RENEW_S", 0.01)
    model.configure(most_ctx=5000)
    settings = load_settings(None, ollama_model="llama3.2", ollama_endpoint=model.url)
    async with (
        AsyncMongoClient[dict[str, Any]](mongodb_uri) as client,
        open_session(1) as session,
        AsyncExitStack() as stack,
    ):
        agreed = client[db_name][COLLECTION]
        asked = AsyncLLMClient(settings, chat_target(settings, "llama3.2"), session)
        window = await loaded_window(stack, client[db_name], asked, choose_window([7000], None), print)
        for _ in range(2):  # renewed twice after the load, so others were looked for
            before = await agreed.find_one()
            assert before is not None
            async with asyncio.timeout(20):
                while await agreed.find_one() == before:
                    await asyncio.sleep(0.01)
        assert before["num_ctx"] == 8192
        assert window.target.num_ctx == 5000


async def test_calls_that_wait_for_a_load_outlive_its_end(model: FakeOllama) -> None:
    """A server of several that is checked again gets a new window, and the load of the old one is stopped."""
    model.configure(load_delay_s=30.0)
    settings = load_settings(None, ollama_model="llama3.2", ollama_endpoint=model.url)
    async with open_session(4) as session:
        window = SharedWindow(AsyncLLMClient(settings, chat_target(settings, "llama3.2"), session), None)
        waiting = asyncio.create_task(window.renew())
        async with asyncio.timeout(20):
            while not model.stats()["load_requests"]:
                await asyncio.sleep(0.01)
        await window.close()
        await waiting


async def test_first_calls_wait_for_the_check_of_the_window(model: FakeOllama) -> None:
    """A call that did not wait would load the model again, with the window that nobody has checked."""
    settings = load_settings(None, ollama_model="llama3.2", ollama_endpoint=model.url)
    async with open_session(4) as session:
        client = AsyncLLMClient(settings, chat_target(settings, "llama3.2"), session)
        await client.warm_up(choose_window(None, None, 4096), print)
        window = SharedWindow(AsyncLLMClient(settings, chat_target(settings, "llama3.2"), session), None)

        async def used_at_once() -> int:
            await window.renew()
            return window.target.num_ctx

        assert await asyncio.gather(*(used_at_once() for _ in range(4))) == [4096] * 4

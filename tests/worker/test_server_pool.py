"""Several model servers: which one is asked, which one is left out, and what a server costs that fails in mid-run."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from typing import Any, cast

import pytest

from async_llm_wrapper import AsyncLLMClient, open_session
from config import load_settings
from error_handler import ConfigurationError, LLMOutageError, LLMUnavailableError
from model_server.models import chat_target
from model_server.window import choose_window
from tests.fakes.fake_ollama import FakeOllama
from tests.worker.site import Site, check_exactly_once, filled, model_of, until
from tests.worker.stream_site import following
from tests.worker.stream_site import until as until_async
from worker.pool_server import FORGET_S, Server, Traits, host_and_port
from worker.server_pool import open_pool

OTHER = {"models": [{"name": "llama3.2:latest", "copy_of": "another"}]}
DIGEST = hashlib.sha256(b"fake-model:another").hexdigest()


@pytest.fixture(scope="module")
def shared_second() -> Iterator[FakeOllama]:
    with FakeOllama() as server:
        yield server


@pytest.fixture
def second(shared_second: FakeOllama) -> FakeOllama:
    """A second model server, as if it had just started."""
    shared_second.renew()
    return shared_second


def both(site: Site, *others: FakeOllama) -> dict[str, str]:
    return {"OLLAMA_ENDPOINT": ",".join([model_of(site).url, *(other.url for other in others)])}


def server(name: str, seconds: float | None, slots: int = 4, in_flight: int = 0) -> Server:
    """A server that has answered in *seconds*, None: not yet."""
    settings = load_settings(None, ollama_endpoint=f"http://{name}:11434", ollama_model="m")
    made = Server(settings, cast("AsyncLLMClient", None), slots, None)
    made.in_flight = in_flight
    if seconds is not None:
        made.measure(seconds, 0.0)
    return made


def spread(servers: list[Server], calls: int) -> list[int]:
    """Return how many of *calls* each server gets if none is answered."""
    for _ in range(calls):
        min(servers, key=lambda one: one.wait(1.0)).in_flight += 1
    return [one.in_flight for one in servers]


def test_work_is_weighted_by_speed_and_no_slot_stays_idle() -> None:
    """Four, two and one second for a call, four slots each: the faster one gets more, and in the end all are full."""
    speeds = (4.0, 2.0, 1.0)
    assert spread([server("a", seconds) for seconds in speeds], 3) == [0, 1, 2]
    assert spread([server("a", seconds) for seconds in speeds], 7) == [1, 2, 4]
    assert spread([server("a", seconds) for seconds in speeds], 12) == [4, 4, 4]
    # Beyond the slots, the queues hold the same time.
    assert spread([server("a", seconds) for seconds in speeds], 21) == [4, 6, 11]


def test_slots_count_as_speed() -> None:
    assert spread([server("a", 1.0, slots=2), server("b", 1.0, slots=6)], 4) == [1, 3]


def test_server_that_was_not_measured_lately_is_tried() -> None:
    """A server that was slow once is not avoided for ever."""
    slow, fast = server("a", 60.0), server("b", 0.1)
    assert slow.wait(1.0) > fast.wait(1.0)
    fast.measure(0.1, FORGET_S)
    assert slow.wait(FORGET_S + 1) < fast.wait(FORGET_S + 1)
    assert server("c", None).wait(1.0) < fast.wait(1.0)


def test_shown_names_hold_no_path() -> None:
    assert [host_and_port(url) for url in ("http://gpu:1234/key", "https://gpu", "http://[::1]:80")] == [
        "gpu:1234",
        "gpu:443",
        "[::1]:80",
    ]


def test_differences_are_told_in_words() -> None:
    first = Traits("sha256:" + "a" * 64, "0.33.0")
    assert Traits(first.digest, "0.33.0").differences(first) == []
    assert Traits("b" * 64, None).differences(first) == [
        "model digest bbbbbbbbbbbb instead of aaaaaaaaaaaa",
        "version unknown instead of 0.33.0",
    ]


def test_two_servers_share_a_run(site: Site, second: FakeOllama) -> None:
    """Each document is asked once, and all views show both servers."""
    model_of(site).configure(latency_s=0.01)
    second.configure(latency_s=0.01)
    documents = filled(site, 60)
    ended = site.run("--output", "out.json", "--progress-files", "--console", **both(site, second))
    assert ended.code == 0, ended.said
    check_exactly_once(site, documents)
    calls = [one.stats()["chat_requests"] for one in (model_of(site), second)]
    assert sum(calls) == 60
    assert min(calls) > 10
    stats = json.loads((site.folder / "out.json").read_text())
    assert [(one["state"], one["answered"]) for one in stats["servers"]] == [("ready", count) for count in calls]
    names = [host_and_port(one.url) for one in (model_of(site), second)]
    assert all(f"{name}: {count} " in ended.out for name, count in zip(names, calls, strict=True))
    assert f"{names[1]} 0" in ended.err
    metrics = site.files("progress/metrics.prom")[0].read_text()
    assert f'triad_run_server_answers_total{{server="{names[1]}",worker="batch_files"}} {calls[1]}.0' in metrics
    beat = site.database.get_collection("sentimental_analysis_workers").find_one()
    assert beat is not None
    assert [one["server"] for one in beat["servers"]] == names


def test_repair_turn_goes_to_the_server_of_the_first_call(site: Site, second: FakeOllama) -> None:
    """Its prompt is in the cache there. One fault for each server, so that no repair turn meets another one."""
    for one in (model_of(site), second):
        one.configure(user_message=0, faults=[{"kind": "invalid_json", "times": 1}])
    documents = filled(site, 20)
    assert site.run(**both(site, second)).code == 0
    check_exactly_once(site, documents)
    mine, theirs = (set(one.stats()["calls_by_sha"]) for one in (model_of(site), second))
    assert not mine & theirs
    assert max(model_of(site).stats()["calls_by_sha"].values()) == 2


def test_server_with_another_model_is_left_out_with_a_sentence(site: Site, second: FakeOllama) -> None:
    """If there is a third one, like the first."""
    second.configure(**OTHER)
    filled(site, 6)
    with FakeOllama() as third:
        ended = site.run(**both(site, second, third))
    assert ended.code == 0
    assert (
        f"{host_and_port(second.url)} takes no calls until that changes: it has model digest {DIGEST[:12]}" in ended.err
    )
    assert second.stats()["chat_requests"] == 0


@pytest.mark.parametrize(
    ("difference", "told"),
    [
        (OTHER, f"model digest {DIGEST[:12]} instead of"),
        pytest.param({"version": "0.1.0"}, "version 0.1.0 instead of", marks=pytest.mark.thorough),
        ({"most_ctx": 2048}, "a window of 2048 tokens instead of 4096"),
        pytest.param({"models": ["qwen3:8b"]}, "has no model llama3.2", marks=pytest.mark.thorough),
    ],
    ids=["digest", "version", "window", "no model"],
)
def test_run_ends_if_no_server_is_like_the_first(
    site: Site, second: FakeOllama, difference: dict[str, Any], told: str
) -> None:
    second.configure(**difference)
    filled(site, 1)
    ended = site.run(**both(site, second))
    assert ended.code == 2
    assert told in ended.err
    assert "--allow-mixed-models" in ended.err
    assert site.results.count_documents({}) == 0


def test_mixed_models_are_told_apart_in_the_results(site: Site, second: FakeOllama) -> None:
    """Each result names the model that gave it, and is current for the next run."""
    second.configure(**OTHER, latency_s=0.01)
    model_of(site).configure(latency_s=0.01)
    filled(site, 30)
    assert site.run("--allow-mixed-models", **both(site, second)).code == 0
    digests = Counter(result["processing_metadata"]["model_digest"] for result in site.results.find())
    assert digests[DIGEST] == second.stats()["chat_requests"] > 0
    assert len(digests) == 2
    prints = site.results.distinct("processing_metadata.fingerprint")
    assert len(prints) == 30
    plan = site.run("plan", "--json", "--allow-mixed-models", **both(site, second))
    assert '"stale": 0' in plan.out, plan.out
    plan = site.run("plan", "--json", "--allow-mixed-models", "--reply", "labels", **both(site, second))
    assert '"style": 30' in plan.out, plan.out


@pytest.mark.thorough
def test_server_away_at_the_start_joins_later(site: Site, second: FakeOllama) -> None:
    """A sentence tells that it is left out; it takes calls once its probe succeeds."""
    model_of(site).configure(latency_s=0.05)
    address = both(site, second)
    second.stop()
    documents = filled(site, 150)
    with site.start("--limit", "150", "--batch-size", "150", **address, MAX_CONCURRENT="2") as worker:
        worker.await_text(f"{host_and_port(second.url)} takes no calls until that changes")
        second.start()
        second.wait_for("chat_requests", 1)
        ended = worker.ended()
    assert ended.code == 0
    check_exactly_once(site, documents)
    assert {record["options"]["num_ctx"] for record in second.requests()} == {4096}, "the window of the others"


@pytest.mark.slow
def test_killed_server_costs_its_calls_in_flight_and_no_attempt(site: Site, second: FakeOllama) -> None:
    """Exactly the calls that it has not answered are asked elsewhere, while it is dead. It comes back by its probe."""
    model_of(site).configure(latency_s=0.05)
    second.configure(latency_s=0.05, faults=[{"kind": "hang", "when": {"from": 5}}])
    documents = filled(site, 150)
    flags = ("--output", str(site.folder / "out.json"))
    with site.start(*flags, **both(site, second), MAX_CONCURRENT="3", LLM_MAX_ATTEMPTS="1") as worker:
        second.wait_for("chat_requests", 8)
        second.configure(faults=[])
        asked = second.stats()["calls_by_sha"].keys()
        second.kill()
        until(lambda: len(asked & model_of(site).stats()["calls_by_sha"].keys()) == 3)
        second.start()
        second.wait_for("answered", 1)
        ended = worker.ended()
    assert ended.code == 0, ended.said
    check_exactly_once(site, documents)
    stats = json.loads((site.folder / "out.json").read_text())
    assert (stats["successful"], stats["failed"], stats["retried"]) == (150, 0, 0)
    assert model_of(site).stats()["chat_requests"] + second.stats()["chat_requests"] == 150 - 5
    assert f"{host_and_port(second.url)} takes no calls until that changes" in ended.err


def test_server_that_only_fails_is_taken_out(site: Site, second: FakeOllama) -> None:
    """It answers its checks and loads the model, but fails each conversation at once."""
    model_of(site).configure(latency_s=0.02)
    second.configure(faults=[{"kind": "runner_stopped_500"}])
    documents = filled(site, 40)
    ended = site.run(**both(site, second), LLM_MAX_ATTEMPTS="1")
    assert ended.code == 0, ended.said
    check_exactly_once(site, documents)
    assert "5 conversations in a row failed, the last one" in ended.err
    assert second.stats()["chat_requests"] < 20


def test_run_ends_if_all_servers_have_lost_the_model(site: Site, second: FakeOllama) -> None:
    """Waiting would not bring it back."""
    for one in (model_of(site), second):
        one.configure(faults=[{"kind": "model_not_found_404"}])
    filled(site, 20)
    ended = site.run(**both(site, second))
    assert ended.code == 3, ended.said
    assert "has no model llama3.2" in ended.err
    assert site.results.count_documents({}) == 0


def test_mixed_models_do_not_mix_their_tokens(site: Site, second: FakeOllama) -> None:
    """A count of one model would look like a truncated prompt to the other."""
    second.configure(**OTHER, latency_s=0.01, chars_per_token=5)
    model_of(site).configure(latency_s=0.01, chars_per_token=2.5)
    documents = filled(site, 60)
    ended = site.run("--allow-mixed-models", **both(site, second))
    assert ended.code == 0, ended.said
    check_exactly_once(site, documents)
    assert sum(one.stats()["chat_requests"] for one in (model_of(site), second)) == 60


def test_run_ends_if_no_server_answers(site: Site) -> None:
    ended = site.run(OLLAMA_ENDPOINT="http://127.0.0.1:1,http://127.0.0.1:2")
    assert ended.code == 3
    assert "no connection to the model server at http://127.0.0.1:1" in ended.err


async def test_missing_model_is_no_outage(site: Site, second: FakeOllama) -> None:
    """Also when the servers have been left out already, so that the service tells its callers the same each time."""
    settings = load_settings(None, ollama_endpoint=both(site, second)["OLLAMA_ENDPOINT"], ollama_model="missing")
    async with open_pool(settings, 1, fails_fast=True) as pool:
        for _ in range(2):
            with pytest.raises(ConfigurationError, match="no model missing"):
                await pool.prepare()


async def test_service_answers_with_the_first_server_if_no_two_are_alike(site: Site, second: FakeOllama) -> None:
    second.configure(**OTHER)
    settings = load_settings(None, ollama_endpoint=both(site, second)["OLLAMA_ENDPOINT"], ollama_model="llama3.2")
    async with open_pool(settings, 1, fails_fast=True) as pool:
        assert (await pool.prepare()).server_url == model_of(site).url
        assert pool.ready == [pool.servers[0]]


def test_style_is_measured_with_a_server_that_answers(site: Site, second: FakeOllama) -> None:
    filled(site, 3)
    servers = f"http://127.0.0.1:1,{second.url}"
    ended = site.run("--reply", "auto", OLLAMA_ENDPOINT=servers)
    assert ended.code == 0, ended.said
    assert "3 conversations are too few to compare styles" in ended.err


async def load(num_ctx: int, *servers: FakeOllama) -> None:
    """Load the model on *servers* as another program does."""
    async with open_session(2) as session:
        for one in servers:
            settings = load_settings(None, ollama_model="llama3.2", ollama_endpoint=one.url)
            client = AsyncLLMClient(settings, chat_target(settings, "llama3.2"), session)
            await client.warm_up(choose_window(None, None, num_ctx), print)


def test_server_keeps_a_larger_window_of_another_program(site: Site, second: FakeOllama) -> None:
    """The service has loaded the model on one of two servers."""
    asyncio.run(load(8192, second))
    documents = filled(site, 12)
    ended = site.run(**both(site, second))
    assert ended.code == 0, ended.said
    check_exactly_once(site, documents)
    assert {record["options"]["num_ctx"] for record in second.requests()} == {8192}
    assert second.stats()["reloads"] == 0


async def test_server_comes_back_with_less_than_another_worker_asks_for(site: Site, second: FakeOllama) -> None:
    """No server gives the window that was adopted, so it must not be required."""
    for one in (model_of(site), second):
        one.configure(most_ctx=5000)
    settings = load_settings(None, ollama_endpoint=both(site, second)["OLLAMA_ENDPOINT"], ollama_model="llama3.2")
    async with open_pool(settings, 1) as pool:
        await pool.prepare()
        await pool.warm_up(choose_window([3000], None), print)
        pool.adopt(16_384)
        pool.servers[1].client.breaker.open("the connection was reset")
        assert await pool._takes_calls(pool.servers[1]), pool.states()
        assert pool.servers[1].client.target.num_ctx == 5000


async def test_stream_reports_its_servers_and_keeps_their_windows(site: Site, second: FakeOllama) -> None:
    """It has found no documents at its start, so it uses the window that is loaded."""
    servers = both(site, second)["OLLAMA_ENDPOINT"]
    await load(4096, model_of(site), second)
    async with following(site, ollama_endpoint=servers) as stats:
        documents = filled(site, 12)
        await until_async(lambda: site.results.count_documents({}) == 12)
    check_exactly_once(site, documents)
    answered = [one["answered"] for one in stats["servers"]]
    assert sum(answered) == 12
    assert min(answered) > 0
    assert sum(one.stats()["reloads"] for one in (model_of(site), second)) == 0


async def test_states_hold_no_path() -> None:
    """They are stored in MongoDB and shown on a page, and the path of a gateway may be a key."""
    settings = load_settings(None, ollama_endpoint="http://127.0.0.1:1/key,http://127.0.0.1:2", ollama_model="m")
    async with open_pool(settings, 1) as pool:
        with pytest.raises(LLMUnavailableError):
            await pool.prepare()
        assert "127.0.0.1:1;" in pool.states()[0]["problem"]
        assert "key" not in str(pool.states())


async def test_calls_wait_while_no_server_takes_any() -> None:
    """At most for the outage limit."""
    settings = load_settings(
        None, ollama_endpoint="http://127.0.0.1:1,http://127.0.0.1:2", ollama_model="m", outage_limit_s=0.01
    )
    async with open_pool(settings, 1) as pool:
        with pytest.raises(LLMUnavailableError):
            await pool.prepare()
        assert pool.is_open
        assert pool.current == 1
        with pytest.raises(LLMOutageError, match=r"127\.0\.0\.1:2: no connection"):
            await pool.classify(cast("Any", None), cast("Any", None), 0)


async def test_state_has_the_lost_connection_until_the_first_probe() -> None:
    settings = load_settings(None, ollama_endpoint="http://127.0.0.1:1,http://127.0.0.1:2", ollama_model="m")
    async with open_pool(settings, 1) as pool:
        pool.servers[0].client.breaker.open("the connection was reset")
        assert [one["problem"] for one in pool.states()] == ["the connection was reset", ""]

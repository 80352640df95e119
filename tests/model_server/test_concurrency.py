"""``--max-concurrent auto``: the controller on a simulated clock, and the slots that workers hold."""

from __future__ import annotations

import asyncio
import functools
import logging

import pytest

from config import load_settings
from error_handler import ConfigurationError, LLMBusyError, LLMConnectionError, LLMTimeoutError
from model_server.concurrency import LOG_EVERY_S, Call, ConcurrencyLimit, LimitController
from model_server.protocol import ChatReply
from tests.cases import mostly_thorough
from tests.fakes.simulated_model import Service, Simulation, constant, lognormal, uniform

MOST = 64
SETTLED_S = 30.0
TIMES = {
    "0.2 s": constant(0.2),
    "2 s": constant(2.0),
    "log-normal 0.2 s": lognormal(0.2),
    "log-normal 2 s": lognormal(2.0),
    "0.3 to 0.7 s": uniform(0.3, 0.7),
}


more = functools.partial(pytest.param, marks=pytest.mark.thorough)


@functools.cache
def best_fixed(slots: int, service_s: Service, until_s: float) -> tuple[float, float]:
    """Return the most slots that any fixed setting keeps busy, and the least p95 of those within 1 % of it."""
    runs = [
        Simulation(slots, service_s, fixed=number, seed=2).run(until_s)
        for number in (slots // 2, slots, slots + 1, slots + 2, 2 * slots)
    ]
    most = max(run.busy(SETTLED_S, until_s) for run in runs)
    good = [run for run in runs if run.busy(SETTLED_S, until_s) >= 0.99 * most]
    return most, min(run.p95_s(SETTLED_S, until_s) for run in good)


@pytest.mark.parametrize("seed", [1, more(3)])
@pytest.mark.parametrize("slots", [more(4), 8, more(16)])
@pytest.mark.parametrize("times", mostly_thorough(TIMES, 5))
def test_auto_matches_the_best_fixed_setting_after_30_s(slots: int, times: str, seed: int) -> None:
    """At least 95 % of its throughput, and at most 125 % of its 95th percentile of latency."""
    until_s = 230.0 if " 2 s" in f" {times}" else 90.0
    most, p95_s = best_fixed(slots, TIMES[times], until_s)
    auto = Simulation(slots, TIMES[times], LimitController(MOST), seed=seed).run(until_s)
    assert auto.busy(SETTLED_S, until_s) >= 0.95 * most
    assert auto.p95_s(SETTLED_S, until_s) <= 1.25 * p95_s


@pytest.mark.parametrize("until_s", [35.0, more(60.0)])
@pytest.mark.parametrize("slots", [more(4), 8, more(16)])
@pytest.mark.parametrize("service_s", [lognormal(0.02), more(constant(0.005))], ids=["20 ms", "5 ms"])
def test_limit_exceeds_slots_if_the_network_takes_much_of_the_time(
    slots: int, service_s: Service, until_s: float
) -> None:
    """More requests than slots must be in flight to keep the slots busy."""
    most = Simulation(slots, service_s, fixed=2 * slots, seed=2).run(10.0).busy(5.0, 10.0)
    auto = Simulation(slots, service_s, LimitController(MOST), seed=1).run(until_s)
    assert auto.busy(SETTLED_S, until_s) >= 0.95 * most
    assert auto.limit_at(until_s) <= 3 * slots


@pytest.mark.parametrize("seed", mostly_thorough(range(5), 5))
def test_limit_reaches_16_slots_in_30_s_if_answers_take_2_s(seed: int) -> None:
    """Slow answers leave few samples; the limit still grows from 2 to 16."""
    auto = Simulation(16, lognormal(2.0), LimitController(MOST), seed=seed).run(30.0)
    assert 15 <= auto.limit_at(30.0) <= 18


@pytest.mark.parametrize(("before", "after"), [(4, 16), (16, 4), (8, 1), (1, 8)])
def test_limit_follows_a_change_of_slots_within_30_s(before: int, after: int) -> None:
    """More slots and fewer slots are both noticed, and the limit stays there."""
    auto = Simulation(before, lognormal(0.3), LimitController(MOST), seed=1).run(60.0)
    assert abs(auto.limit_at(60.0) - before) <= 1
    auto.slots = after
    auto.run(120.0)
    assert all(abs(auto.limit_at(90.0 + second) - after) <= 2 for second in range(0, 30, 5))
    assert auto.busy(90.0, 120.0) >= 0.93 * after


def test_limit_never_exceeds_the_cap() -> None:
    """A server with more slots than MOST gets MOST."""
    auto = Simulation(200, lognormal(0.3), LimitController(MOST), seed=1).run(60.0)
    assert auto.limit_at(60.0) == MOST
    assert max(limit for _, limit in auto.limits) == MOST


def test_limit_recovers_after_a_burst_of_503() -> None:
    """The limit falls during the burst and is back within half a minute."""
    auto = Simulation(16, lognormal(0.3), LimitController(MOST), seed=1, busy_between=(40.0, 42.0)).run(90.0)
    assert auto.rejected
    assert min(limit for at_s, limit in auto.limits if 40.0 <= at_s <= 43.0) <= 8
    assert abs(auto.limit_at(70.0) - 16) <= 2
    assert auto.busy(60.0, 90.0) >= 0.95 * 16


def test_limit_is_halved_once_for_many_503_of_one_moment() -> None:
    """Sixteen 503 to requests sent before the change halve the limit once; a later one halves it again."""
    controller = LimitController(MOST, start=16)
    calls = [Call(0.0, number) for number in range(1, 17)]
    for call in calls:
        controller.congested(call, 0.1)
    assert controller.limit == 8
    controller.congested(Call(0.2, 1), 0.3)
    assert controller.limit == 4


def test_lost_connections_do_not_change_the_limit() -> None:
    """An outage is handled by the circuit breaker and says nothing about slots."""
    auto = Simulation(8, lognormal(0.3), LimitController(MOST), seed=1, away_between=(40.0, 45.0)).run(46.0)
    assert auto.rejected
    assert all(abs(limit - 8) <= 1 for at_s, limit in auto.limits if at_s >= 40.0)


def test_waiting_for_a_model_load_does_not_change_the_limit() -> None:
    """The first answers wait 20 s for the load; the limit fits soon after."""
    auto = Simulation(8, lognormal(0.3), LimitController(MOST), seed=1, cold_load_s=20.0).run(60.0)
    assert auto.limit_at(19.0) == 2
    assert abs(auto.limit_at(35.0) - 8) <= 1


def test_limit_does_not_grow_without_enough_work() -> None:
    """Two requests at a time do not show that the server runs more than a few."""
    controller = LimitController(MOST)
    now_s = 0.0
    for _ in range(200):
        calls = [Call(now_s, number) for number in (1, 2)]
        now_s += 0.2
        for call in calls:
            controller.answered(call, now_s, ChatReply("{}", None, None, 0.0, 0.0, (), 0.2))
    assert controller.limit <= 5


def test_limit_stays_after_the_last_document() -> None:
    """600 documents on 8 slots leave the limit at 8, although the last ones run alone."""
    auto = Simulation(8, lognormal(0.3), LimitController(MOST), seed=1, documents=600).run(60.0)
    assert len(auto.answers) == 600
    assert abs(auto.limit_at(60.0) - 8) <= 1


@pytest.mark.parametrize("slots", [more(4), 8, more(16)])
def test_latency_decides_if_the_server_reports_no_queue(slots: int) -> None:
    """Constant latency reveals the slots: rather a few too many than too few."""
    auto = Simulation(slots, constant(0.2), LimitController(MOST), tells=False, seed=1).run(90.0)
    assert slots <= auto.limit_at(60.0) <= slots + 3
    assert auto.busy(SETTLED_S, 90.0) >= 0.95 * slots
    auto.slots = 2 * slots
    auto.run(300.0)
    assert auto.busy(240.0, 300.0) >= 1.2 * slots


def test_answers_that_loaded_the_model_do_not_count() -> None:
    """Not even if they report a queue wait as well."""
    controller = LimitController(MOST, start=4)
    calls = [Call(0.0, number) for number in range(1, 5)]
    controller.answered(calls[0], 0.2, ChatReply("{}", None, None, 0.0, 0.0, (), 0.2))
    before = controller.limit
    for call in calls[1:]:
        controller.answered(call, 25.2, ChatReply("{}", None, None, 5.0, 20.0, (), 25.2))
    assert controller.limit == before


FREE = ChatReply("{}", 10, 5, queue_wait_s=0.0, load_s=0.0, total_s=0.1)


class Clock:
    """A clock that a test advances."""

    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


async def free() -> ChatReply:
    """Return an answer that was not queued."""
    await asyncio.sleep(0)
    return FREE


def test_max_concurrent_takes_a_number_or_auto() -> None:
    """most_concurrent is the cap of auto; other values are refused with the setting's name."""
    assert load_settings(None, max_concurrent="auto").most_concurrent == 64
    assert load_settings(None, max_concurrent="AUTO").max_concurrent == "auto"
    assert load_settings(None, max_concurrent=9).most_concurrent == 9
    for wrong in ("automatic", "0", "257", "2.5", "-1"):
        with pytest.raises(ConfigurationError, match=r"MAX_CONCURRENT.*whole number from 1 to 256, or auto"):
            load_settings(None, max_concurrent=wrong)


async def test_slots_are_given_in_order_of_arrival() -> None:
    """Two slots at first; each that is released goes to the first waiter."""
    limit, order, leave = ConcurrencyLimit(64), [], asyncio.Event()

    async def worker(number: int) -> None:
        async with limit.slot():
            order.append(number)
            await leave.wait()

    async with asyncio.TaskGroup() as tasks:
        for number in range(5):
            tasks.create_task(worker(number))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert order == [0, 1]
        leave.set()
    assert order == [0, 1, 2, 3, 4]


async def test_cancelled_waiters_lose_no_slot() -> None:
    """Neither a waiter that is cancelled in the queue, nor one that has just got the slot."""
    limit = ConcurrencyLimit(1)
    holder = limit.slot()
    await holder.__aenter__()
    waiting = [asyncio.create_task(limit.slot().__aenter__()) for _ in range(2)]
    await asyncio.sleep(0)
    waiting[0].cancel()
    await holder.__aexit__(None, None, None)  # gives the place to the second, who is cancelled before it runs
    waiting[1].cancel()
    assert all(
        isinstance(result, asyncio.CancelledError) for result in await asyncio.gather(*waiting, return_exceptions=True)
    )
    async with asyncio.timeout(1), limit.slot():
        pass


async def test_limit_grows_after_answers_without_a_queue() -> None:
    """Two answers without a wait double the limit of 2."""
    limit = ConcurrencyLimit(64)
    await asyncio.gather(*(limit.observed(free) for _ in range(2)))
    assert limit.current == 4


@pytest.mark.parametrize(
    ("error", "after"), [(LLMBusyError("503"), 1), (LLMTimeoutError("late"), 1), (LLMConnectionError("gone"), 2)]
)
async def test_only_503_and_timeouts_halve_the_limit(error: Exception, after: int) -> None:
    """A lost connection does not: the circuit breaker handles it. Each error passes through."""
    limit = ConcurrencyLimit(64)

    async def fail() -> ChatReply:
        raise error

    with pytest.raises(type(error)):
        await limit.observed(fail)
    assert limit.current == after
    assert limit._in_flight == 0


async def test_limit_changes_are_logged_at_most_every_15_s(caplog: pytest.LogCaptureFixture) -> None:
    """However often it changes."""
    caplog.set_level(logging.INFO)
    clock = Clock()
    limit = ConcurrencyLimit(64, clock)
    for _ in range(60):
        clock.now_s += 1
        await asyncio.gather(*(limit.observed(free) for _ in range(limit.current)))
    assert 1 <= len(caplog.messages) <= 60 / LOG_EVERY_S + 1
    assert caplog.messages[0].startswith("model calls in flight: at most ")


async def test_free_slots_are_withdrawn_when_the_limit_falls() -> None:
    """Slots that nobody held when the limit fell are not given out afterwards."""
    limit = ConcurrencyLimit(64)
    await asyncio.gather(*(limit.observed(free) for _ in range(2)))
    limit.controller.limit = 1
    async with limit.slot():
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05), limit.slot():
                pass
    async with asyncio.timeout(1), limit.slot():
        pass

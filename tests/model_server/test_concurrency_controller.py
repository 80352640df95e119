"""The limit of ``--max-concurrent auto`` on a simulated clock: what it settles at, and what it does not mistake for a queue."""

from __future__ import annotations

import functools

import pytest

from model_server.concurrency_controller import LimitController
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
@pytest.mark.parametrize("slots", [4, 8, 16])
@pytest.mark.parametrize("times", TIMES)
def test_as_good_as_the_best_fixed_setting_after_half_a_minute(slots: int, times: str, seed: int) -> None:
    """At least 95 % of its throughput, at most 25 % more latency at the 95th percentile."""
    until_s = 230.0 if " 2 s" in f" {times}" else 90.0
    most, p95_s = best_fixed(slots, TIMES[times], until_s)
    auto = Simulation(slots, TIMES[times], LimitController(MOST), seed=seed).run(until_s)
    assert auto.busy(SETTLED_S, until_s) >= 0.95 * most
    assert auto.p95_s(SETTLED_S, until_s) <= 1.25 * p95_s


@pytest.mark.parametrize("until_s", [35.0, more(60.0)])
@pytest.mark.parametrize("slots", [4, 8, 16])
@pytest.mark.parametrize("service_s", [lognormal(0.02), constant(0.005)], ids=["20 ms", "5 ms"])
def test_a_fast_model_gets_enough_to_keep_its_slots_busy(slots: int, service_s: Service, until_s: float) -> None:
    """The way there and back is a good part of the time, so more than the slots are in flight."""
    most = Simulation(slots, service_s, fixed=2 * slots, seed=2).run(10.0).busy(5.0, 10.0)
    auto = Simulation(slots, service_s, LimitController(MOST), seed=1).run(until_s)
    assert auto.busy(SETTLED_S, until_s) >= 0.95 * most
    assert auto.limit_at(until_s) <= 3 * slots


@pytest.mark.parametrize("seed", range(5))
def test_two_second_answers_and_sixteen_slots(seed: int) -> None:
    """From 2 to 16 in half a minute."""
    auto = Simulation(16, lognormal(2.0), LimitController(MOST), seed=seed).run(30.0)
    assert 15 <= auto.limit_at(30.0) <= 18


@pytest.mark.parametrize(("before", "after"), [(4, 16), (16, 4), (8, 1), (1, 8)])
def test_slots_that_change_in_mid_run(before: int, after: int) -> None:
    """Half a minute later the limit is that of the new slots."""
    auto = Simulation(before, lognormal(0.3), LimitController(MOST), seed=1).run(60.0)
    assert abs(auto.limit_at(60.0) - before) <= 1
    auto.slots = after
    auto.run(120.0)
    assert all(abs(auto.limit_at(90.0 + second) - after) <= 2 for second in range(0, 30, 5))
    assert auto.busy(90.0, 120.0) >= 0.93 * after


def test_more_than_can_be_used_is_not_exceeded() -> None:
    """A server with more slots than the cap gets the cap."""
    auto = Simulation(200, lognormal(0.3), LimitController(MOST), seed=1).run(60.0)
    assert auto.limit_at(60.0) == MOST
    assert max(limit for _, limit in auto.limits) == MOST


def test_503_halves_once_per_moment_and_comes_back() -> None:
    """A burst of 503 of two seconds: down at once, and up again to what was right before."""
    auto = Simulation(16, lognormal(0.3), LimitController(MOST), seed=1, busy_between=(40.0, 42.0)).run(90.0)
    assert auto.rejected
    assert min(limit for at_s, limit in auto.limits if 40.0 <= at_s <= 43.0) <= 8
    assert abs(auto.limit_at(70.0) - 16) <= 2
    assert auto.busy(60.0, 90.0) >= 0.95 * 16


def test_one_503_to_many_halves_once() -> None:
    """Sixteen 503 to requests of the same moment are one sign, not sixteen."""
    controller = LimitController(MOST, start=16)
    calls = [controller.sent(0.0) for _ in range(16)]
    for call in calls:
        controller.congested(call, 0.1)
    assert controller.settled == 8
    controller.congested(controller.sent(0.2), 0.3)
    assert controller.settled == 4


def test_an_outage_is_no_congestion() -> None:
    """Lost connections leave the limit as it is."""
    auto = Simulation(8, lognormal(0.3), LimitController(MOST), seed=1, away_between=(40.0, 45.0)).run(46.0)
    assert auto.rejected
    assert all(abs(limit - 8) <= 1 for at_s, limit in auto.limits if at_s >= 40.0)


def test_a_cold_load_is_no_queue() -> None:
    """The first answers wait 20 s for the model to load; the limit is right soon after."""
    auto = Simulation(8, lognormal(0.3), LimitController(MOST), seed=1, cold_load_s=20.0).run(60.0)
    assert auto.limit_at(19.0) == 2
    assert abs(auto.limit_at(35.0) - 8) <= 1


def test_the_end_of_a_run_is_no_evidence() -> None:
    """A queue that is empty but for two documents at a time does not raise the limit beyond what they show."""
    controller = LimitController(MOST)
    now_s = 0.0
    for _ in range(200):
        calls = [controller.sent(now_s) for _ in range(2)]
        now_s += 0.2
        for call in calls:
            controller.answered(call, now_s, queue_wait_s=0.0, load_s=0.0, total_s=0.2)
    assert controller.settled <= 5


def test_the_last_answers_do_not_pull_the_limit_down() -> None:
    """600 documents on 8 slots: after the last one the limit is still 8."""
    auto = Simulation(8, lognormal(0.3), LimitController(MOST), seed=1, documents=600).run(60.0)
    assert len(auto.answers) == 600
    assert abs(auto.limit_at(60.0) - 8) <= 1


@pytest.mark.parametrize("slots", [4, 8, 16])
def test_a_server_that_tells_no_queue(slots: int) -> None:
    """Latency has to do; times that do not vary much show the slots, a little too many rather than too few."""
    auto = Simulation(slots, constant(0.2), LimitController(MOST), tells=False, seed=1).run(90.0)
    assert slots <= auto.limit_at(60.0) <= slots + 3
    assert auto.busy(SETTLED_S, 90.0) >= 0.95 * slots
    auto.slots = 2 * slots
    auto.run(300.0)
    assert auto.busy(240.0, 300.0) >= 1.2 * slots


def test_answers_that_had_to_load_the_model_tell_nothing() -> None:
    """Not even where they say that they also waited."""
    controller = LimitController(MOST, start=4)
    calls = [controller.sent(0.0) for _ in range(4)]
    controller.answered(calls[0], 0.2, queue_wait_s=0.0, load_s=0.0, total_s=0.2)
    before = controller.settled
    for call in calls[1:]:
        controller.answered(call, 25.2, queue_wait_s=5.0, load_s=20.0, total_s=25.2)
    assert controller.settled == before

"""The arithmetic of the estimate, checked with simulated queues."""

from __future__ import annotations

import heapq
import random

import pytest

from commands.estimate import duration_text
from worker.timing import (
    DocumentTiming,
    Pace,
    mean_tokens,
    measure_pace,
    quote_time,
    slots_held_while_waiting,
)

OVERHEAD_S = 0.002  # network, and our own part


def served(seed: int, count: int, calls: int, slots: int, *, load_s: float = 0.0) -> list[DocumentTiming]:
    """Simulate *count* documents of 1 s on average with *calls* concurrent calls, on a server with *slots* and a queue."""
    source = random.Random(seed)
    free_at_s = [load_s] * slots
    workers = [(0.0, number) for number in range(calls)]
    ended_s: dict[int, float] = {}
    timings = []
    for _ in range(count):
        start_s, worker = heapq.heappop(workers)
        arrived_s = max(start_s, load_s)
        begin_s = max(arrived_s, free_at_s[0])
        done_s = begin_s + source.lognormvariate(-0.08, 0.4)
        heapq.heapreplace(free_at_s, done_s)
        gap_s = start_s - ended_s[worker] if worker in ended_s else None
        timing = DocumentTiming(start_s, done_s + OVERHEAD_S, gap_s, begin_s - arrived_s, arrived_s - start_s, 100, 10)
        timings.append(timing)
        ended_s[worker] = timing.ended_s
        heapq.heappush(workers, (timing.ended_s + OVERHEAD_S, worker))
    return timings


def duration_s(timings: list[DocumentTiming]) -> float:
    return max(timing.ended_s for timing in timings) - min(timing.started_s for timing in timings)


@pytest.mark.parametrize(("samples", "documents"), [(20, 120), pytest.param(60, 40, marks=pytest.mark.thorough)])
@pytest.mark.parametrize(
    ("calls", "slots"),
    [
        (1, 1),
        (4, 8),
        (12, 4),
        *(pytest.param(*counts, marks=pytest.mark.thorough) for counts in [(5, 1), (5, 4), (16, 8)]),
    ],
)
def test_expected_time_is_unbiased_for_any_concurrency(calls: int, slots: int, samples: int, documents: int) -> None:
    """On average over many samples."""
    ratios = []
    for seed in range(samples):
        pace = measure_pace(served(seed, documents, calls, slots), calls)
        truth_s = duration_s(served(1000 + seed, 300, calls, slots))
        ratios.append(quote_time(pace, 300).expected_s / truth_s)
        assert pace.is_server_busy is (calls > slots)
    assert sum(ratios) / len(ratios) == pytest.approx(1.0, abs=0.03)


@pytest.mark.parametrize("samples", [50, pytest.param(150, marks=pytest.mark.thorough)])
def test_interval_covers_the_true_time_in_nine_of_ten_samples(samples: int) -> None:
    """Samples of 20 documents."""
    hits = 0
    for seed in range(samples):
        quote = quote_time(measure_pace(served(seed, 20, 5, 4), 5), 500)
        assert quote.low_s is not None
        assert quote.high_s is not None
        hits += quote.low_s <= duration_s(served(5000 + seed, 500, 5, 4)) <= quote.high_s
    assert 0.84 <= hits / samples <= 0.96


def test_slots_are_counted_while_a_document_waits() -> None:
    """With network time included, and for a server without waits."""
    assert slots_held_while_waiting(served(1, 60, 9, 4)) == pytest.approx(4, abs=0.1)
    assert slots_held_while_waiting(served(1, 60, 3, 8)) == 0.0


def test_small_queue_waits_are_not_a_busy_server() -> None:
    """Servers report a few milliseconds of overhead as queue wait."""
    timings = served(3, 40, 4, 8)
    for timing in timings:
        timing.queue_wait_s = 0.03
    pace = measure_pace(timings, 4)
    assert not pace.is_server_busy
    assert pace.slots == 4


def test_load_time_is_excluded() -> None:
    """The sample is too small to exclude the first documents, and the load takes ten times a document."""
    cold, warm = served(7, 6, 3, 3, load_s=10.0), served(7, 6, 3, 3)
    expected_s = quote_time(measure_pace(warm, 3), 100).expected_s
    assert quote_time(measure_pace(cold, 3), 100).expected_s == pytest.approx(expected_s)


def test_first_document_of_each_call_is_excluded_if_enough_remain() -> None:
    """Servers read the constant part of the prompt only once per slot."""
    timings = served(5, 40, 4, 4)
    usual = measure_pace(timings, 4)
    for timing in timings:
        if timing.gap_s is None:
            timing.ended_s += 100.0
    assert measure_pace(timings, 4).documents_per_s == pytest.approx(usual.documents_per_s)
    few = timings[:5]
    assert len(measure_pace(few, 4).holds_s) == 5


def test_server_without_queue_waits_is_estimated_by_call_time() -> None:
    """The call time includes the waits, so the rate is right although the slots are unknown."""
    timings = served(2, 60, 8, 4)
    for timing in timings:
        timing.queue_wait_s = None
    pace = measure_pace(timings, 8)
    assert pace.wait_share is None
    assert not pace.is_server_busy
    assert quote_time(pace, 300).expected_s == pytest.approx(duration_s(served(9, 300, 8, 4)), rel=0.15)


def test_more_calls_help_only_with_free_slots() -> None:
    """A busy server is no faster with four times the calls, and half as fast with half its slots."""
    busy = measure_pace(served(1, 60, 8, 4), 8)
    assert busy.with_calls(32).documents_per_s == busy.documents_per_s
    assert busy.with_calls(2).documents_per_s == pytest.approx(busy.documents_per_s / 2)
    idle = measure_pace(served(1, 60, 4, 32), 4)
    assert idle.with_calls(8).documents_per_s == pytest.approx(2 * idle.documents_per_s)


def test_idle_slots_at_the_end_are_included() -> None:
    """Five documents in four slots take two rounds, not one and a quarter."""
    quote = quote_time(Pace(4, (1.0,) * 20, None, is_server_busy=False), 5)
    assert (quote.expected_s, quote.low_s, quote.high_s) == (2.0, 2.0, 2.0)


def test_small_sample_has_no_interval() -> None:
    """Four documents give an expected time only."""
    quote = quote_time(measure_pace(served(1, 4, 2, 2), 2), 50)
    assert quote.expected_s > 0
    assert (quote.low_s, quote.high_s) == (None, None)


def test_mean_tokens_ignore_documents_without_counts() -> None:
    told = [DocumentTiming(0, 1, prompt_tokens=100, reply_tokens=20), DocumentTiming(0, 1, None, None, 0, 300, 40)]
    assert mean_tokens([*told, DocumentTiming(0, 1)]) == (200.0, 30.0)
    assert mean_tokens([DocumentTiming(0, 1)]) is None


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.26, "0.3 s"), (99.4, "99 s"), (100, "2 min"), (3590, "1 h 0 min"), (8100, "2 h 15 min"), (266_400, "3 d 2 h")],
)
def test_durations_have_at_most_two_units(seconds: float, text: str) -> None:
    assert duration_text(seconds) == text

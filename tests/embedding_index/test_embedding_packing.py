"""As few calls as the limits allow, and never one beyond them."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedding_index import inputs
from embedding_index.inputs import pack
from embedding_index.providers.contract import RequestLimits

OPENAI = RequestLimits(inputs=2048, input_tokens=8192, request_tokens=300_000)


def log_normal_sizes(count: int, seed: int = 1) -> list[int]:
    """Sizes of real texts: most of some hundred tokens, a few as long as an input may be."""
    rng = random.Random(seed)
    return [min(8192, max(1, int(rng.lognormvariate(5.0, 1.2)))) for _ in range(count)]


def bound(sizes: list[int], limits: RequestLimits, batch_size: int) -> int:
    by_inputs = -(-len(sizes) // min(limits.inputs, batch_size))
    return max(by_inputs, -(-sum(sizes) // limits.request_tokens) if limits.request_tokens else 0)


@given(
    sizes=st.lists(st.integers(1, 50), max_size=80),
    inputs=st.integers(1, 30),
    request_tokens=st.none() | st.integers(20, 200),
    batch_size=st.integers(1, 30),
)
def test_each_input_is_in_one_call_and_the_limits_hold(
    sizes: list[int], inputs: int, request_tokens: int | None, batch_size: int
) -> None:
    calls = pack(sizes, RequestLimits(inputs, 50, request_tokens), batch_size)
    assert sorted(place for call in calls for place in call) == list(range(len(sizes)))
    for call in calls:
        assert 0 < len(call) <= min(inputs, batch_size)
        if request_tokens is not None and len(call) > 1:
            assert sum(sizes[place] for place in call) <= request_tokens


@pytest.mark.parametrize("batch_size", [100, 1000, 2048])
def test_ten_thousand_texts_take_the_least_number_of_calls(batch_size: int) -> None:
    """No packing has fewer: so many inputs, or so many tokens, do not fit into fewer calls."""
    sizes = log_normal_sizes(10_000)
    assert max(sizes) == 8192
    assert len(pack(sizes, OPENAI, batch_size)) == bound(sizes, OPENAI, batch_size)


@given(seed=st.integers(0, 10**6), count=st.integers(1, 3000), batch_size=st.sampled_from([50, 400, 2048]))
def test_the_least_number_whatever_the_texts(seed: int, count: int, batch_size: int) -> None:
    sizes = log_normal_sizes(count, seed)
    assert len(pack(sizes, OPENAI, batch_size)) == bound(sizes, OPENAI, batch_size)


def test_both_limits_tight_at_once() -> None:
    """2,048 inputs and nearly 300,000 tokens in each call."""
    sizes = [146] * (2048 * 5)
    assert len(pack(sizes, OPENAI, 2048)) == 5


def test_large_inputs_that_leave_no_room_are_packed_in_few_tries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two thirds of a call each: one per call, far above the bound by tokens, without a try of each number."""
    spread, tries = inputs._spread, []

    def counted(*arguments: Any) -> list[list[int]] | None:
        tries.append(arguments)
        return spread(*arguments)

    monkeypatch.setattr(inputs, "_spread", counted)
    assert len(pack([200, 101] * 1000, RequestLimits(2048, 300, 300), 100)) <= 2000
    assert len(pack([160] * 1000 + [120] * 1000, RequestLimits(2048, 300, 300), 100)) == 1000
    assert len(tries) < 60


def test_calls_keep_the_order_of_their_inputs() -> None:
    calls = pack([1, 3, 2, 5, 4], RequestLimits(10, 10, None), 10)
    assert calls == [[0, 1, 2, 3, 4]]


def test_an_input_larger_than_a_call_has_its_own() -> None:
    assert sorted(map(len, pack([500, 1, 1], RequestLimits(10, 500, 300), 10))) == [1, 2]


def test_calls_are_about_equally_large() -> None:
    """One of 2,048 inputs beside one of 3 would keep the others waiting."""
    sizes = log_normal_sizes(2051)
    tokens = [sum(sizes[place] for place in call) for call in pack(sizes, OPENAI, 2048)]
    assert max(tokens) < 1.1 * min(tokens)

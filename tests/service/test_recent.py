"""Figures that are computed in the background and kept for some seconds."""

from __future__ import annotations

import asyncio

import pytest

from error_handler import RequestError, StoreUnavailableError
from service.recent import FRESH_S, MAX_KEPT, MAX_WAITING, Figures, Recent
from tests.service.test_parts import settle


class Source:
    """Counts its computations; each waits for ``go``."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.running = 0
        self.most = 0
        self.go = asyncio.Event()
        self.problem: Exception | None = None
        self.now = 0.0
        self.recent = Recent[str, int](self.compute, lambda: self.now)

    async def compute(self, key: str) -> int:
        self.calls.append(key)
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            await self.go.wait()
            if self.problem is not None:
                raise self.problem
            return len(self.calls)
        finally:
            self.running -= 1

    async def get(self, key: str) -> Figures[int]:
        """Ask until there are figures."""
        async with asyncio.timeout(2):
            while (figures := self.recent.last(key)) is None:
                await asyncio.sleep(0)
        return figures


async def test_many_viewers_cost_one_computation() -> None:
    source = Source()
    source.go.set()
    found = await asyncio.gather(*(source.get("a") for _ in range(20)))
    assert {figures.value for figures in found} == {1}
    assert source.calls == ["a"]


async def test_old_figures_are_shown_while_new_ones_are_computed() -> None:
    source = Source()
    source.go.set()
    first = await source.get("a")
    source.now = FRESH_S + 1
    source.go.clear()
    assert source.recent.last("a") is first
    await asyncio.sleep(0)
    assert source.recent.last("a") is first
    assert source.calls == ["a", "a"]
    source.problem = StoreUnavailableError("away")
    source.go.set()
    await asyncio.sleep(0.01)
    assert source.recent.last("a") is first  # of more use than the problem, which is in the log
    source.problem = None
    while source.recent.last("a") is first:
        await asyncio.sleep(0)


async def test_one_computation_runs_at_a_time_and_their_number_is_bounded() -> None:
    source = Source()
    for key in range(MAX_WAITING):
        assert source.recent.last(str(key)) is None
    with pytest.raises(RequestError) as refused:
        source.recent.last("another")
    assert refused.value.kind.name == "QueueFullError"
    await asyncio.sleep(0.01)  # all of them could have begun
    source.go.set()
    await asyncio.gather(*(source.get(str(key)) for key in range(MAX_WAITING)))
    assert source.most == 1


async def test_figures_of_few_keys_are_kept() -> None:
    source = Source()
    source.go.set()
    for key in range(MAX_KEPT + 1):
        await source.get(str(key))
    assert source.recent.last(str(MAX_KEPT)) is not None
    assert source.recent.last("0") is None
    await source.recent.close()


async def test_failed_computation_is_reported_once_and_tried_again(caplog: pytest.LogCaptureFixture) -> None:
    """Also if it is a bug: else the page would wait for ever, and the log would not tell why."""
    source = Source()
    source.go.set()
    source.problem = StoreUnavailableError("away")
    with pytest.raises(StoreUnavailableError):
        await source.get("a")
    source.problem = OverflowError("date value out of range")
    with pytest.raises(RequestError) as failed:
        await source.get("a")
    assert failed.value.kind.name == "InternalError"
    assert caplog.records[-1].exc_info is not None
    source.problem = StoreUnavailableError("away")
    for key in range(MAX_KEPT):  # views that nobody asks for again do not hide the problem of the next one
        assert source.recent.last(str(key)) is None
        await settle()
    with pytest.raises(StoreUnavailableError):
        await source.get("a")
    source.problem = None
    assert (await source.get("a")).value == len(source.calls)

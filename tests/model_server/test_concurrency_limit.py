"""The gate of ``--max-concurrent auto``: places, what requests tell it, and the setting."""

from __future__ import annotations

import asyncio
import logging

import pytest

from config import load_settings
from error_handler import ConfigurationError, LLMBusyError, LLMConnectionError, LLMTimeoutError
from model_server.concurrency import LOG_EVERY_S, ConcurrencyLimit
from model_server.protocol import ChatReply

FREE = ChatReply("{}", 10, 5, queue_wait_s=0.0, load_s=0.0, total_s=0.1)


class Clock:
    """Seconds that pass only when a test says so."""

    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


async def free() -> ChatReply:
    """Answer without a queue."""
    await asyncio.sleep(0)
    return FREE


def test_the_setting() -> None:
    """A number or auto; the cap is what everything that needs a number uses."""
    assert load_settings(None, max_concurrent="auto").most_concurrent == 64
    assert load_settings(None, max_concurrent="AUTO").max_concurrent == "auto"
    assert load_settings(None, max_concurrent=9).most_concurrent == 9
    for wrong in ("automatic", "0", "257", "2.5", "-1"):
        with pytest.raises(ConfigurationError, match=r"MAX_CONCURRENT.*whole number from 1 to 256, or auto"):
            load_settings(None, max_concurrent=wrong)


async def test_places_come_first_come_first_served() -> None:
    """Two at the start; who waits gets in when one leaves."""
    limit, order, leave = ConcurrencyLimit(64), [], asyncio.Event()

    async def worker(number: int) -> None:
        async with limit.place():
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


async def test_a_cancelled_wait_loses_no_place() -> None:
    """Neither one that was only waited for, nor one that was just given."""
    limit = ConcurrencyLimit(1)
    holder = limit.place()
    await holder.__aenter__()
    waiting = [asyncio.create_task(limit.place().__aenter__()) for _ in range(2)]
    await asyncio.sleep(0)
    waiting[0].cancel()
    await holder.__aexit__(None, None, None)  # gives the place to the second, who is cancelled before it runs
    waiting[1].cancel()
    assert all(
        isinstance(result, asyncio.CancelledError) for result in await asyncio.gather(*waiting, return_exceptions=True)
    )
    async with asyncio.timeout(1), limit.place():
        pass


async def test_answers_open_more_places() -> None:
    """An answer that did not wait lets one more in."""
    limit = ConcurrencyLimit(64)
    await asyncio.gather(*(limit.observed(free) for _ in range(2)))
    assert limit.current == 4


@pytest.mark.parametrize(
    ("error", "after"), [(LLMBusyError("503"), 1), (LLMTimeoutError("late"), 1), (LLMConnectionError("gone"), 2)]
)
async def test_what_counts_as_congestion(error: Exception, after: int) -> None:
    """503 and time-outs halve the limit; a lost connection is the breaker's business. The error is let through."""
    limit = ConcurrencyLimit(64)

    async def fail() -> ChatReply:
        raise error

    with pytest.raises(type(error)):
        await limit.observed(fail)
    assert limit.current == after
    assert limit.controller.in_flight == 0


async def test_changes_are_logged_a_few_times_a_minute(caplog: pytest.LogCaptureFixture) -> None:
    """However often the limit changes."""
    caplog.set_level(logging.INFO)
    clock = Clock()
    limit = ConcurrencyLimit(64, clock)
    for _ in range(60):
        clock.now_s += 1
        await asyncio.gather(*(limit.observed(free) for _ in range(limit.current)))
    assert 1 <= len(caplog.messages) <= 60 / LOG_EVERY_S + 1
    assert caplog.messages[0].startswith("model calls in flight: at most ")
    limit.close()

"""The breaker lets calls wait while the server is away; waits are zero here, and probes are steered by hand."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from error_handler import (
    LLMBusyError,
    LLMConnectionError,
    LLMElsewhereError,
    LLMError,
    LLMModelError,
    LLMOutageError,
    LLMReplyError,
    LLMTimeoutError,
    Reason,
)
from model_server.breaker import BreakerPolicy, CircuitBreaker

AT_ONCE = BreakerPolicy(first_probe_s=0.0, probe_cap_s=0.0)


class Server:
    """A server that answers if *alive*, otherwise refuses the connection; counts the calls."""

    def __init__(self, *, alive: bool = True) -> None:
        self.alive = alive
        self.sent = 0
        self.probed = asyncio.Event()
        self.probes = 0
        self.failing: list[LLMError] = []

    async def send(self) -> str:
        self.sent += 1
        if self.failing:
            raise self.failing.pop(0)
        if not self.alive:
            raise LLMConnectionError("refused")
        return "answer"

    async def probe(self) -> bool:
        self.probes += 1
        self.probed.set()
        return self.alive

    async def next_probe(self) -> None:
        """Wait for a probe that starts from now on."""
        self.probed.clear()
        await self.probed.wait()


@pytest.fixture(autouse=True)
async def time_limit() -> AsyncIterator[None]:
    async with asyncio.timeout(20):
        yield


async def opened(server: Server, policy: BreakerPolicy = AT_ONCE) -> tuple[CircuitBreaker, asyncio.Task[str]]:
    """Return an open breaker and the call that opened it."""
    breaker = CircuitBreaker(server.probe, policy)
    call = asyncio.create_task(breaker.call(server.send))
    while not breaker.is_open:
        await asyncio.sleep(0)
    return breaker, call


async def test_a_call_passes_while_closed() -> None:
    """No probe is sent."""
    server = Server()
    breaker = CircuitBreaker(server.probe, AT_ONCE)
    assert await breaker.call(server.send) == "answer"
    assert (server.sent, server.probes, breaker.is_open) == (1, 0, False)


async def test_breaker_opens_after_five_connection_failures_in_a_row() -> None:
    """Four failures do not open it."""
    server = Server(alive=False)
    breaker, call = await opened(server)
    assert server.sent == 5
    assert breaker.openings == 1
    server.alive = True
    assert await call == "answer"


async def test_open_breaker_sends_nothing() -> None:
    """All waiting calls are sent after a probe has closed the breaker."""
    server = Server(alive=False)
    breaker, first = await opened(server)
    others = [asyncio.create_task(breaker.call(server.send)) for _ in range(20)]
    for _ in range(10):
        await server.next_probe()
    assert server.sent == 5
    assert not any(call.done() for call in others)
    server.alive = True
    assert await asyncio.gather(first, *others) == ["answer"] * 21
    assert (server.sent, breaker.is_open, breaker.openings) == (26, False, 1)


async def test_breaker_opens_again_after_it_closed() -> None:
    """Five new failures are needed after it closed."""
    server = Server(alive=False)
    breaker, call = await opened(server)
    server.alive = True
    await call
    server.alive = False
    again = asyncio.create_task(breaker.call(server.send))
    while breaker.openings == 1:
        await asyncio.sleep(0)
    assert server.sent == 6 + 5
    server.alive = True
    assert await again == "answer"
    assert breaker.openings == 2


async def test_error_is_raised_if_the_server_is_alive() -> None:
    """The request may be at fault, so the caller counts the attempt."""
    server = Server()
    server.failing = [LLMConnectionError("reset")]
    breaker = CircuitBreaker(server.probe, AT_ONCE)
    with pytest.raises(LLMConnectionError):
        await breaker.call(server.send)
    assert (server.sent, server.probes) == (1, 1)


async def failures_of(breaker: CircuitBreaker, server: Server, *errors: LLMError) -> None:
    server.failing = list(errors)
    for error in errors:
        with pytest.raises(type(error)):
            await breaker.call(server.send)


@pytest.mark.parametrize(
    "answer",
    [None, LLMBusyError("503"), LLMReplyError("no JSON", Reason.NOT_JSON), LLMModelError("404")],
    ids=["answer", "busy", "unusable", "no-model"],
)
async def test_any_answer_resets_the_failure_count(answer: LLMError | None) -> None:
    """A server that answers is not away."""
    server = Server()
    breaker = CircuitBreaker(server.probe, AT_ONCE)
    lost = [LLMConnectionError("reset")] * 4
    await failures_of(breaker, server, *lost)
    if answer is None:
        await breaker.call(server.send)
    else:
        await failures_of(breaker, server, answer)
    await failures_of(breaker, server, *lost)
    assert breaker.openings == 0


async def test_timeout_neither_counts_nor_resets_the_count() -> None:
    """A slow server is not away, but silence does not show that it is alive."""
    server = Server()
    breaker = CircuitBreaker(server.probe, AT_ONCE)
    lost, slow = LLMConnectionError("reset"), LLMTimeoutError("slow")
    await failures_of(breaker, server, *[slow] * 10)
    await failures_of(breaker, server, lost, lost, lost, lost, slow)
    assert breaker.openings == 0
    server.failing = [lost]
    assert await breaker.call(server.send) == "answer"
    assert breaker.openings == 1


@pytest.mark.parametrize("error", [LLMBusyError("x"), LLMTimeoutError("x"), ValueError("x"), asyncio.CancelledError()])
async def test_other_errors_pass_through(error: BaseException) -> None:
    """They are raised at once, without a probe."""
    server = Server()
    breaker = CircuitBreaker(server.probe, AT_ONCE)

    async def send() -> str:
        raise error

    with pytest.raises(type(error)):
        await breaker.call(send)
    assert server.probes == 0


async def test_open_breaker_that_fails_fast_raises_at_once() -> None:
    """A connection failure is raised as it is; once open, calls fail at once until a probe has closed it."""
    server = Server(alive=False)
    breaker = CircuitBreaker(server.probe, BreakerPolicy(first_probe_s=0.0, probe_cap_s=0.0, fails_fast=True))
    for _ in range(5):
        with pytest.raises(LLMConnectionError):
            await breaker.call(server.send)
    with pytest.raises(LLMOutageError):
        await breaker.call(server.send)
    assert server.sent == 5
    server.alive = True
    while breaker.is_open:
        await asyncio.sleep(0)
    assert await breaker.call(server.send) == "answer"


async def test_an_outage_beyond_the_limit_is_final() -> None:
    """For waiting and for later calls; nothing more is sent."""
    server = Server(alive=False)
    breaker, first = await opened(server, BreakerPolicy(first_probe_s=0.0, probe_cap_s=0.0, outage_limit_s=0.05))
    second = asyncio.create_task(breaker.call(server.send))
    for call in (first, second):
        with pytest.raises(LLMOutageError, match="same command"):
            await call
    server.alive = True
    with pytest.raises(LLMOutageError):
        await breaker.call(server.send)
    assert server.sent == 5


async def test_waiting_call_can_be_cancelled() -> None:
    """The other calls keep waiting."""
    server = Server(alive=False)
    breaker, first = await opened(server)
    second = asyncio.create_task(breaker.call(server.send))
    await server.next_probe()
    second.cancel()
    with pytest.raises(asyncio.CancelledError):
        await second
    server.alive = True
    assert await first == "answer"


async def test_close_stops_the_probes() -> None:
    """A run that was cancelled leaves no task behind; closing twice is harmless."""
    server = Server(alive=False)
    breaker, call = await opened(server)
    call.cancel()
    await asyncio.gather(call, return_exceptions=True)
    await breaker.close()
    await breaker.close()
    probes = server.probes
    for _ in range(10):
        await asyncio.sleep(0)
    assert server.probes == probes
    assert [task for task in asyncio.all_tasks() if task.get_name() == "breaker-probe"] == []


ONE_OF_SEVERAL = BreakerPolicy(first_probe_s=0.0, probe_cap_s=0.0, has_others=True)


@pytest.mark.parametrize("problem", [LLMConnectionError("reset"), LLMTimeoutError("hangs")], ids=["lost", "timeout"])
async def test_call_of_a_dead_server_goes_elsewhere_at_once_if_there_are_others(problem: LLMError) -> None:
    """It does not wait for the server, and the next one sends nothing."""
    server = Server(alive=False)
    server.failing = [problem]
    breaker = CircuitBreaker(server.probe, ONE_OF_SEVERAL)
    for _ in range(2):
        with pytest.raises(LLMElsewhereError):
            await breaker.call(server.send)
    assert (server.sent, breaker.openings) == (1, 1)
    server.alive = True
    await breaker.until_closed()
    assert await breaker.call(server.send) == "answer"


@pytest.mark.parametrize("problem", [LLMConnectionError("reset"), LLMTimeoutError("slow")], ids=["lost", "timeout"])
async def test_call_of_a_live_server_fails_although_there_are_others(problem: LLMError) -> None:
    """The request may be at fault."""
    server = Server()
    server.failing = [problem]
    breaker = CircuitBreaker(server.probe, ONE_OF_SEVERAL)
    with pytest.raises(type(problem)):
        await breaker.call(server.send)
    assert not breaker.is_open


async def test_opened_breaker_closes_by_its_probe() -> None:
    server = Server()
    breaker = CircuitBreaker(server.probe, ONE_OF_SEVERAL)
    breaker.open("another model")
    assert breaker.is_open
    await breaker.until_closed()
    assert await breaker.call(server.send) == "answer"

"""One per turn of the loop, in the order they came."""

from __future__ import annotations

import asyncio
import contextlib

from service.turnstile import Turnstile


async def test_one_enters_per_turn_and_works_alone() -> None:
    """Each has its own turn, so what it does until its next wait is done before the next one begins."""
    turnstile, log = Turnstile(), []

    async def caller(name: str) -> None:
        await turnstile.enter()
        log.append(f"{name} read")
        await asyncio.sleep(0)
        log.append(f"{name} sent")

    await asyncio.gather(*(caller(name) for name in "abc"))
    assert log.index("a sent") < log.index("c read")
    assert [entry for entry in log if entry.endswith("read")] == ["a read", "b read", "c read"]
    assert [entry for entry in log if entry.endswith("sent")] == ["a sent", "b sent", "c sent"]


async def test_who_comes_alone_does_not_wait() -> None:
    turnstile = Turnstile()
    for _ in range(3):
        entering = turnstile.enter()
        with contextlib.suppress(StopIteration):
            entering.send(None)
            raise AssertionError("it waited")
        await asyncio.sleep(0)


async def test_who_leaves_while_waiting_holds_nobody_up() -> None:
    turnstile = Turnstile()
    entered: list[int] = []

    async def caller(number: int) -> None:
        await turnstile.enter()
        entered.append(number)

    tasks = [asyncio.create_task(caller(number)) for number in range(5)]
    await asyncio.sleep(0)
    for task in tasks[1:4]:
        task.cancel()
    await asyncio.wait(tasks)
    assert entered == [0, 4]
    await asyncio.wait_for(turnstile.enter(), 1)

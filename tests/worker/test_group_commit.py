"""Items are written at once when nothing is being written, else together with the next group."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from worker.settlement import GroupCommit


class Store:
    """Keeps the groups it was given; waits before each for as long as *gate* is closed."""

    def __init__(self) -> None:
        self.groups: list[list[int]] = []
        self.begun: list[list[int]] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.busy = 0
        self.error: Exception | None = None

    async def write(self, group: list[int]) -> None:
        self.begun.append(group)
        self.busy += 1
        assert self.busy == 1, "two groups at a time"
        await self.gate.wait()
        await asyncio.sleep(0)
        self.busy -= 1
        if self.error is not None:
            raise self.error
        self.groups.append(group)


@pytest.fixture
async def store() -> AsyncIterator[Store]:
    async with asyncio.timeout(10):
        yield Store()


async def until_begun(store: Store, groups: int) -> None:
    while len(store.begun) < groups:
        await asyncio.sleep(0)


async def test_single_item_is_written_at_once(store: Store) -> None:
    """No timer delays it."""
    commit: GroupCommit[int] = GroupCommit(store.write)
    async with asyncio.TaskGroup() as tasks:
        writer = tasks.create_task(commit.run())
        for item in range(3):
            commit.submit(item)
            await commit.drained()
        writer.cancel()
    assert store.groups == [[0], [1], [2]]


async def test_items_submitted_during_a_write_form_the_next_group(store: Store) -> None:
    """In the order submitted, and one group at a time."""
    commit: GroupCommit[int] = GroupCommit(store.write)
    async with asyncio.TaskGroup() as tasks:
        writer = tasks.create_task(commit.run())
        store.gate.clear()
        commit.submit(0)
        await until_begun(store, 1)
        for item in range(1, 6):
            commit.submit(item)
        store.gate.set()
        await commit.drained()
        writer.cancel()
    assert store.groups == [[0], [1, 2, 3, 4, 5]]


async def test_group_size_is_limited(store: Store) -> None:
    """One message to MongoDB holds so many documents and no more."""
    commit: GroupCommit[int] = GroupCommit(store.write, max_group=4)
    async with asyncio.TaskGroup() as tasks:
        for item in range(10):
            commit.submit(item)
        writer = tasks.create_task(commit.run())
        await commit.drained()
        writer.cancel()
    assert store.groups == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


async def test_drained_waits_for_the_write_to_end(store: Store) -> None:
    """An empty queue is not enough: the last group may still be on its way."""
    commit: GroupCommit[int] = GroupCommit(store.write)
    async with asyncio.TaskGroup() as tasks:
        writer = tasks.create_task(commit.run())
        await commit.drained()
        store.gate.clear()
        commit.submit(1)
        await until_begun(store, 1)
        drained = tasks.create_task(commit.drained())
        for _ in range(10):
            await asyncio.sleep(0)
        assert not drained.done()
        store.gate.set()
        await drained
        assert store.groups == [[1]]
        writer.cancel()


@pytest.mark.parametrize("steps", range(12))
async def test_item_submitted_as_the_last_group_ends_is_written(store: Store, steps: int) -> None:
    """At whatever step of the loop it comes: nothing follows that would wake the writer for it."""
    commit: GroupCommit[int] = GroupCommit(store.write)
    async with asyncio.TaskGroup() as tasks:
        writer = tasks.create_task(commit.run())
        commit.submit(0)
        for _ in range(steps):
            await asyncio.sleep(0)
        commit.submit(1)
        await commit.drained()
        assert [item for group in store.groups for item in group] == [0, 1]
        writer.cancel()


async def test_many_submitters_write_each_item_once(store: Store) -> None:
    """All is written once."""
    commit: GroupCommit[int] = GroupCommit(store.write, max_group=3)

    async def submit(first: int) -> None:
        for item in range(first, first + 50):
            commit.submit(item)
            for _ in range(item % 4):
                await asyncio.sleep(0)

    async with asyncio.TaskGroup() as tasks:
        writer = tasks.create_task(commit.run())
        await asyncio.gather(submit(0), submit(50), submit(100))
        await commit.drained()
        writer.cancel()
    assert sorted(item for group in store.groups for item in group) == list(range(150))


async def test_error_of_write_ends_run(store: Store) -> None:
    """Whoever runs it hears of it."""
    store.error = RuntimeError("the store is gone")
    commit: GroupCommit[int] = GroupCommit(store.write)
    commit.submit(1)
    with pytest.raises(RuntimeError, match="gone"):
        await commit.run()

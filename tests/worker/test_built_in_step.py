"""The built-in classifier as the step of a run: conversations that wait are labelled together, and none is lost."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence

import pytest

from batch_processor import BUILT_IN_AT_ONCE, built_in_classify, built_in_plan
from config import load_taxonomy
from domain.conversation import BASELINE_MODEL, Conversation, Turn
from embedded.baseline import Answer, BaselineClassifier

TAXONOMY = load_taxonomy()
TEXTS = ["Where is my parcel?", "I want my money back", "I love it, thank you!", "My card was declined"]


class Held(BaselineClassifier):
    """Each call tells *began*, and waits for *go*."""

    def __init__(self) -> None:
        super().__init__(TAXONOMY)
        self.began, self.go = threading.Semaphore(0), threading.Semaphore(0)
        self.sizes: list[int] = []

    def answers(self, conversations: Sequence[Conversation]) -> list[Answer]:
        self.sizes.append(len(conversations))
        self.began.release()
        assert self.go.acquire(timeout=30)
        return super().answers(conversations)


def said(text: str) -> Conversation:
    return Conversation("messages", None, (Turn("customer", text),), 1)


async def started(held: Held, count: int) -> list[asyncio.Task[str]]:
    """Return *count* tasks, of which the first is being labelled and the others wait."""
    classify = built_in_classify(held, built_in_plan(TAXONOMY))

    async def topic(text: str) -> str:
        outcome = await classify(said(text), 0)
        assert outcome.model_used == BASELINE_MODEL
        return str(outcome.classification.topic)

    tasks = [asyncio.create_task(topic(TEXTS[number % len(TEXTS)])) for number in range(count)]
    await asyncio.to_thread(held.began.acquire, timeout=30)
    return tasks


def test_conversations_that_wait_are_labelled_together() -> None:
    async def run() -> list[str]:
        tasks = await started(held, BUILT_IN_AT_ONCE + 3)
        held.go.release(3)
        return await asyncio.gather(*tasks)

    held, plain = Held(), BaselineClassifier(TAXONOMY)
    wanted = [str(plain.classify(said(text)).topic) for text in TEXTS]
    topics = asyncio.run(run())
    assert held.sizes == [1, BUILT_IN_AT_ONCE, 2]
    assert topics == [wanted[number % len(TEXTS)] for number in range(len(topics))]


def test_others_are_labelled_if_the_one_that_labels_them_is_cancelled() -> None:
    async def run() -> list[str]:
        first, second, *others = await started(held, 4)
        held.go.release()
        await first
        await asyncio.to_thread(held.began.acquire, timeout=30)  # now the second one labels all that are left
        second.cancel()
        held.go.release(2)
        with pytest.raises(asyncio.CancelledError):
            await second
        return await asyncio.wait_for(asyncio.gather(*others), 5)

    held = Held()
    assert len(asyncio.run(run())) == 2
    assert held.sizes == [1, 3, 3]

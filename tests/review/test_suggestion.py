"""The choice of examples: halves, candidates, and the gain. No model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from aggregator import aggregate_conversation
from config.taxonomy import Example
from domain.conversation import Classification, Conversation
from review.suggestion import (
    MAX_CANDIDATES,
    MAX_EXAMPLE_CHARACTERS,
    MAX_EXAMPLES,
    Reviewed,
    candidates_of,
    halves,
    most_calls,
    suggest,
)
from tests.review.review_site import AGREED


def reviewed(number: int, text: str = "hello", **right: Any) -> Reviewed:
    conversation = aggregate_conversation({"messages": [{"sender": "customer", "text": f"{number} {text}"}]})
    return Reviewed(number, conversation, {**AGREED, **right}, dict(AGREED))


def test_halves_do_not_overlap_and_do_not_change_as_more_is_reviewed() -> None:
    some, more = [reviewed(number) for number in range(40)], [reviewed(number) for number in range(80)]
    first, second = halves(some, 100)
    assert {one.source_id for one in first} | {one.source_id for one in second} == set(range(40))
    assert len(first) > 8
    assert len(second) > 8
    later = halves(more, 100)
    assert {one.source_id for one in first} <= {one.source_id for one in later[0]}
    assert {one.source_id for one in second} <= {one.source_id for one in later[1]}
    assert sum(map(len, halves(more, 10))) == 10
    assert sum(map(len, halves([*more, replace(more[0], source_id="same text")], 100))) == 80


def test_candidates_cover_frequent_mistakes_first() -> None:
    """Accepted and long conversations are none."""
    status = [reviewed(number, "x" * number, intent="Order Status") for number in range(1, 20)]
    other = [reviewed(30 + number, topic="Other") for number in range(3)]
    long = reviewed(50, "x" * MAX_EXAMPLE_CHARACTERS, sentiment="Positive")
    found = candidates_of([*status, *other, long, reviewed(60)])
    assert len(found) == MAX_CANDIDATES
    assert [one.source_id for one in found[:4]] == [1, 30, 2, 31]
    assert not {50, 60} & {one.source_id for one in found}


async def test_only_examples_that_help_are_chosen_and_the_other_half_is_asked_twice() -> None:
    """At most eight; a conversation that is an example is not asked about with that prompt."""
    development = [
        reviewed(number, "helps" if number % 2 else "hinders", intent="Order Status") for number in range(40)
    ]
    others = [reviewed(100 + number, intent="Order Status") for number in range(10)]
    asked: list[tuple[int, int]] = []

    async def ask(examples: Sequence[Example], conversations: Sequence[Conversation]) -> list[Classification | None]:
        asked.append((len(examples), len(conversations)))
        transcripts = {example.transcript for example in examples}
        assert not transcripts & {one.transcript for one in conversations}
        helps = sum("helps" in transcript for transcript in transcripts)
        right = [position < 3 * helps for position in range(len(conversations))]
        return [
            Classification(**AGREED | {"intent": "Order Status" if one else "Other", "categorization": "c"})
            for one in right
        ]

    def example_of(one: Reviewed, said: Classification | None) -> Example:
        assert said is not None
        return Example(one.conversation.transcript, {}, str(one.source_id))

    candidates = candidates_of(development)
    found = await suggest(development, others, candidates, ask, example_of)
    assert 0 < len(found.chosen) <= MAX_EXAMPLES
    assert all("helps" in example.transcript for example in found.chosen)
    assert asked[-2:] == [(0, 10), (len(found.chosen), 10)]
    assert sum(count for _, count in asked) <= most_calls(development, others, candidates)
    assert found.right_with > found.right_without
    gain = found.gain
    assert (gain.labels, gain.right_before, gain.broken) == (30, 20, 0)
    assert gain.right_after == gain.right_before + gain.fixed == 30
    assert gain.interval[0] <= gain.change <= gain.interval[1]

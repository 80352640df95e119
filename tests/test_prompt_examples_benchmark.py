"""The benchmark of prompt examples: choice and measurement on different samples, and its table."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from benchmarks.prompt_examples import DEVELOPMENT, FIELD, OTHERS, _samples, found_by, rows_of
from config.taxonomy import Example
from domain.conversation import Classification, Conversation


class Learner:
    """Says Neutral to everything, and what is expected once the prompt has an example."""

    def __init__(self) -> None:
        self._right = {conversation.transcript: label for _, conversation, label in _samples()}
        self.examples: set[str] = set()

    async def ask(self, examples: Sequence[Example], conversations: Sequence[Conversation]) -> list[Any]:
        self.examples |= {example.transcript for example in examples}
        return [
            Classification(categorization=None, **{FIELD: self._right[one.transcript] if examples else "Neutral"})
            for one in conversations
        ]


def test_gain_is_measured_on_conversations_that_are_no_examples() -> None:
    learner = Learner()
    found = asyncio.run(found_by(learner, quick=False))  # type: ignore[arg-type]
    assert len(found.chosen) == 1
    assert found.development_labels == DEVELOPMENT - 1
    assert (found.gain.conversations, found.gain.right_after) == (OTHERS, OTHERS)
    assert found.gain.right_before < OTHERS
    rows = {row.measure.strip(): (row.product, row.reference) for row in rows_of(found)}
    assert rows["examples chosen"] == ("1", "")
    assert rows[f"right labels of {OTHERS} other conversations, %"][0] == "100.0"

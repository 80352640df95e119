"""Measures what the examples of ``cli.py prompt suggest`` change with a trained model: ``python -m benchmarks examples``.

The model is SmolLM2 on llama.cpp. So that it takes minutes: one field of three labels (the sentiment), and only the
first turn of each sample conversation. The expected labels of the samples stand in for reviewers.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from aggregator import aggregate_conversation
from benchmarks.table import Row
from benchmarks.trained_client import trained_client
from classifier import Classifier
from config import Taxonomy
from config.taxonomy import Example
from domain.conversation import Classification, Conversation
from error_handler import LLMReplyError
from help_desks.reader import SAMPLES, read_documents
from llm_wrapper import LLMClient
from review.suggestion import Reviewed, Suggestion, candidates_of, halves, suggest
from storage.extended_json import canonical, loads

EXPECTED = SAMPLES.with_name("sample_expected.jsonl")
FIELD, EXPECTED_FIELD = "feeling", "sentiment"
TAXONOMY = """
fields:
  feeling:
    definition: What the customer feels.
    labels:
      Positive: {definition: The customer is pleased or praises something.}
      Neutral: {definition: The customer asks or states something without a feeling.}
      Negative: {definition: "The customer is angry, disappointed or worried."}
categorization: false
"""
DEVELOPMENT, OTHERS = 10, 40  # conversations to choose from, and to measure with
QUICK = 2  # of each
CHARACTERS = 160  # of the first turn


def measure(*, quick: bool) -> list[Row]:
    """Choose examples on one part of the English samples and return what they change on the others.

    Raises:
        WorkerFailedError: The model is not installed.
    """
    with trained_client(TAXONOMY, context_tokens=4096) as (client, taxonomy):
        return rows_of(asyncio.run(found_by(Asker(client, taxonomy), quick=quick)))


class Asker:
    """Asks the model one conversation after the other; a question that it answered before costs no call."""

    def __init__(self, client: LLMClient, taxonomy: Taxonomy) -> None:
        self._client = client
        self._taxonomy = taxonomy
        self._known: dict[str, Classification | None] = {}

    async def ask(
        self, examples: Sequence[Example], conversations: Sequence[Conversation]
    ) -> list[Classification | None]:
        """Return what the model says; None for an answer that is not usable."""
        classifier = Classifier(replace(self._taxonomy, examples=tuple(examples)))
        return [self._answer(classifier, one) for one in conversations]

    def _answer(self, classifier: Classifier, conversation: Conversation) -> Classification | None:
        messages = classifier.messages(conversation.transcript)
        key = json.dumps(messages)
        if key not in self._known:
            try:
                self._known[key] = classifier.parse(self._client.chat(messages, classifier.schema_json).text)
            except LLMReplyError:
                self._known[key] = None
            if len(self._known) % 20 == 0:
                print(f"examples: {len(self._known)} calls", file=sys.stderr)
        return self._known[key]


async def found_by(asker: Asker, *, quick: bool) -> Suggestion:
    """Return the examples that ``suggest`` chooses, and their gain on the other conversations."""
    samples = list(_samples())
    development, others = halves([_reviewed(*one, None) for one in samples], len(samples))
    count = QUICK if quick else DEVELOPMENT
    development, others = development[:count], [*others, *development[count:]][: QUICK if quick else OTHERS]
    answers = await asker.ask([], [one.conversation for one in development])
    asked = [
        replace(one, was={FIELD: None if answer is None else str(answer.labels[FIELD])})
        for one, answer in zip(development, answers, strict=True)
    ]
    return await suggest(asked, others, candidates_of(asked), asker.ask, _example)


def _samples() -> list[tuple[Any, Conversation, str]]:
    """Return key, first turn and expected label of the English samples."""
    rows = [loads(line) for line in EXPECTED.read_bytes().splitlines()]
    right = {canonical(row["_id"]): row for row in rows if str(row.get("language", "en")).startswith("en")}
    found = []
    for document in read_documents(SAMPLES):
        if row := right.get(canonical(document["_id"])):
            whole = aggregate_conversation(document)
            turn = replace(whole.turns[0], text=whole.turns[0].text[:CHARACTERS])
            found.append((document["_id"], replace(whole, turns=(turn,)), row["expected"][EXPECTED_FIELD]))
    return found


def _reviewed(key: Any, conversation: Conversation, right: str, was: str | None) -> Reviewed:
    return Reviewed(key, conversation, {FIELD: right}, {FIELD: was})


def _example(one: Reviewed, _said: Classification | None) -> Example:
    return Example(one.conversation.transcript, dict(one.labels), canonical(one.source_id))


def rows_of(found: Suggestion) -> list[Row]:
    """Return the table: right labels in percent, without (reference) and with the examples (product)."""
    gain = found.gain

    def percent(right: int, of: int) -> str:
        return f"{100 * right / of:.1f}" if of else ""

    return [
        Row("examples chosen", str(len(found.chosen)), ""),
        Row(
            f"right labels of the {found.development_labels} conversations to choose from, %",
            percent(found.right_with, found.development_labels),
            percent(found.right_without, found.development_labels),
        ),
        Row(
            f"right labels of {gain.labels} other conversations, %",
            percent(gain.right_after, gain.labels),
            percent(gain.right_before, gain.labels),
        ),
        Row(
            "  change with 95 % interval, points",
            "{:+.1f} ({:+.1f} to {:+.1f})".format(100 * gain.change, *(100 * end for end in gain.interval)),
            "",
        ),
    ]

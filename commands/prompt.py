"""``cli.py prompt suggest``: choose examples for the prompt from corrected conversations, and measure their gain."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import sys
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import async_llm_wrapper as llm
from aggregator import aggregate_conversation
from classifier import Classifier
from commands.flags import Command, add_model_flags, positive
from config import Settings, Taxonomy, load_prompt_taxonomy
from config.examples import examples_json
from config.taxonomy import Example
from domain.conversation import Classification, Conversation
from domain.text import counted
from error_handler import (
    ConfigurationError,
    ExitCode,
    LLMModelError,
    LLMRejectedError,
    LLMReplyError,
    LLMUnavailableError,
    SkippedDocumentError,
)
from model_server.models import chat_target
from mongo_client import DocumentStore
from review.corrections import CorrectionStore
from review.labels import Correction, Label
from review.suggestion import (
    MAX_EXAMPLES,
    Gain,
    Reviewed,
    Suggestion,
    candidates_of,
    halves,
    latest_decisions,
    most_calls,
    suggest,
)
from storage.extended_json import canonical, id_key
from storage.files import replace_file, require_replaceable
from utils.process import number_between
from worker.reply_choice import style_of

if TYPE_CHECKING:
    from openai_batch.masking import Masking

DEFAULT_LIMIT = 80
PAGE = 50
NO_SUMMARY = "Customer support conversation."  # of a conversation that the model gave no usable answer for
LINE_EVERY_S = 5.0
MOST_LOST = 3  # calls without an answer, for example for a timeout; more end the measurement


def _add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", choices=["suggest"], help="choose examples and show their gain")
    group = parser.add_argument_group("prompt")
    group.add_argument(
        "--limit", type=positive, default=DEFAULT_LIMIT, metavar="N", help="use at most N reviewed conversations (80)"
    )
    group.add_argument(
        "--write", type=Path, metavar="FILE", help="write the examples to FILE if they help; see PROMPT_EXAMPLES_FILE"
    )
    group.add_argument(
        "--phone-region", metavar="CODE", help="country whose national phone numbers are masked as well, such as US"
    )
    group.add_argument(
        "--max-concurrent", "--concurrent", type=number_between(int, 1, 256), metavar="N", help="concurrent model calls"
    )
    add_model_flags(group)


async def _run(arguments: argparse.Namespace, settings: Settings) -> int:
    if arguments.write:
        require_replaceable(arguments.write, "--write")
    from openai_batch.masking import Masking  # noqa: PLC0415 - the package takes a second to load, also for cli.py --help

    masking = Masking(arguments.phone_region)
    taxonomy = load_prompt_taxonomy(settings)
    store = DocumentStore(settings)
    try:
        await store.check()
        reviewed = await _reviewed(store, settings, taxonomy)
    finally:
        await store.close()
    development, others = halves(reviewed, arguments.limit)
    candidates = candidates_of(development)
    if not candidates or not others:
        raise ConfigurationError(
            f"There is no example to try in {counted(len(reviewed), 'reviewed conversation')}: corrected ones of at most 1,500 "
            "characters are needed, and others to measure with. Review more: python cli.py review."
        )
    most = most_calls(development, others, candidates)
    sys.stderr.write(
        f"{counted(len(development) + len(others), 'reviewed conversation')}: {len(development)} to choose examples, "
        f"{len(others)} to measure. At most {counted(most, 'model call')}, and a second one for each unusable answer.\n"
    )
    async with _Asker.open(settings, taxonomy, most) as asker:
        masked = _Examples(masking, taxonomy)
        found = await suggest(development, others, candidates, asker.ask, masked.of)
    print(_report(found))
    return _write(arguments.write, taxonomy, found)


async def _reviewed(store: DocumentStore, settings: Settings, taxonomy: Taxonomy) -> list[Reviewed]:
    """Return the reviewed conversations with the decisions whose labels are in *taxonomy*; none is an example already."""
    names = {name: set(taxonomy.names(name)) for name in taxonomy.field_names}
    by_conversation: dict[bytes, list[Correction]] = {}
    async for one in CorrectionStore(store, settings).read_all():
        by_conversation.setdefault(id_key(one.source_conversation_id), []).append(one)
    decided = list(by_conversation.values())
    reviewed = []
    for start in range(0, len(decided), PAGE):
        ids = [found[0].source_conversation_id for found in decided[start : start + PAGE]]
        for document in await store.read_documents("all", ids):
            with contextlib.suppress(SkippedDocumentError):
                conversation = aggregate_conversation(document)
                if taxonomy.is_example(canonical(document["_id"]), conversation.transcript_sha256):
                    continue
                labels, was = latest_decisions(by_conversation[id_key(document["_id"])])
                labels = {name: label for name, label in labels.items() if _are_known(label, names.get(name, set()))}
                reviewed.append(Reviewed(document["_id"], conversation, labels, was))
    return reviewed


def _are_known(label: Label, names: set[str]) -> bool:
    return names.issuperset([label] if isinstance(label, str) else label) and bool(names)


class _Examples:
    """Makes examples from reviewed conversations, without personal data that can be recognised."""

    def __init__(self, masking: Masking, taxonomy: Taxonomy) -> None:
        self._masking = masking
        self._taxonomy = taxonomy

    def of(self, one: Reviewed, said: Classification | None) -> Example:
        """Return the example of *one*; *said* gives what people do not decide, such as the categorization."""
        answer: dict[str, Any] = {} if said is None else dict(said.as_dict())
        if self._taxonomy.has_categorization:  # the short reply styles have no sentence
            answer.setdefault("categorization", NO_SUMMARY)
        texts = [one.conversation.transcript, *([answer["categorization"]] if "categorization" in answer else [])]
        source = canonical(one.source_id)
        mask = self._masking.of(texts, source)
        transcript, *summary = map(mask.hide, texts)
        kept = {name: answer[name] for name in self._taxonomy.field_names if name in answer}
        answer = {**dict(zip(["categorization"], summary, strict=False)), **kept, **one.labels}
        return Example(transcript, answer, source, one.conversation.transcript_sha256)


class _Asker:
    """Asks the model with different examples in the prompt; shows the number of calls."""

    def __init__(self, settings: Settings, taxonomy: Taxonomy, window: llm.SharedWindow, most: int) -> None:
        self._taxonomy = taxonomy
        self._window = window
        self._on_long = settings.on_long
        self._style = style_of(settings, window.target, taxonomy)
        self._slots = asyncio.Semaphore(settings.most_concurrent)
        self._most = most
        self._done = self._lost = 0
        self._shown_s = time.monotonic()

    @classmethod
    @contextlib.asynccontextmanager
    async def open(cls, settings: Settings, taxonomy: Taxonomy, most: int) -> AsyncIterator[_Asker]:
        """Load the model and yield the asker, for at most *most* calls."""
        async with llm.open_session(settings.most_concurrent) as session:
            client = llm.AsyncLLMClient(settings, chat_target(settings, settings.model or ""), session)
            await client.prepare(settings)
            window = llm.SharedWindow(client, settings.ollama_num_ctx)
            try:
                await window.load()
                yield cls(settings, taxonomy, window, most)
            finally:
                await window.close()
                await client.breaker.close()

    async def ask(
        self, examples: Sequence[Example], conversations: Sequence[Conversation]
    ) -> list[Classification | None]:
        """Return what the model says about *conversations*; None for one without a usable answer."""
        added = replace(self._taxonomy, examples=(*self._taxonomy.examples, *examples))
        classifier = Classifier(added, self._on_long, self._style)
        tasks = [asyncio.create_task(self._answer(classifier, one)) for one in conversations]
        try:
            return await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()

    async def _answer(self, classifier: Classifier, conversation: Conversation) -> Classification | None:
        async with self._slots:
            try:
                return (await self._window.classify(classifier, conversation, 0)).classification
            except LLMModelError:  # no conversation will get an answer
                raise
            except (LLMReplyError, LLMRejectedError, SkippedDocumentError):
                return None
            except LLMUnavailableError:
                self._lost += 1
                if self._lost > MOST_LOST:
                    raise
                return None
            finally:
                self._done += 1
                if time.monotonic() - self._shown_s >= LINE_EVERY_S:
                    self._shown_s = time.monotonic()
                    sys.stderr.write(f"prompt suggest: {self._done:,} of at most {self._most:,} calls\n")


def _report(found: Suggestion) -> str:
    if not found.chosen:
        return "No example helps: with each of them the model labels no more conversations as the reviewers did."
    lines = [f"{counted(len(found.chosen), 'example')} (at most {MAX_EXAMPLES}):"]
    for example in found.chosen:
        labels = ", ".join(str(label) for name, label in example.answer.items() if name != "categorization")
        lines.append(f"  {example.source}  {labels}")
    lines.append(
        f"Development half: {found.right_without} of {counted(found.development_labels, 'label')} right without the examples, "
        f"{found.right_with} with them."
    )
    lines.append(_gain_line(found.gain))
    return "\n".join(lines)


def _gain_line(gain: Gain) -> str:
    low, high = gain.interval
    return (
        f"Other half ({counted(gain.conversations, 'conversation')}): {gain.right_before} of {counted(gain.labels, 'label')} right "
        f"without, {gain.right_after} with; {gain.fixed} became right, {gain.broken} wrong. "
        f"Change: {gain.change:+.1%}, 95 % interval {low:+.1%} to {high:+.1%}."
    )


def _write(path: Path | None, taxonomy: Taxonomy, found: Suggestion) -> int:
    """Write the examples if they help on the other half; those that the prompt has already stay."""
    if path is None:
        if found.chosen:
            print("Nothing was changed; --write FILE writes the examples.")
        return ExitCode.DONE
    if found.gain.change <= 0:
        print(f"{path} was not written: there is no gain on the other half.")
        return ExitCode.INCOMPLETE
    replace_file(path, examples_json((*taxonomy.examples, *found.chosen)).encode())
    print(
        f"Wrote {path}. Read it first: e-mail addresses, phone and card numbers are masked, names of people are not. "
        f"PROMPT_EXAMPLES_FILE={path} makes the prompt use it."
    )
    return ExitCode.DONE


COMMAND = Command(
    "prompt", "Suggest examples for the prompt from corrected conversations, with their gain.", _add_flags, _run
)

"""``--reply auto``: measures on a sample which reply style may replace ``full``, and stores the choice.

A short style may be used if either holds:

* it agrees with ``full`` in a random sample: the exact lower bound (one-sided, 95 %) of the share of conversations whose
  labels are the same in every field is at least LEAST_AGREEMENT;
* it loses nothing against gold: on the conversations that people have reviewed, it gets no fewer wholly right than
  ``full``, and the 95 % interval of the change is above -MOST_LOSS.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING

from aggregator import aggregate_conversation
from classifier import Classifier
from config import Settings, Taxonomy, load_prompt_taxonomy
from domain.conversation import SOURCE_FIELDS, Conversation, Outcome
from domain.reply_style import ReplyStyle
from domain.text import counted
from error_handler import LLMModelError, LLMRejectedError, LLMReplyError, LLMUnavailableError, SkippedDocumentError
from evaluation.corrections import read_corrections
from evaluation.fresh_run import choose, read_sources
from evaluation.gold import match
from evaluation.intervals import bootstrap, lower_bound, share_of
from evaluation.sources import Collections
from evaluation.values import Estimate, Labels, Spelling
from model_server.window import tokens_needed
from mongo_client import DocumentStore
from storage.extended_json import Document, canonical, id_key
from storage.subset import ALL, Subset
from utils.retry_utils import RetryPolicy
from worker.plan import open_client, run_window
from worker.reply_choice import can_score, store_choice, stored_choice
from worker.shared_window import loaded_window
from worker.subset import require_query

if TYPE_CHECKING:
    from worker.shared_window import Window

CANDIDATES: tuple[ReplyStyle, ...] = ("score", "list", "labels")  # the shortest first
SAMPLE, GOLD = 200, 200  # conversations
LEAST_AGREEMENT, MOST_LOSS = 0.95, 0.05
LEAST_SAMPLE = 59  # the bound cannot reach LEAST_AGREEMENT with fewer
LINE_EVERY_S = 5.0
MOST_LOST = 3  # calls without an answer, for example for a timeout; more end the measurement

Tell = Callable[[str], None]
Judged = tuple[Conversation, Mapping[str, Labels]]  # with gold labels of some of its fields


@dataclass(frozen=True, slots=True)
class Agreement:
    """The share of conversations for which a style gave the labels of ``full`` in all fields; *low* is the exact lower bound (0 to 1)."""

    same: int
    n: int

    @property
    def low(self) -> float:
        """The lower bound, 0.0 for an empty sample."""
        return lower_bound(self.same, self.n) if self.n else 0.0

    def __str__(self) -> str:
        return f"agrees with full in {self.same} of {self.n} conversations (lower bound {self.low:.3f})"


def loses_nothing(change: Estimate) -> bool:
    """Return whether *change*, the share of wholly right conversations minus that of ``full``, allows a style."""
    return change.n >= LEAST_SAMPLE and (change.value or 0.0) >= 0 and (change.low or 0.0) > -MOST_LOSS


async def settle_style(settings: Settings, tell: Tell, subset: Subset = ALL, *, has_work: bool = False) -> None:
    """Measure which style ``auto`` stands for, unless that is stored; *tell* gets what is found.

    Nothing is measured if no document of *subset* is pending, except if the run *has_work* all the same.

    Raises:
        ConfigurationError: MongoDB does not understand the query of *subset*.
        LLMError: The model server is away, or does not have the model.
        StoreError: MongoDB is not reachable.
    """
    taxonomy = load_prompt_taxonomy(settings)
    store = DocumentStore(settings, subset=subset)
    async with AsyncExitStack() as stack:
        stack.push_async_callback(store.close)
        await store.check()
        await require_query(store, subset.condition, "--filter")
        if not has_work and not await store.count("sweep"):
            return
        client = await open_client(stack, settings, settings.most_concurrent)
        plan = Classifier(taxonomy).plan(await client.prepare(settings))
        if (known := stored_choice(settings.batch_files_dir, plan)) is not None:
            tell(f"reply style auto: {known}, as measured before.")
            return
        sample = [one for document in await _sample(store) for one in _readable(document)]
        if len(sample) < LEAST_SAMPLE:
            tell(
                f"reply style auto: full; {counted(len(sample), 'conversation')} are too few to compare styles "
                f"({LEAST_SAMPLE} are needed)."
            )
            return
        full = Classifier(taxonomy, settings.on_long)
        needs = [tokens_needed(full.truncator.estimator.prompt_tokens(one.transcript)) for one in sample]
        choice = await run_window(client, settings.ollama_num_ctx, partial(_given, needs))
        window = await loaded_window(stack, store.database, client, choice, tell)
        gold = await _gold(settings, store, taxonomy)
        trial = _Trial(window, full, settings, tell, can_score=can_score(client.target, taxonomy))
        found = await trial.choice(sample, gold)
    settings.batch_files_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    store_choice(settings.batch_files_dir, plan, found)


class _Trial:
    """Asks for the same conversations in several styles."""

    def __init__(self, window: Window, full: Classifier, settings: Settings, tell: Tell, *, can_score: bool) -> None:
        self._window, self._full, self._tell, self._can_score = window, full, tell, can_score
        # The limit of ``auto`` follows a run; a trial is too short for that.
        self._at_once = 4 if settings.max_concurrent == "auto" else settings.max_concurrent
        self._shown_s = time.monotonic()
        self._full_on_gold: list[Outcome | None] = []
        self._lost = 0

    async def choice(self, sample: Sequence[Conversation], gold: Sequence[Judged]) -> dict[str, object]:
        """Return the style to use, and what was found about each that was tried."""
        reference = await self._ask("full", sample)
        found: dict[str, object] = {"measured_at": datetime.now(UTC).isoformat(), "style": "full"}
        for style in CANDIDATES if self._can_score else CANDIDATES[1:]:
            sentences, is_good = await self._judged(style, sample, reference, gold)
            found[style] = sentences
            self._tell(f"reply style {style}: {'; '.join(sentences)}.")
            if is_good:
                found["style"] = style
                break
        self._tell(f"reply style auto: {found['style']}, until the model, the prompt or the taxonomy changes.")
        return found

    async def _judged(
        self,
        style: ReplyStyle,
        sample: Sequence[Conversation],
        reference: Sequence[Outcome | None],
        gold: Sequence[Judged],
    ) -> tuple[list[str], bool]:
        answers = await self._asked(style, sample, reference)
        if self._full.restyled(style).for_target(self._window.target).reply_style != style:
            return ["the server takes no arrays" if style == "list" else "the server gives no probabilities"], False
        pairs = [(one, answers[place]) for place, one in enumerate(reference) if one is not None and place in answers]
        agreement = Agreement(sum(_same(one, other) for one, other in pairs), len(pairs))
        tokens = [_mean_tokens([one for one, _ in pairs]), _mean_tokens([other for _, other in pairs])]
        sentences = [str(agreement)]
        if all(tokens):
            sentences.append(f"{tokens[1]:.0f} reply tokens instead of {tokens[0]:.0f}")
        if agreement.low >= LEAST_AGREEMENT:
            return sentences, True
        if len(gold) < LEAST_SAMPLE:
            return sentences, False
        change = await self._change(style, gold)
        sentences.append(
            f"against {change.n} reviewed conversations {change.value:+.3f} ({change.low:+.3f} to {change.high:+.3f})"
        )
        return sentences, loses_nothing(change)

    async def _change(self, style: ReplyStyle, gold: Sequence[Judged]) -> Estimate:
        """Return the change of the share of wholly right conversations from ``full`` to *style*."""
        conversations = [conversation for conversation, _ in gold]
        if not self._full_on_gold:  # the same for each style
            self._full_on_gold = await self._ask("full", conversations)
        full, short = self._full_on_gold, await self._ask(style, conversations)
        changes = [
            _is_right(b, labels) - _is_right(a, labels) for (_, labels), a, b in zip(gold, full, short, strict=True)
        ]
        return bootstrap([changes.count(value) for value in (-1, 0, 1)], share_of([-1, 0, 1]), -1.0)

    async def _ask(self, style: ReplyStyle, conversations: Sequence[Conversation]) -> list[Outcome | None]:
        """Return the answers about *conversations*, None without a usable one."""
        answers = await self._asked(style, conversations, [])
        return [answers.get(place) for place in range(len(conversations))]

    async def _asked(
        self, style: ReplyStyle, conversations: Sequence[Conversation], reference: Sequence[Outcome | None]
    ) -> dict[int, Outcome | None]:
        """Return the answers about *conversations* by their place, None without a usable one; lost calls have no place.

        With *reference*, it ends as soon as so many differ from it that the bound cannot be reached.
        """
        classifier = self._full if style == "full" else self._full.restyled(style)
        answers: dict[int, Outcome | None] = {}
        waiting, differing = iter(range(len(conversations))), 0

        async def work() -> None:
            nonlocal differing
            for index in waiting:
                if reference and Agreement(len(conversations) - differing, len(conversations)).low < LEAST_AGREEMENT:
                    return
                try:
                    answers[index] = await self._answer(classifier, conversations[index])
                except LLMUnavailableError:  # it says nothing about the style
                    self._lost += 1
                    if self._lost > MOST_LOST:
                        raise
                    continue
                if reference and (expected := reference[index]) is not None:
                    differing += not _same(expected, answers[index])
                if time.monotonic() - self._shown_s >= LINE_EVERY_S:
                    self._shown_s = time.monotonic()
                    self._tell(f"reply style {style}: {len(answers)} of {len(conversations)} conversations")

        tasks = [asyncio.create_task(work()) for _ in range(self._at_once)]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
        return answers

    async def _answer(self, classifier: Classifier, conversation: Conversation) -> Outcome | None:
        try:
            return await self._window.classify(classifier, conversation, 0)
        except LLMModelError:  # no conversation will get an answer
            raise
        except (LLMReplyError, LLMRejectedError, SkippedDocumentError):
            return None


def _same(full: Outcome, other: Outcome | None) -> bool:
    return other is not None and other.classification.labels == full.classification.labels


def _is_right(outcome: Outcome | None, gold: Mapping[str, Labels]) -> bool:
    if outcome is None:
        return False
    given = {
        name: (label,) if isinstance(label, str) else label for name, label in outcome.classification.labels.items()
    }
    return all(sorted(given.get(name, ())) == sorted(labels) for name, labels in gold.items())


def _mean_tokens(outcomes: Sequence[Outcome | None]) -> float:
    counts = [one.reply_tokens for one in outcomes if one is not None and one.reply_tokens is not None]
    return sum(counts) / len(counts) if counts else 0.0


async def _given(needs: list[int]) -> list[int]:
    return needs


async def _sample(store: DocumentStore) -> list[Document]:
    return [document async for document in store.sample(SAMPLE, SOURCE_FIELDS)]


def _readable(document: Document) -> list[Conversation]:
    try:
        return [aggregate_conversation(document)]
    except SkippedDocumentError:
        return []


async def _gold(settings: Settings, store: DocumentStore, taxonomy: Taxonomy) -> list[Judged]:
    """Return up to GOLD reviewed conversations with the labels of the reviewers, without the examples of the prompt."""
    collections = Collections(store, RetryPolicy(settings.mongodb_max_retries, settings.mongodb_backoff_s))
    gold = await read_corrections(collections, settings.results_collection, Spelling(taxonomy), is_control=False)
    pairs, _ = await match(gold.entries, partial(collections.conversations, settings.source_collection))
    labels: dict[bytes, dict[str, Labels]] = {}
    for entry, found in pairs:
        labels.setdefault(found.key, {}).update(entry.labels)
    documents = await read_sources(collections, settings, choose(pairs, GOLD))
    return [
        (one, labels[id_key(document["_id"])])
        for document in documents
        for one in _readable(document)
        if not taxonomy.is_example(canonical(document["_id"]), one.transcript_sha256)
    ]

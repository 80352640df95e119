"""Classifies gold conversations with the configured model into a separate results collection; see ``FreshRun``."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Iterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import replace
from functools import partial

import async_llm_wrapper as llm
from aggregator import aggregate_conversation
from config import Settings
from domain.conversation import Conversation, ResultOptions, build_result, result_fingerprint, source_paths
from domain.text import one_line
from error_handler import (
    ConfigurationError,
    LLMError,
    LLMModelError,
    LLMOutageError,
    SkippedDocumentError,
    StoreRejectedError,
)
from evaluation.sources import Collections
from evaluation.values import GoldEntry, Labelled, Problem
from model_server.models import chat_target
from model_server.tokens import TokenEstimator
from model_server.window import tokens_needed
from mongo_client import DocumentStore
from storage.extended_json import Document, id_key, id_text
from storage.selection import StateFields
from worker.checkpoint import RunStats
from worker.intake import Classify
from worker.plan import run_window
from worker.progress import Reporter
from worker.reply_choice import classifier_for
from worker.shared_window import loaded_window

JOB = "evaluation"
OWN = (
    "",
    "_corrections",
    "_review_leases",
    "_counts",
)  # collections beside the results; an index of results blocks them


def evaluation_name(results: str) -> str:
    """Return the default collection for the results of ``--run``."""
    return f"{results}_evaluation"


def choose(pairs: Sequence[tuple[GoldEntry, Labelled]], number: int) -> list[Labelled]:
    """Return *number* conversations of *pairs* in an order that depends only on their ids.

    So two models get the same conversations, and a larger number adds to those of a smaller one.
    """
    conversations = {found.key: found for _, found in pairs}
    in_order = sorted(conversations, key=lambda key: hashlib.sha256(key).digest())
    return [conversations[key] for key in in_order[:number]]


class FreshRun:
    """Classifies documents that are read from the source and are not changed: no status, no lease.

    A conversation that the collection *into* already has, labelled by the same model, prompt and options, is not
    classified again, so the same command resumes an interrupted run.
    """

    def __init__(self, settings: Settings, store: DocumentStore, into: str, reporter: Reporter) -> None:
        """Raise ConfigurationError if *into* is a collection of the worker, or the concurrency is not fixed."""
        own = (settings.source_collection, *(f"{settings.results_collection}{end}" for end in OWN))
        if into in own:
            raise ConfigurationError(f"--run-into {into} is a collection of the worker; name another one.")
        if settings.max_concurrent == "auto":
            raise ConfigurationError("--run requires a fixed concurrency; set --max-concurrent to a number.")
        self._settings, self._reporter = settings, reporter
        self._result_options = replace(ResultOptions.of(settings), keep_original=False)
        self._store = DocumentStore(
            settings.model_copy(update={"results_collection": into}), client=store.database.client
        )
        self._stats = RunStats()
        self._in_flight = 0
        self._problems: list[Problem] = []
        self.failed: set[bytes] = set()  # the id_key of documents without a result of this run

    async def execute(self, documents: Sequence[Document]) -> list[Problem]:
        """Classify *documents* and store their results; return those that have none afterwards.

        Raises:
            LLMError: The model server is away, or does not have the model. Results so far are kept.
        """
        conversations = [pair for document in documents for pair in self._readable(document)]
        self._stats.total = len(conversations)
        await self._store.ensure_result_indexes()
        known = await self._store.result_provenance([document["_id"] for document, _ in conversations])
        async with AsyncExitStack() as stack:
            classify, plan = await self._connect(stack, [one for _, one in conversations])
            queue: list[tuple[Document, Conversation]] = []
            for document, conversation in conversations:
                metadata = known.get(id_key(document["_id"]), {}).get("processing_metadata") or {}
                if metadata.get("fingerprint") == result_fingerprint(plan, conversation.transcript_sha256):
                    self._stats.already_done += 1
                    self._stats.total -= 1
                else:
                    queue.append((document, conversation))
            await self._work_off(classify, queue)
        return self._problems

    def _readable(self, document: Document) -> Iterator[tuple[Document, Conversation]]:
        try:
            yield document, aggregate_conversation(document)
        except SkippedDocumentError as exc:
            self._note("skipped", document, str(exc.reason))

    async def _connect(self, stack: AsyncExitStack, conversations: Sequence[Conversation]) -> tuple[Classify, str]:
        settings = self._settings
        session = await stack.enter_async_context(llm.open_session(settings.most_concurrent))
        asked = replace(chat_target(settings, settings.model or ""), logprobs=True)
        client = llm.AsyncLLMClient(settings, asked, session)
        stack.push_async_callback(client.breaker.close)
        await client.prepare(settings)
        classifier = classifier_for(settings, client.target)
        sample = partial(_needs, conversations, classifier.truncator.estimator)
        choice = await run_window(client, settings.ollama_num_ctx, sample)
        window = await loaded_window(stack, self._store.database, client, choice, lambda _: None)
        return partial(window.classify, classifier), classifier.plan(client.target)

    async def _work_off(self, classify: Classify, queue: list[tuple[Document, Conversation]]) -> None:
        """Classify *queue* with MAX_CONCURRENT tasks; an error that ends the run ends them all."""
        waiting = iter(queue)
        status = "failed"

        async def work() -> None:
            for document, conversation in waiting:
                await self._classify(classify, document, conversation)

        tasks = [asyncio.create_task(work()) for _ in range(min(len(queue), self._settings.most_concurrent))]
        try:
            await asyncio.gather(*tasks)
            status = "completed"
        finally:
            for task in tasks:
                task.cancel()
            self._report(status)

    async def _classify(self, classify: Classify, document: Document, conversation: Conversation) -> None:
        self._in_flight += 1
        self._report("running")
        try:
            outcome = await classify(conversation, 0)
            result = build_result(document, conversation, outcome, JOB, self._result_options)
            for rejected in (await self._store.write_results([result], replace=True)).values():
                raise rejected
        except (LLMOutageError, LLMModelError):
            raise
        except (SkippedDocumentError, LLMError, StoreRejectedError) as exc:
            self._stats.failed += 1
            self._note("failed", document, f"{exc.reason}: {one_line(str(exc), 200)}")
        else:
            self._stats.successful += 1
        finally:
            self._in_flight -= 1
        self._stats.processed += 1
        self._report("running")

    def _note(self, kind: str, document: Document, detail: str) -> None:
        self._problems.append(Problem(kind, id_text(document["_id"]), detail))
        self.failed.add(id_key(document["_id"]))

    def _report(self, status: str) -> None:
        self._reporter.update(JOB, status, self._stats, self._in_flight)


async def _needs(conversations: Sequence[Conversation], estimator: TokenEstimator) -> list[int]:
    return [tokens_needed(estimator.prompt_tokens(one.transcript)) for one in conversations]


async def read_sources(collections: Collections, settings: Settings, chosen: Sequence[Labelled]) -> list[Document]:
    """Return the source documents of the conversations *chosen*, in their order."""
    found: dict[bytes, Document] = {}
    fields = tuple(source_paths(StateFields(settings.status_field), settings.result_metadata))
    for start in range(0, len(chosen), 100):
        ids = [one.document_id for one in chosen[start : start + 100]]
        documents = await collections.find(settings.source_collection, {"_id": {"$in": ids}}, fields)
        found |= {id_key(document["_id"]): document for document in documents}
    return [found[one.key] for one in chosen if one.key in found]

"""The batch worker: pages of documents in, exactly one result each out, through any crash.

docs/architecture.md follows one document through this module.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import runpy
import secrets
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import AsyncExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import async_llm_wrapper as llm
from aggregator import aggregate_conversation
from async_llm_wrapper import SharedWindow
from classifier import ReplyParser
from config import Settings, load_settings, load_taxonomy
from domain.conversation import Conversation, Outcome, result_fingerprint
from domain.result import build_result
from embedded.baseline import BASELINE_MODEL, BaselineClassifier
from error_handler import LLMError, LLMUnavailableError
from model_server.concurrency import ConcurrencyLimit
from model_server.protocol import chat_target, plan_fingerprint
from mongo_client import DocumentStore
from prompt_builder import PromptBuilder
from storage.contract import Document
from utils.batch_file_manager import BatchFiles
from worker.checkpoint import Checkpoint
from worker.intake import DocumentIntake, RunOptions
from worker.items import BatchInWork
from worker.plan import work_kinds
from worker.progress import Reporter
from worker.run import BatchRun, Classify, Steps
from worker.window_sample import run_window, sample_needs

if TYPE_CHECKING:  # of an estimate; a run has none
    from worker.timing import SampleRecorder

logger = logging.getLogger(__name__)

BASELINE_PLAN = "baseline"


class BatchProcessor:
    """Classifies the documents of one collection; one run at a time.

    *settings* None reads them from the environment; further keyword arguments are fields of
    Settings and win. *classify* and *client* replace the model server and the MongoDB client: the
    caller closes what it hands in. *plan* names how *classify* makes its answers (result_fingerprint).
    *recorder*, set before ``connect``, is told of each document that is asked and of each answer of
    the model server. Use as ``async with``, or call ``close``.
    """

    recorder: SampleRecorder | None = None

    def __init__(
        self,
        settings: Settings | None = None,
        *,
        options: RunOptions | None = None,
        classify: Classify | None = None,
        plan: str = "",
        client: Any = None,
        reporter: Reporter | None = None,
        **overrides: Any,
    ) -> None:
        base = {} if settings is None else {name: getattr(settings, name) for name in settings.model_fields_set}
        self.settings = load_settings(**{**base, **overrides}) if settings is None or overrides else settings
        self.options = replace(options or RunOptions(), batch_size=self.settings.batch_size)
        self._given_classify = classify
        self._plan = plan
        self._client = client
        self.reporter = reporter
        self._stack = AsyncExitStack()
        self._connected = False
        self._limit: ConcurrencyLimit | None = None
        self.announce: Callable[[str], None] = lambda _sentence: None  # gets what an operator should see of a start
        self.stop = asyncio.Event()  # set it to end the run: no new documents, calls in flight get the grace period

    async def __aenter__(self) -> BatchProcessor:
        await self.connect()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def connect(self) -> None:
        """Take the directory, reach MongoDB and the model server, and create missing indexes.

        Raises:
            TriadError: The first thing that is wrong, in one sentence; nothing was changed by then.
        """
        if self._connected:
            return
        async with AsyncExitStack() as stack:
            self.files = BatchFiles(self.settings.batch_files_dir)
            self.files.acquire()
            stack.callback(self.files.release)
            self.store = DocumentStore(self.settings, worker_id=self._worker_id(), client=self._client)
            stack.push_async_callback(self.store.close)
            await self.store.check()
            self._source = await self.store.identity()
            self.files.require_source(self._source)
            classify = self._given_classify or await self._connect_model(stack)
            self._classify = self.recorder.recorded(classify) if self.recorder else classify
            await self.store.ensure_result_indexes()
            self._stack = stack.pop_all()
        self._connected = True

    async def _connect_model(self, stack: AsyncExitStack) -> Classify:
        taxonomy = load_taxonomy(self.settings.taxonomy_file)
        prompts, parser = PromptBuilder.from_taxonomy(taxonomy), ReplyParser(taxonomy)
        session = await stack.enter_async_context(llm.open_session(self.settings.most_concurrent))
        if self.settings.max_concurrent == "auto":
            self._limit = ConcurrencyLimit(self.settings.most_concurrent)
        asked = replace(chat_target(self.settings, self.settings.model or ""), logprobs=True)
        on_answer = self.recorder.note_answer if self.recorder else None
        client = llm.AsyncLLMClient(self.settings, asked, session, limit=self._limit, on_answer=on_answer)
        stack.push_async_callback(client.breaker.close)
        await client.prepare(self.settings)
        choice = await run_window(
            client,
            self.settings.ollama_num_ctx,
            lambda client: sample_needs(
                self.store, self.settings.source_collection, client.truncator(prompts).estimator
            ),
        )
        start_s = time.monotonic()
        target = await client.warm_up(choice, self._tell)
        if self.recorder is not None:
            self.recorder.load_s = time.monotonic() - start_s
        logger.info("model %s at %s, window %d tokens", target.model, target.server_url, target.num_ctx)

        self._plan = plan_fingerprint(target, prompts.system_prompt, parser.schema_json)
        window = SharedWindow(client, target.num_ctx)
        stack.push_async_callback(window.close)

        async def classify(conversation: Conversation, rounds: int) -> Outcome:
            with contextlib.suppress(LLMError):  # the call says what is wrong
                await window.renew()
            return await llm.ollama_classify_async(conversation, client, prompts, parser, rounds)

        return classify

    def _tell(self, sentence: str) -> None:
        logger.info(sentence)
        self.announce(sentence)

    async def close(self) -> None:
        """Close what ``connect`` opened and give the directory back; safe to call twice."""
        self._connected = False
        await self._stack.aclose()

    async def fetch_unprocessed_queries(self, limit: int | None = None) -> list[Document]:
        """Return up to *limit* pending documents (None: one batch) in the order of ids; changes nothing."""
        await self.connect()
        return await self.store.read_page("pending", [], [], limit or self.settings.batch_size)

    async def process_document(self, document: Document) -> Document:
        """Classify one document, store its result and return it; the source is not touched.

        Raises:
            SkippedDocumentError: There is nothing to classify.
            LLMError, StoreError: It failed; nothing was stored, and nothing is queued.
        """
        await self.connect()
        conversation = aggregate_conversation(document)
        outcome = await self._classify(conversation, 0)
        result = build_result(
            document,
            conversation,
            outcome,
            "single",
            keep_original=self.settings.store_original_conversation,
            review_below=self.settings.review_below,
        )
        for problem in (await self.store.write_results([result])).values():
            raise problem
        return result

    async def process_batch(self, documents: list[Document]) -> dict[str, Any]:
        """Classify *documents* with every safeguard of a run; return its statistics, as ``run`` does.

        Nothing else is looked for; documents that fail are in the retry queue afterwards.
        """
        return await self._run(lambda intake: [intake.given(documents)], to_the_end=False)

    async def run(self) -> dict[str, Any]:
        """Classify everything that is selected; return the statistics.

        Keys: job_id, documents_processed, successful, failed, skipped, already_done,
        leased_elsewhere, retried, copied, in_retry_queue, in_quarantine, reasons, interrupted, with_confidence,
        needs_review, review_below.

        Raises:
            FailureThresholdError: Too many documents failed.
            TriadError: MongoDB, the model server or the directory failed for good. In each case
                the same command goes on where this one ended.
        """
        return await self._run(
            lambda intake: [intake.recovered(), intake.retry_round(), intake.fresh()], to_the_end=True
        )

    async def _run(
        self, sources: Callable[[DocumentIntake], list[AsyncGenerator[BatchInWork]]], *, to_the_end: bool
    ) -> dict[str, Any]:
        await self.connect()
        kinds = work_kinds(self.store, self.settings, self._plan or None) if self.options.only else None
        steps = Steps(aggregate_conversation, self._classify, self._plan, kinds)
        saved = self.files.read_state("checkpoint.json")
        options = self.options
        checkpoint = Checkpoint.resume_or_new(saved, self._source, reprocess=options.reprocess, only=options.only)
        checkpoint.worker_id = self._worker_id()
        run = BatchRun(self.settings, self.options, self.store, self.files, steps, checkpoint=checkpoint)
        run.stop, run.reporter, run.limit = self.stop, self.reporter, self._limit
        return await run.execute(sources(run.intake), to_the_end=to_the_end)

    def _worker_id(self) -> str:
        """Return the id under which this directory's worker holds leases, the same after a crash."""
        for name in ("worker.json", "checkpoint.json"):
            worker_id = (self.files.read_state(name) or {}).get("worker_id")
            if isinstance(worker_id, str):
                return worker_id
        worker_id = f"worker-{secrets.token_hex(8)}"
        self.files.write_state("worker.json", {"worker_id": worker_id})
        return worker_id


async def find_model(settings: Settings) -> str | None:
    """Return the model to ask: the one named, else the first local one of the server; None where none answers."""
    async with llm.open_session(1) as session:
        client = llm.AsyncLLMClient(settings, chat_target(settings, settings.model or ""), session)
        try:
            if settings.model is not None:
                return (await client.prepare(settings)).model
            return next((model.name for model in await client.list_models() if not model.remote), None)
        except LLMUnavailableError:
            return None


def baseline_classify(baseline: BaselineClassifier) -> Classify:
    """Return *baseline* in the form that a run asks, with metadata that says what it is."""

    async def classify(conversation: Conversation, _rounds: int) -> Outcome:
        await asyncio.sleep(0)  # it computes; let signals and writes have their turn between two documents
        start = time.monotonic()
        labels = baseline.classify(conversation)
        return Outcome(
            labels,
            model_used=BASELINE_MODEL,
            model_digest=None,
            input_sha256=conversation.transcript_sha256,
            fingerprint=result_fingerprint(BASELINE_PLAN, conversation.transcript_sha256),
            duration_ms=round((time.monotonic() - start) * 1000),
        )

    return classify


if __name__ == "__main__":
    # The same command under the name that older scripts call; an import would point upwards.
    runpy.run_module("cli", run_name="__main__")

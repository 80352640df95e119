"""The batch worker as a class: ``BatchProcessor(...).run()`` connects all parts and classifies a collection."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import runpy
import secrets
import time
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import async_llm_wrapper as llm
from aggregator import aggregate_conversation
from async_llm_wrapper import SharedWindow
from config import Settings, Taxonomy, load_prompt_taxonomy, load_settings
from domain.conversation import Conversation, Outcome, ResultOptions, build_result, result_fingerprint
from error_handler import ConfigurationError, LLMUnavailableError
from model_server.concurrency import ConcurrencyLimit
from model_server.models import chat_target
from mongo_client import DocumentStore
from storage.extended_json import Document
from storage.service_lease import server_name
from utils.batch_file_manager import BatchFiles
from worker.checkpoint import Checkpoint
from worker.describe import DescriptionPass, describing_classifier
from worker.heartbeat import Heartbeat
from worker.intake import Classify, RunOptions, RunParts, has_work
from worker.model_use import ModelUse
from worker.plan import plan_of, run_window, sample_if_in_time
from worker.progress import Reporter
from worker.reply_choice import classifier_for
from worker.run import BatchRun
from worker.service_first import ServiceFirst
from worker.staleness import BASELINE_PLAN, Plan, StalenessChecker

if TYPE_CHECKING:  # few runs have a built-in classifier, a student or a stream, and only an estimate records its calls
    from embedded.baseline import Answer
    from embedded.choice import BuiltInClassifier
    from student.first_answer import FirstAnswer
    from worker.stream import StreamState
    from worker.timing import SampleRecorder

BUILT_IN_AT_ONCE = 16  # conversations; more take no less time for each

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Observers:
    """The observers of a run.

    *reporters* get its progress, *recorder* each document that is asked and each reply of the model server, *announce*
    the sentences that an operator should see while the run starts, *model* what the model server reports.
    """

    reporters: Sequence[Reporter] = ()
    recorder: SampleRecorder | None = None
    announce: Callable[[str], None] | None = None
    model: ModelUse = field(default_factory=ModelUse)


class BatchProcessor:
    """Classifies the documents of one collection; one run at a time.

    *settings* None reads them from the environment; further keyword arguments are fields of Settings and take
    precedence. *classify* and *client* replace the model server and the MongoDB client; the caller closes what it
    passes in. *plan* identifies how *classify* produces its answers (see result_fingerprint). Use as ``async with``, or
    call ``close``.
    """

    def __init__(
        self,
        settings: Settings | None = None,
        *,
        options: RunOptions | None = None,
        classify: Classify | None = None,
        plan: str = "",
        client: Any = None,
        observers: Observers | None = None,
        **overrides: Any,
    ) -> None:
        base = {} if settings is None else {name: getattr(settings, name) for name in settings.model_fields_set}
        self.settings = load_settings(**{**base, **overrides}) if settings is None or overrides else settings
        self.options = replace(options or RunOptions(), batch_size=self.settings.batch_size)
        self._given_classify = classify
        self._plan = Plan(plan) if plan else None
        self._client = client
        self._observers = observers or Observers()
        self._stack = AsyncExitStack()
        self._connected = False
        self._limit: ConcurrencyLimit | None = None
        self._window: SharedWindow | None = None  # None without a model server
        self._heartbeat: Heartbeat | None = None
        self._stream: StreamState | None = None
        self.stop = asyncio.Event()  # set it to end the run: no new documents, a grace period for calls in flight

    async def __aenter__(self) -> BatchProcessor:
        await self.connect()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def connect(self) -> None:
        """Lock the directory, connect to MongoDB and the model server, create missing indexes; change no document."""
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
            if self.settings.mode == "stream":
                from worker.stream import open_stream  # noqa: PLC0415 - only for this mode

                self._stream = await open_stream(self.store, self.files, self._source, self.settings)
            self._heartbeat = self._new_heartbeat()
            taxonomy = load_prompt_taxonomy(self.settings)
            classify = self._given_classify or await self._connect_model(stack, taxonomy)
            recorder = self._observers.recorder
            self._classify = recorder.recorded(classify) if recorder else classify
            await self.store.ensure_result_indexes(taxonomy.field_names)
            if self._heartbeat is not None:
                self._heartbeat.start()
                stack.push_async_callback(self._heartbeat.close)
            self._stack = stack.pop_all()
        self._connected = True

    async def _connect_model(self, stack: AsyncExitStack, taxonomy: Taxonomy) -> Classify:
        session = await stack.enter_async_context(llm.open_session(self.settings.most_concurrent))
        if self.settings.max_concurrent == "auto":
            self._limit = ConcurrencyLimit(self.settings.most_concurrent)
        asked = replace(chat_target(self.settings, self.settings.model or ""), logprobs=True)
        recorder = self._observers.recorder
        model = self._observers.model
        on_answer = (recorder or model).note_answer
        client = llm.AsyncLLMClient(self.settings, asked, session, limit=self._limit, on_answer=on_answer)
        model.breaker = client.breaker
        stack.push_async_callback(client.breaker.close)
        await client.prepare(self.settings)
        classifier = classifier_for(self.settings, client.target, taxonomy)
        self._plan = plan_of(classifier, client.target)
        student = await self._open_student(stack, taxonomy, self._plan)
        asked_ctx = self.settings.ollama_num_ctx
        if await has_work(self.store, self.files, self.options, self._kinds(self.options)):
            sample = partial(sample_if_in_time, self.store, classifier.truncator.estimator)
            choice = await run_window(client, asked_ctx, sample)
            start_s = time.monotonic()
            asked_ctx = (await client.warm_up(choice, self._tell)).num_ctx
            if recorder is not None:
                recorder.note_load(time.monotonic() - start_s)
        target = client.target
        logger.info("model %s at %s, window %d tokens", target.model, target.server_url, target.num_ctx)
        window = self._window = SharedWindow(client, asked_ctx)  # it loads the model for documents that come later
        stack.push_async_callback(window.close)
        ask = partial(window.classify, classifier)
        return student.before(ask) if student else ask

    async def _open_student(self, stack: AsyncExitStack, taxonomy: Taxonomy, plan: Plan) -> FirstAnswer | None:
        """Return the student that answers before the model; None if it is off or has withdrawn."""
        promise = self.settings.student
        if promise is None or self.options.only == "student":  # the model redoes what it did
            return None
        from student.choice import open_first_answer  # noqa: PLC0415 - its packages are optional

        directory = self.settings.batch_files_dir
        student, log = await asyncio.to_thread(open_first_answer, directory, promise, plan, taxonomy, self._tell)
        stack.callback(log.close)
        return student

    def _kinds(self, options: RunOptions) -> StalenessChecker | None:
        return StalenessChecker(self.store, self.files.directory, self._plan) if options.only else None

    def _tell(self, sentence: str) -> None:
        logger.info(sentence)
        if self._observers.announce is not None:
            self._observers.announce(sentence)

    async def close(self) -> None:
        """Close what ``connect`` opened and release the directory; safe to call twice."""
        self._connected = False
        await self._stack.aclose()

    async def fetch_unprocessed_queries(self, limit: int | None = None) -> list[Document]:
        """Return up to *limit* pending documents (None: one batch) in the order of ids, and change nothing."""
        await self.connect()
        return await self.store.read_page("pending", [], [], limit or self.settings.batch_size)

    async def process_document(self, document: Document) -> Document:
        """Classify one document, store its result and return it; the source document does not change.

        Raise SkippedDocumentError if there is nothing to classify, LLMError or StoreError if it failed. Nothing is stored
        or queued for retry then.
        """
        await self.connect()
        conversation = aggregate_conversation(document)
        outcome = await self._classify(conversation, 0)
        result = build_result(document, conversation, outcome, "single", ResultOptions.of(self.settings))
        for problem in (await self.store.write_results([result])).values():
            raise problem
        return result

    async def process_batch(self, documents: list[Document]) -> dict[str, Any]:
        """Classify only *documents*; failed ones are in the retry queue or quarantine afterwards. Return statistics as ``run`` does."""
        run = await self._new_run()
        return await run.execute([run.intake.given(documents)], to_the_end=False)

    async def run(self) -> dict[str, Any]:
        """Classify all selected documents; return the statistics.

        Keys: job_id, documents_processed, successful, failed, skipped, already_done, leased_elsewhere, retried, copied,
        in_retry_queue, in_quarantine, not_selected, reasons, interrupted, with_confidence, needs_review, held_back_s, review_below. After a
        TriadError (too many documents failed, or MongoDB, the model server or the directory), the next run resumes.
        """
        run = await self._new_run()
        sources = [run.intake.recovered(), run.intake.retry_round(), run.intake.fresh()]
        return await run.execute(sources, to_the_end=True)

    async def follow(self, sweep_every_s: float) -> dict[str, Any]:
        """Classify conversations as they come or grow, until ``stop`` is set; return the statistics as ``run`` does.

        Each *sweep_every_s*, look at all pending documents. For settings with the mode ``stream``; ``run`` comes first.
        """
        from worker.stream import StreamIntake  # noqa: PLC0415 - only for this mode

        await self.connect()
        if self._stream is None:
            raise ConfigurationError("follow needs the mode stream: BatchProcessor(mode='stream').")
        run = await self._new_run(replace(self.options, only="changed", retry_failed=False))
        intake = StreamIntake(run.intake, self._stream)
        return await run.execute([intake.live(sweep_every_s)], to_the_end=False)

    async def describe(self) -> dict[str, Any]:
        """Write the sentence (``categorization``) into the results that lack it; the labels do not change.

        Return the counts: described, failed, left (changed since, or gone), and the reasons of failures. Raise
        ConfigurationError if there is no model server or the taxonomy has no sentence, else as ``run`` does.
        """
        await self.connect()
        if self._window is None:
            raise ConfigurationError(
                "--describe needs a model server; a built-in classifier writes the sentence itself."
            )
        taxonomy = load_prompt_taxonomy(self.settings)
        describe = partial(self._window.classify, describing_classifier(taxonomy, self.settings))
        at_once = self.settings.most_concurrent if self._limit is None else self._limit.current
        made = DescriptionPass(self.settings, self.store, describe, self.stop, at_once, self._observers.reporters)
        stats = await made.execute()
        return {
            "described": stats.successful,
            "failed": stats.failed,
            "left": stats.skipped,
            "reasons": stats.reasons,
            "interrupted": self.stop.is_set(),
        }

    async def _new_run(self, options: RunOptions | None = None) -> BatchRun:
        await self.connect()
        options = options or self.options
        saved = self.files.read_state("checkpoint.json")
        checkpoint = Checkpoint.resume_or_new(
            saved, self._source, self._worker_id(), reprocess=options.reprocess, only=options.only
        )
        parts = RunParts(
            self.settings,
            options,
            self.store,
            self.files,
            checkpoint,
            self.stop,
            self._classify,
            plan=self._plan.fingerprint if self._plan else "",
            kinds=self._kinds(options),
            reporters=[*self._observers.reporters, *([] if self._heartbeat is None else [self._heartbeat])],
            limit=self._limit,
            service_first=self._service_first(),
            go=None if self._heartbeat is None else self._heartbeat.go,
        )
        return BatchRun(parts)

    def _new_heartbeat(self) -> Heartbeat | None:
        """Return the heartbeat; None for an estimate, and for a client that was passed in: mongomock knows no pipelines."""
        settings = self.settings
        if not settings.worker_heartbeat or self._client is not None or self._observers.recorder is not None:
            return None
        worker, results = self._worker_id(), settings.results_collection
        model, most = self._observers.model, settings.most_concurrent
        heartbeat = Heartbeat(self.store.database, results, worker, self.stop, most, model)
        heartbeat.mode = settings.mode
        return heartbeat

    def _service_first(self) -> ServiceFirst | None:
        settings = self.settings
        if not settings.service_lease or self._given_classify is not None:
            return None
        return ServiceFirst(self.store.database, server_name(settings.server_url), settings.worker_floor)

    def _worker_id(self) -> str:
        """Return the id under which the worker of this directory holds leases, the same after a crash."""
        for name in ("worker.json", "checkpoint.json"):
            worker_id = (self.files.read_state(name) or {}).get("worker_id")
            if isinstance(worker_id, str):
                return worker_id
        worker_id = f"worker-{secrets.token_hex(8)}"
        self.files.write_state("worker.json", {"worker_id": worker_id})
        return worker_id


async def find_model(settings: Settings) -> str | None:
    """Return the configured model, or the first local model that can chat; None if there is none or no server answers."""
    async with llm.open_session(1) as session:
        client = llm.AsyncLLMClient(settings, chat_target(settings, settings.model or ""), session)
        try:
            if settings.model is not None:
                return (await client.prepare(settings)).model
            for model in await client.list_models():
                if model.chats and not model.remote and (await client.show(model.name)).can_chat:
                    return model.name
            return None
        except LLMUnavailableError:
            return None


def built_in_plan(taxonomy: Taxonomy) -> str:
    """Return the plan_fingerprint of a built-in classifier with *taxonomy*: the same for each of them."""
    return f"{BASELINE_PLAN}-{hashlib.sha256(repr(taxonomy.fields).encode()).hexdigest()[:16]}"


def built_in_classify(classifier: BuiltInClassifier, plan: str = BASELINE_PLAN) -> Classify:
    """Return *classifier* as the classify step of a run; the results name the built-in classifier that gave their labels.

    *plan* is that of ``built_in_plan``. Conversations that wait at the same time are labelled together, because that takes less time.
    """
    waiting: list[tuple[Conversation, asyncio.Future[Answer]]] = []
    one_at_a_time = asyncio.Lock()

    async def label_waiting() -> None:
        taken = waiting[:BUILT_IN_AT_ONCE]
        del waiting[:BUILT_IN_AT_ONCE]
        try:
            # Signals and writes go on meanwhile.
            answers = await asyncio.to_thread(classifier.answers, [conversation for conversation, _ in taken])
            for (_, future), answer in zip(taken, answers, strict=True):
                future.set_result(answer)
        finally:  # if this task was cancelled, another one that waits labels the rest
            waiting.extend(pair for pair in taken if not pair[1].done())

    async def classify(conversation: Conversation, _rounds: int) -> Outcome:
        start = time.monotonic()
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        waiting.append((conversation, future))
        async with one_at_a_time:
            while not future.done():
                await label_waiting()
        answer = future.result()
        return Outcome(
            answer.classification,
            model_used=answer.model,
            model_digest=None,
            input_sha256=conversation.transcript_sha256,
            fingerprint=result_fingerprint(answer.plan or plan, conversation.transcript_sha256),
            plan=answer.plan or plan,
            duration_ms=round((time.monotonic() - start) * 1000),
            confidence=answer.confidence,
        )

    return classify


if __name__ == "__main__":
    # The same command under its older name; an import would point upwards.
    runpy.run_module("cli", run_name="__main__")

"""The batch worker as a class: ``BatchProcessor(...).run()`` connects all parts and classifies a collection."""

from __future__ import annotations

if __name__ == "__main__":
    # The same command under its older name, which does not return; an import would point upwards.
    import runpy

    runpy.run_module("cli", run_name="__main__")

import asyncio
import hashlib
import logging
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
from storage.subset import parsed_query
from utils.batch_file_manager import BatchFiles
from worker.checkpoint import Checkpoint, worker_id
from worker.describe import DescriptionPass, describing_classifier
from worker.heartbeat import Heartbeat
from worker.intake import Classify, DocumentIntake, RunOptions, RunParts, Slots, has_work
from worker.model_use import ModelUse
from worker.plan import plan_of, run_window, sample_if_in_time
from worker.progress import Reporter
from worker.reply_choice import classifier_for
from worker.run import BatchRun
from worker.service_first import ServiceFirst
from worker.shared_window import loaded_window, window_of
from worker.staleness import BASELINE_PLAN, Plan, StalenessChecker
from worker.subset import require_query

if TYPE_CHECKING:  # few runs have a built-in classifier, a student, several servers, a stream, or a recorder
    from embedded.baseline import Answer
    from embedded.choice import BuiltInClassifier
    from student.first_answer import FirstAnswer
    from worker.server_pool import ServerPool
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
        self._options = options or RunOptions()
        self._given_classify = classify
        self._plan = Plan(plan) if plan else None
        self._client = client
        self._observers = observers or Observers()
        self._stack = AsyncExitStack()
        self._connected = False
        self._limit: Slots | None = None
        self._pool: ServerPool | None = None  # None with one model server
        self._window: SharedWindow | ServerPool | None = None  # None without a model server
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
            subset = self._options.subset
            self.store = DocumentStore(
                self.settings, worker_id=worker_id(self.files), client=self._client, subset=subset
            )
            stack.push_async_callback(self.store.close)
            await self.store.check()
            await require_query(self.store, subset.condition, "--filter")
            for rule in self.settings.priority_rules or ():
                await require_query(self.store, parsed_query(rule.query, "PRIORITY_RULES"), "PRIORITY_RULES")
            self._source = await self.store.identity()
            self.files.require_source(self._source)
            if self.settings.mode == "stream":
                from worker.stream import open_stream  # noqa: PLC0415 - only for this mode

                self._stream = await open_stream(self.store, self.files, self._source, self.settings, subset.name)
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
        client = await self._open_client(stack)
        recorder = self._observers.recorder
        await client.prepare(self.settings)
        classifier = classifier_for(self.settings, client.target, taxonomy)
        self._plan = plan_of(classifier, client.target, () if self._pool is None else self._pool.other_targets)
        student = await self._open_student(stack, taxonomy, self._plan)
        if await has_work(self.store, self.files, self._options, self._kinds(self._options)):
            sample = partial(sample_if_in_time, self.store, classifier.truncator.estimator)
            choice = await run_window(client, self.settings.ollama_num_ctx, sample)
            on_load = recorder.note_load if recorder else None
            window = await loaded_window(stack, self.store.database, client, choice, self._tell, on_load)
        else:  # it loads the model for documents that come later
            window = window_of(client, self.settings.ollama_num_ctx)
            stack.push_async_callback(window.close)
        self._window = window
        target = client.target
        logger.info("model %s at %s, window %d tokens", target.model, target.address, target.num_ctx)
        ask = partial(window.classify, classifier)
        return student.before(ask) if student else ask

    async def _open_client(self, stack: AsyncExitStack) -> llm.AsyncLLMClient | ServerPool:
        """Return the client of the model server, or the pool of several."""
        settings, model = self.settings, self._observers.model
        on_answer = (self._observers.recorder or model).note_answer
        if len(settings.ollama_endpoints) > 1:
            from worker.server_pool import open_pool  # noqa: PLC0415 - few runs have several servers

            opened = open_pool(settings, settings.most_concurrent, logprobs=True, on_answer=on_answer)
            pool = model.breaker = model.pool = self._pool = self._limit = await stack.enter_async_context(opened)
            return pool
        session = await stack.enter_async_context(llm.open_session(settings.most_concurrent))
        limit = ConcurrencyLimit(settings.most_concurrent) if settings.max_concurrent == "auto" else None
        self._limit = limit
        asked = replace(chat_target(settings, settings.model or ""), logprobs=True)
        client = llm.AsyncLLMClient(settings, asked, session, limit=limit, on_answer=on_answer)
        model.breaker = client.breaker
        stack.push_async_callback(client.breaker.close)
        return client

    async def _open_student(self, stack: AsyncExitStack, taxonomy: Taxonomy, plan: Plan) -> FirstAnswer | None:
        """Return the student that answers before the model; None if it is off or has withdrawn."""
        promise = self.settings.student
        if promise is None or self._options.only == "student":  # the model redoes what it did
            return None
        from student.choice import open_first_answer  # noqa: PLC0415 - its packages are optional

        student, log = await asyncio.to_thread(open_first_answer, self.settings, promise, plan, taxonomy, self._tell)
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
        run = await self._new_run(urgent_first=False)
        before = self.files.read_state("checkpoint.json")
        try:
            return self._with_servers(await run.execute([run.intake.given(documents)], to_the_end=False))
        finally:
            if before is not None and before.get("finished") is False:  # an interrupted run resumes
                self.files.write_state("checkpoint.json", before)

    async def run(self, options: RunOptions | None = None) -> dict[str, Any]:
        """Classify all selected documents; return the statistics. *options* None means those of the constructor.

        Keys: job_id, documents_processed, successful, failed, skipped, already_done, leased_elsewhere, retried, copied,
        in_retry_queue, in_quarantine, not_selected, reasons, urgent, interrupted, with_confidence, needs_review, held_back_s,
        review_below; with several model servers also servers. After a TriadError (too many documents failed, or MongoDB, the
        model server or the directory), the next run resumes.
        """
        run = await self._new_run(options)
        sources = [run.intake.recovered(), run.intake.retry_round(), run.intake.fresh()]
        return self._with_servers(await run.execute(sources, to_the_end=True))

    async def follow(self, sweep_every_s: float) -> dict[str, Any]:
        """Classify conversations as they come or grow, until ``stop`` is set; return the statistics as ``run`` does.

        Each *sweep_every_s*, look at all pending documents. For settings with the mode ``stream``; ``run`` comes first.
        """
        from worker.stream import StreamIntake  # noqa: PLC0415 - only for this mode

        await self.connect()
        if self._stream is None:
            raise ConfigurationError("follow needs the mode stream: BatchProcessor(mode='stream').")
        options = replace(self._options, only="changed", retry_failed=False)
        run: Any = await self._new_run(options, partial(StreamIntake, self._stream))
        return self._with_servers(await run.execute([run.intake.live(sweep_every_s)], to_the_end=False))

    def _with_servers(self, stats: dict[str, Any]) -> dict[str, Any]:
        return stats if self._pool is None else {**stats, "servers": self._pool.states()}

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
        parts = self._new_parts(self._options)
        return await DescriptionPass(replace(parts, classify=describe, reporters=self._observers.reporters)).execute()

    async def _new_run(
        self, options: RunOptions | None = None, make_intake: Any = DocumentIntake, *, urgent_first: bool = True
    ) -> BatchRun:
        await self.connect()
        parts = self._new_parts(options or self._options)
        # mongomock has no hints
        return BatchRun(replace(parts, urgent_first=urgent_first and self._client is None), make_intake)

    def _new_parts(self, options: RunOptions) -> RunParts:
        options = replace(options, batch_size=self.settings.batch_size)
        saved = self.files.read_state("checkpoint.json")
        checkpoint = Checkpoint.resume_or_new(
            saved,
            self._source,
            worker_id(self.files),
            reprocess=options.reprocess,
            only=options.only,
            subset=options.subset.name,
        )
        return RunParts(
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

    def _new_heartbeat(self) -> Heartbeat | None:
        """Return the heartbeat; None for an estimate, and for a client that was passed in: mongomock knows no pipelines."""
        settings = self.settings
        if not settings.worker_heartbeat or self._client is not None or self._observers.recorder is not None:
            return None
        return Heartbeat(self.store.database, settings, worker_id(self.files), self.stop, self._observers.model)

    def _service_first(self) -> ServiceFirst | None:
        settings = self.settings
        if not settings.service_lease or self._given_classify is not None:
            return None
        servers = [server_name(one.server_url) for one in settings.for_each_server()]
        return ServiceFirst(self.store.database, servers, settings.worker_floor)


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

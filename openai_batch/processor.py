"""The Python face of document jobs: ``DocumentBatchProcessor``."""

from __future__ import annotations

import asyncio
import hashlib
import re
from collections.abc import AsyncGenerator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pydantic import ValidationError

from config import Settings, load_settings
from error_handler import ConfigurationError, JobValidationError
from openai_batch.answers import Answers, Handling
from openai_batch.documents import ResponseProcessor, TemplateHandling
from openai_batch.job_config import AppConfig, SchemaConfig
from openai_batch.job_plan import JobPlanner
from openai_batch.job_run import JobRun, ShardEnd
from openai_batch.job_store import JobStore
from openai_batch.ledger import ItemState, Ledger
from openai_batch.notifications import Notifier, payload_of, ways_of
from openai_batch.openai_client import OpenAIFiles
from openai_batch.schema_file import SchemaFile, explain
from openai_batch.shard_sending import Times
from openai_batch.triad import TriadHandling, result_store, worker_schema
from storage.files import DirectoryLock
from utils.network import is_this_machine

STATE_FOLDER = "openai_batch"
PREVIEW = "preview"


@dataclass(slots=True)
class JobResult:
    """What one call of a job did.

    *total_processed* = *succeeded* + *failed* + *skipped*; *retried* were sent again meanwhile, or will be.
    """

    total_processed: int = 0
    succeeded: int = 0
    failed: int = 0
    skipped: int = 0
    retried: int = 0
    batches: int = 0

    def add(self, end: ShardEnd) -> None:
        """Count one applied shard."""
        ended = sum(end.counts.values()) - end.retried
        self.batches += 1
        self.succeeded += end.counts[ItemState.OK]
        self.failed += ended - end.counts[ItemState.OK]
        self.retried += end.retried
        self.total_processed += ended


@dataclass(slots=True)
class OpenJob:
    """A job whose parts are open: *run* does the steps with *files*, *result* counts what they end."""

    run: JobRun
    planner: JobPlanner
    ledger: Ledger
    store: JobStore
    handling: Handling
    files: OpenAIFiles
    result: JobResult


class DocumentBatchProcessor:
    """Runs one job over the pending documents of a collection.

    What is not given comes from the environment (see ``AppConfig.from_env``); *parts* are fields of AppConfig.
    *state_dir* holds the ledger: keep it, and give each job its own.
    """

    def __init__(
        self,
        schema_config: SchemaConfig | None = None,
        *,
        config: AppConfig | None = None,
        settings: Settings | None = None,
        state_dir: Path | None = None,
        schema_file: SchemaFile | None = None,
        **parts: Any,
    ) -> None:
        self._settings = settings or load_settings()
        given = {**(schema_file.parts if schema_file else {}), **parts}
        if schema_config is not None:
            given["schema_config"] = schema_config
        try:
            self.config = config or AppConfig.from_env(settings=self._settings, **given)
        except ValidationError as exc:
            raise JobValidationError(explain(exc)) from exc
        self._state_dir = state_dir or self._settings.batch_files_dir / STATE_FOLDER / job_slug(self.config)
        self._processor: ResponseProcessor | None = schema_file.response_processor if schema_file else None
        self._labels_conversations = schema_file.results_of_conversations if schema_file else False
        if self._labels_conversations:
            narrowed = worker_schema(self.config.schema_config)
            self.config = self.config.model_copy(update={"schema_config": narrowed})
        self.times = Times(self.config.batch.poll_interval)
        self.on_progress: Callable[[str], None] | None = None

    def set_response_processor(self, processor: ResponseProcessor) -> None:
        """Let *processor*, ``(response, document) -> dict``, make what is stored of each answer.

        *response* is the text, or the parsed JSON where a response_format is set.
        """
        self._processor = processor

    def process_pending_documents(self, limit: int | None = None) -> JobResult:
        """Work until no document is pending and every batch is applied; blocks, for hours where it must.

        It may be stopped at any moment: the next call goes on, and pays for nothing twice.

        Raises:
            TriadError: What is wrong, in one sentence. Batches that were made go on at OpenAI.
        """
        return asyncio.run(self.process_pending_documents_async(limit))

    async def process_pending_documents_async(self, limit: int | None = None) -> JobResult:
        """Do what ``process_pending_documents`` does, inside a running event loop."""
        async with self.opened() as job:
            await job.run.run(job.files, limit)
            return self.counted(job)

    @staticmethod
    def counted(job: OpenJob) -> JobResult:
        """Return the counts of *job*, with the documents that no request was made of."""
        planner, result = job.planner, job.result
        result.failed += planner.refused
        result.skipped += planner.skipped
        result.total_processed += planner.refused + planner.skipped
        planner.refused = planner.skipped = 0
        return result

    @asynccontextmanager
    async def opened(self) -> AsyncGenerator[OpenJob]:
        """Take the job's directory and open what its steps need.

        Raises:
            ConfigurationError: Text may not leave this machine, or there is no key.
            DirectoryLockedError: Another process runs this job.
        """
        require_permission(self.config)
        self._state_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        async with AsyncExitStack() as stack:
            lock = DirectoryLock(self._state_dir)
            lock.acquire("wait for it; two would pay twice.")
            stack.callback(lock.release)
            store = await stack.enter_async_context(JobStore(self.config, self._settings))
            ledger = stack.enter_context(Ledger(self.ledger_path))
            files = await stack.enter_async_context(OpenAIFiles(self.config.openai, self.config.batch))
            notifier = await stack.enter_async_context(Notifier(ways_of(self.config.notifications)))
            handling = await self._handling(stack, ledger.job_id(store.source))
            if isinstance(handling, TriadHandling):
                await handling.keep()
                store.leases = handling
            answers = Answers(handling, store, ledger, self.config.batch.max_retries)
            planner = JobPlanner(
                self.config.batch, self.config.openai.model, store, ledger, answers, folder=self._state_dir
            )
            run = JobRun(planner, store, ledger, answers, self.times, folder=self._state_dir)
            result = JobResult()

            def on_end(end: ShardEnd) -> None:
                result.add(end)
                notifier.tell(payload_of(end))

            run.on_end = on_end
            run.on_progress = self.on_progress or run.on_progress
            yield OpenJob(run, planner, ledger, store, handling, files, result)

    @property
    def ledger_path(self) -> Path:
        """Where the ledger of this job is."""
        return self._state_dir / "ledger.sqlite"

    @asynccontextmanager
    async def reading(self) -> AsyncGenerator[tuple[JobStore, Handling]]:
        """Open what looks at the documents and changes nothing; neither key nor permission is needed."""
        async with AsyncExitStack() as stack:
            store = await stack.enter_async_context(JobStore(self.config, self._settings))
            yield store, await self._handling(stack, PREVIEW)

    async def _handling(self, stack: AsyncExitStack, job_id: str) -> Handling:
        if not self._labels_conversations:
            return stack.enter_context(TemplateHandling(self.config, self._processor))
        results = result_store(self.config, self._settings, job_id)
        stack.push_async_callback(results.close)
        if job_id != PREVIEW:
            await results.check()  # leases are kept by the server's clock
            await results.ensure_result_indexes()
        return TriadHandling(self.config, self._settings, results, job_id)


def require_permission(config: AppConfig) -> None:
    """Raise ConfigurationError where documents would leave this machine and nobody allowed it."""
    if config.allow_external or is_this_machine(urlsplit(config.openai.base_url).hostname or ""):
        return
    raise ConfigurationError(
        f"the documents would be sent to {urlsplit(config.openai.base_url).hostname}; allow it with --allow-external or "
        "ALLOW_EXTERNAL_LLM=true (--dry-run shows what would be sent, --mask-pii replaces personal data)."
    )


def job_slug(config: AppConfig) -> str:
    """Return the name of the job's folder: readable, and different for each collection and status field."""
    source = f"{config.database.name}.{config.database.collection}.{config.schema_config.status.field_name}"
    digest = hashlib.sha256(source.encode()).hexdigest()[:8]
    return f"{re.sub(r'[^a-z0-9]+', '-', source.lower()).strip('-')[:48]}-{digest}"

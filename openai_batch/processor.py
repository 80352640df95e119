"""The Python interface of document jobs: ``DocumentBatchProcessor``."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import re
from collections.abc import AsyncGenerator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pydantic import ValidationError

from config import Settings, load_settings
from error_handler import ConfigurationError, JobValidationError
from network.addresses import is_this_machine
from openai_batch.documents import TemplateHandling
from openai_batch.job_config import AppConfig, SchemaConfig
from openai_batch.job_context import JobContext, JobResult, Times
from openai_batch.job_run import JobRun
from openai_batch.job_store import Handling, JobStore
from openai_batch.ledger import Ledger
from openai_batch.notifications import Notifier, channels_of, payload_of
from openai_batch.openai_client import OpenAIFiles
from openai_batch.planning import JobSender
from openai_batch.schema_file import ResponseProcessor, SchemaFile, explain
from openai_batch.triad import TriadHandling, result_store, worker_schema
from storage.files import DirectoryLock
from storage.selection import StateFields

__all__ = ["DocumentBatchProcessor", "JobResult", "job_slug"]

logger = logging.getLogger(__name__)

STATE_FOLDER = "openai_batch"


class DocumentBatchProcessor:
    """Runs one job over the pending documents of a collection."""

    def __init__(
        self,
        schema_config: SchemaConfig | None = None,
        *,
        config: AppConfig | None = None,
        settings: Settings | None = None,
        state_dir: Path | None = None,
        schema_file: SchemaFile | None = None,
        times: Times | None = None,
        **parts: Any,
    ) -> None:
        """Build the configuration; nothing is opened or sent.

        Args:
            schema_config: Which documents the job takes and what it writes to them.
            config: The complete configuration; None builds it from *schema_config*, *schema_file* and *parts*.
            settings: None loads them from the environment.
            state_dir: Holds the ledger. Keep it, and give each job its own. None creates one below ``BATCH_FILES_DIR``.
            schema_file: A loaded schema file; see ``load_schema_file``.
            times: Waits of the run.
            parts: Fields of AppConfig; the environment fills in what they leave open.

        Raises JobValidationError if a part is not usable.
        """
        self._settings = settings or load_settings()
        file = schema_file or SchemaFile()
        given = file.parts | parts | ({"schema_config": schema_config} if schema_config is not None else {})
        try:
            config = config or AppConfig.from_env(settings=self._settings, **given)
        except ValidationError as exc:
            raise JobValidationError(explain(exc)) from exc
        self._state_dir = state_dir or self._settings.batch_files_dir / STATE_FOLDER / job_slug(config)
        self._processor: ResponseProcessor | None = file.response_processor
        self._labels_conversations = file.results_of_conversations
        if self._labels_conversations:
            schema = worker_schema(config.schema_config, StateFields(self._settings.status_field))
            config = config.model_copy(update={"schema_config": schema})
        self.config: AppConfig = config
        times = times or Times()
        self._times = times if times.poll_s else replace(times, poll_s=config.batch.poll_interval)

    def set_response_processor(self, processor: ResponseProcessor) -> None:
        """Store what *processor*, ``(response, document) -> dict``, returns for each answer.

        *response* is the text, or the parsed JSON if a response_format is set.
        """
        self._processor = processor

    def process_pending_documents(
        self, limit: int | None = None, on_progress: Callable[[str], None] = logger.debug
    ) -> JobResult:
        """Work until no document is pending and every batch is applied; blocks, for hours if necessary.

        It may be killed at any time: the next call resumes and pays for nothing twice. At most *limit* documents
        are sent. *on_progress* gets texts such as ``shard 3: in_progress, 5 of 10 done``.

        Raises a TriadError with the cause in one sentence; existing batches continue at OpenAI.
        """
        return asyncio.run(self.process_pending_documents_async(limit, on_progress))

    async def process_pending_documents_async(
        self, limit: int | None = None, on_progress: Callable[[str], None] = logger.debug
    ) -> JobResult:
        """Do what ``process_pending_documents`` does, inside a running event loop."""
        async with self.opened(on_progress=on_progress) as job:
            await job.run(limit)
            return job.context.result

    @asynccontextmanager
    async def opened(
        self, stop: asyncio.Event | None = None, on_progress: Callable[[str], None] = logger.debug
    ) -> AsyncGenerator[JobRun]:
        """Lock the state directory, open the job and give back what a killed run claimed. *stop* ends its steps soon.

        Raises ConfigurationError if documents may not leave this machine or there is no key, DirectoryLockedError if
        another process runs this job.
        """
        require_permission(self.config)
        self._state_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        async with AsyncExitStack() as stack:
            lock = DirectoryLock(self._state_dir)
            lock.acquire("wait for it; two runs would pay twice.")
            stack.callback(lock.release)
            ledger = stack.enter_context(Ledger(self.ledger_path))
            files = await stack.enter_async_context(OpenAIFiles(self.config.openai, self.config.batch))
            notifier = await stack.enter_async_context(Notifier(channels_of(self.config.notifications)))
            job_id = ledger.job_id(self.config.source)
            store = await self._open_documents(stack, job_id)
            context = JobContext(
                config=self.config,
                job_id=job_id,
                folder=self._state_dir,
                store=store,
                ledger=ledger,
                files=files,
                times=self._times,
                stop=stop or asyncio.Event(),
                on_progress=on_progress,
            )
            sender = JobSender(context)
            await sender.recover()
            yield JobRun(context, sender, on_end=lambda *end: notifier.notify(payload_of(*end)))

    @property
    def ledger_path(self) -> Path:
        """The path of the ledger of this job."""
        return self._state_dir / "ledger.sqlite"

    @asynccontextmanager
    async def reading(self) -> AsyncGenerator[JobStore]:
        """Open the documents only for reading; that needs neither a key nor the permission to send."""
        async with AsyncExitStack() as stack:
            yield await self._open_documents(stack, job_id=None)

    async def _open_documents(self, stack: AsyncExitStack, job_id: str | None) -> JobStore:
        """Open the documents and what the job does with them; *job_id* None: for reading only."""
        handling = await self._open_handling(stack, job_id)
        return await stack.enter_async_context(JobStore(self.config, self._settings, handling))

    async def _open_handling(self, stack: AsyncExitStack, job_id: str | None) -> Handling:
        if not self._labels_conversations:
            return stack.enter_context(TemplateHandling(self.config, self._processor))
        results = result_store(self.config, self._settings, job_id or "preview")
        stack.push_async_callback(results.close)
        handling = TriadHandling(self.config, self._settings, results, job_id or "preview")
        if job_id is not None:
            await results.check()  # leases are measured by the server's clock
            await results.ensure_result_indexes(handling.field_names)
            await results.renew_leases()
        return handling


def require_permission(config: AppConfig) -> None:
    """Raise ConfigurationError if documents would leave this machine without permission."""
    host = urlsplit(config.openai.base_url).hostname or ""
    if not config.allow_external and not is_this_machine(host):
        raise ConfigurationError(
            f"the documents would be sent to {host}; allow it with --allow-external or ALLOW_EXTERNAL_LLM=true "
            "(--dry-run shows what would be sent, --mask-pii replaces personal data)."
        )


def job_slug(config: AppConfig) -> str:
    """Return the name of the job's folder: readable, and different for each collection and status field."""
    source = f"{config.database.name}.{config.database.collection}.{config.schema_config.status.field_name}"
    digest = hashlib.sha256(source.encode()).hexdigest()[:8]
    return f"{re.sub(r'[^a-z0-9]+', '-', source.lower()).strip('-')[:48]}-{digest}"

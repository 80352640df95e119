"""One batch worker as an object with asynchronous methods, which Ray runs in a process of its own."""

from __future__ import annotations

import asyncio
import hashlib
import secrets
import socket
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from batch_processor import BatchProcessor, Observers
from cluster.tally import Ended, Job, Snapshot, added
from config import Settings, load_prompt_taxonomy, load_settings
from domain.conversation import PROCESSOR_VERSION
from error_handler import ConfigurationError, DirectoryLockedError, ExitCode, TriadError
from logger import configure_logging
from worker.checkpoint import RunStats

LOOK_AGAIN_S = 2.0  # for documents that other workers hold
WORKERS_ON_A_NODE = 256


class ClusterWorker:
    """Classifies documents until none is left, not even in the hands of another worker; a Reporter of its own run.

    It outlives the other workers, so the documents of one that died are taken over when its leases have expired.
    """

    def __init__(self, node: str) -> None:
        self._now = Snapshot(secrets.token_hex(8), node, socket.gethostname())
        self._passes: list[RunStats] = []
        self._jobs: list[str] = []
        self._processor: BatchProcessor | None = None
        self._work: asyncio.Task[Ended] | None = None
        self._is_stopping = self._leaves = False

    async def run(self, job: Job) -> Ended:
        """Run *job* to its end; a TriadError becomes a sentence, because few exceptions survive the way to another process."""
        self._work = asyncio.create_task(self._run(job))
        try:
            ended = await self._work
        except TriadError as exc:
            ended = Ended(self.snapshot(), error=str(exc), exit_code=exc.exit_code)
        except asyncio.CancelledError:
            if not self._is_stopping:
                raise
            ended = Ended(self.snapshot(), interrupted=True)  # it was stopped while it connected
        if self._leaves and ended.interrupted:
            await asyncio.Event().wait()  # Ray ends this process, and runs the job elsewhere
        return ended

    async def progress(self) -> Snapshot:
        """Return the state."""
        return self.snapshot()

    async def stop(self) -> None:
        """Take no new documents, and end when the calls in flight have ended."""
        self._is_stopping = True
        if self._processor is not None:
            self._processor.stop.set()
        elif self._work is not None:
            self._work.cancel()

    async def leave(self) -> Snapshot:
        """Stop, wait for the end, and return the last state; ``run`` does not return, so that it can continue elsewhere."""
        self._leaves = True
        await self.stop()
        if self._work is not None:
            await asyncio.wait([self._work])
        return self.snapshot()

    def update(  # a Reporter
        self,
        job_id: str,
        status: str,  # noqa: ARG002
        stats: RunStats,
        in_flight: int,
        limit: int | None = None,
    ) -> None:
        """Keep the state of the run."""
        if job_id not in self._jobs:
            self._jobs.append(job_id)
            self._passes.append(stats)
        self._passes[-1] = stats
        self._now = replace(self._now, in_flight=in_flight, limit=limit)

    def snapshot(self) -> Snapshot:
        """Return the sums of all passes, and the rest of the last one."""
        return replace(self._now, stats=added(self._passes), jobs=tuple(self._jobs))

    async def _run(self, job: Job) -> Ended:
        settings = on_this_node(job.settings)
        secret = settings.llm_api_key.get_secret_value() if settings.llm_api_key else ""
        configure_logging(settings.log_level, secrets=[secret])
        if code_of(settings) != job.code:
            raise ConfigurationError(
                f"{self._now.host} has another version of this program, taxonomy or prompt examples than the machine of the "
                "command; install the same files on all nodes."
            )
        processor = await self._connected(settings, job)
        try:
            ended = await self._passes_of(processor, job)
            if ended.interrupted:
                await _release(processor)
            return ended
        finally:
            self._processor = None
            await processor.close()

    async def _connected(self, settings: Settings, job: Job) -> BatchProcessor:
        """Return the processor of the first directory on this node that no other worker has locked."""
        for number in range(1, WORKERS_ON_A_NODE + 1):
            place = settings.model_copy(update={"batch_files_dir": job.directory / f"worker-{number}"})
            processor = BatchProcessor(place, options=job.options, observers=Observers([self]))
            with suppress(DirectoryLockedError):
                await processor.connect()
                self._processor = processor
                return processor
        raise DirectoryLockedError(f"All {WORKERS_ON_A_NODE} directories for workers in {job.directory} are in use.")

    async def _passes_of(self, processor: BatchProcessor, job: Job) -> Ended:
        options, held_back_s = job.options, 0.0
        while True:
            stats = await processor.run(options)
            held_back_s += stats["held_back_s"]
            if stats["interrupted"] or options.limit is not None or not stats["leased_elsewhere"]:
                break
            options = replace(options, retry_failed=False)
            with suppress(TimeoutError):
                await asyncio.wait_for(processor.stop.wait(), LOOK_AGAIN_S)
        return Ended(
            self.snapshot(),
            stats["in_retry_queue"],
            stats["in_quarantine"],
            interrupted=stats["interrupted"],
            held_back_s=held_back_s,
            exit_code=ExitCode.INCOMPLETE
            if stats["failed"] or stats["in_retry_queue"] or stats["in_quarantine"]
            else ExitCode.DONE,
        )


async def _release(processor: BatchProcessor) -> None:
    """Give up the leases on documents that were not asked: the next worker with this directory may be late, or never come."""
    for file in processor.files.load_pending():
        await processor.store.release([document.get("_id") for document in file.documents])


def on_this_node(settings: Settings) -> Settings:
    """Return *settings* with the model server of this node, unless the command named one."""
    if "ollama_endpoint" in settings.model_fields_set:
        return settings
    return settings.model_copy(update={"ollama_endpoint": load_settings(dotenv=None).ollama_endpoint})


def code_of(settings: Settings) -> str:
    """Return what identifies the version of the program and the content of the taxonomy and examples of *settings*."""
    taxonomy = load_prompt_taxonomy(settings)
    return f"{PROCESSOR_VERSION} {hashlib.sha256(repr(taxonomy).encode()).hexdigest()}"


def directory_of(settings: Settings) -> Path:
    """Return the state directory as an absolute path, which is the same on all nodes."""
    return settings.batch_files_dir.absolute()

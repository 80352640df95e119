"""The second pass for ``--describe``: writes the one-line sentence into results that lack it. Labels never change."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from aggregator import aggregate_conversation
from classifier import Classifier
from config import Settings, Taxonomy
from domain.conversation import Outcome
from domain.text import one_line
from error_handler import (
    ConfigurationError,
    LLMError,
    LLMModelError,
    LLMOutageError,
    SkippedDocumentError,
    StoreRejectedError,
)
from mongo_client import call_repeatedly, range_filter
from storage.extended_json import Document, id_key, id_text
from utils.retry_utils import RetryPolicy
from worker.checkpoint import RunStats
from worker.intake import RunParts
from worker.subset import in_subset

logger = logging.getLogger(__name__)

JOB = "describe"
LACKS = {
    "source_conversation_id": {"$exists": True},
    "classification": {"$type": "object"},
    "classification.categorization": {"$exists": False},
}


def describing_classifier(taxonomy: Taxonomy, settings: Settings) -> Classifier:
    """Return the classifier whose answer is the sentence alone; raise as ``require_sentence`` does."""
    require_sentence(taxonomy)
    return Classifier(replace(taxonomy, fields=()), settings.on_long)


def require_sentence(taxonomy: Taxonomy) -> None:
    """Raise ConfigurationError if *taxonomy* has no sentence."""
    if not taxonomy.has_categorization:
        raise ConfigurationError(
            "--describe writes the sentence that the taxonomy switches off with categorization: false; remove one of them."
        )


class DescriptionPass:
    """Describes the results of a store that have no sentence; ``parts.classify`` writes them.

    Each sentence is stored as soon as it is there, so the same command resumes an interrupted pass. A result is left as it
    is if its conversation has changed since it was labelled, or is gone. *parts* mean what they mean in a run: subset and
    limit, the slots, the pause, the lease of the service, and the stop with its grace period.
    """

    def __init__(self, parts: RunParts) -> None:
        settings = parts.settings
        self._parts, self._settings, self._stop = parts, settings, parts.stop
        self._at_once = settings.most_in_flight if parts.limit is None else parts.limit.current
        self._policy = RetryPolicy(settings.mongodb_max_retries, settings.mongodb_backoff_s)
        self._store = parts.store
        self._results: Any = parts.store.database[settings.results_collection]
        self._floor: int | None = None  # of calls, while the service goes first
        self._in_flight = 0
        self._progress = asyncio.Event()
        self._taking = asyncio.Lock()
        self.stats = RunStats()

    async def execute(self) -> dict[str, Any]:
        """Run the pass, and return what ``BatchProcessor.describe`` returns.

        Raises:
            LLMError: The model server is away, or does not have the model. Sentences so far are kept.
            StoreError: MongoDB is not reachable.
        """
        limit = self._parts.options.limit
        if not self._parts.options.subset.name:  # the number of those in a subset is only known after the last page
            total = await self._call("count results", lambda: self._results.count_documents(LACKS))
            self.stats.total = total if limit is None else min(total, limit)
        work, status = self._work(), "failed"
        self._note_end(finished=False)
        watches: list[asyncio.Task[Any]] = [asyncio.create_task(self._stop.wait())]
        if self._parts.service_first is not None:
            watches.append(asyncio.create_task(self._parts.service_first.watch(self._give_way)))
        tasks = [asyncio.create_task(self._describe_all(work)) for _ in range(self._at_once)]
        described = asyncio.gather(*tasks)
        try:
            await asyncio.wait([described, watches[0]], return_when=asyncio.FIRST_COMPLETED)
            with contextlib.suppress(TimeoutError):  # the next run writes the sentences of calls that last longer
                async with asyncio.timeout(self._settings.shutdown_grace_s):
                    await self._until(lambda: described.done() or self._in_flight == 0)
            if described.done():
                described.result()
            status = "interrupted" if self._stop.is_set() else "completed"
            self._note_end(finished=status == "completed")
        finally:
            for task in (*tasks, *watches):
                task.cancel()
            await asyncio.gather(described, *tasks, *watches, return_exceptions=True)
            if self.stats.expected:
                self._report(status)
        stats = self.stats
        return {
            "described": stats.successful,
            "failed": stats.failed,
            "left": stats.skipped,
            "reasons": stats.reasons,
            "interrupted": self._stop.is_set(),
        }

    def _note_end(self, *, finished: bool) -> None:
        """Record whether a run with ``--reprocess`` is done: until then, the same command asks for no label again."""
        saved = self._parts.files.read_state("checkpoint.json")
        if saved and saved.get("reprocess") is True:
            self._parts.files.write_state("checkpoint.json", saved | {"finished": finished})

    async def _describe_all(self, work: AsyncIterator[tuple[Document, Document]]) -> None:
        while True:
            if self._parts.go is not None:
                await self._parts.go.wait()
            await self._until(lambda: self._floor is None or self._in_flight < self._floor)
            self._in_flight += 1  # before the next step of the other tasks
            try:
                async with self._taking:
                    pair = None if self._stop.is_set() else await anext(work, None)
                if pair is None:
                    return
                await self._one(*pair)
            finally:
                self._in_flight -= 1
                self._progress.set()

    def _give_way(self, floor: int | None) -> None:
        self._floor = floor
        self._progress.set()

    async def _until(self, is_true: Callable[[], bool]) -> None:
        while not is_true():
            self._progress.clear()
            await self._progress.wait()

    async def _work(self) -> AsyncIterator[tuple[Document, Document]]:
        """Yield each selected result without a sentence, and its source document, empty if that is gone."""
        options, taken = self._parts.options, 0
        after: list[Any] = []
        while (options.limit is None or taken < options.limit) and (page := await self._page(after)):
            after = [page[-1]["_id"]]
            ids = [result["source_conversation_id"] for result in page]
            if options.subset.name:
                inside = await in_subset(self._store, ids)
                page = [result for result in page if id_key(result["source_conversation_id"]) in inside]
            page = page if options.limit is None else page[: options.limit - taken]
            taken += len(page)
            documents = {id_key(one["_id"]): one for one in await self._store.read_documents("all", ids)}
            for result in page:
                yield result, documents.get(id_key(result["source_conversation_id"]), {})

    async def _page(self, after: Sequence[Any]) -> list[Document]:
        fields = {"source_conversation_id": 1, "processing_metadata.input_sha256": 1}
        query = {**LACKS, **range_filter(after, [])}
        page: list[Document] = await self._call(
            "read results",
            lambda: self._results.find(query, fields, sort=[("_id", 1)], limit=self._settings.batch_size).to_list(None),
        )
        return page

    async def _one(self, result: Document, document: Document) -> None:
        self._report("running")
        try:
            conversation = aggregate_conversation(document)
            if conversation.transcript_sha256 != _input_hash(result):
                self.stats.skipped += 1
                return
            await self._write(result, await self._parts.classify(conversation, 0))
        except (LLMOutageError, LLMModelError):
            raise
        except SkippedDocumentError:
            self.stats.skipped += 1
        except (LLMError, StoreRejectedError) as exc:
            self.stats.failed += 1
            self.stats.count_reason(str(exc.reason))
            logger.warning("no sentence for %s: %s", id_text(result["source_conversation_id"]), one_line(str(exc), 200))
        finally:
            self.stats.processed += 1
            self._report("running")

    async def _write(self, result: Document, outcome: Outcome) -> None:
        """Store the sentence, unless the result got another one, or other labels of other text, meanwhile."""
        same = {"_id": result["_id"], "processing_metadata.input_sha256": outcome.input_sha256, **LACKS}
        change = {
            "classification.categorization": outcome.classification.categorization,
            "processing_metadata.described_by": outcome.model_used,
            "processing_metadata.described_at": datetime.now(UTC),
        }
        done = await self._call("store a sentence", lambda: self._results.update_one(same, {"$set": change}))
        self.stats.successful += done.modified_count
        self.stats.skipped += 1 - done.modified_count

    async def _call(self, what: str, operation: Callable[[], Awaitable[Any]]) -> Any:
        return await call_repeatedly(what, operation, self._policy)

    def _report(self, status: str) -> None:
        for reporter in self._parts.reporters:
            reporter.update(JOB, status, self.stats, self._in_flight, self._floor)


def _input_hash(result: Mapping[str, Any]) -> Any:
    metadata = result.get("processing_metadata")
    return metadata.get("input_sha256") if isinstance(metadata, Mapping) else None

"""The second pass for ``--describe``: writes the one-line sentence into results that lack it. Labels never change."""

from __future__ import annotations

import asyncio
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
from mongo_client import DocumentStore, call_repeatedly, range_filter
from storage.extended_json import Document, id_key, id_text
from utils.retry_utils import RetryPolicy
from worker.checkpoint import RunStats
from worker.intake import Classify
from worker.progress import Reporter

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
    """Describes the results of *store* that have no sentence, with up to *at_once* calls at a time.

    Each sentence is stored as soon as it is there, so the same command resumes an interrupted pass. A result is left as it
    is if its conversation has changed since it was labelled, or is gone. *stop* ends the pass after the calls in flight.
    """

    def __init__(
        self,
        settings: Settings,
        store: DocumentStore,
        describe: Classify,
        stop: asyncio.Event,
        at_once: int,
        reporters: Sequence[Reporter] = (),
    ) -> None:
        self._size, self._at_once = settings.batch_size, at_once
        self._policy = RetryPolicy(settings.mongodb_max_retries, settings.mongodb_backoff_s)
        self._store = store
        self._results: Any = store.database[settings.results_collection]
        self._describe = describe
        self._stop = stop
        self._reporters = reporters
        self._in_flight = 0
        self.stats = RunStats()

    async def execute(self) -> RunStats:
        """Run the pass; of the statistics, *successful* sentences were stored and *skipped* results were left.

        Raises:
            LLMError: The model server is away, or does not have the model. Sentences so far are kept.
            StoreError: MongoDB is not reachable.
        """
        self.stats.total = await self._call("count results", lambda: self._results.count_documents(LACKS))
        work = self._work()
        take, status = asyncio.Lock(), "failed"

        async def next_one() -> tuple[Document, Document] | None:
            async with take:
                return None if self._stop.is_set() else await anext(work, None)

        async def describe_all() -> None:
            while (pair := await next_one()) is not None:
                await self._one(*pair)

        tasks = [asyncio.create_task(describe_all()) for _ in range(min(self.stats.total, self._at_once))]
        try:
            await asyncio.gather(*tasks)
            status = "interrupted" if self._stop.is_set() else "completed"
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            if self.stats.total:
                self._report(status)
        return self.stats

    async def _work(self) -> AsyncIterator[tuple[Document, Document]]:
        """Yield each result without a sentence, and its source document, empty if that is gone."""
        after: list[Any] = []
        while page := await self._page(after):
            after = [page[-1]["_id"]]
            ids = [result["source_conversation_id"] for result in page]
            documents = {id_key(one["_id"]): one for one in await self._store.read_documents("all", ids)}
            for result in page:
                yield result, documents.get(id_key(result["source_conversation_id"]), {})

    async def _page(self, after: Sequence[Any]) -> list[Document]:
        fields = {"source_conversation_id": 1, "processing_metadata.input_sha256": 1}
        query = {**LACKS, **range_filter(after, [])}
        page: list[Document] = await self._call(
            "read results",
            lambda: self._results.find(query, fields, sort=[("_id", 1)], limit=self._size).to_list(None),
        )
        return page

    async def _one(self, result: Document, document: Document) -> None:
        self._in_flight += 1
        self._report("running")
        try:
            conversation = aggregate_conversation(document)
            if conversation.transcript_sha256 != _input_hash(result):
                self.stats.skipped += 1
                return
            await self._write(result, await self._describe(conversation, 0))
        except (LLMOutageError, LLMModelError):
            raise
        except SkippedDocumentError:
            self.stats.skipped += 1
        except (LLMError, StoreRejectedError) as exc:
            self.stats.failed += 1
            self.stats.count_reason(str(exc.reason))
            logger.warning("no sentence for %s: %s", id_text(result["source_conversation_id"]), one_line(str(exc), 200))
        finally:
            self._in_flight -= 1
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
        for reporter in self._reporters:
            reporter.update(JOB, status, self.stats, self._in_flight)


def _input_hash(result: Mapping[str, Any]) -> Any:
    metadata = result.get("processing_metadata")
    return metadata.get("input_sha256") if isinstance(metadata, Mapping) else None

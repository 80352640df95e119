"""Reads results in pages, with the decisions of reviewers and, if wanted, the transcripts."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Any

from aggregator import aggregate_conversation
from config import Settings
from error_handler import SkippedDocumentError
from exporting.columns import ORIGINAL, Entry
from exporting.filters import Filter
from mongo_client import DocumentStore, call_repeatedly, range_filter
from review.corrections import CorrectionStore
from review.labels import read_labels
from storage.extended_json import Document, id_key
from utils.retry_utils import RetryPolicy
from worker.subset import in_subset

PAGE, TEXT_PAGE = 500, 100
# Results that one query looks through at most, so that it stays within MONGODB_TIMEOUT_MS if few of them match.
WINDOW = 20_000

# The copy of a conversation is customer text: it stays in MongoDB, and only its presence is read.
_WITHOUT_ORIGINAL: Document = {
    "$set": {ORIGINAL: {"$cond": [{"$eq": [{"$type": f"${ORIGINAL}"}, "missing"]}, "$$REMOVE", True]}}
}


class ResultReader:
    """The results that *condition* selects, in the order of their ``_id``; *fields* are those of the taxonomy.

    If *store* has a subset, only those whose conversation is in it; ``outside`` counts the others.

    ``looked_at`` counts results, whether they are selected or not, in steps of up to WINDOW.
    """

    def __init__(self, store: DocumentStore, settings: Settings, condition: Filter, fields: Sequence[str]) -> None:
        options = store.database.codec_options.with_options(tz_aware=True)
        self._store, self._condition, self._query = store, condition, condition.query(fields)
        self._results = store.database.get_collection(settings.results_collection, codec_options=options)
        self._corrections = CorrectionStore(store, settings)
        self._policy = RetryPolicy(settings.mongodb_max_retries, settings.mongodb_backoff_s)
        self.looked_at = self.outside = 0

    async def pages(self, *, with_text: bool = False) -> AsyncIterator[list[Entry]]:
        """Yield pages of entries, at most PAGE, or TEXT_PAGE with transcripts; a page may be empty."""
        size = TEXT_PAGE if with_text else PAGE
        async for page in self._result_pages(size):
            entries = await self._with_labels(await self._inside(page))
            yield await self._with_transcripts(entries) if with_text else entries

    async def _result_pages(self, size: int) -> AsyncIterator[list[Document]]:
        after: list[Any] = []
        while True:
            bound = await self._end_of_window(after)
            full = True
            while full:
                page = await self._page(after, bound, size)
                full = len(page) == size
                after = [page[-1]["_id"]] if full else bound
                yield page
            if not bound:
                return
            self.looked_at += WINDOW

    async def _end_of_window(self, after: list[Any]) -> list[Any]:
        """Return the id of the last of the next WINDOW results as a list of one; [] if there are fewer."""
        query = range_filter(after, [])
        found = await call_repeatedly(
            "read results",
            lambda: self._results.find(
                query, {"_id": 1}, sort=[("_id", 1)], skip=WINDOW - 1, limit=1, hint=[("_id", 1)]
            ).to_list(None),
            self._policy,
        )
        return [document["_id"] for document in found]

    async def _page(self, after: list[Any], bound: list[Any], size: int) -> list[Document]:
        match = {**range_filter(after, bound), **self._query}
        stages: list[Document] = [{"$match": match}, {"$sort": {"_id": 1}}, {"$limit": size}, _WITHOUT_ORIGINAL]

        async def read() -> list[Document]:
            cursor = await self._results.aggregate(stages, hint={"_id": 1}, batchSize=size)
            return [document async for document in cursor]

        return await call_repeatedly("read results", read, self._policy)

    async def _inside(self, results: list[Document]) -> list[Document]:
        if not results or not self._store.states.subset:
            return results
        known = await in_subset(self._store, [result.get("source_conversation_id") for result in results])
        inside = [result for result in results if id_key(result.get("source_conversation_id")) in known]
        self.outside += len(results) - len(inside)
        return inside

    async def _with_labels(self, results: list[Document]) -> list[Entry]:
        made = await self._corrections.of(result.get("source_conversation_id") for result in results)
        entries = []
        for result in results:
            stored = result.get("classification")
            labelled = result if isinstance(stored, dict) else {**result, "classification": {}}
            read = read_labels(labelled, made.get(id_key(result.get("source_conversation_id")), ()))
            if self._condition.takes(read.labels):
                entries.append(Entry(result, read))
        return entries

    async def _with_transcripts(self, entries: list[Entry]) -> list[Entry]:
        ids = [entry.result.get("source_conversation_id") for entry in entries]
        found = await self._store.read_documents("all", ids) if ids else []
        texts = {id_key(document["_id"]): transcript_of(document) for document in found}
        return [
            Entry(entry.result, entry.labels, texts.get(id_key(document_id)))
            for entry, document_id in zip(entries, ids, strict=True)
        ]


def transcript_of(document: Document) -> str | None:
    """Return the transcript of *document* as the model gets it; None if there is nothing to classify."""
    try:
        return aggregate_conversation(document).transcript
    except SkippedDocumentError:
        return None

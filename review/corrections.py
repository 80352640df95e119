"""The collection of corrections: one decision of a reviewer on a field of a conversation."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from functools import lru_cache
from typing import Any, TypeVar

from config import Settings
from mongo_client import DURABLE, DocumentStore, call_repeatedly
from review.labels import Correction, correction_of
from storage.extended_json import Document, id_key
from storage.mongo_errors import translated
from storage.mongo_indexes import CORRECTION_KEY, correction_indexes, create_indexes
from storage.mongo_pages import replace_each
from utils.retry_utils import RetryPolicy

logger = logging.getLogger(__name__)

T = TypeVar("T")


class CorrectionStore:
    """The corrections of the results of *store*. Each call is retried as *settings* say, then raises a StoreError."""

    def __init__(self, store: DocumentStore, settings: Settings) -> None:
        options = store.database.codec_options.with_options(tz_aware=True)
        self.name = f"{settings.results_collection}_corrections"
        self._collection = store.database.get_collection(self.name, codec_options=options, write_concern=DURABLE)
        self._policy = RetryPolicy(settings.mongodb_max_retries, settings.mongodb_backoff_s)

    async def ensure_indexes(self) -> None:
        """Create the indexes; raise StoreForbiddenError or IndexBlockedError if there is no unique one."""
        await create_indexes(self._collection, correction_indexes(), self.call)

    async def record(self, corrections: Sequence[Correction]) -> None:
        """Store *corrections*. A second decision of a reviewer on a field replaces the first."""
        documents = [correction.as_document() for correction in corrections]
        await self.call("store the decisions", lambda: replace_each(self._collection, documents, CORRECTION_KEY))

    async def undo(self, reviewer: str) -> list[Correction]:
        """Remove the decisions that *reviewer* stored last, all of one conversation, and return them; [] if none."""
        last = await self._find({"reviewer": reviewer}, sort=[("at", -1)], limit=1)
        if not last:
            return []
        names = ("source_conversation_id", "reviewer", "at")
        query = {name: {"$eq": last[0].get(name)} for name in names}
        removed = await self._find(query)
        await self.call("remove the decisions", lambda: self._collection.delete_many(query))
        return [one for document in removed for one in self._usable(document)]

    async def of(self, document_ids: Iterable[Any]) -> dict[bytes, list[Correction]]:
        """Return, by ``id_key``, the corrections of those *document_ids* that have any."""
        found: dict[bytes, list[Correction]] = {}
        for document in await self._find({"source_conversation_id": {"$in": list(document_ids)}}):
            for one in self._usable(document):
                found.setdefault(id_key(one.source_conversation_id), []).append(one)
        return found

    async def read_all(self) -> AsyncIterator[Correction]:
        """Yield all corrections, those of one conversation together."""
        with translated("read the corrections"):
            async for document in self._collection.find().sort(CORRECTION_KEY[0], 1):
                for one in self._usable(document):
                    yield one

    async def add_to_control_sample(self, document_ids: Sequence[Any], probability: float) -> None:
        """Record that the random control sample has drawn these conversations, which were decided already."""
        query = {"source_conversation_id": {"$in": list(document_ids)}, "sampling_probability": None}
        change = {"$set": {"sampling_probability": probability}}
        await self.call("record the control sample", lambda: self._collection.update_many(query, change))

    async def decided_once(self) -> list[tuple[Any, str]]:
        """Return the ids of the conversations that exactly one reviewer has decided, with that reviewer."""
        stages: list[Document] = [
            {"$group": {"_id": "$source_conversation_id", "reviewers": {"$addToSet": "$reviewer"}}},
            {"$match": {"reviewers": {"$size": 1}}},
        ]

        async def read() -> list[tuple[Any, str]]:
            cursor = await self._collection.aggregate(stages, allowDiskUse=True)
            return [(document["_id"], document["reviewers"][0]) async for document in cursor]

        return await self.call("read the corrections", read)

    def _usable(self, document: Document) -> list[Correction]:
        """Return the correction in *document*, or nothing if it is none."""
        found = correction_of(document)
        if found is None:
            _warn(
                f"{self.name} has documents without source_conversation_id, field or label (to); they are not corrections "
                "and are ignored"
            )
        return [] if found is None else [found]

    async def _find(self, query: Document, **options: Any) -> list[Document]:
        return await self.call("read the corrections", lambda: self._collection.find(query, **options).to_list(None))

    async def call(self, what: str, operation: Callable[[], Awaitable[T]]) -> T:
        """Return the result of *operation*, which is retried; *what* names it in errors."""
        return await call_repeatedly(what, operation, self._policy)


@lru_cache(maxsize=16)  # once for each collection
def _warn(sentence: str) -> None:
    logger.warning("%s", sentence)

"""How the stored results were made, read from MongoDB."""

from __future__ import annotations

from typing import Any

from config import Settings
from domain.staleness import ResultProvenance
from mongo_client import DocumentStore, translated
from storage.extended_json import id_key
from utils.aio import cancellable
from utils.retry_utils import RetryPolicy, retry_async

_FIELDS = {
    "_id": 0,
    "source_conversation_id": 1,
    "processing_metadata.input_sha256": 1,
    "processing_metadata.fingerprint": 1,
}

_LABELLED = {
    "_id": 0,
    "source_conversation_id": 1,
    "classification": 1,
    "processing_metadata.processed_at": 1,
    "processing_metadata.model_used": 1,
}


class StoredResults:
    """The results that *store* has; each call is repeated as *settings* say before it raises."""

    def __init__(self, store: DocumentStore, settings: Settings) -> None:
        self._results = store.database[settings.results_collection]
        self._policy = RetryPolicy(settings.mongodb_max_retries, settings.mongodb_backoff_s)

    async def made(self, document_ids: list[Any]) -> dict[bytes, ResultProvenance]:
        """Return, by ``id_key``, how the results of those *document_ids* that have one were made.

        Raises:
            StoreError: After the last attempt.
        """
        query = {"source_conversation_id": {"$in": document_ids}}

        async def attempt() -> list[dict[str, Any]]:
            with translated("read how results were made"):
                return await cancellable(lambda: self._results.find(query, _FIELDS).to_list(None))

        found = await retry_async(attempt, self._policy, "read how results were made")
        return {id_key(result["source_conversation_id"]): _made(result) for result in found}

    async def labelled(self, document_ids: list[Any]) -> dict[bytes, dict[str, Any]]:
        """Return, by ``id_key``, the results of those *document_ids* that have one: their labels, by what and when.

        Raises:
            StoreError: After the last attempt.
        """
        query = {"source_conversation_id": {"$in": document_ids}}

        async def attempt() -> list[dict[str, Any]]:
            with translated("read classifications"):
                return await cancellable(lambda: self._results.find(query, _LABELLED).to_list(None))

        found = await retry_async(attempt, self._policy, "read classifications")
        return {id_key(result["source_conversation_id"]): result for result in found}


def _made(result: dict[str, Any]) -> ResultProvenance:
    metadata = result.get("processing_metadata")
    fields = metadata if isinstance(metadata, dict) else {}
    return ResultProvenance(_text(fields.get("input_sha256")), _text(fields.get("fingerprint")))


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None

"""Checks the query of a subset with MongoDB, and finds the documents that are in it."""

from __future__ import annotations

import asyncio
from typing import Any

from error_handler import ConfigurationError, StoreRejectedError
from mongo_client import DocumentStore
from storage.extended_json import Document, id_key
from utils.batch_file_manager import BatchFiles


async def require_query(store: DocumentStore, query: Document, name: str) -> None:
    """Raise ConfigurationError if MongoDB does not understand *query*, which is that of *name*."""
    if not query:
        return
    try:  # it reads no document: MongoDB parses the whole query first
        await store.aggregate(f"check {name}", [{"$match": {"$and": [{"_id": {"$in": []}}, query]}}])
    except StoreRejectedError as exc:
        raise ConfigurationError(f"{name} is not a query for MongoDB: {exc}. Check its operators.") from exc


async def in_subset(store: DocumentStore, document_ids: list[Any]) -> set[bytes]:
    """Return the ``id_key`` of those *document_ids* that are in the source and in the subset of *store*."""
    match = {"_id": {"$in": document_ids}, **store.states.queries["all"]}
    found = await store.aggregate("look for documents", [{"$match": match}, {"$project": {"_id": 1}}])
    return {id_key(document["_id"]) for document in found}


async def quarantined(store: DocumentStore, files: BatchFiles, *, is_part: bool, limit: int | None) -> set[bytes]:
    """Return the ``id_key`` of up to *limit* documents in the quarantine of *files*; if *is_part*, those of ``in_subset``."""
    found = await asyncio.to_thread(_quarantined_ids, files)
    chosen = await in_subset(store, list(found.values())) if is_part else found.keys()
    return set([key for key in found if key in chosen][:limit])


def _quarantined_ids(files: BatchFiles) -> dict[bytes, Any]:
    return {entry.key: entry.conversation_id for _, entries in files.failure_files("quarantine") for entry in entries}

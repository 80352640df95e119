"""Pages of documents bounded by bytes, and updates of many documents of which MongoDB refuses some."""

from __future__ import annotations

import logging
from collections.abc import Sequence, Set
from dataclasses import dataclass
from typing import Any

import bson
from pymongo import ReplaceOne, UpdateOne
from pymongo.errors import BulkWriteError

from storage.extended_json import Document, bson_encode, id_key, id_text
from storage.mongo_errors import VALIDATOR_CODE, refusal, refused_documents, require_only_duplicates

logger = logging.getLogger(__name__)

PAGE_BYTES = 4_000_000  # of BSON; one document may be larger


async def bounded(cursor: Any, *, whole: bool) -> list[Document]:
    """Return the documents of *cursor* up to PAGE_BYTES, at least one, and close it; if not *whole*, without attachments."""
    page: list[Document] = []
    size = 0
    try:
        async for document in cursor:
            page.append(document if whole else without_attachments(document))
            size += len(bson_encode(document))
            if size >= PAGE_BYTES:
                break
    finally:
        await cursor.close()
    return page


def without_attachments(document: Document) -> Document:
    """Remove binary values from the turns of *document*, and return it: no text is read from them."""
    for turns in document.values():
        for turn in turns if isinstance(turns, list) else ():
            if isinstance(turn, dict):
                for name in [name for name, value in turn.items() if isinstance(value, bytes)]:
                    del turn[name]
    return document


def is_doubtful(document_id: Any) -> bool:
    """Return whether *document_id* may not be UTF-8 in MongoDB: the driver reads what is not as U+FFFD."""
    return "\ufffd" in (document_id if isinstance(document_id, str) else str(document_id))


async def unusable_ids(collection: Any, page: Sequence[Document]) -> dict[bytes, Any]:
    """Return, by ``id_key``, each id of *page* that no query can find, because it is not UTF-8."""
    doubtful = {id_key(document["_id"]): document["_id"] for document in page if is_doubtful(document["_id"])}
    if doubtful:
        query = {"_id": {"$in": list(doubtful.values())}}
        for document in await collection.find(query, projection={"_id": 1}).to_list(None):
            doubtful.pop(id_key(document["_id"]), None)
    return doubtful


def warn_of_unusable(lost: dict[bytes, Any], warned: Set[bytes]) -> set[bytes]:
    """Warn that the documents *lost* are skipped, unless they are in *warned*; return their keys."""
    for key, document_id in lost.items():
        if key not in warned:
            logger.warning(
                "document %s is skipped: its _id is not UTF-8, so no query can name it", id_text(document_id)
            )
    return set(lost)


def end_of_ids(document_id: Any) -> Any:
    """Return *document_id* as the bound of a run; if it is doubtful, that of all ids."""
    return bson.MaxKey() if is_doubtful(document_id) else document_id


@dataclass(frozen=True, slots=True)
class Refused:
    """A document whose update MongoDB refuses, and the error code."""

    document_id: Any
    code: int


async def insert_new(collection: Any, documents: list[Document]) -> set[int]:
    """Insert *documents*; return the indexes of those that were stored already."""
    try:
        await collection.insert_many(documents, ordered=False)
    except BulkWriteError as exc:
        require_only_duplicates(exc)
        return {error["index"] for error in exc.details["writeErrors"]}
    return set()


async def replace_each(collection: Any, documents: list[Document], key: Sequence[str]) -> None:
    """Store each of *documents*, in place of the one with the same values of the fields in *key*."""
    operations = [
        ReplaceOne({name: {"$eq": document[name]} for name in key}, document, upsert=True) for document in documents
    ]
    await collection.bulk_write(operations)


async def update_each(collection: Any, document_ids: Sequence[Any], change: Document) -> list[Refused]:
    """Make *change* to each of *document_ids*; return those that MongoDB refuses."""
    # The update of all may have reached some of them, and a counter must not count twice.
    unless_done = {"$nor": [change["$set"]]} if "$inc" in change and change.get("$set") else {}
    operations = [UpdateOne({"_id": {"$eq": value}, **unless_done}, change) for value in document_ids]
    try:
        await collection.bulk_write(operations, ordered=False)
    except BulkWriteError as exc:
        return [Refused(document_ids[index], code) for index, code in refused_documents(exc).items()]
    return []


def warn_of(collection: str, refused: Sequence[Refused], warned: Set[Any], *, is_all: bool) -> set[Any]:
    """Warn that the documents *refused* keep their status; return what is told now, and is not again.

    If a validator refuses all documents of an update, one sentence stands for them.
    """
    if is_all and {one.code for one in refused} == {VALIDATOR_CODE}:
        if collection not in warned:
            logger.warning(
                "the validator of %s does not allow the statuses of this product: documents keep the one that they have, and "
                "their results are stored; allow pending, processing, processed, failed and skipped there (collMod)",
                collection,
            )
        return {collection} | {id_key(one.document_id) for one in refused}
    new = {id_key(one.document_id): one for one in refused if id_key(one.document_id) not in warned}
    for one in new.values():
        logger.warning("document %s keeps its status: %s", id_text(one.document_id), refusal(one.code))
    return set(new)

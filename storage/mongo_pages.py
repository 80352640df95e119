"""Documents that need more than a query: invalid BSON, ids that no query can name, refused updates, replaced results."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

import bson
from bson.errors import InvalidBSON
from bson.raw_bson import RawBSONDocument
from pymongo import ReplaceOne, UpdateOne
from pymongo.errors import BulkWriteError

from storage.extended_json import Document, bson_encode, id_key, id_text, is_doubtful
from storage.mongo_errors import VALIDATOR_CODE, refusal, refused_documents, require_only_duplicates
from storage.selection import UNREADABLE, StateFields

logger = logging.getLogger(__name__)

END_OF_IDS = bson.MaxKey()
PAGE_BYTES = 4_000_000  # of BSON; one document may be larger
SAMPLE_PAGE = 100  # documents of a sample in memory at once, at most 16 MB
SAMPLE_BYTES = 16_000_000  # of a sample
HISTORY_KEPT = 20  # earlier labels of a result


async def unusable_ids(collection: Any, doubtful: Sequence[Any]) -> dict[bytes, Any]:
    """Return, by ``id_key``, those of the ids *doubtful* that no query can find, because they are not UTF-8."""
    query = {"_id": {"$in": list(doubtful)}}
    found = {id_key(document["_id"]) for document in await collection.find(query, projection={"_id": 1}).to_list(None)}
    return {key: document_id for document_id in doubtful if (key := id_key(document_id)) not in found}


def undecoded(collection: Any) -> Any:
    """Return *collection* with documents that the driver does not decode."""
    return collection.with_options(codec_options=collection.codec_options.with_options(document_class=RawBSONDocument))


def decoded(document: RawBSONDocument, options: bson.CodecOptions[Document]) -> Document | None:
    """Return *document* of an ``undecoded`` collection; None if it is not valid BSON."""
    try:
        return bson.decode(document.raw, options)
    except InvalidBSON:
        return None


async def valid_documents(
    cursor: Any, options: bson.CodecOptions[Document], most_bytes: int
) -> AsyncIterator[Document]:
    """Yield the documents of *cursor*, which is of an ``undecoded`` collection, that are valid BSON, up to *most_bytes*."""
    size = 0
    async for document in cursor:
        if known := decoded(document, options):
            yield known
        size += len(document.raw)
        if size >= most_bytes:
            return


async def random_documents(collection: Any, size: int, fields: Sequence[str]) -> AsyncIterator[Document]:
    """Yield *fields* of up to *size* random documents of *collection*: at most SAMPLE_BYTES, and only valid BSON."""
    # Without a filter before it, $sample uses a random cursor and reads no more than it returns.
    stages = [{"$sample": {"size": size}}, {"$project": dict.fromkeys(fields, 1)}]
    async with await undecoded(collection).aggregate(stages, batchSize=SAMPLE_PAGE, allowDiskUse=True) as cursor:
        async for document in valid_documents(cursor, collection.codec_options, SAMPLE_BYTES):
            yield document


async def read_ids(cursor: Any, options: bson.CodecOptions[Document]) -> tuple[list[Any], dict[bytes, Any]]:
    """Return the ids in *cursor*, which is of an ``undecoded`` collection; and, by their bytes, those that are not valid BSON."""
    found: list[Any] = []
    lost: dict[bytes, Any] = {}
    async for document in cursor:
        if known := decoded(document, options):
            found.append(known["_id"])
        else:
            lost[document.raw] = "(not valid BSON)"
    return found, lost


async def read_alone(
    collection: Any,
    document_ids: Iterable[Any],
    fields: Iterable[str] | None,
    states: StateFields | None = None,
    query: Document | None = None,
    is_page: bool = True,
) -> list[Document]:
    """Return those *document_ids* that *query* finds, each read alone; if *is_page*, up to PAGE_BYTES.

    One that is not valid BSON has UNREADABLE, and of its fields only those of its state (*states*; None: the default ones).
    """
    page: list[Document] = []
    size = 0
    for document_id in document_ids:
        wanted = {**(query or {}), "_id": {"$eq": document_id}}
        for projection in (fields, (states or StateFields()).names, ("_id",)):
            try:
                found = await collection.find(wanted, projection and dict.fromkeys(projection, 1)).to_list(None)
            except InvalidBSON:
                continue
            page += found if projection is fields else [{**document, UNREADABLE: True} for document in found]
            break
        size += len(bson_encode(page[-1])) if page else 0
        if is_page and size >= PAGE_BYTES:
            break
    return page


def warn_of_unusable(lost: dict[bytes, Any], warned: Set[bytes]) -> set[bytes]:
    """Warn that the documents *lost* are skipped, unless they are in *warned*; return their keys."""
    for key, document_id in lost.items():
        if key not in warned:
            logger.warning(
                "document %s is skipped: its _id is not UTF-8, or not valid BSON, so no query can name it",
                id_text(document_id),
            )
    return set(lost)


def end_of_ids(document_id: Any) -> Any:
    """Return *document_id* as the bound of a run; if it is doubtful, that of all ids."""
    return END_OF_IDS if is_doubtful(document_id) else document_id


@dataclass(frozen=True, slots=True)
class Refused:
    """A document whose update MongoDB refuses, and the error code."""

    document_id: Any
    code: int


async def replace_all(collection: Any, results: list[Document]) -> None:
    """Store *results*, each in place of an earlier one of the same document.

    If the text of the conversation was another one, the earlier labels go into ``history``, of which HISTORY_KEPT stay.
    """
    operations = [
        UpdateOne(
            {"source_conversation_id": {"$eq": result["source_conversation_id"]}}, _replacement(result), upsert=True
        )
        for result in results
    ]
    try:
        await collection.bulk_write(operations, ordered=False)
    except BulkWriteError as exc:
        require_only_duplicates(exc)


def _replacement(result: Document) -> list[Document]:
    """Return the update that replaces a stored document by *result*; it changes nothing more if it is repeated."""
    made = "$processing_metadata"
    earlier = {
        "classification": "$classification",
        **{name: f"{made}.{name}" for name in ("processed_at", "model_used", "input_sha256", "turns_used")},
    }
    has_changed = {
        "$and": [
            {"$eq": [{"$type": f"{made}.input_sha256"}, "string"]},
            {"$ne": [f"{made}.input_sha256", {"$literal": result.get("processing_metadata", {}).get("input_sha256")}]},
        ]
    }
    known = {"$ifNull": ["$history", []]}
    history = {"$cond": [has_changed, {"$slice": [{"$concatArrays": [known, [earlier]]}, -HISTORY_KEPT]}, "$history"]}
    new = {name: value for name, value in result.items() if name != "_id"}
    return [{"$replaceWith": {"$mergeObjects": [{"_id": "$_id"}, {"$literal": new}, {"history": history}]}}]


async def replace_each(collection: Any, documents: list[Document], key: Sequence[str]) -> None:
    """Store each of *documents*, in place of the one with the same values of the fields in *key*."""
    operations = [
        ReplaceOne({name: {"$eq": document[name]} for name in key}, document, upsert=True) for document in documents
    ]
    await collection.bulk_write(operations)


async def set_each(collection: Any, field: str, values: Mapping[Any, Any]) -> None:
    """Set *field* of documents to *values*, by their ``_id``."""
    operations = [UpdateOne({"_id": {"$eq": key}}, {"$set": {field: value}}) for key, value in values.items()]
    await collection.bulk_write(operations, ordered=False)


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


async def update_matching(collection: Any, updates: Sequence[tuple[Document, Document]]) -> int:
    """Make each of *updates*, a query for one document and its change, in one request; return how many found a document.

    Raises:
        StoreRejectedError: MongoDB refuses one of them for good; others may have been made.
    """
    operations = [UpdateOne(query, change) for query, change in updates]
    try:
        return int((await collection.bulk_write(operations, ordered=False)).matched_count)
    except BulkWriteError as exc:
        require_only_duplicates(exc)
    return 0


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

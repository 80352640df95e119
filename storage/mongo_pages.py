"""Documents that MongoDB refuses, and replaced results: ids that no query can name, updates of which some are refused."""

from __future__ import annotations

import logging
from collections.abc import Sequence, Set
from dataclasses import dataclass
from typing import Any

import bson
from pymongo import ReplaceOne, UpdateOne
from pymongo.errors import BulkWriteError

from storage.extended_json import Document, id_key, id_text, is_doubtful
from storage.mongo_errors import VALIDATOR_CODE, refusal, refused_documents, require_only_duplicates

logger = logging.getLogger(__name__)


async def unusable_ids(collection: Any, doubtful: Sequence[Any]) -> dict[bytes, Any]:
    """Return, by ``id_key``, those of the ids *doubtful* that no query can find, because they are not UTF-8."""
    query = {"_id": {"$in": list(doubtful)}}
    found = {id_key(document["_id"]) for document in await collection.find(query, projection={"_id": 1}).to_list(None)}
    return {key: document_id for document_id in doubtful if (key := id_key(document_id)) not in found}


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


async def replace_all(collection: Any, results: list[Document]) -> None:
    """Store *results*, each in place of an earlier one of the same document."""
    operations = [
        ReplaceOne(
            {"source_conversation_id": {"$eq": result["source_conversation_id"]}},
            {name: value for name, value in result.items() if name != "_id"},
            upsert=True,
        )
        for result in results
    ]
    try:
        await collection.bulk_write(operations, ordered=False)
    except BulkWriteError as exc:
        require_only_duplicates(exc)


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

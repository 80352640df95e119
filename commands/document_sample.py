"""Draws a random sample of the documents that still need a result. Reads only."""

from __future__ import annotations

from dataclasses import dataclass

from aggregator import aggregate_conversation
from error_handler import SkippedDocumentError
from mongo_client import DocumentStore
from storage.contract import Document
from storage.extended_json import id_key

READ = 300  # minimum documents to read, to count those with nothing to classify, which needs no model
CANDIDATES = 1000  # minimum ids to draw, to count the pending documents that have a result already


@dataclass(frozen=True, slots=True)
class DocumentSample:
    """*documents* drawn at random; *left* is the number without a result before, these included.

    *left* is exact if *is_exact*, else the pending documents times the share of them that has no result.
    *askable_share* is the part of them (0 to 1) that has something to classify, by up to READ of them.
    """

    documents: list[Document]
    left: int
    is_exact: bool
    askable_share: float


async def draw_sample(store: DocumentStore, size: int) -> DocumentSample:
    """Return up to *size* documents that are pending, or were left processing, and have no result.

    Raises:
        StoreError: MongoDB does not answer, or refuses.
    """
    count = await store.count("sweep")
    drawn = {id_key(value): value for value in await store.sample_ids("sweep", max(CANDIDATES, size))}
    done = await store.result_keys(list(drawn.values()))
    undone = [value for key, value in drawn.items() if key not in done]
    is_exact = len(drawn) >= count
    left = len(undone) if is_exact else round(count * len(undone) / max(1, len(drawn)))
    wanted = undone[: max(READ, size)]
    documents = {id_key(document["_id"]): document for document in await store.read_documents("sweep", wanted)}
    # In the order drawn: in the order of ids, the first workers would get the oldest documents.
    in_order = [documents[key] for key in map(id_key, wanted) if key in documents]
    askable = sum(map(_is_askable, in_order))
    return DocumentSample(in_order[:size], left, is_exact, askable / max(1, len(in_order)))


def _is_askable(document: Document) -> bool:
    try:
        aggregate_conversation(document)
    except SkippedDocumentError:
        return False
    return True

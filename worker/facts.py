"""``--only facts``: adds ``conversation`` to results of versions that did not store it. No model is asked.

Each page of results is written before the next one is read, and only results without facts are read: after an interruption,
the same command goes on.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

from aggregator import aggregate_conversation
from config import Settings
from domain.conversation import ConversationFacts
from domain.text import counted
from error_handler import SkippedDocumentError
from mongo_client import DURABLE, DocumentStore, call_repeatedly, range_filter
from storage.extended_json import Document, id_key
from storage.mongo_pages import set_each
from utils.retry_utils import RetryPolicy
from worker.left_out import LINE_EVERY_S

WITHOUT_FACTS: Document = {"conversation": None}
PAGE = 50  # whole documents with STORE_ORIGINAL_CONVERSATION=true, so few


async def fill_facts(
    store: DocumentStore, settings: Settings, limit: int | None, tell: Callable[[str], None], *, dry_run: bool
) -> Document:
    """Add the facts to up to *limit* results without them; return the counts. *tell* gets a line each LINE_EVERY_S.

    Keys: results_without_facts, filled, source_is_gone, nothing_to_read. With *dry_run*, all but the first are 0.
    """
    report = dict.fromkeys(("results_without_facts", "filled", "source_is_gone", "nothing_to_read"), 0)
    results = _Results(store, settings)
    if dry_run:
        return report | {"results_without_facts": await results.count()}
    after: list[Any] = []
    shown_s = time.monotonic()
    while limit is None or report["results_without_facts"] < limit:
        left = PAGE if limit is None else min(PAGE, limit - report["results_without_facts"])
        page = await results.read(after, left)
        if not page:
            break
        after = [page[-1]["_id"]]
        found = await store.read_documents("all", [result["source_conversation_id"] for result in page])
        documents = {id_key(document["_id"]): document for document in found}
        facts: dict[Any, Document] = {}
        for result in page:
            document = documents.get(id_key(result["source_conversation_id"]))
            if document is None:
                report["source_is_gone"] += 1
                continue
            try:
                conversation = aggregate_conversation(document)
            except SkippedDocumentError:
                report["nothing_to_read"] += 1
                continue
            made = ConversationFacts.of(document, conversation, settings.result_metadata)
            facts[result["_id"]] = made.as_dict()
        await results.write(facts)
        report["results_without_facts"] += len(page)
        report["filled"] += len(facts)
        if time.monotonic() - shown_s >= LINE_EVERY_S:
            shown_s = time.monotonic()
            tell(f"facts: {counted(report['filled'], 'result')} filled")
    return report


class _Results:
    """The results without facts; each call is repeated as *settings* say."""

    def __init__(self, store: DocumentStore, settings: Settings) -> None:
        self._results = store.database.get_collection(store.results_name, write_concern=DURABLE)
        self._policy = RetryPolicy(settings.mongodb_max_retries, settings.mongodb_backoff_s)

    async def count(self) -> int:
        return await call_repeatedly(
            "count results", lambda: self._results.count_documents(WITHOUT_FACTS), self._policy
        )

    async def read(self, after: list[Any], limit: int) -> list[Document]:
        """Return ``_id`` and source id of up to *limit* results in the order of their ``_id``, after the one given."""
        query = {**WITHOUT_FACTS, **range_filter(after, [])}
        names = {"source_conversation_id": 1}
        found = partial(self._results.find, query, names, sort=[("_id", 1)], limit=limit)
        return await call_repeatedly("read results", lambda: found().to_list(None), self._policy)

    async def write(self, facts: dict[Any, Document]) -> None:
        """Store the facts of conversations, by the ``_id`` of their results."""
        if facts:
            await call_repeatedly("write facts", lambda: set_each(self._results, "conversation", facts), self._policy)

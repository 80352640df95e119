"""Documents that were saved to disk for a run, and have got another text in MongoDB since."""

from __future__ import annotations

from collections.abc import Iterable

from domain.conversation import SOURCE_FIELDS
from mongo_client import DocumentStore
from storage.extended_json import id_key
from storage.files import JournalEntry
from storage.selection import UNREADABLE
from worker.settlement import WorkItem


async def bring_up_to_date(store: DocumentStore, items: Iterable[WorkItem]) -> None:
    """Give *items* their documents as they are now, if the text differs; an answer to the earlier text is dropped.

    The aggregator is not used, because a document that crashes it must do so where the journal notices it.
    """
    by_key = {item.key: item for item in items}
    found = await store.read_documents("all", [item.document_id for item in by_key.values()]) if by_key else []
    for document in found:
        item = by_key[id_key(document["_id"])]
        was_unreadable, is_unreadable = UNREADABLE in item.document, UNREADABLE in document
        if was_unreadable:  # the file does not have its text, which may be readable by now
            item.document = document
        elif not is_unreadable and any(item.document.get(name) != document.get(name) for name in SOURCE_FIELDS):
            item.document, item.past = document, JournalEntry()

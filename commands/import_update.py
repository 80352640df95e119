"""Conversations of an import that are stored already: what a newer export adds to them."""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from aggregator import aggregate_conversation
from config import Settings
from error_handler import ConfigurationError, SkippedDocumentError, StoreError, StoreRejectedError
from help_desks.columns import FORMATS
from help_desks.grown import Comparison, compared
from mongo_client import DURABLE, DocumentStore, call_repeatedly
from storage.extended_json import Document, id_key
from storage.mongo_pages import update_matching
from utils.retry_utils import RetryPolicy

DERIVED_ID = "sha256-"  # how an _id begins that the import has made of the content
ATTEMPTS = 5  # another program may change a document between its comparison and its update


@dataclass(slots=True)
class Growth:
    """Counts of the documents of an import whose conversations are stored already.

    *grown* have *turns* that the stored ones lack (with an update: lacked); of these, *in_work* were leased by a worker, and
    *foreign* have a status of another program. The stored form of *others* has another text; *first_other* is the number of
    the first one. *missed* were changed by other programs during each attempt.
    """

    grown: int = 0
    turns: int = 0
    others: int = 0
    first_other: int = 0
    in_work: int = 0
    foreign: int = 0
    missed: int = 0


@dataclass(frozen=True, slots=True)
class Pair:
    """Document *number* of the import, and the ``_id`` under which it is stored."""

    number: int
    newer: Document
    stored_id: Any


class StoredConversations:
    """Finds the conversations of an import among the stored ones; with *updates*, adds the turns that they lack.

    A conversation is found by its ``_id``. If that is new and the import has made it, of the content or of the name of the
    help desk, by its conversation_number: one of the two must have all turns of the other.
    """

    def __init__(self, store: DocumentStore, settings: Settings, *, updates: bool) -> None:
        self.growth = Growth()
        self._store = store
        self._states = store.states
        self._updates = updates
        name = settings.source_collection
        options = store.database.codec_options.with_options(tz_aware=True)
        self._source = store.database.get_collection(name, codec_options=options, write_concern=DURABLE)
        self._leases = store.database.get_collection(f"{name}_leases")
        self._policy = RetryPolicy(settings.mongodb_max_retries, settings.mongodb_backoff_s)
        self._was_empty: bool | None = None
        self._is_indexed = False

    async def split(self, page: list[tuple[int, Document]]) -> tuple[list[tuple[int, Document]], list[Pair]]:
        """Return the documents of *page* to insert, and those that are stored under another ``_id``.

        Each document has its number in the import.
        """
        if self._was_empty is None:
            found = await self._call("look for documents", partial(self._source.find_one, {}, projection={"_id": 1}))
            self._was_empty = found is None
        made = [one for _, one in page if not self._was_empty and _is_made_here(one)]
        if not made:
            return page, []
        known = await self._read([one["_id"] for one in made])
        asked = {id_key(one["_id"]): one["conversation_number"] for one in made if id_key(one["_id"]) not in known}
        by_number = await self._by_number(set(asked.values())) if asked else {}
        pairs = {}
        for number, one in page:
            candidates = by_number.get(asked.get(id_key(one["_id"])), [])
            if (same := _same_conversation(one, candidates)) is not None:
                pairs[number] = Pair(number, one, same["_id"])
        return [each for each in page if each[0] not in pairs], list(pairs.values())

    async def take(self, pairs: list[Pair]) -> None:
        """Compare *pairs* with what is stored now; with *updates*, add the turns that it lacks."""
        for _ in range(ATTEMPTS):
            stored = await self._read([pair.stored_id for pair in pairs]) if pairs else {}
            known = [(pair, stored[key]) for pair in pairs if (key := id_key(pair.stored_id)) in stored]
            grown = [(pair, document, found) for pair, document in known if (found := self._judged(pair, document))]
            if not self._updates:
                for _pair, _document, found in grown:
                    self._count(found)
                return
            pairs = await self._add(grown) if grown else []
        self.growth.missed += len(pairs)

    def _judged(self, pair: Pair, stored: Document) -> Comparison | None:
        """Return what the stored document lacks, None if nothing; note a stored document with another text."""
        text, stored_text = _text_of(pair.newer), _text_of(stored)
        if text is not None and text == stored_text:
            return None
        found = compared(stored, pair.newer)
        if found is not None and found.added and (found.shared or not found.only_stored):
            return found
        if text != stored_text and (found is None or found.added):
            self.growth.others += 1
            self.growth.first_other = self.growth.first_other or pair.number
        return None

    def _count(self, found: Comparison) -> None:
        self.growth.grown += 1
        self.growth.turns += len(found.added)

    async def _add(self, grown: list[tuple[Pair, Document, Comparison]]) -> list[Pair]:
        """Add the turns; return the pairs whose stored documents were changed meanwhile."""
        leased = await self._leased([pair.stored_id for pair, _, _ in grown])
        updates = [self._update(document, found) for _, document, found in grown]
        try:
            matched = await self._call("add turns", partial(update_matching, self._source, updates))
        except StoreRejectedError as exc:
            if len(grown) > 1:  # one by one, so that the document can be named
                return [pair for each in grown for pair in await self._add([each])]
            raise ConfigurationError(
                f"The new turns of document {grown[0][0].number} cannot be stored in MongoDB (too large, or an unsupported "
                "value); correct or remove it."
            ) from exc
        now = {} if matched == len(grown) else await self._read([pair.stored_id for pair, _, _ in grown])
        again = []
        for pair, document, found in grown:
            key = id_key(pair.stored_id)
            rest = compared(now.get(key, {}), pair.newer) if now else None
            if rest is not None and rest.added:
                again.append(pair)
                continue
            self.growth.in_work += key in leased
            self.growth.foreign += self._states.state_of(document) == "foreign"
            self._count(found)
        return again

    def _update(self, document: Document, found: Comparison) -> tuple[Document, Document]:
        """Return the query and the change that add what was *found* to the stored *document*."""
        change: Document = {"$push": {found.field: {"$each": found.added}}}
        if self._states.state_of(document) != "foreign":
            change |= {"$set": {self._states.status: "pending"}, "$unset": {self._states.reason: ""}}
        # The list must be as it was compared, or a turn that another import added meanwhile would be there twice.
        return {"_id": {"$eq": document["_id"]}, found.field: {"$size": len(document[found.field])}}, change

    async def _by_number(self, numbers: set[Any]) -> dict[Any, list[Document]]:
        if not self._is_indexed:
            self._is_indexed = True
            with contextlib.suppress(StoreError):  # without the index, only slower
                await self._store.ensure_source_indexes()
        query = {"conversation_number": {"$in": list(numbers)}}
        fields = dict.fromkeys(("conversation_number", "messages", "tweets"), 1)
        found = await self._call("find conversations", lambda: self._source.find(query, fields).to_list(None))
        by_number: dict[Any, list[Document]] = {}
        for document in found:
            if not isinstance(number := document["conversation_number"], list):  # a list that holds the number
                by_number.setdefault(number, []).append(document)
        return by_number

    async def _read(self, document_ids: list[Any]) -> dict[bytes, Document]:
        return {id_key(one["_id"]): one for one in await self._store.read_documents("all", document_ids)}

    async def _leased(self, document_ids: list[Any]) -> set[bytes]:
        query = {"_id": {"$in": document_ids}, "expires_at": {"$gt": self._store.server_time()}}
        found = await self._call("read leases", lambda: self._leases.find(query, {"_id": 1}).to_list(None))
        return {id_key(one["_id"]) for one in found}

    async def _call(self, what: str, operation: Callable[[], Awaitable[Any]]) -> Any:
        return await call_repeatedly(what, operation, self._policy)


def _is_made_here(document: Document) -> bool:
    """Return whether the import has made the ``_id`` of a conversation, so that its number can say more."""
    has_turns = isinstance(document.get("messages"), list) or isinstance(document.get("tweets"), list)
    number, document_id = document.get("conversation_number"), str(document["_id"])
    if not has_turns or not isinstance(number, str | int):
        return False
    return document_id.startswith(DERIVED_ID) or any(document_id == f"{desk}-{number}" for desk in FORMATS)


def _same_conversation(newer: Document, candidates: list[Document]) -> Document | None:
    """Return the candidate that has all turns of *newer*, or the other way around; of several, that with the most of them."""
    shared: list[tuple[int, Document]] = []
    for candidate in candidates:
        found = compared(candidate, newer)
        if found is not None and found.shared and not (found.added and found.only_stored):
            shared.append((found.shared, candidate))
    return max(shared, key=lambda each: each[0])[1] if shared else None


def _text_of(document: Document) -> str | None:
    try:
        return aggregate_conversation(document).transcript_sha256
    except SkippedDocumentError:
        return None

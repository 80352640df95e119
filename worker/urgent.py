"""Urgent documents go first: a look for them every half second, and the order in which worker tasks take documents.

A document is urgent if its priority field (PRIORITY_FIELD) is a number above 0, or if it has no number there and the first of
PRIORITY_RULES that finds it has one. Urgent documents pass the same steps as all others (lease, pending file, journal, result).
"""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import itertools
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from domain.text import counted
from error_handler import StoreForbiddenError, StoreRejectedError, StoreUnavailableError
from mongo_client import call_repeatedly
from storage import extended_json
from storage.extended_json import Document, id_key, is_doubtful
from storage.mongo_indexes import urgent_key
from storage.mongo_pages import PAGE_BYTES, decoded, undecoded
from storage.subset import parsed_query
from utils.batch_file_manager import batch_paths
from utils.failed_documents import content_of
from utils.retry_utils import RetryPolicy
from worker.intake import DocumentIntake, RunParts
from worker.quarantine import failed_keys
from worker.settlement import BatchInWork, Settlement, WorkItem

logger = logging.getLogger(__name__)

LOOK_EVERY_S = 0.5
MOST_IN_A_ROW = 3  # urgent documents while others wait: each fourth place is theirs
BEYOND = 200  # ids to read beyond those that are wanted, because other workers may hold the first ones
NEWEST = 2000  # documents, by their ids, that are looked through for rules at each look
RULE_SHARE = 0.05  # of the time, at most, that looks for rules in all documents take: their fields may have no index

Found = list[tuple[float, Any, int]]  # priority, id, bytes
Finder = Callable[[float, int], Awaitable[Found]]


class UrgentSource:
    """Finds the pending urgent documents of a source, the most urgent first."""

    def __init__(self, parts: RunParts) -> None:
        settings, states = parts.settings, parts.store.states
        self._field = settings.priority_field
        self._options = parts.store.database.codec_options
        self._collection = undecoded(parts.store.database[settings.source_collection])
        self._policy = RetryPolicy(settings.mongodb_max_retries, settings.mongodb_backoff_s)
        self._pending: Document = states.queries["pending"]
        pending = states.whole["pending"]
        self._kinds: list[Document] = pending.get("$or", [pending])
        self._subset = [states.subset] if states.subset else []
        self._key = urgent_key(states, self._field)
        self._rules: list[tuple[float, Document]] = []  # conditions that exclude each other
        earlier: list[Document] = [{self._field: {"$type": "number"}}]
        for rule in settings.priority_rules or ():
            query = parsed_query(rule.query, "PRIORITY_RULES")
            if rule.priority > 0:
                self._rules.append((rule.priority, {"$and": [query, {"$nor": list(earlier)}]}))
            earlier.append(query)
        self._rules.sort(key=lambda pair: -pair[0])

    @property
    def finders(self) -> list[tuple[Finder, float]]:
        """The ways to find urgent documents, each with the share of the time that it may take.

        A finder returns the documents above a priority, 0 or more, up to a number and BEYOND more.
        """
        by_rules = [(self._newest_by_rules, 1.0), (self._by_rules, RULE_SHARE)] if self._rules else []
        return [(self._by_field, 1.0), *by_rules]

    async def _by_field(self, floor: float, number: int) -> Found:
        branches = [{"$and": [one, {self._field: {"$gt": floor}}, *self._subset]} for one in self._kinds]
        # Without the index, each look would read the whole collection; with it, each branch is in this order already.
        stages: list[Document] = [{"$match": {"$or": branches}}, {"$sort": {self._field: -1}}]
        rows = await self._read(stages, number, hint=dict(self._key))
        return [(_number(row.get("priority")), row["_id"], row["size"]) for row in rows]

    async def _by_rules(self, floor: float, number: int) -> Found:
        return await self._ruled([], floor, number)

    async def _newest_by_rules(self, floor: float, number: int) -> Found:
        return await self._ruled([{"$sort": {"_id": -1}}, {"$limit": NEWEST}], floor, number)

    async def _ruled(self, stages: list[Document], floor: float, number: int) -> Found:
        rules = [pair for pair in self._rules if pair[0] > floor]
        if not rules:
            return []
        match = {"$match": {"$and": [self._pending, {"$or": [condition for _, condition in rules]}]}}
        rows = {id_key(row["_id"]): row for row in await self._read([*stages, match], number)}
        found: Found = []
        ids = [row["_id"] for row in rows.values()]
        for priority, condition in rules if rows else ():
            chosen = [{"$match": {"$and": [{"_id": {"$in": ids}}, condition]}}]
            found += [(priority, row["_id"], row["size"]) for row in await self._read(chosen, number)]
        return found

    async def _read(self, stages: list[Document], number: int, hint: Document | None = None) -> list[Document]:
        fields = {"_id": 1, "priority": f"${self._field}", "size": {"$bsonSize": "$$ROOT"}}
        pipeline = [*stages, {"$limit": number + BEYOND}, {"$project": fields}]

        async def read() -> list[Document]:
            cursor = await self._collection.aggregate(pipeline, **({"hint": hint} if hint else {}))
            rows = [decoded(raw, self._options) async for raw in cursor]
            # An id that no query can name is left to the pages, which say so.
            return [row for row in rows if row is not None and not is_doubtful(row["_id"])]

        return await call_repeatedly("look for urgent documents", read, self._policy)


def _number(value: Any) -> float:
    with contextlib.suppress(ValueError):
        return float(str(value))
    return 0.0  # a list with a number in it


def keys_in_files(directory: Path) -> set[bytes]:
    """Return the ``id_key`` of each document in the pending, retry and quarantine files of *directory*."""
    keys = failed_keys(directory)
    for path in batch_paths(directory / "pending"):
        with contextlib.suppress(KeyError, TypeError, AttributeError, ValueError):  # a corrupt file, which is set aside
            content = extended_json.loads(content_of(path) or b"[]")
            entries = content if isinstance(content, list) else content["conversations"]
            keys |= {id_key(entry.get("_id", entry.get("conversation_id"))) for entry in entries}
    return keys


class UrgentLane:
    """Puts urgent documents before the *queue* of a run.

    *queue* has one entry for each document that waits: the document, or None for one that waits here. ``waiting`` is the number
    of those.
    """

    def __init__(
        self,
        parts: RunParts,
        intake: DocumentIntake,
        settlement: Settlement,
        queue: asyncio.Queue[WorkItem | None],
    ) -> None:
        self._parts, self._intake, self._settlement, self._queue = parts, intake, settlement, queue
        self._least = parts.settings.most_in_flight
        self._most = max(parts.settings.batch_size // 2, 2 * self._least)  # urgent documents that wait here
        self._urgent: list[tuple[float, int, WorkItem]] = []  # a heap: the most urgent, then the oldest
        self._others: deque[WorkItem] = deque()  # that gave way
        self._in_row = 0
        self._numbers = itertools.count()
        self._batches: list[BatchInWork] = []
        self._left_alone: set[bytes] | None = None  # the documents of local files: this run takes them from there
        self._held: set[bytes] = set()  # the documents of the last looks
        self._taking = asyncio.Lock()
        self._has_ended = self._has_more = False
        self._is_low = asyncio.Event()
        self.ready = asyncio.Event()  # set when the indexes exist
        self.waiting = 0

    @property
    def unsettled(self) -> int:
        """The number of urgent documents in work."""
        return sum(batch.unsettled for batch in self._batches)

    async def run(self) -> None:
        """Look for urgent documents until the run stops, or ``end`` is called; idle looks log nothing."""
        await self.ready.wait()
        async with asyncio.TaskGroup() as tasks:
            for finder, share in UrgentSource(self._parts).finders:
                tasks.create_task(self._look_regularly(finder, share), name="urgent")

    async def end(self) -> None:
        """Take no more; what was taken is in the queue."""
        async with self._taking:
            self._has_ended = True

    async def _look_regularly(self, finder: Finder, share: float) -> None:
        while not self._parts.stop.is_set():
            self._is_low.clear()
            started_at = time.monotonic()
            found: Found = []
            # A full lane takes only what is more urgent than all in it.
            floor = 0.0 if len(self._urgent) < self._most else -self._urgent[0][0]
            try:
                found = await finder(floor, self._most)
            except StoreRejectedError as exc:
                logger.warning("the rest of the run does not look for urgent documents: %s", exc)
                return
            except (StoreUnavailableError, StoreForbiddenError) as exc:
                logger.warning("could not look for urgent documents: %s", exc)
            pause_s = max(LOOK_EVERY_S, (time.monotonic() - started_at) / share)
            async with self._taking:
                if self._has_ended:
                    return
                await self._take(found)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause_s):
                    await self._is_low.wait()

    async def _take(self, found: Found) -> None:
        """Take the most urgent documents of *found* for which there is room, and that nobody else has."""
        if not found:
            return
        if self._left_alone is None:
            self._left_alone = await asyncio.to_thread(keys_in_files, self._parts.files.directory)
        keys = {id_key(row[1]): row for row in found}
        self._promote({key: row[0] for key, row in keys.items()})
        new = [keys[key] for key in self._intake.free(keys, self._left_alone | self._held)]
        if not new:
            self._held.clear()
            return
        number = max(self._most - len(self._urgent), self._least)
        sizes = itertools.accumulate(size for *_, size in new)
        chosen = [row for row, size in zip(new, sizes, strict=True) if size <= PAGE_BYTES][:number] or new[:1]
        self._has_more = len(new) > len(chosen)
        priorities = {id_key(document_id): priority for priority, document_id, _ in chosen}
        self._held |= priorities.keys()  # if another worker has them, the next look tries those behind them
        batch = await self._intake.urgent([document_id for _, document_id, _ in chosen])
        if batch is not None:
            self._add(batch, priorities)

    def _add(self, batch: BatchInWork, priorities: dict[bytes, float]) -> None:
        logger.info("%s first", counted(len(batch.items), "urgent document goes", "urgent documents go"))
        self._batches = [one for one in self._batches if one.unsettled] + [batch]
        self._settlement.admit(batch)
        self._settlement.stats.urgent += len(batch.items)
        self.waiting += len(batch.items)
        for item in batch.items:
            heapq.heappush(self._urgent, (-priorities[item.key], next(self._numbers), item))
            self._queue.put_nowait(None)

    def _promote(self, priorities: dict[bytes, float]) -> None:
        """Put the documents of *priorities* first that the queue has already: a change of the source announced them."""
        for _ in range(self._queue.qsize()):
            entry = self._queue.get_nowait()
            if entry is not None and entry.key in priorities:
                heapq.heappush(self._urgent, (-priorities[entry.key], next(self._numbers), entry))
                self._settlement.stats.urgent += 1
                self.waiting += 1
                entry = None
            self._queue.put_nowait(entry)

    def exchange(self, entry: WorkItem | None) -> WorkItem:
        """Return the document to process now, in place of the *entry* of the queue."""
        if entry is not None:
            self._others.append(entry)
            self.waiting += 1
        if self._urgent and self._in_row >= MOST_IN_A_ROW and not self._others:
            self._find_other()
        self.waiting -= 1
        if not self._urgent or (self._others and self._in_row >= MOST_IN_A_ROW):
            self._in_row = 0
            return self._others.popleft()
        self._in_row += 1
        item = heapq.heappop(self._urgent)[-1]
        if self._has_more and len(self._urgent) < self._least:
            self._is_low.set()
        return item

    def _find_other(self) -> None:
        """Move the first document of the queue that is not urgent to those here, if there is one."""
        for _ in range(self._queue.qsize()):
            entry = self._queue.get_nowait()
            self._queue.put_nowait(None)
            if entry is not None:
                self._others.append(entry)
                self.waiting += 1
                return

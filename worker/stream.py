"""The documents of ``--mode stream``: new conversations as they come, and those that grew after they were labelled.

A change of the source only names a document. Its state, its lease and its result decide whether it needs a label, as in every
run, so a lost or repeated change only costs time (docs/stream.md).
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Iterable
from typing import Any

from config import Settings
from mongo_client import DocumentStore
from storage.change_stream import ChangeWatch, Position
from storage.extended_json import Document, id_key
from utils.batch_file_manager import BatchFiles
from worker.intake import DocumentIntake, RunParts
from worker.settlement import BatchInWork, Settlement
from worker.subset import in_subset

FILE_NAME = "stream.json"
SAVE_EVERY_S = 5.0
TICK_S = 0.5  # the longest wait for changes
COMPARE_S = 0.25  # the longest time for pages between two looks at the changes
POLL_MIN_S, POLL_MAX_S = 0.5, 2.0
POLL_LOAD = 20.0  # a poll waits this many times as long as it took
MOST_POSITIONS = 1000  # read ahead
MOST_WAITING = 10_000  # conversations that wait until they are quiet; with more, the first ones are not waited for, and
# no changes are read: they stay in MongoDB


class StreamState:
    """What must survive a restart: the resume token, and the conversations that have grown. Kept in FILE_NAME.

    The file may be old: changes that are read again lead to documents that are up to date.
    """

    def __init__(
        self, files: BatchFiles, source: str, watch: ChangeWatch, settle_s: float, subset: str | None = None
    ) -> None:
        self._files = files
        self._source = source
        self._subset = subset
        self.watch = watch
        self.settle_s = settle_s
        saved = files.read_state(FILE_NAME) or {}
        if saved.get("source") != source:
            saved = {}
        self.token = watch.token = saved.get("token")
        # A stream of another part did not keep the conversations of this one that grew.
        self.is_comparing = saved.get("is_comparing") is True or saved.get("subset") not in (None, subset)
        self.waiting: dict[bytes, tuple[float, Any]] = {}  # by id_key: when it is due (monotonic), and the _id
        for document_id in saved.get("waiting") or []:
            self.wait_for(document_id)
        self._content = saved
        self._next_s = 0.0

    async def locate(self) -> None:
        """Begin at now if no token is stored, and store it. Raises StoreError if MongoDB does not answer."""
        await self.watch.locate()
        self.token = self.watch.token
        self.save(at_once=True)

    @property
    def has_room(self) -> bool:
        """True if another conversation may join those that wait."""
        return len(self.waiting) <= MOST_WAITING

    def wait_for(self, document_id: Any) -> None:
        """Look at the document when it has been quiet for the settling time from now."""
        key = id_key(document_id)
        self.waiting.pop(key, None)  # to the end: the order is that of the due times
        self.waiting[key] = (time.monotonic() + self.settle_s, document_id)

    def due(self, limit: int) -> list[Any]:
        """Return up to *limit* ids that are due; they wait on until they are dropped."""
        now, surplus = time.monotonic(), len(self.waiting) - MOST_WAITING
        first = list(self.waiting.values())[:limit] if self.waiting else []
        return [document_id for index, (at, document_id) in enumerate(first) if at <= now or index < surplus]

    def save(self, *, at_once: bool = False) -> None:
        """Write the file if it changed, at most each SAVE_EVERY_S."""
        now = time.monotonic()
        if now < self._next_s and not at_once:
            return
        ids = [document_id for _, document_id in self.waiting.values()]
        content = {
            "source": self._source,
            "subset": self._subset,
            "token": self.token,
            "is_comparing": self.is_comparing,
            "waiting": ids,
        }
        if content != self._content:
            self._files.write_state(FILE_NAME, content)
            self._content, self._next_s = content, now + SAVE_EVERY_S


async def open_stream(
    store: DocumentStore, files: BatchFiles, source: str, settings: Settings, subset: str | None
) -> StreamState:
    """Return the state of the stream of *source*, the identity of the collection; create the index that its looks need.

    *subset* is the ``Subset.name`` of *store*.

    The stream begins before the first run, so that what grows meanwhile is not missed.
    """
    options = store.database.codec_options.with_options(tz_aware=True)  # as the store reads ids
    collection = store.database.get_collection(settings.source_collection, codec_options=options)
    await store.ensure_source_indexes(for_stream=True)
    state = StreamState(files, source, ChangeWatch(collection, store.states), settings.settle_s, subset)
    await state.locate()
    return state


class StreamIntake(DocumentIntake):
    """The intake of a run that lasts until it is stopped; its ``only`` is ``changed``."""

    takes_new = True

    def __init__(self, state: StreamState, parts: RunParts, settlement: Settlement) -> None:
        super().__init__(parts, settlement)
        self._state = state
        self._in_work: list[BatchInWork] = []
        self._taking = asyncio.Lock()  # new and urgent documents are taken in turn, so that none is taken twice
        self._elsewhere: set[bytes] = set()  # leased by others, or done, since the last sweep
        self._compared: list[Any] = []  # the last id
        self._poll_s = POLL_MIN_S
        self._next_sweep_s = 0.0

    async def live(self, sweep_every_s: float) -> AsyncGenerator[BatchInWork]:
        """Yield new and grown conversations as they come, and each *sweep_every_s* those that no change announced."""
        state = self._state
        state.watch.token = state.token  # an outage has discarded what was read beyond it
        positions: asyncio.Queue[Position] = asyncio.Queue(MOST_POSITIONS)
        reader = asyncio.create_task(state.watch.run(positions), name="changes")
        try:
            while not self._parts.stop.is_set():
                if reader.done():
                    reader.result()  # it returns if there are no change streams
                if time.monotonic() >= self._next_sweep_s:
                    self._elsewhere.clear()
                    async for batch in self._pending():
                        yield batch
                    self._next_sweep_s = time.monotonic() + sweep_every_s
                is_read = state.watch.is_supported and state.has_room
                async for batch in self._announced(positions) if is_read else self._polled():
                    yield batch
                async for batch in self._grown():
                    yield batch
                async for batch in self._failed():
                    yield batch
                state.save()
        finally:
            reader.cancel()
            await asyncio.wait([reader])
            state.save(at_once=True)

    async def _announced(self, positions: asyncio.Queue[Position]) -> AsyncGenerator[BatchInWork]:
        """Wait at most TICK_S for changes, and yield the new documents among them."""
        found: list[Position] = []
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(TICK_S):
                found.append(await positions.get())
        while not positions.empty():
            found.append(positions.get_nowait())
        state = self._state
        if any(position.is_lost for position in found):
            state.is_comparing, self._compared, self._next_sweep_s = True, [], 0.0
        changes = [position.change for position in found if position.change is not None]
        for change in changes:
            if change.has_grown:
                state.wait_for(change.document_id)
        new = {id_key(change.document_id): change.document_id for change in changes if change.is_new}
        for start in range(0, len(new), self._options.batch_size):
            ids = list(new.values())[start : start + self._options.batch_size]
            async for batch in self._new(await self._store.read_documents("sweep", ids)):
                yield batch
        if found:  # the batches are on disk
            state.token = found[-1].token
        until_s = time.monotonic() + COMPARE_S
        while state.is_comparing and state.has_room and time.monotonic() < until_s:
            state.is_comparing = await self._compare_page()

    async def _polled(self) -> AsyncGenerator[BatchInWork]:
        """Wait as long as a poll may, and yield what it finds; compare one page of all documents with their results."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._poll_s):
                await self._parts.stop.wait()
        start_s = time.monotonic()
        async for batch in self._pending():
            yield batch
        if self._state.has_room:
            await self._compare_page()
        self._poll_s = min(POLL_MAX_S, max(POLL_MIN_S, POLL_LOAD * (time.monotonic() - start_s)))

    async def _pending(self) -> AsyncGenerator[BatchInWork]:
        """Yield the documents that are pending, or whose worker died."""
        after: list[Any] = []
        while page := await self._store.read_page("sweep", after, [], self._options.batch_size):
            after = [page[-1]["_id"]]
            async for batch in self._new([one for one in page if id_key(one["_id"]) not in self._elsewhere]):
                yield batch

    async def _new(self, documents: list[Document]) -> AsyncGenerator[BatchInWork]:
        """Yield those of *documents* that nobody works on, as one batch."""
        async with self._taking:
            mine = self._busy() | self._settlement.failed_keys | self._store.unmarked
            free = [document for document in documents if id_key(document["_id"]) not in mine]
            self._elsewhere |= {id_key(document["_id"]) for document in free}
            self._recovered.clear()  # a document may come again
            batches = [batch async for batch in self.given(free)] if free else []
            self._in_work += batches
        for batch in batches:
            self._elsewhere -= {item.key for item in batch.items}
            yield batch

    def free(self, keys: Iterable[bytes], left_alone: set[bytes]) -> list[bytes]:
        """Return what the intake of each run does, without the documents in work: they look pending."""
        return super().free(keys, left_alone | self._busy())

    async def urgent(self, document_ids: list[Any]) -> BatchInWork | None:
        """Return what the intake of each run does, and remember what is in work."""
        async with self._taking:
            batch = await super().urgent(document_ids)
            self._in_work += [] if batch is None else [batch]
        return batch

    async def _grown(self) -> AsyncGenerator[BatchInWork]:
        """Yield the conversations that have been quiet since they grew, if their text is not that of their result."""
        state, kinds = self._state, self._parts.kinds
        ids = state.due(self._options.batch_size)
        if not ids or kinds is None:
            return
        if self._options.subset.name:
            inside = await in_subset(self._store, ids)
            for document_id in [one for one in ids if id_key(one) not in inside]:
                del state.waiting[id_key(document_id)]
            ids = [one for one in ids if id_key(one) in inside]
        busy = self._busy() | self._settlement.failed_keys
        found = await kinds.of(await self._store.read_documents("all", ids), set())
        kind_of = {id_key(document["_id"]): kind for document, kind in found}
        for document_id in ids:
            if id_key(document_id) in busy or kind_of.get(id_key(document_id)) == "changed":
                state.wait_for(document_id)  # until its result is seen
            else:
                del state.waiting[id_key(document_id)]
        # A skipped conversation had no text of a customer; a new one is pending.
        async for batch in self._new([document for document, kind in found if kind in ("changed", "skipped", "new")]):
            yield batch

    async def _failed(self) -> AsyncGenerator[BatchInWork]:
        """Yield a retry round if no document is in work."""
        if not self._settlement.failed_keys or self._busy():
            return
        async for batch in self.retry_round():
            self._in_work.append(batch)
            yield batch

    async def _compare_page(self) -> bool:
        """Compare the next documents with their results; those that have grown wait. Return whether there are more."""
        page = await self._store.read_page("all", self._compared, [], self._options.batch_size)
        self._compared = [page[-1]["_id"]] if page else []
        for document, kind in await self._parts.kinds.of(page, set()) if page and self._parts.kinds else []:
            if kind == "changed" and id_key(document["_id"]) not in self._state.waiting:
                self._state.wait_for(document["_id"])
        return bool(page)

    def _busy(self) -> set[bytes]:
        """Return the ``id_key`` of each document of this worker whose status is not written yet."""
        self._in_work = [batch for batch in self._in_work if batch.items]  # emptied when all is written
        return {item.key for batch in self._in_work for item in batch.items}

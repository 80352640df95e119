"""A whole run on a store in memory: leases, the order of settlement, and what becomes of answers that are not stored."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from config import load_settings
from domain.conversation import Classification, Conversation, Outcome
from error_handler import LLMReplyError, Reason, SkippedDocumentError, StoreRejectedError, StoreUnavailableError
from mongo_client import FinalStatus
from storage.extended_json import Document, id_key
from storage.selection import Selection, StateFields
from utils.batch_file_manager import BatchFiles
from worker.checkpoint import Checkpoint
from worker.intake import RunOptions, RunParts
from worker.quarantine import list_failed
from worker.run import BatchRun
from worker.service_first import ServiceFirst
from worker.settlement import BatchInWork

END_S = 20.0


class MemoryStore:
    """A store without a database, with scripted failures.

    *rejects* holds the source ids whose results it rejects for good; *is_away* fails every write of results, and
    *failing_marks* the next writes of statuses. *on_mark* is called before each of those.
    """

    def __init__(self) -> None:
        self.results: dict[Any, Document] = {}
        self.statuses: dict[Any, FinalStatus] = {}
        self.renewed = asyncio.Event()
        self.rejects: set[Any] = set()
        self.is_away = False
        self.failing_marks = 0
        self.on_mark: Callable[[], None] = lambda: None
        self.unusable: set[bytes] = set()
        self.unmarked: set[bytes] = set()
        self.states = StateFields()

    async def ensure_source_indexes(self) -> None:
        """Nothing to index."""

    async def count_results(self) -> int:
        return len(self.results)

    async def count(self, _selection: Selection) -> int:
        return 0

    async def upper_bound(self) -> list[Any]:
        return []

    async def read_page(
        self, _selection: Selection, _after: Sequence[Any], _bound: Sequence[Any], _limit: int
    ) -> list[Document]:
        return []

    async def result_keys(self, document_ids: list[Any], _job_id: str | None = None) -> set[bytes]:
        return {id_key(document_id) for document_id in document_ids if document_id in self.results}

    async def result_provenance(self, document_ids: list[Any]) -> dict[bytes, Document]:
        return {
            id_key(document_id): self.results[document_id]
            for document_id in document_ids
            if document_id in self.results
        }

    async def read_documents(self, _selection: Selection, _document_ids: list[Any]) -> list[Document]:
        return []

    async def write_results(self, results: list[Document], *, replace: bool) -> dict[int, StoreRejectedError]:
        if self.is_away:
            raise StoreUnavailableError("MongoDB is unavailable")
        rejected = {}
        for index, result in enumerate(results):
            if result["source_conversation_id"] in self.rejects:
                rejected[index] = StoreRejectedError("MongoDB cannot store the document")
            else:
                self.results[result["source_conversation_id"]] = result
        return rejected

    async def mark_processing(self, _document_ids: list[Any]) -> None:
        """The status of a document in work is of no interest here."""

    async def mark(self, document_ids: list[Any], status: FinalStatus, _reason: str | None, *, queries: bool) -> None:
        self.on_mark()
        if self.failing_marks:
            self.failing_marks -= 1
            raise StoreUnavailableError("MongoDB is unavailable")
        self.statuses |= dict.fromkeys(document_ids, status)

    async def claim(self, document_ids: list[Any]) -> set[bytes]:
        return set(map(id_key, document_ids))

    async def renew_leases(self) -> None:
        self.renewed.set()

    async def release(self, _document_ids: list[Any]) -> None:
        """Leases are not kept here."""


class Model:
    """Answers each conversation at once; *before* is awaited before each answer."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.before: Callable[[], Any] = lambda: asyncio.sleep(0)

    async def classify(self, conversation: Conversation, _rounds: int) -> Outcome:
        await self.before()
        self.asked.append(conversation.transcript)
        labels = Classification(
            categorization="a parcel that is late",
            intent="Order Status",
            topic="Shipping/Delivery",
            sentiment="Negative",
        )
        return Outcome(labels, "model", None, conversation.transcript_sha256, "fingerprint")


def document(number: int, text: str) -> Document:
    return {"_id": number, "messages": [{"sender": "customer", "text": text}], "status": "pending"}


class Lease(ServiceFirst):
    """The lease of the service on the model server, held until *is_free* is set."""

    def __init__(self, floor: int) -> None:
        super().__init__(None, "server:80", floor)
        self.is_free = asyncio.Event()
        self.held = floor

    async def watch(self, on_change: Callable[[int | None], None]) -> None:
        on_change(self.held)
        await self.is_free.wait()
        on_change(None)


async def run(
    folder: Path,
    store: MemoryStore,
    model: Model,
    *pages: list[Document],
    to_the_end: bool = False,
    lease: ServiceFirst | None = None,
) -> dict[str, Any]:
    """Process *pages*, each as a batch, and with *to_the_end* what is in the retry files of *folder*."""
    settings = load_settings(None, lease_s=1.0)
    checkpoint, files = Checkpoint("db.source", "job"), BatchFiles(folder)
    parts = RunParts(settings, RunOptions(), store, files, checkpoint, asyncio.Event(), model.classify, "plan")
    parts = replace(parts, service_first=lease)
    batch_run = BatchRun(parts)
    sources: list[AsyncGenerator[BatchInWork]] = [batch_run.intake.given(page) for page in pages]
    async with asyncio.timeout(END_S):
        return await batch_run.execute(sources, to_the_end=to_the_end)


async def test_leases_are_renewed_during_long_calls(tmp_path: Path) -> None:
    """Else a call that takes longer than LEASE_S loses its document to another worker."""
    store, model = MemoryStore(), Model()
    model.before = store.renewed.wait
    await run(tmp_path, store, model, [document(1, "where is my parcel")])
    assert store.results.keys() == {1}


async def test_calls_keep_to_the_floor_while_the_service_has_the_lease(tmp_path: Path) -> None:
    """Five calls are allowed; the lease is never released, and every document is done all the same."""
    store, model, running, most = MemoryStore(), Model(), set[object](), 0

    async def count() -> None:
        nonlocal most
        running.add(call := object())
        most = max(most, len(running))
        for _ in range(5):
            await asyncio.sleep(0)
        running.remove(call)

    model.before = count
    await run(tmp_path, store, model, [document(number, f"parcel {number}") for number in range(12)], lease=Lease(2))
    assert most == 2
    assert len(store.results) == 12


async def test_end_of_the_lease_starts_the_calls_that_wait(tmp_path: Path) -> None:
    """Also if the one call in flight never ends."""
    store, model, lease, asked = MemoryStore(), Model(), Lease(1), asyncio.Event()
    running = 0

    async def wait_for_all() -> None:
        nonlocal running
        running += 1
        lease.is_free.set()
        if running == 4:
            asked.set()
        await asked.wait()

    model.before = wait_for_all
    await run(tmp_path, store, model, [document(number, f"parcel {number}") for number in range(4)], lease=lease)
    assert len(store.results) == 4


async def test_answer_that_could_not_be_written_is_kept_and_not_asked_again(tmp_path: Path) -> None:
    """The next run writes it from the retry file."""
    store, model = MemoryStore(), Model()
    store.is_away = True
    with pytest.raises(StoreUnavailableError):
        await run(tmp_path, store, model, [document(1, "where is my parcel")])
    assert store.results == {}
    assert [entry.status for entry in list_failed(tmp_path, "retry").entries] == ["write_failed"]
    store.is_away = False
    await run(tmp_path, store, model, to_the_end=True)
    assert store.results.keys() == {1}
    assert len(model.asked) == 1


async def test_rejected_result_is_not_copied(tmp_path: Path) -> None:
    """The next identical conversation is asked itself: a copy would refer to a document without a result."""
    store, model = MemoryStore(), Model()
    store.rejects = {1}
    await run(tmp_path, store, model, [document(1, "same text")], [document(2, "same text")])
    assert store.results.keys() == {2}
    assert len(model.asked) == 2
    assert "copied_from" not in store.results[2]["processing_metadata"]


async def test_document_that_failed_and_is_then_skipped_is_counted_once(tmp_path: Path) -> None:
    """For example because the window is smaller in the retry round; its failure no longer counts."""
    store, model = MemoryStore(), Model()
    errors = [LLMReplyError("empty", Reason.EMPTY), SkippedDocumentError("too long", Reason.CONTEXT_OVERFLOW)]

    async def fail() -> None:
        raise errors.pop(0)

    model.before = fail
    stats = await run(tmp_path, store, model, [document(1, "where is my parcel")], to_the_end=True)
    assert (stats["documents_processed"], stats["failed"], stats["skipped"]) == (1, 0, 1)
    assert stats["reasons"] == {Reason.CONTEXT_OVERFLOW: 1}
    assert store.statuses == {1: "skipped"}


async def test_statuses_are_written_before_the_batch_is_completed(tmp_path: Path) -> None:
    """A crash in between leaves the batch in pending/, so that the next run writes the status."""
    store, seen = MemoryStore(), []
    store.on_mark = lambda: seen.append(len(list((tmp_path / "pending").glob("*.json"))))
    await run(tmp_path, store, Model(), [document(1, "where is my parcel")])
    assert seen == [1]
    assert store.statuses == {1: "processed"}
    assert list((tmp_path / "pending").glob("*.json")) == []


async def test_statuses_that_could_not_be_written_are_written_by_the_next_flush(tmp_path: Path) -> None:
    """The first flush ends the run with an error; the last one, when it saves, writes them."""
    store = MemoryStore()
    store.failing_marks = 1
    with pytest.raises(StoreUnavailableError):
        await run(tmp_path, store, Model(), [document(1, "where is my parcel")])
    assert store.statuses == {1: "processed"}

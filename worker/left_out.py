"""The documents that a run does not select, counted and named: for the summary, ``--dry-run``, ``estimate`` and ``doctor``."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from config import Settings
from domain.text import counted, one_line
from error_handler import StoreUnavailableError
from mongo_client import DocumentStore
from utils.batch_file_manager import FAILURE_KINDS
from worker.quarantine import failed_keys, list_failed
from worker.subset import in_subset

T = TypeVar("T")

COUNT_LIMIT_S = 120.0  # for the counts of a report
LINE_EVERY_S = 5.0  # while they last
NAMED_STATUSES = 10
FOREIGN_REMEDY = (
    "If another program sets it, use --status-field triad_status (STATUS_FIELD=triad_status): the state of this product is then "
    "in fields of that name, and theirs stays as it is. Otherwise set it to pending."
)
EXACT_MARKS = 10_000  # documents marked processed whose results are looked up; 30 us each


@dataclass(frozen=True, slots=True)
class LeftOut:
    """Counts of documents that a run does not select.

    *foreign* documents have a status of another program; *statuses* holds the most frequent of these. *elsewhere*
    documents are marked processed and have no result in the results collection; *done* ones have one. *failed* documents
    are in no local queue. *skipped* documents had nothing to classify in an earlier run. *filtered* documents wait for a result
    and are outside the subset (``--filter``, ``--since``, ``--until``); the other counts are of documents inside.
    """

    foreign: int = 0
    statuses: dict[str, int] = field(default_factory=dict)
    elsewhere: int = 0
    failed: int = 0
    skipped: int = 0
    done: int = 0
    filtered: int = 0

    @property
    def is_all(self) -> bool:
        """True if there are documents, and none of them can be selected or has a result here."""
        return not self.done and any((self.foreign, self.elsewhere, self.failed, self.skipped))

    def hint_if_none(self, settings: Settings, queued: int) -> str | None:
        """Return what to do if there are no documents at all, not even *queued* ones; else None."""
        if queued or self != LeftOut():
            return None
        return (
            f"No documents found in {settings.db_name}.{settings.source_collection}: correct --db-name, --source-collection or "
            "--filter, or import conversations with python -m utils.mongodb_import."
        )

    def problems(self, results: str) -> list[tuple[str, str]]:
        """Return a sentence and its remedy for each kind; *results* is the name of the results collection."""
        names = ", ".join(f"{status} ({count:,})" for status, count in self.statuses.items())
        names += ", and others" if self.foreign > sum(self.statuses.values()) else ""
        rows = [
            (
                self.foreign,
                f"{_have(self.foreign)} an unrecognised status and {_are(self.foreign)} not selected: {names}.",
                FOREIGN_REMEDY,
            ),
            (
                self.elsewhere,
                f"{counted(self.elsewhere, 'document')} {_are(self.elsewhere)} marked processed and without a result in "
                f"{results}: the result is in another collection, or another program set the mark.",
                "--only elsewhere classifies them.",
            ),
            (
                self.failed,
                f"{_have(self.failed)} the status failed and {_are(self.failed)} in no queue of this directory.",
                "--retry-failed retries them.",
            ),
            (
                self.skipped,
                f"{counted(self.skipped, 'document was', 'documents were')} skipped by an earlier run: nothing to classify.",
                "Set their status to pending after a correction; data/README.md lists the accepted shapes.",
            ),
            (
                self.filtered,
                f"{counted(self.filtered, 'document waits', 'documents wait')} outside --filter, --since and --until.",
                "A run without these flags takes them.",
            ),
        ]
        return [(sentence, remedy) for count, sentence, remedy in rows if count]


def _have(count: int) -> str:
    return counted(count, "document has", "documents have")


def _are(count: int) -> str:
    return "is" if count == 1 else "are"


async def count_in_time(counting: Coroutine[Any, Any, T], tell: Callable[[str], None]) -> T:
    """Return what *counting* returns; *tell* gets a line each LINE_EVERY_S.

    Raises:
        StoreError: It has failed, or takes longer than COUNT_LIMIT_S.
    """
    start_s, task = time.monotonic(), asyncio.create_task(counting)
    try:
        while not task.done():
            waited_s = time.monotonic() - start_s
            if waited_s >= COUNT_LIMIT_S:
                raise StoreUnavailableError(
                    f"MongoDB did not count the documents within {COUNT_LIMIT_S:g} s; the index on their status, which "
                    "a run creates, makes it faster"
                )
            if waited_s >= LINE_EVERY_S:
                tell(f"counting the documents: {waited_s:.0f} s of at most {COUNT_LIMIT_S:.0f} s")
            await asyncio.wait([task], timeout=min(LINE_EVERY_S, COUNT_LIMIT_S - waited_s))
        return task.result()
    finally:
        task.cancel()


async def count_left_out(store: DocumentStore, *, queued: Path | int, skipped_now: int = 0) -> LeftOut:
    """Return what a run leaves out now.

    *queued* is the directory with the retry queue and the quarantine, or the number of their documents; *skipped_now* were
    skipped by this run. Above EXACT_MARKS, *elsewhere* is the least number, from the sizes of both collections.
    """
    foreign = await store.count("foreign")
    marked = await store.count("processed")
    elsewhere = await _without_result(store, marked)
    in_queue = queued if isinstance(queued, int) else await _queued(store, queued)
    return LeftOut(
        foreign,
        await _statuses(store) if foreign else {},
        elsewhere,
        max(0, await store.count("failed") - in_queue),
        max(0, await store.count("skipped") - skipped_now),
        marked - elsewhere,
        await _filtered(store),
    )


async def _queued(store: DocumentStore, directory: Path) -> int:
    """Return how many documents of the retry queue and the quarantine of *directory* are in the subset."""
    if not store.states.subset:
        return len(failed_keys(directory))
    return len(await in_subset(store, await asyncio.to_thread(_queued_ids, directory)))


def _queued_ids(directory: Path) -> list[Any]:
    kinds = FAILURE_KINDS if directory.is_dir() else ()
    return [entry.conversation_id for kind in kinds for entry in list_failed(directory, kind).entries]


async def _filtered(store: DocumentStore) -> int:
    if not store.states.subset:
        return 0
    return max(0, await store.count("sweep", whole=True) - await store.count("sweep"))


async def _statuses(store: DocumentStore) -> dict[str, int]:
    stages: list[dict[str, Any]] = [
        {"$match": store.states.queries["foreign"]},
        {"$group": {"_id": store.states.status_expression, "count": {"$sum": 1}}},
        {"$sort": {"count": -1, "_id": 1}},
        {"$limit": NAMED_STATUSES},
    ]
    groups = await store.aggregate("count the statuses of other programs", stages)
    return {status_name(group["_id"]): group["count"] for group in groups}


def status_name(status: Any) -> str:
    """Return *status* as a report shows it."""
    return one_line(str(status), 40) or "''"


async def _without_result(store: DocumentStore, marked: int) -> int:
    results = await store.count_results() if marked else 0
    if not results or marked > EXACT_MARKS:
        return max(0, marked - results)
    found = {"from": store.results_name, "localField": "_id", "foreignField": "source_conversation_id", "as": "found"}
    stages: list[dict[str, Any]] = [
        {"$match": store.states.queries["processed"]},
        {"$project": {"_id": 1}},
        {"$lookup": found},
        {"$match": {"found": []}},
        {"$count": "count"},
    ]
    return sum([int(row["count"]) for row in await store.aggregate("look for results", stages)])


def is_fruitless(stats: Mapping[str, Any]) -> bool:
    """Return whether a run with *stats* could select none of the documents, or skipped all for their shape."""
    if any(stats[name] for name in ("successful", "failed", "already_done", "leased_elsewhere")):
        return False
    if stats["skipped"]:
        shape = sum(count for reason, count in stats["reasons"].items() if reason.startswith("skipped_"))
        return bool(shape == stats["skipped"])
    left = stats.get("not_selected")
    return left is not None and LeftOut(**left).is_all

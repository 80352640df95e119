"""``python cli.py plan``: what a run would find to do, and which documents. Changes nothing."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections import Counter
from collections.abc import AsyncGenerator
from typing import Any, TextIO, get_args

from commands.flags import Command, add_model_flags
from config import Settings
from domain.staleness import Kind, StalenessChecker
from error_handler import ConfigurationError, ExitCode
from mongo_client import DocumentStore
from storage import extended_json
from storage.contract import Document
from worker.plan import ask_plan, work_kinds

MEANINGS: dict[Kind, str] = {
    "new": "no result yet",
    "changed": "the conversation is not the one that was labelled",
    "stale": "labelled by another prompt, taxonomy, model or options",
    "failed": "failed, or in the retry queue or quarantine",
    "skipped": "nothing to classify",
    "done": "nothing to do",
    "unjudged": "done or stale: the model server was not asked (--offline)",
    "foreign": "a status that is none of ours: never selected",
}
OFFLINE_KINDS = ("stale", "done", "unjudged")  # which of them cannot be told apart
LINE_EVERY_S = 5.0


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this command alone."""
    add_model_flags(parser.add_argument_group("what would be asked"))
    shown = parser.add_argument_group("what to list")
    shown.add_argument("--json", action="store_true", help="counts, or with --ids the ids, as JSON")
    shown.add_argument("--ids", choices=get_args(Kind), metavar="KIND", help="print the ids of one kind, one per line")
    shown.add_argument(
        "--offline", action="store_true", help="do not ask the model server; stale cannot be judged then"
    )


async def run(arguments: argparse.Namespace, settings: Settings) -> int:
    """Count the documents by kind and print the counts, or print the ids of one kind."""
    if arguments.offline and arguments.ids in OFFLINE_KINDS[:2]:
        raise ConfigurationError(f"--offline cannot tell which documents are {arguments.ids}; leave it out.")
    store = DocumentStore(settings)
    try:
        await store.check()
        plan = None if arguments.offline else await ask_plan(settings)
        kinds = work_kinds(store, settings, plan)
        progress = _Progress(sys.stderr, await store.count("all"))
        counts: Counter[str] = Counter()
        async for document, kind in _judged(store, kinds, settings.batch_size):
            counts[kind] += 1
            progress.show(counts.total())
            if kind == arguments.ids:
                sys.stdout.write(_id_line(document["_id"], as_json=arguments.json) + "\n")
        progress.end()
    finally:
        await store.close()
    if arguments.ids is None:
        render = _as_json if arguments.json else _as_text
        sys.stdout.write(render(counts, settings, plan) + "\n")
    return ExitCode.DONE


async def _judged(
    store: DocumentStore, kinds: StalenessChecker, page_size: int
) -> AsyncGenerator[tuple[Document, Kind]]:
    """Yield each document up to the greatest id there is now, with its kind; one page is in memory at a time."""
    bound = await store.upper_bound()
    queued = await asyncio.to_thread(kinds.queued)
    after: list[Any] = []
    while bound:
        page = await store.read_page("all", after, bound, page_size)
        if not page:
            return
        after = [page[-1]["_id"]]
        for judged in await kinds.of(page, queued):
            yield judged


def _id_line(document_id: Any, *, as_json: bool) -> str:
    return extended_json.dumps(document_id).decode() if as_json else extended_json.id_text(document_id)


def _shown(plan: str | None) -> list[Kind]:
    """Return the kinds that can be told, in the order they are listed."""
    left_out = OFFLINE_KINDS[:2] if plan is None else OFFLINE_KINDS[2:]
    return [kind for kind in MEANINGS if kind not in left_out]


def _as_json(counts: Counter[str], settings: Settings, plan: str | None) -> str:
    report: dict[str, Any] = {
        "source": f"{settings.db_name}.{settings.source_collection}",
        "results": f"{settings.db_name}.{settings.results_collection}",
        "documents": counts.total(),
        "model_asked": plan is not None,
    }
    return json.dumps(report | {str(kind): counts[kind] for kind in _shown(plan)}, indent=2)


def _as_text(counts: Counter[str], settings: Settings, plan: str | None) -> str:
    place = f"{settings.db_name}.{settings.source_collection} -> {settings.results_collection}"
    width = max(len(f"{counts.total():,}"), 5)
    lines = [f"{kind:<9} {counts[kind]:>{width},}  {MEANINGS[kind]}" for kind in _shown(plan)]
    return "\n".join([f"{counts.total():,} documents, {place}", *lines])


class _Progress:
    """A line on *stream* each LINE_EVERY_S: rewritten on a terminal, a new one elsewhere."""

    def __init__(self, stream: TextIO, total: int) -> None:
        self._stream = stream
        self._total = total
        self._end = "\r" if stream.isatty() else "\n"
        self._last_s = time.monotonic()
        self._has_shown = False

    def show(self, read: int) -> None:
        """Note that *read* documents are read by now."""
        now = time.monotonic()
        if now - self._last_s >= (0.5 if self._end == "\r" else LINE_EVERY_S):
            self._last_s, self._has_shown = now, True
            self._stream.write(f"plan: {read:,} of {max(self._total, read):,} documents read{self._end}")
            self._stream.flush()

    def end(self) -> None:
        """Leave the line that was rewritten."""
        if self._has_shown and self._end == "\r":
            self._stream.write("\n")


COMMAND = Command(
    "plan",
    "List how many documents are new, changed, stale, failed or done; changes nothing.",
    add_flags,
    run,
)

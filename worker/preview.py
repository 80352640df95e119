"""The report of ``--dry-run``: what a run would do. Reads only."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any

from aggregator import aggregate_conversation
from domain.staleness import REPLACED, StalenessChecker
from error_handler import SkippedDocumentError
from mongo_client import DocumentStore
from storage.contract import Selection
from storage.extended_json import id_key, id_text
from worker.intake import RunOptions

EXAMPLES = 10


async def preview(store: DocumentStore, options: RunOptions, kinds: StalenessChecker | None = None) -> dict[str, Any]:
    """Return counts of the documents that a run with *options* would process; call no model and write nothing.

    *kinds* is required with ``options.only``; to_classify then includes documents that have a result.

    Keys: selected, to_classify, already_done, skipped (by reason), shapes, turns, characters (of the transcripts),
    first_ids (at most EXAMPLES, as text).
    """
    bound = await store.upper_bound()
    queued = await asyncio.to_thread(kinds.queued) if kinds else set()
    selection: Selection = "all" if options.reprocess or options.only else "failed" if options.retry_failed else "sweep"
    report: dict[str, Any] = dict.fromkeys(("selected", "to_classify", "already_done", "turns", "characters"), 0)
    skipped: Counter[str] = Counter()
    shapes: Counter[str] = Counter()
    first_ids: list[str] = []
    after: list[Any] = []
    while bound and (options.limit is None or report["selected"] < options.limit):
        left = options.batch_size if options.limit is None else options.limit - report["selected"]
        size = options.batch_size if options.only else min(options.batch_size, left)
        page = await store.read_page(selection, after, bound, size)
        if not page:
            break
        after = [page[-1]["_id"]]
        if kinds is not None and options.only:
            page = [document for document, kind in await kinds.of(page, queued) if kind == options.only][:left]
        report["selected"] += len(page)
        replaces = options.reprocess or options.only in REPLACED
        done = set() if replaces else await store.result_keys([document["_id"] for document in page])
        report["already_done"] += len(done)
        for document in page:
            if id_key(document["_id"]) in done:
                continue
            try:
                conversation = aggregate_conversation(document)
            except SkippedDocumentError as exc:
                skipped[exc.reason] += 1
                continue
            report["to_classify"] += 1
            report["turns"] += len(conversation.turns)
            report["characters"] += len(conversation.transcript)
            shapes[conversation.shape] += 1
            if len(first_ids) < EXAMPLES:
                first_ids.append(id_text(document["_id"]))
    return {**report, "skipped": dict(skipped), "shapes": dict(shapes), "first_ids": first_ids}

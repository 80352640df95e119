"""``cli.py plan``: count the documents that a run would process, or list their ids. Changes nothing."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections import Counter
from collections.abc import AsyncGenerator
from typing import Any, get_args

from commands.flags import Command, add_model_flags
from commands.subset_flags import add_subset_flags, subset_of
from config import Settings
from domain.text import counted
from error_handler import ConfigurationError, ExitCode, LLMUnavailableError
from mongo_client import DocumentStore
from storage import extended_json
from storage.extended_json import Document
from utils.process import tell_line
from worker.left_out import FOREIGN_REMEDY, NAMED_STATUSES, count_in_time, status_name
from worker.plan import ask_plan
from worker.staleness import Kind, Plan, StalenessChecker
from worker.subset import require_query

MEANINGS: dict[Kind, str] = {
    "new": "no result yet",
    "changed": "conversation changed since it was labelled",
    "stale": "labelled by another prompt, taxonomy, model or options",
    "student": "labelled by a student of the current model; --only student asks the model",
    "style": "labelled in another reply style, else up to date; only --only style takes them",
    "failed": "failed, or in the retry queue or quarantine",
    "elsewhere": "marked processed, no result in this collection; only --only elsewhere takes them",
    "skipped": "nothing to classify",
    "done": "up to date",
    "unjudged": "done, stale, or of another style or a student; unknown without the model server (--offline)",
    "foreign": "unrecognised status; not selected",
}
OFFLINE_KINDS = ("stale", "style", "student", "done", "unjudged")  # --offline cannot distinguish the first four
LINE_EVERY_S = 5.0


def _add_flags(parser: argparse.ArgumentParser) -> None:
    add_subset_flags(parser.add_argument_group("subset"))
    add_model_flags(parser.add_argument_group("model"))
    shown = parser.add_argument_group("report")
    shown.add_argument("--json", action="store_true", help="print the counts, or with --ids the ids, as JSON")
    shown.add_argument(
        "--ids",
        choices=get_args(Kind),
        metavar="KIND",
        help=f"print the ids of one kind, one per line: {', '.join(get_args(Kind))}",
    )
    shown.add_argument(
        "--offline",
        action="store_true",
        help="do not contact the model server; stale and done documents are not distinguished",
    )


async def _plan(settings: Settings) -> Plan:
    try:
        return await ask_plan(settings)
    except LLMUnavailableError as exc:
        raise LLMUnavailableError(f"{exc}; for what works without it: python cli.py plan --offline") from exc


async def _run(arguments: argparse.Namespace, settings: Settings) -> int:
    if arguments.offline and arguments.ids in OFFLINE_KINDS[:-1]:
        raise ConfigurationError(f"--offline cannot find documents that are {arguments.ids}; remove --offline.")
    store = DocumentStore(settings, subset=subset_of(arguments, settings))
    try:
        await store.check()
        await require_query(store, store.states.subset, "--filter")
        plan = None if arguments.offline else await _plan(settings)
        kinds = StalenessChecker(store, settings.batch_files_dir, plan)
        total, shown_s = await count_in_time(store.count("all"), tell_line), time.monotonic()
        counts: Counter[str] = Counter()
        statuses: Counter[str] = Counter()
        async for document, kind in _judged(store, kinds, settings.batch_size):
            counts[kind] += 1
            if kind == "foreign":
                statuses[status_name(document[settings.status_field])] += 1
            if time.monotonic() - shown_s >= LINE_EVERY_S:
                shown_s = time.monotonic()
                sys.stderr.write(f"plan: {counts.total():,} of {max(total, counts.total()):,} documents read\n")
            if kind == arguments.ids:
                value = document["_id"]
                print(extended_json.dumps(value).decode() if arguments.json else extended_json.id_text(value))
        outside = await store.count("all", whole=True) - counts.total() if store.states.subset else 0
    finally:
        await store.close()
    if arguments.ids is None:
        counts["outside"] = max(0, outside)
        print((_as_json if arguments.json else _as_text)(counts, statuses, settings, plan))
    return ExitCode.DONE


async def _judged(
    store: DocumentStore, kinds: StalenessChecker, page_size: int
) -> AsyncGenerator[tuple[Document, Kind]]:
    """Yield each document up to the current greatest id with its kind; hold one page in memory."""
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


def _shown(plan: Plan | None) -> list[Kind]:
    """Return the kinds that can be distinguished, in the order of the report."""
    left_out = OFFLINE_KINDS[:-1] if plan is None else OFFLINE_KINDS[-1:]
    return [kind for kind in MEANINGS if kind not in left_out]


def _as_json(counts: Counter[str], statuses: Counter[str], settings: Settings, plan: Plan | None) -> str:
    outside = counts.pop("outside")
    report: dict[str, Any] = {
        "source": f"{settings.db_name}.{settings.source_collection}",
        "results": f"{settings.db_name}.{settings.results_collection}",
        "documents": counts.total(),
        "model_asked": plan is not None,
    }
    report |= {str(kind): counts[kind] for kind in _shown(plan)} | {"outside": outside}
    return json.dumps(report | {"foreign_statuses": dict(statuses.most_common(NAMED_STATUSES))}, indent=2)


def _as_text(counts: Counter[str], statuses: Counter[str], settings: Settings, plan: Plan | None) -> str:
    outside = counts.pop("outside")
    place = f"{settings.db_name}.{settings.source_collection} -> {settings.results_collection}"
    width = max(len(f"{counts.total():,}"), 5)
    lines = [f"{kind:<9} {counts[kind]:>{width},}  {MEANINGS[kind]}" for kind in _shown(plan)]
    if statuses:
        names = [f"{name} ({count:,})" for name, count in statuses.most_common(NAMED_STATUSES)]
        lines += [f"statuses of other programs: {', '.join(names)}", FOREIGN_REMEDY]
    if outside:
        lines.append(f"{counted(outside, 'document is', 'documents are')} outside --filter, --since and --until.")
    return "\n".join([f"{counted(counts.total(), 'document')}, {place}", *lines])


COMMAND = Command("plan", "Count new, changed, stale, failed and done documents; changes nothing.", _add_flags, _run)

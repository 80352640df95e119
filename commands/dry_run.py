"""``cli.py --dry-run``: what a run would do, as JSON."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict

from config import Settings
from error_handler import ExitCode, StoreUnavailableError
from mongo_client import DocumentStore
from storage.files import replace_file
from utils.process import tell_line
from worker.intake import RunOptions, preview
from worker.left_out import LeftOut, count_in_time, count_left_out
from worker.plan import ask_plan
from worker.quarantine import failed_keys
from worker.staleness import Plan, StalenessChecker
from worker.subset import require_query


async def dry_run(arguments: argparse.Namespace, settings: Settings, options: RunOptions, given: str | None) -> int:
    """Report the documents that a run with *options* would take; *given* is the plan of a built-in classifier."""
    plan = Plan(given) if given else None
    store = DocumentStore(settings, subset=options.subset)
    try:
        await store.check()
        await require_query(store, options.subset.condition, "--filter")
        if options.only in ("stale", "style", "student", "failed") and plan is None:
            plan = await ask_plan(settings)
        kinds = StalenessChecker(store, settings.batch_files_dir, plan) if options.only else None
        report = await preview(store, options, kinds, tell_line)
        left_out = await _left_out(store, settings)
    finally:
        await store.close()
    report["in_retry_queue"] = len(failed_keys(settings.batch_files_dir, "retry"))
    report["not_selected"] = None if left_out is None else asdict(left_out)
    for problem in left_out.problems(settings.results_collection) if left_out else ():
        tell_line(" ".join(problem))
    queued = len(failed_keys(settings.batch_files_dir))
    if left_out and not report["selected"] and (hint := left_out.hint_if_none(settings, queued)):
        tell_line(hint)
    text = json.dumps(report, indent=2)
    if arguments.output:
        replace_file(arguments.output, text.encode())
    print(text)
    return ExitCode.DONE


async def _left_out(store: DocumentStore, settings: Settings) -> LeftOut | None:
    """Return what a run leaves out; None, with a line, if MongoDB does not count it in time."""
    try:
        return await count_in_time(count_left_out(store, queued=settings.batch_files_dir), tell_line)
    except StoreUnavailableError as exc:
        tell_line(f"The documents that are not selected were not counted: {exc}.")
        return None

"""``cli.py`` that kills itself when it passes a named seam for the n-th time.

    python tests/crash/faulty_worker.py '{"seam": "answered", "passage": 3}' --batch-size 10

Keys of the plan: *seam*, one of SEAMS, QUARANTINE_SEAMS or URGENT_SEAMS; *passage*, from 1 (default 1); *poison*, the number of the
conversation that aborts the process when it is aggregated; *file_limit*, the largest size of a file in bytes. The
process ends by SIGKILL, so nothing is cleaned up.
"""

from __future__ import annotations

import inspect
import itertools
import json
import os
import resource
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import async_llm_wrapper
import cli
import worker.run
from mongo_client import DocumentStore
from storage import files as storage_files
from storage.files import BatchJournal
from utils import batch_file_manager
from utils.batch_file_manager import BatchFiles
from worker.intake import DocumentIntake

Matches = Callable[[tuple[Any, ...]], bool]


@dataclass(frozen=True)
class Seam:
    """A function, and whether the process dies before or after it; *matches* filters calls by their arguments."""

    owner: Any
    name: str
    before: bool = False
    matches: Matches = lambda arguments: True


class PatchedOs:
    """The module ``os`` for one module under test, so that only its calls can be patched."""

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)


def _in_folder(folder: str, suffix: str) -> Matches:
    return lambda arguments: arguments[0].parent.name == folder and arguments[0].suffix == suffix


def _event(name: str) -> Matches:
    return lambda arguments: arguments[1] == name


_FILES_OS = PatchedOs()
_FILES_OS.replace = os.replace  # type: ignore[attr-defined]
_FILES_OS.rename = os.rename  # type: ignore[attr-defined]
_FILES_OS.write = os.write  # type: ignore[attr-defined]

SEAMS = {
    "indexes_made": Seam(DocumentStore, "ensure_result_indexes"),
    "page_read": Seam(DocumentStore, "read_page"),
    "claimed": Seam(DocumentStore, "claim"),
    "pending_saved": Seam(BatchFiles, "save_pending"),
    "processing_marked": Seam(DocumentStore, "mark_processing"),
    "started": Seam(BatchJournal, "add", matches=_event("started")),
    "asked": Seam(BatchJournal, "add", matches=_event("asked")),
    "answer_received": Seam(async_llm_wrapper.AsyncLLMClient, "chat"),
    "answered": Seam(BatchJournal, "add", matches=_event("answered")),
    "failure_noted": Seam(BatchJournal, "add", matches=_event("failed")),
    "skip_noted": Seam(BatchJournal, "add", matches=_event("skipped")),
    "before_write": Seam(DocumentStore, "write_results", before=True),
    "results_written": Seam(DocumentStore, "write_results"),
    "before_mark": Seam(DocumentStore, "mark", before=True),
    "marked": Seam(DocumentStore, "mark"),
    "before_rename": Seam(_FILES_OS, "replace", before=True),
    "renamed": Seam(_FILES_OS, "replace"),
    "retry_saved": Seam(BatchFiles, "save_failed"),
    "completed_written": Seam(batch_file_manager, "remove_file", True, _in_folder("pending", ".json")),
    "pending_removed": Seam(batch_file_manager, "remove_file", False, _in_folder("pending", ".json")),
    "completed": Seam(BatchFiles, "save_completed"),
    "released": Seam(DocumentStore, "release"),
    "before_retry_rewrite": Seam(BatchFiles, "finish_retry", before=True),
    "retry_rewritten": Seam(batch_file_manager, "remove_file", True, _in_folder("retry", ".journal")),
    "retry_finished": Seam(BatchFiles, "finish_retry"),
    "state_written": Seam(BatchFiles, "write_state"),
    "torn_line": Seam(_FILES_OS, "write", True, lambda arguments: b'"answered"' in arguments[1]),
}

# Only ``cli.py quarantine`` passes these.
QUARANTINE_SEAMS = {
    "before_move": Seam(_FILES_OS, "rename", before=True),
    "moved": Seam(_FILES_OS, "rename"),
    "before_removal": Seam(batch_file_manager, "remove_file", True, _in_folder("quarantine", ".json")),
    "removed": Seam(batch_file_manager, "remove_file", False, _in_folder("quarantine", ".json")),
}

# Only urgent documents pass these.
URGENT_SEAMS = {
    "urgent_taken": Seam(DocumentIntake, "urgent"),
}


def die() -> None:
    """End this process as ``kill -9`` does."""
    os.kill(os.getpid(), signal.SIGKILL)


def arm(name: str, passage: int) -> None:
    """Kill the process when it passes the seam *name* for the *passage*-th time."""
    seam = {**SEAMS, **QUARANTINE_SEAMS, **URGENT_SEAMS}[name]
    original = getattr(seam.owner, seam.name)
    passages = itertools.count(1)

    def is_due(arguments: tuple[Any, ...]) -> bool:
        return seam.matches(arguments) and next(passages) == passage

    def die_if(due: bool, arguments: tuple[Any, ...]) -> None:
        if due and name == "torn_line":
            os.write(arguments[0], arguments[1][: len(arguments[1]) // 2])
        if due:
            die()

    def wrapped(*arguments: Any, **named: Any) -> Any:
        due = is_due(arguments)
        die_if(due and seam.before, arguments)
        outcome = original(*arguments, **named)
        die_if(due, arguments)
        return outcome

    async def wrapped_async(*arguments: Any, **named: Any) -> Any:
        due = is_due(arguments)
        die_if(due and seam.before, arguments)
        outcome = await original(*arguments, **named)
        die_if(due, arguments)
        return outcome

    setattr(seam.owner, seam.name, wrapped_async if inspect.iscoroutinefunction(original) else wrapped)


def poison(conversation_number: str) -> None:
    """Abort the process, as a crashing C extension does, when this conversation is aggregated."""
    original = worker.run.aggregate_conversation

    def aggregate(document: Any) -> Any:
        if document.get("conversation_number") == conversation_number:
            os.abort()
        return original(document)

    worker.run.aggregate_conversation = aggregate


def main(plan: dict[str, Any], flags: list[str]) -> int:
    """Apply *plan* and run the command line."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    storage_files.os = _FILES_OS  # type: ignore[attr-defined]
    if "seam" in plan:
        arm(plan["seam"], plan.get("passage", 1))
    if "file_limit" in plan:
        resource.setrlimit(resource.RLIMIT_FSIZE, (plan["file_limit"], plan["file_limit"]))
    if "poison" in plan:
        poison(plan["poison"])
    return cli.main(flags)


if __name__ == "__main__":
    sys.exit(main(json.loads(sys.argv[1]), sys.argv[2:]))

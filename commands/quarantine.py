"""``cli.py quarantine``: which documents failed and why, and their way back or out.

Conversation text is printed by ``show`` alone.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections import Counter
from collections.abc import Sequence
from typing import Any

from commands.flags import Command
from config import Settings
from domain.text import escaped, one_line
from error_handler import ConfigurationError, ExitCode, Reason
from storage import extended_json
from storage.extended_json import id_key, id_text
from utils.batch_file_manager import BatchFiles, FailedDocument, FailureKind
from worker.quarantine import FailedDocuments, discard, list_failed, requeue

PLACES: dict[FailureKind, str] = {"quarantine": "quarantine", "retry": "the retry queue"}
ERROR_WIDTH = 160


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the action, the ids and the flags."""
    parser.add_argument(
        "action",
        choices=["list", "show", "replay", "drop"],
        help="list them; show one with its text; give them fresh attempts at the next run; give them up",
    )
    parser.add_argument("ids", nargs="*", metavar="ID", help="documents, as list shows them or as Extended JSON")
    which = parser.add_argument_group("which documents")
    which.add_argument("--reason", type=_reason, help="those that failed for this reason")
    which.add_argument("--all", action="store_true", help="all of them")
    which.add_argument("--retry", action="store_true", help="look at the retry queue instead (list and show)")
    parser.add_argument("--json", action="store_true", help="print JSON (list and show)")
    parser.add_argument("--yes", action="store_true", help="drop without asking")


def _reason(text: str) -> Reason:
    try:
        return Reason(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be one of {', '.join(Reason)}") from None


async def run(arguments: argparse.Namespace, settings: Settings) -> int:
    """Do what *arguments* say.

    Raises:
        ConfigurationError: The arguments do not fit together, or an id is unknown or ambiguous.
        DirectoryLockedError: A worker holds the directory, and the documents are to be moved or dropped.
    """
    _require_sense(arguments)
    kind: FailureKind = "retry" if arguments.retry else "quarantine"
    found = list_failed(settings.batch_files_dir, kind)
    for name in found.unreadable:
        sys.stderr.write(
            f"{kind}/{name} cannot be read and is left out; the next run sets it aside as {name}.corrupt\n"
        )
    if arguments.action == "list":
        _print_list(found, arguments.reason, kind, as_json=arguments.json)
    elif arguments.action == "show":
        for entry in found.named(arguments.ids):
            print(_everything(entry, as_json=arguments.json))
    else:
        return await _move(arguments, settings)
    return ExitCode.DONE


def _require_sense(arguments: argparse.Namespace) -> None:
    action, ways = arguments.action, [bool(arguments.ids), arguments.reason is not None, arguments.all]
    if action == "list" and (arguments.ids or arguments.all):
        raise ConfigurationError("list takes no ids; it shows all, or those of --reason R.")
    if action == "show" and (not arguments.ids or sum(ways) > 1):
        raise ConfigurationError("show needs the id of a document, and nothing else; list shows the ids.")
    if action in ("replay", "drop"):
        if sum(ways) != 1:
            raise ConfigurationError(f"{action} needs ids, or --reason R, or --all, and only one of them.")
        if arguments.retry or arguments.json:
            raise ConfigurationError(f"{action} works on quarantine and prints a sentence: without --retry and --json.")
    if arguments.yes and action != "drop":
        raise ConfigurationError("--yes is for drop alone; nothing else asks.")


def _print_list(found: FailedDocuments, reason: Reason | None, kind: FailureKind, *, as_json: bool) -> None:
    entries = found.of_reason(reason)
    counts = Counter(str(entry.reason) for entry in entries)
    if as_json:
        report = {"documents": [_facts(entry) for entry in entries], "counts": counts, "unreadable": found.unreadable}
        print(escaped(extended_json.pretty(report)))
        return
    of_reason = f" for {reason}" if reason else ""
    if not entries:
        print(f"No document is in {PLACES[kind]}{of_reason}.")
        return
    width = max(len(id_text(entry.conversation_id)) for entry in entries)
    for entry in entries:
        print(
            f"{id_text(entry.conversation_id):{width}}  {entry.reason:19}  {entry.failed_at:%Y-%m-%d %H:%M:%SZ}  "
            f"{_rounds(entry):9}  {one_line(entry.error, ERROR_WIDTH)}"
        )
    shares = ", ".join(f"{count} x {name}" for name, count in counts.most_common())
    print(f"{_documents(len(entries))} in {PLACES[kind]}{of_reason}: {shares}")


def _facts(entry: FailedDocument) -> dict[str, Any]:
    """Return what is known of *entry* but its text."""
    return {
        "id": id_text(entry.conversation_id),
        "_id": entry.conversation_id,
        "reason": str(entry.reason),
        "status": entry.status,
        "failed_at": entry.failed_at.isoformat(timespec="seconds"),
        "rounds": entry.retry_count,
        "error": one_line(entry.error, ERROR_WIDTH),
    }


def _everything(entry: FailedDocument, *, as_json: bool) -> str:
    classification = (entry.classification_result or {}).get("classification")
    facts = {**_facts(entry), "classification": classification, "document": entry.conversation_data}
    if as_json:
        return escaped(extended_json.pretty(facts))
    lines = [
        f"document        {facts['id']}",
        f"as JSON         {extended_json.dumps(entry.conversation_id).decode()}",
        f"reason          {entry.reason}",
        f"error           {facts['error']}",
        f"failed at       {entry.failed_at:%Y-%m-%d %H:%M:%SZ}, after {_rounds(entry)}",
    ]
    if entry.status == "write_failed":
        lines.append("classification  is known, only its write failed: the model is not asked again")
        lines += [f"  {name:16}{value}" for name, value in (classification or {}).items()]
    text = "not in the file" if entry.conversation_data is None else extended_json.pretty(entry.conversation_data)
    return escaped("\n".join([*lines, f"conversation    {text}"]))


async def _move(arguments: argparse.Namespace, settings: Settings) -> int:
    files = BatchFiles(settings.batch_files_dir)
    files.acquire()
    try:
        found = list_failed(settings.batch_files_dir, "quarantine")  # again: nobody changes it from here on
        entries = found.named(arguments.ids) if arguments.ids else found.of_reason(arguments.reason)
        if not entries:
            print(f"No document is in quarantine{f' for {arguments.reason}' if arguments.reason else ''}.")
            return ExitCode.DONE
        keys = {id_key(entry.conversation_id) for entry in entries}
        if arguments.action == "replay":
            done = requeue(files, keys)
            print(
                f"{_documents(done)} left quarantine with fresh attempts; the next python cli.py takes them up, and until then "
                "their status stays failed."
            )
        else:
            await _require_consent(entries, yes=arguments.yes)
            done = discard(files, keys)
            print(f"{_documents(done)} dropped from quarantine; in MongoDB their status stays failed, with its reason.")
        if done < len(keys):
            print(f"{_documents(len(keys) - done)} stayed: their batch is still in work. Run python cli.py first.")
    finally:
        files.release()
    return ExitCode.DONE


async def _require_consent(entries: Sequence[FailedDocument], *, yes: bool) -> None:
    """Ask the person at the terminal whether to drop *entries*.

    Raises:
        ConfigurationError: There is no person, or the answer is not yes; nothing is dropped.
    """
    if yes:
        return
    if not sys.stdin.isatty():
        raise ConfigurationError(
            f"drop removes {_documents(len(entries))} for good; add --yes to do so without a terminal."
        )
    sys.stderr.write(f"Drop {_documents(len(entries))} from quarantine for good? [y/N] ")
    sys.stderr.flush()
    loop, answered = asyncio.get_running_loop(), asyncio.Event()
    loop.add_reader(sys.stdin, answered.set)  # a plain input() would not be ended by Ctrl-C
    try:
        await answered.wait()
    finally:
        loop.remove_reader(sys.stdin)
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise ConfigurationError("nothing was dropped.")


def _rounds(entry: FailedDocument) -> str:
    return "1 round" if entry.retry_count == 1 else f"{entry.retry_count} rounds"


def _documents(count: int) -> str:
    return "1 document" if count == 1 else f"{count} documents"


COMMAND = Command(
    "quarantine", "Look at documents that failed, give them fresh attempts, or give them up", add_flags, run
)

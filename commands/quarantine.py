"""``cli.py quarantine``: list failed documents, show one, replay or drop them.

Only ``show`` prints conversation text.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from typing import Any

from commands.flags import Command
from config import Settings
from domain.text import counted, escaped, one_line
from error_handler import ConfigurationError, ExitCode, Reason
from storage import extended_json
from storage.extended_json import id_key, id_text
from utils.batch_file_manager import BatchFiles, FailureKind
from utils.failed_documents import FailedDocument
from utils.process import is_confirmed
from worker.quarantine import FailedDocuments, discard, list_failed, requeue

PLACES: dict[FailureKind, str] = {"quarantine": "quarantine", "retry": "the retry queue"}
ERROR_WIDTH, WHOLE_ERROR = 160, 600  # characters of an error in a list, and at most


def _add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "action",
        choices=["list", "show", "replay", "drop"],
        help="list the documents; show one with its text; replay: retry in the next run; drop: remove from quarantine",
    )
    parser.add_argument(
        "ids", nargs="*", default=[], metavar="ID", help="document ids, as list shows them or as Extended JSON"
    )
    which = parser.add_argument_group("selection")
    which.add_argument(
        "--reason",
        choices=[reason.value for reason in Reason],
        metavar="REASON",
        help="documents that failed for this reason",
    )
    which.add_argument("--all", action="store_true", help="all documents")
    which.add_argument("--retry", action="store_true", help="list or show the retry queue instead")
    parser.add_argument("--json", action="store_true", help="print JSON (list and show)")
    parser.add_argument("--yes", action="store_true", help="drop without confirmation")


async def _run(arguments: argparse.Namespace, settings: Settings) -> int:
    _require_sense(arguments)
    kind: FailureKind = "retry" if arguments.retry else "quarantine"
    found = list_failed(settings.batch_files_dir, kind)
    for name in found.unreadable:
        sys.stderr.write(f"{kind}/{name} cannot be read and is skipped; the next run renames it to {name}.corrupt\n")
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
        raise ConfigurationError("list takes no ids; it shows all documents, or those of --reason R.")
    if action == "show" and (not arguments.ids or sum(ways) > 1):
        raise ConfigurationError("show requires document ids and no other selection; list shows the ids.")
    if action in ("replay", "drop"):
        if sum(ways) != 1:
            raise ConfigurationError(f"{action} requires ids, --reason R or --all, and only one of these.")
        if arguments.retry or arguments.json:
            raise ConfigurationError(f"{action} does not accept --retry or --json.")
    if arguments.yes and action != "drop":
        raise ConfigurationError("--yes is only for drop.")


def _print_list(found: FailedDocuments, reason: Reason | None, kind: FailureKind, *, as_json: bool) -> None:
    entries = found.of_reason(reason)
    counts = Counter(str(entry.reason) for entry in entries)
    if as_json:
        report = {"documents": [_facts(entry) for entry in entries], "counts": counts, "unreadable": found.unreadable}
        print(escaped(extended_json.pretty(report)))
        return
    of_reason = f" for {reason}" if reason else ""
    if not entries:
        print(f"No documents in {PLACES[kind]}{of_reason}.")
        return
    width = max(len(id_text(entry.conversation_id)) for entry in entries)
    for entry in entries:
        print(
            f"{id_text(entry.conversation_id):{width}}  {entry.reason:19}  {entry.failed_at:%Y-%m-%d %H:%M:%SZ}  "
            f"{counted(entry.retry_count, 'round'):9}  {one_line(entry.error, ERROR_WIDTH)}"
        )
    shares = ", ".join(f"{count} x {name}" for name, count in counts.most_common())
    print(f"{counted(len(entries), 'document')} in {PLACES[kind]}{of_reason}: {shares}")


def _facts(entry: FailedDocument) -> dict[str, Any]:
    """Return everything about *entry* except its text."""
    return {
        "id": id_text(entry.conversation_id),
        "_id": entry.conversation_id,
        "reason": str(entry.reason),
        "status": entry.status,
        "failed_at": entry.failed_at.isoformat(timespec="seconds"),
        "rounds": entry.retry_count,
        "error": one_line(entry.error, WHOLE_ERROR),
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
        f"failed at       {entry.failed_at:%Y-%m-%d %H:%M:%SZ}, after {counted(entry.retry_count, 'round')}",
    ]
    if entry.status == "write_failed":
        lines.append("classification  known; only the write failed, so the model is not called again")
        lines += [
            f"  {name:16}{', '.join(value) if isinstance(value, list) else value}"
            for name, value in (classification or {}).items()
        ]
    text = "not stored" if entry.conversation_data is None else extended_json.pretty(entry.conversation_data)
    return escaped("\n".join([*lines, f"conversation    {text}"]))


async def _move(arguments: argparse.Namespace, settings: Settings) -> int:
    files = BatchFiles(settings.batch_files_dir)
    files.acquire()
    try:
        found = list_failed(settings.batch_files_dir, "quarantine")  # read again under the lock
        entries = found.named(arguments.ids) if arguments.ids else found.of_reason(arguments.reason)
        if not entries:
            print(f"No documents in quarantine{f' for {arguments.reason}' if arguments.reason else ''}.")
            return ExitCode.DONE
        keys = {id_key(entry.conversation_id) for entry in entries}
        if arguments.action == "replay":
            done = requeue(files, keys)
            print(
                f"{counted(done, 'document')} moved from quarantine to pending with a full set of attempts. Run python cli.py to "
                "retry; until then the status in MongoDB stays failed."
            )
        else:
            number = counted(len(entries), "document")
            if not arguments.yes and not sys.stdin.isatty():
                raise ConfigurationError(f"drop removes {number} for good; without a terminal, add --yes.")
            if not arguments.yes and not await is_confirmed(f"Drop {number} from quarantine for good?"):
                raise ConfigurationError("Not confirmed; nothing was dropped.")
            done = discard(files, keys)
            print(
                f"{counted(done, 'document')} dropped from quarantine; in MongoDB the status stays failed, with its reason."
            )
        if done < len(keys):
            stayed = counted(len(keys) - done, "document")
            print(f"{stayed} stayed in quarantine because the batch is not finished. Run python cli.py first.")
    finally:
        files.release()
    return ExitCode.DONE


COMMAND = Command("quarantine", "List failed documents with reasons, show one, replay or drop them.", _add_flags, _run)

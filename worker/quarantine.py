"""The documents that failed, as an operator deals with them: look, choose, give fresh attempts, give up.

Looking needs no lock and changes nothing. ``release`` and ``drop`` need the directory's lock, and each of their steps
is the replacement or the rename of one file: whenever the process dies, every document is in exactly one folder.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from error_handler import ConfigurationError, Reason, StateDirectoryError
from storage import extended_json
from storage.extended_json import id_key, id_text
from storage.files import move_file
from utils.batch_file_manager import BatchFiles, FailedDocument, FailureKind, batch_paths, parse_failures

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class FailedDocuments:
    """What is in the retry queue or in quarantine: one entry per document, the newest first.

    *unreadable* names the files that were passed over.
    """

    entries: list[FailedDocument]
    unreadable: list[str] = field(default_factory=list)

    def of_reason(self, reason: Reason | None) -> list[FailedDocument]:
        """Return the entries that failed for *reason*; None takes all."""
        return [entry for entry in self.entries if reason is None or entry.reason is reason]

    def named(self, texts: Iterable[str]) -> list[FailedDocument]:
        """Return the entries of the documents that *texts* name, each once, in their order.

        A text is what ``id_text`` shows, or the id as Extended JSON, which wins: it can tell 7 from "7".

        Raises:
            ConfigurationError: A text names no document, or more than one.
        """
        return list({id_key(entry.conversation_id): entry for entry in map(self._named, texts)}.values())

    def _named(self, text: str) -> FailedDocument:
        found = [entry for entry in self.entries if id_text(entry.conversation_id) == text]
        if text.startswith(("{", '"')) or not found:
            found = [entry for entry in self.entries if id_key(entry.conversation_id) == _json_key(text)] or found
        if not found:
            raise ConfigurationError(f"no document {text[:120]!r} is there; cli.py quarantine list shows the ids.")
        if len(found) > 1:
            ids = " or ".join(extended_json.dumps(entry.conversation_id).decode() for entry in found[:5])
            raise ConfigurationError(
                f"{text[:120]!r} names {len(found)} documents; give the id as Extended JSON: {ids}."
            )
        return found[0]


def _json_key(text: str) -> bytes | None:
    try:
        return id_key(extended_json.loads(text))
    except ValueError:
        return None


def look(directory: Path, kind: FailureKind) -> FailedDocuments:
    """Return what is in the retry queue, or in quarantine, of *directory*; a worker may hold it meanwhile.

    Raises:
        StateDirectoryError: The directory is not there, or a file may not be read.
    """
    if not directory.is_dir():
        raise StateDirectoryError(f"there is no directory {directory}; name the worker's with --batch-files-dir.")
    newest: dict[bytes, FailedDocument] = {}
    unreadable = []
    try:
        for path in batch_paths(directory / kind):
            try:
                entries = parse_failures(extended_json.loads(path.read_bytes()))
            except FileNotFoundError:  # the worker has moved on
                continue
            except ValueError:
                unreadable.append(path.name)
                continue
            for entry in entries:
                key = id_key(entry.conversation_id)
                if key not in newest or newest[key].failed_at < entry.failed_at:
                    newest[key] = entry
    except OSError as exc:
        raise StateDirectoryError(f"{directory / kind} cannot be read ({exc.strerror}); fix its rights.") from exc
    return FailedDocuments(sorted(newest.values(), key=lambda entry: entry.failed_at, reverse=True), unreadable)


def release(files: BatchFiles, keys: set[bytes] | None = None) -> int:
    """Move the quarantined documents of *keys* (None: all) to ``pending/``, where they get fresh attempts; return how many.

    Answers that could not be written are kept. A document whose batch is still in work stays where it is.

    Raises:
        StateDirectoryError: A file cannot be written; the documents before it are moved.
    """
    _remove_older_copies(files)
    in_work = _keys_in_work(files)
    moved = 0
    for path, entries in files.failure_files("quarantine"):
        chosen = [
            entry for entry in entries if _is_chosen(entry, keys) and id_key(entry.conversation_id) not in in_work
        ]
        if not chosen:
            continue
        staged = path
        if len(chosen) < len(entries):
            # Two files cannot change at once, so the chosen ones are split off inside the folder, then moved whole.
            staged = files.new_path("quarantine", "replay")
            files.write_failures(staged, chosen)
            left = {id_key(entry.conversation_id) for entry in chosen}
            files.write_failures(path, [entry for entry in entries if id_key(entry.conversation_id) not in left])
        move_file(staged, files.new_path("pending", "replay"))
        moved += len(chosen)
    return moved


def drop(files: BatchFiles, keys: set[bytes]) -> int:
    """Remove the documents of *keys* from quarantine for good; return how many. Their sources keep saying failed.

    A document whose batch is still in work stays: its run would only put it back.

    Raises:
        StateDirectoryError: A file cannot be written; what was in the files before it is removed.
    """
    _remove_older_copies(files)
    going = keys - _keys_in_work(files)
    dropped = 0
    for path, entries in files.failure_files("quarantine"):
        kept = [entry for entry in entries if id_key(entry.conversation_id) not in going]
        if len(kept) < len(entries):
            files.write_failures(path, kept)
            dropped += len(entries) - len(kept)
    return dropped


def _is_chosen(entry: FailedDocument, keys: set[bytes] | None) -> bool:
    return keys is None or id_key(entry.conversation_id) in keys


def _keys_in_work(files: BatchFiles) -> set[bytes]:
    """Return what a crash left in ``pending/``: the next run takes it up there, and may quarantine it again."""
    return {id_key(document.get("_id")) for batch in files.load_pending() for document in batch.documents}


def _remove_older_copies(files: BatchFiles) -> None:
    """Leave the newest entry of each document: a crash during ``release`` and a ``--reprocess`` leave two."""
    newest: dict[bytes, tuple[datetime, Path]] = {}
    for path, entries in files.failure_files("quarantine"):
        for entry in entries:
            key = id_key(entry.conversation_id)
            if key not in newest or newest[key][0] < entry.failed_at:
                newest[key] = (entry.failed_at, path)
    for path, entries in files.failure_files("quarantine"):
        kept = [entry for entry in entries if newest[id_key(entry.conversation_id)][1] == path]
        if len(kept) < len(entries):
            files.write_failures(path, kept)

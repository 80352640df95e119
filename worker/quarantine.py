"""Failed documents: list them, requeue them with a full set of attempts, or discard them.

``requeue`` and ``discard`` need the lock of the directory. Each of their steps replaces or renames one file, so every
document is in exactly one folder whenever the process dies, or StateDirectoryError reports a file that cannot be written.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path

from error_handler import ConfigurationError, Reason, StateDirectoryError
from storage import extended_json
from storage.extended_json import id_key, id_text
from storage.files import JournalEntry, move_file, replay_journal
from utils.batch_file_manager import FAILURE_KINDS, BatchFiles, FailureKind, batch_paths
from utils.failed_documents import DamagedFileError, FailedDocument, read_failures, round_journal

logger = logging.getLogger(__name__)

MAX_ROUNDS = 3  # retry rounds of one document before it is quarantined


@dataclass(frozen=True, slots=True)
class FailedDocuments:
    """The documents in the retry queue or in quarantine: one entry each, the newest first.

    *unreadable* names the corrupt files, whose documents are missing here.
    """

    entries: list[FailedDocument]
    unreadable: list[str] = field(default_factory=list)

    def of_reason(self, reason: Reason | None) -> list[FailedDocument]:
        """Return the entries that failed because of *reason*; None returns all."""
        return [entry for entry in self.entries if reason is None or entry.reason == reason]

    def named(self, texts: Iterable[str]) -> list[FailedDocument]:
        """Return the entries of the documents that *texts* name, each once, in the order of *texts*.

        A text is what ``id_text`` shows, or the id as Extended JSON, which takes precedence because it distinguishes 7
        from "7". Raise ConfigurationError if a text names no document, or more than one.
        """
        return list({entry.key: entry for entry in map(self._named, texts)}.values())

    def _named(self, text: str) -> FailedDocument:
        found = [entry for entry in self.entries if id_text(entry.conversation_id) == text]
        if text.startswith(("{", '"')) or not found:
            with suppress(ValueError):
                key = id_key(extended_json.loads(text))
                found = [entry for entry in self.entries if entry.key == key] or found
        if not found:
            raise ConfigurationError(
                f"no document {text[:120]!r} is there; python cli.py quarantine list shows the ids."
            )
        if len(found) > 1:
            ids = " or ".join(extended_json.dumps(entry.conversation_id).decode() for entry in found[:5])
            raise ConfigurationError(
                f"{text[:120]!r} names {len(found)} documents; give the id as Extended JSON: {ids}."
            )
        return found[0]


def list_failed(directory: Path, kind: FailureKind) -> FailedDocuments:
    """Return the documents in the retry queue, or in quarantine, of *directory*. Needs no lock.

    Those that failed in a batch that is not finished are part of it; the batch's journal names them.
    """
    if not directory.is_dir():
        raise StateDirectoryError(f"there is no directory {directory}; name the worker's with --batch-files-dir.")
    entries: list[FailedDocument] = []
    unreadable = []
    judged = _judged(directory)
    for path in batch_paths(directory / kind):
        try:
            found = read_failures(path)
        except DamagedFileError as exc:
            found = exc.survivors
            unreadable.append(path.name)
        entries += [entry for entry in found if judged.get(entry.key, _NOWHERE).path != path]
    for path in {ended.path for ended in judged.values() if ended.place == kind}:
        entries += _entries_of(path, judged, kind)
    newest = _newest(entries).values()
    return FailedDocuments(sorted(newest, key=lambda entry: entry.failed_at, reverse=True), unreadable)


def _newest(entries: Iterable[FailedDocument]) -> dict[bytes, FailedDocument]:
    return {entry.key: entry for entry in sorted(entries, key=lambda entry: entry.failed_at)}


def failed_keys(directory: Path, *kinds: FailureKind) -> set[bytes]:
    """Return the ``id_key`` of each document in the retry queue or quarantine (*kinds*; by default both). Needs no lock.

    Those that failed in a batch that is not finished are part of it, as in ``list_failed``. Corrupt files are ignored with
    a warning; the status of their documents in MongoDB is failed as well.
    """
    keys: set[bytes] = set()
    judged = _judged(directory)
    for path in (path for kind in kinds or FAILURE_KINDS for path in batch_paths(directory / kind)):
        with suppress(FileNotFoundError):  # the worker has finished it
            state = path.stat()
            found = _keys_in(path, state.st_ino, state.st_mtime_ns)
            keys.update(key for key in found if judged.get(key, _NOWHERE).path != path)
    return keys | {key for key, found in judged.items() if found.place in (kinds or FAILURE_KINDS)}


def failed_places(directory: Path) -> str:
    """Return a sentence about where the failed documents are now, and how to retry them; empty if there are none."""
    retry, quarantine = len(failed_keys(directory, "retry")), len(failed_keys(directory, "quarantine"))
    places = [f"{retry:,} in the retry queue (the next run retries them)"] if retry else []
    places += [f"{quarantine:,} in quarantine (--retry-failed retries them)"] if quarantine else []
    return f"Failed documents: {', '.join(places)}; quarantine list shows the reasons." if places else ""


@dataclass(frozen=True, slots=True)
class _Judged:
    """The journal's verdict in the unfinished batch *path*: *place* is where its document goes, None if it has not failed."""

    path: Path
    place: FailureKind | None = None
    past: JournalEntry = field(default_factory=JournalEntry)
    rounds: int = 0


_NOWHERE = _Judged(Path())
_FAILED = b'"failed"'  # in each event of that name


def _judged(directory: Path) -> dict[bytes, _Judged]:
    """Return, by ``id_key``, the documents that ended in a batch that is not finished: killed, stopped, or still running."""
    judged: dict[bytes, _Judged] = {}
    for path in (path for folder in ("pending", "retry") for path in batch_paths(directory / folder)):
        is_retry = path.parent.name == "retry"
        try:
            journal, rounds = _journal_of(path)
        except ValueError:  # the reader of the file reports it
            continue
        for key, past in journal.items():
            if past.verdict is None or past.verdict.is_skipped:
                if past.verdict is not None or past.result is not None:
                    judged[key] = _Judged(path)
                continue
            number = rounds.get(key, 0) + 1 if is_retry else 0
            is_final = past.verdict.is_final or number >= MAX_ROUNDS
            judged[key] = _Judged(path, "quarantine" if is_final else "retry", past, number)
    return judged


def _journal_of(path: Path) -> tuple[dict[bytes, JournalEntry], dict[bytes, int]]:
    """Return the journal of the batch file *path*, and the earlier rounds of its documents."""
    plain = path.with_suffix(".journal")
    with suppress(FileNotFoundError):
        # Most batches have no failure, and the metrics of a running worker read this every few seconds.
        return (replay_journal(plain) if _FAILED in plain.read_bytes() else {}), {}
    if not any(path.parent.glob(f"{path.stem}.*.journal")):
        return {}, {}
    failures = read_failures(path)
    return replay_journal(round_journal(path, failures)), {entry.key: entry.retry_count for entry in failures}


def _entries_of(path: Path, judged: dict[bytes, _Judged], kind: FailureKind) -> Iterator[FailedDocument]:
    """Yield the documents of the batch file *path* that *judged* says are in *kind*."""
    try:
        content = extended_json.loads(path.read_bytes())
        failed_at = datetime.fromtimestamp(path.stat().st_mtime, UTC)
    except FileNotFoundError:  # finished meanwhile
        return
    for row in content if isinstance(content, list) else content["conversations"]:
        document_id = row["conversation_id"] if "conversation_id" in row else row["_id"]
        found = judged.get(id_key(document_id), _NOWHERE)
        verdict = found.past.verdict
        if found.path != path or found.place != kind or verdict is None:
            continue
        result = found.past.result or row.get("classification_result")
        yield FailedDocument(
            document_id,
            "llm_failed" if result is None else "write_failed",
            row["conversation_data"],
            found.rounds,
            verdict.reason,
            verdict.problem,
            result,
            failed_at,
        )


@lru_cache(maxsize=10_000)  # a quarantine of many files is not read again every few seconds
def _keys_in(path: Path, _inode: int, _changed_ns: int) -> frozenset[bytes]:
    try:
        entries = read_failures(path)
    except DamagedFileError as exc:
        logger.warning("%s is corrupt; the documents that it lost count by their status in MongoDB only", path)
        entries = exc.survivors
    return frozenset(entry.key for entry in entries)


def requeue(files: BatchFiles, keys: set[bytes] | None = None) -> int:
    """Move the quarantined documents of *keys* (None: all) to ``pending/`` with a full set of attempts; return their number.

    Results that could not be written are kept. Documents of a batch that is still in work stay in quarantine.
    """
    in_work = _keys_in_work(files)
    moved = 0
    for path, entries in _newest_by_file(files).items():
        chosen = {key: entry for key, entry in entries.items() if key not in in_work and (keys is None or key in keys)}
        if not chosen:
            continue
        staged = path
        if len(chosen) < len(entries):
            # Two files cannot change atomically: split the chosen entries off inside the folder, then rename that file.
            staged = files.new_path("quarantine", "replay")
            files.write_failures(staged, chosen.values())
            files.write_failures(path, [entry for key, entry in entries.items() if key not in chosen])
        move_file(staged, files.new_path("pending", "replay"))
        moved += len(chosen)
    return moved


def discard(files: BatchFiles, keys: set[bytes]) -> int:
    """Remove the documents of *keys* from quarantine for good; return their number. Their status stays failed.

    Documents of a batch that is still in work stay, because its run would quarantine them again.
    """
    chosen = keys - _keys_in_work(files)
    discarded = 0
    for path, entries in _newest_by_file(files).items():
        kept = [entry for key, entry in entries.items() if key not in chosen]
        if len(kept) < len(entries):
            files.write_failures(path, kept)
            discarded += len(entries) - len(kept)
    return discarded


def _keys_in_work(files: BatchFiles) -> set[bytes]:
    """Return the documents that a crash left in ``pending/``; the next run may quarantine them again."""
    return {id_key(document.get("_id")) for batch in files.load_pending() for document in batch.documents}


def _newest_by_file(files: BatchFiles) -> dict[Path, dict[bytes, FailedDocument]]:
    """Return the quarantined documents by file and ``id_key``; first remove older entries of the same documents.

    A crash during ``requeue``, and ``--reprocess``, leave two entries of one document.
    """
    found = list(files.failure_files("quarantine"))
    newest = _newest(entry for _, entries in found for entry in entries)
    by_file = {}
    for path, entries in found:
        by_file[path] = {entry.key: entry for entry in entries if newest[entry.key] is entry}
        if len(by_file[path]) < len(entries):
            files.write_failures(path, by_file[path].values())
    return by_file

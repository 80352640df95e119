"""A resumable run of one file of documents through the REST service, and the journal of its answers."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import math
import os
import time
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from error_handler import (
    ConfigurationError,
    DirectoryLockedError,
    RequestError,
    RunInterruptedError,
    SkippedDocumentError,
    StateDirectoryError,
    TriadError,
)
from service.client.client import ServiceClient, ServiceTimeoutError
from service.client.protocol import ServiceRequest, request_for
from storage.extended_json import Document
from storage.files import append_line, open_for_append, remove_file, replace_file
from worker.checkpoint import RunStats
from worker.progress import Reporter

JOB = "classify"  # prefix of the progress lines
REPORT_EVERY_S = 0.5


@dataclass(frozen=True, slots=True)
class Entry:
    """One document of the file: the *key* of its request, or None and the *problem* that prevents one."""

    number: str
    key: bytes | None
    problem: dict[str, Any] | None = None


class AnswerJournal:
    """The journal at *path* with the answers of the service at *url*; the caller closes it.

    One line per answer, each in one ``write``, so that a killed process leaves whole lines. The first line names the
    service. The file is not fsynced: after a power failure the last answers are requested again. Memory holds only the
    position of each answer.
    """

    def __init__(self, path: Path, url: str, *, restart: bool = False) -> None:
        """Open or create the journal and read its answers; *restart* discards them.

        Raises:
            DirectoryLockedError: Another run has it open.
            ConfigurationError: It holds the answers of another service.
            StateDirectoryError: It cannot be read or written.
        """
        self.path = path
        self._spans: dict[bytes, tuple[int, int]] = {}  # offset and length by key
        with contextlib.ExitStack() as on_error:
            self._handle = open_for_append(path)
            on_error.callback(os.close, self._handle)
            try:
                fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as exc:
                raise DirectoryLockedError(f"Another run is using {path}; wait until it ends.") from exc
            except OSError as exc:
                raise StateDirectoryError(f"Cannot lock {path} ({exc.strerror}); choose another --output-dir.") from exc
            if restart:
                os.ftruncate(self._handle, 0)
            self._replay(url)
            on_error.pop_all()

    def __len__(self) -> int:
        return len(self._spans)

    def __contains__(self, key: bytes) -> bool:
        return key in self._spans

    def keep(self, key: bytes, answer: dict[str, Any]) -> None:
        """Append *answer*.

        Raises:
            StateDirectoryError: The disk is full or gone; earlier answers are kept.
        """
        line = orjson.dumps({"key": key.hex(), "answer": answer}) + b"\n"
        append_line(self._handle, self.path, line)
        self._spans[key] = os.lseek(self._handle, 0, os.SEEK_CUR) - len(line), len(line)

    def read(self, key: bytes) -> bytes:
        """Return the answer for *key* as JSON; raise KeyError if there is none."""
        offset, length = self._spans[key]
        try:
            return orjson.dumps(orjson.loads(os.pread(self._handle, length, offset))["answer"])
        except (OSError, orjson.JSONDecodeError) as exc:
            raise StateDirectoryError(f"{self.path} was changed during the run; run the same command again.") from exc

    def close(self, *, remove: bool = False) -> None:
        """Close the file and release its lock; *remove* deletes it."""
        if remove:
            remove_file(self.path)
        os.close(self._handle)

    def _replay(self, url: str) -> None:
        offset, head = 0, None
        with self.path.open("rb") as file:
            for line in file:
                # A torn line is skipped: its answer is requested again.
                with contextlib.suppress(orjson.JSONDecodeError, ValueError, KeyError, TypeError):
                    event = orjson.loads(line)
                    if head is None:
                        head = str(event["service"])
                    elif event["answer"]["classification"]:
                        self._spans[bytes.fromhex(event["key"])] = (offset, len(line))
                offset += len(line)
        if head is not None and head != url:
            raise ConfigurationError(
                f"{self.path} holds answers of {head}; finish that run with --url {head}, or discard them with --restart."
            )
        if head is None:
            append_line(self._handle, self.path, orjson.dumps({"service": url}) + b"\n")


class ClientRun:
    """One run over the documents that *read* returns, the same ones at each call.

    *problems* has the reason of each missing answer by key.
    """

    def __init__(self, read: Callable[[], Iterator[Document]], journal: AnswerJournal, stop: asyncio.Event) -> None:
        self._read = read
        self._journal = journal
        self._error: TriadError | None = None
        self._in_flight = 0
        self.stop = stop
        self.stats = RunStats()
        self.entries: list[Entry] = []
        self.problems: dict[bytes, dict[str, Any]] = {}
        self.duration_s = 0.0

    def plan(self) -> None:
        """Read the whole file, so that an invalid line is reported before the first request.

        Raises:
            ConfigurationError: The file cannot be read, or is not a list of documents.
        """
        self.entries = [_entry(document, position)[0] for position, document in enumerate(self._read(), 1)]
        keys = {entry.key for entry in self.entries if entry.key is not None}
        problems = [entry.problem for entry in self.entries if entry.problem is not None]
        self.stats.already_done = sum(key in self._journal for key in keys)
        self.stats.processed = len(problems)
        self.stats.skipped = sum("skipped" in problem for problem in problems)
        self.stats.failed = len(problems) - self.stats.skipped
        self.stats.total = len(keys) - self.stats.already_done + self.stats.processed

    async def ask_all(self, client: ServiceClient, concurrency: int, reporter: Reporter) -> None:
        """Request every answer that is not in the journal, at most *concurrency* at once.

        Raises:
            ServiceAwayError: The service is not reachable; the answers so far are in the journal.
            ConfigurationError: The service would reject every conversation, or the file has changed.
            RunInterruptedError: *stop* was set; requests in flight have finished.
        """
        started, pending = time.monotonic(), self._pending()
        workers = [asyncio.create_task(self._work(client, pending)) for _ in range(concurrency)]
        try:
            while not all(worker.done() for worker in workers):
                reporter.update(JOB, "running", self.stats, self._in_flight)
                await asyncio.wait(workers, timeout=REPORT_EVERY_S)
            for worker in workers:
                worker.result()
        finally:
            for worker in workers:
                worker.cancel()
            await asyncio.wait(workers)
            self.duration_s = time.monotonic() - started
            is_done = self.stats.processed == self.stats.total
            reporter.update(JOB, "completed" if is_done else "interrupted", self.stats, self._in_flight)
        if self._error is not None:
            raise self._error
        if not is_done:
            raise RunInterruptedError("Interrupted; the answers in flight were kept.")

    def write(self, results: Path, failures: Path) -> int:
        """Write the answers in file order to *results* and the rest to *failures*; return the number of failures.

        Each file is written atomically. *failures* is not created if there are none and no skipped documents.

        Raises:
            StateDirectoryError: The disk is full, or the directory not writable; the journal keeps all answers.
        """
        rows, missing = [], []
        for position, entry in enumerate(self.entries, 1):
            if entry.key is not None and entry.key in self._journal:
                rows.append(self._journal.read(entry.key))
            else:
                problem = entry.problem or self.problems[entry.key or b""]
                missing.append({"position": position, "conversation_number": entry.number, **problem})
        if missing:
            replace_file(failures, orjson.dumps(missing, option=orjson.OPT_INDENT_2))
        replace_file(results, b"[" + b",\n".join(rows) + b"]\n")
        return sum("skipped" not in row for row in missing)

    def _pending(self) -> Iterator[ServiceRequest]:
        """Yield the missing requests, equal content once. Reads the file again, so that memory holds no texts."""
        seen: set[bytes] = set()
        for position, document in enumerate(self._read(), 1):
            entry, request = _entry(document, position)
            if position > len(self.entries) or entry != self.entries[position - 1]:
                raise ConfigurationError("The file was changed during the run; run the same command again.")
            if request is not None and request.key not in self._journal and request.key not in seen:
                seen.add(request.key)
                yield request

    async def _work(self, client: ServiceClient, pending: Iterator[ServiceRequest]) -> None:
        while (request := next(pending, None)) is not None:
            self._in_flight += 1
            try:
                answer = await client.classify(request)
                self._journal.keep(request.key, answer)
            except (RequestError, ServiceTimeoutError) as exc:
                self._fail(request, exc)
            except RunInterruptedError:
                return
            except TriadError as exc:  # ends the run; the other workers finish their requests in flight
                self._error = self._error or exc
                self.stop.set()
                return
            else:
                self.stats.processed += 1
                self.stats.successful += 1
                self.stats.count_labels(answer["classification"])
            finally:
                self._in_flight -= 1

    def _fail(self, request: ServiceRequest, exc: RequestError | ServiceTimeoutError) -> None:
        name, status = (exc.kind.name, exc.kind.status) if isinstance(exc, RequestError) else ("TimeoutError", None)
        self.stats.processed += 1
        self.stats.failed += 1
        self.stats.count_reason(name)
        self.problems[request.key] = {"type": name, "status": status, "message": str(exc), "request_id": request.id}


def _entry(document: Document, position: int) -> tuple[Entry, ServiceRequest | None]:
    try:
        request = request_for(document, position)
    except SkippedDocumentError as exc:
        return Entry(str(position), None, {"skipped": exc.reason, "message": str(exc)}), None
    except RequestError as exc:
        return Entry(str(position), None, {"type": exc.kind.name, "message": str(exc)}), None
    return Entry(request.number, request.key), request


def percentile(values: array[float], share: float) -> float:
    """Return the nearest-rank percentile of *values*, at least one; *share* is from 0 to 1."""
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]

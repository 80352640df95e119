"""Takes the documents of one file through the REST service, each once, and keeps what came of it."""

from __future__ import annotations

import asyncio
import math
import time
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson

from error_handler import ConfigurationError, RequestError, RunInterruptedError, SkippedDocumentError, TriadError
from service.client.client import ServiceClient, ServiceTimeoutError, request_id
from service.client.journal import AnswerJournal
from service.client.protocol import ServiceRequest
from storage.contract import Document
from storage.files import replace_file
from worker.checkpoint import RunStats
from worker.progress import Reporter

JOB = "classify"  # how the progress lines begin
REPORT_EVERY_S = 0.5

RequestMaker = Callable[[Document, int], ServiceRequest]
DocumentReader = Callable[[], Iterator[Document]]


@dataclass(frozen=True, slots=True)
class Place:
    """One document of the file: *key* of its request, or None and the *problem* why there is none."""

    number: str
    key: bytes | None
    problem: dict[str, Any] | None = None


@dataclass
class ClientRun:
    """One run; *read* gives the documents of the file, the same each time, and *make* the request of one.

    *problems* says by key why there is no answer, *latencies_s* holds one value per answer of this run.
    """

    read: DocumentReader
    make: RequestMaker
    journal: AnswerJournal
    stop: asyncio.Event
    stats: RunStats = field(default_factory=RunStats)
    places: list[Place] = field(default_factory=list)
    problems: dict[bytes, dict[str, Any]] = field(default_factory=dict)
    latencies_s: array[float] = field(default_factory=lambda: array("d"))
    duration_s: float = 0.0
    _end: TriadError | None = None
    _in_flight: int = 0

    def plan(self) -> None:
        """Read the whole file once, so that a mistake on its last line shows before the first request.

        Raises:
            ConfigurationError: The file cannot be read, or holds something else than documents.
        """
        for position, document in enumerate(self.read(), 1):
            self.places.append(self._place(document, position)[0])
        keys = {place.key for place in self.places if place.key is not None}
        self.stats.already_done = sum(key in self.journal for key in keys)
        for place in self.places:
            if place.problem is not None:
                self.stats.processed += 1
                self.stats.skipped += "skipped" in place.problem
                self.stats.failed += "skipped" not in place.problem
        self.stats.total = len(keys) - self.stats.already_done + self.stats.processed

    async def ask_all(self, client: ServiceClient, concurrency: int, reporter: Reporter) -> None:
        """Ask for every answer that the journal does not have, at most *concurrency* at once.

        Raises:
            ServiceAwayError: The service stayed away; answers so far are in the journal.
            ConfigurationError: It would refuse every conversation, or the file was changed meanwhile.
            RunInterruptedError: *stop* was set; requests in flight have been waited for.
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
        if self._end is not None:
            raise self._end
        if not is_done:
            raise RunInterruptedError("Interrupted; what was in flight is kept.")

    def write(self, results: Path, failures: Path) -> int:
        """Write the answers in the order of the file to *results*, the rest to *failures*; return how many fail.

        Each file appears as a whole or not at all. Without failures and skipped documents there is no second file.

        Raises:
            StateDirectoryError: The disk is full, or the folder not writable; the journal has all answers.
        """
        rows, lost = [], []
        for position, place in enumerate(self.places, 1):
            if place.key is not None and place.key in self.journal:
                rows.append(self.journal.read(place.key))
            else:
                problem = place.problem or self.problems[place.key or b""]
                lost.append({"position": position, "conversation_number": place.number, **problem})
        if lost:
            replace_file(failures, orjson.dumps(lost, option=orjson.OPT_INDENT_2))
        replace_file(results, b"[" + b",\n".join(rows) + b"]\n")
        return sum("skipped" not in row for row in lost)

    def _place(self, document: Document, position: int) -> tuple[Place, ServiceRequest | None]:
        try:
            request = self.make(document, position)
        except SkippedDocumentError as exc:
            return Place(str(position), None, {"skipped": exc.reason, "message": str(exc)}), None
        except RequestError as exc:
            return Place(str(position), None, {"type": exc.kind.name, "message": str(exc)}), None
        return Place(request.number, request.key), request

    def _pending(self) -> Iterator[ServiceRequest]:
        """Yield what is to be asked for, each content once; the file is read again, so that memory holds no texts."""
        asked: set[bytes] = set()
        for position, document in enumerate(self.read(), 1):
            place, request = self._place(document, position)
            if position > len(self.places) or place != self.places[position - 1]:
                raise ConfigurationError("The file was changed during the run; run again.")
            if request is not None and request.key not in self.journal and request.key not in asked:
                asked.add(request.key)
                yield request

    async def _work(self, client: ServiceClient, pending: Iterator[ServiceRequest]) -> None:
        while (request := next(pending, None)) is not None:
            self._in_flight += 1
            try:
                answer = await client.classify(request)
                self.journal.keep(request.key, answer.body)
            except (RequestError, ServiceTimeoutError) as exc:
                self._fail(request, exc)
            except RunInterruptedError:
                return
            except TriadError as exc:  # what ends the run for all: the others finish what they have in flight
                self._end = self._end or exc
                self.stop.set()
                return
            else:
                self.latencies_s.append(answer.latency_s)
                self.stats.processed += 1
                self.stats.successful += 1
                self.stats.count_labels(answer.body["classification"])
            finally:
                self._in_flight -= 1

    def _fail(self, request: ServiceRequest, exc: RequestError | ServiceTimeoutError) -> None:
        self.stats.processed += 1
        self.stats.failed += 1
        name = exc.kind.name if isinstance(exc, RequestError) else "TimeoutError"
        status = exc.kind.status if isinstance(exc, RequestError) else None
        self.stats.count_reason(name)
        self.problems[request.key] = {
            "type": name,
            "status": status,
            "message": str(exc),
            "request_id": request_id(request, 1).removesuffix("-1"),
        }


def percentile(values: array[float], share: float) -> float | None:
    """Return the smallest of *values* that *share* (0 to 1) of them do not exceed; None without values."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)] if ordered else None

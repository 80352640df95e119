"""The run of several workers on a cluster as one run: one progress, one stop, one summary."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

from batch_processor import Observers
from cluster.ray_cluster import RemoteWorker, draining_nodes, open_cluster, places, start_workers
from cluster.tally import Ended, Job, Snapshot, added
from cluster.worker import code_of, directory_of
from config import Settings
from domain.text import counted
from error_handler import ConfigurationError, ExitCode, StoreError, WorkerLostError
from mongo_client import DocumentStore
from utils.batch_file_manager import BatchFiles
from utils.process import stop_on_signals
from worker.checkpoint import RunStats
from worker.intake import RunOptions
from worker.left_out import count_in_time, count_left_out

POLL_S = 1.0
SILENT_AFTER_S = 15.0  # a worker that does not answer has no node, or is being started
WAITING_EVERY_S = 30.0  # for a line while no worker has a node

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class View:
    """The state of one worker, as last reported. *before* has the counts of its earlier starts."""

    number: int
    remote: RemoteWorker
    run: asyncio.Task[Ended]
    last: Snapshot | None = None
    before: RunStats = field(default_factory=RunStats)
    starts: int = 0
    asked: asyncio.Task[Snapshot] | None = None
    moving: asyncio.Task[Snapshot] | None = None
    moved: str = ""  # the start that was told to move
    heard_s: float = field(default_factory=time.monotonic)
    ended: Ended | None = None

    @property
    def stats(self) -> RunStats:
        """The counts of all its starts."""
        return added([self.before, *([self.last.stats] if self.last else [])])

    @property
    def is_silent(self) -> bool:
        """True if it has not answered for a while."""
        return time.monotonic() - self.heard_s > SILENT_AFTER_S

    def note(self, snapshot: Snapshot) -> bool:
        """Keep *snapshot*; return whether it is the first one of a start of the worker."""
        is_new = self.last is None or self.last.start != snapshot.start
        if is_new:
            self.before, self.starts = self.stats, self.starts + 1
        self.last, self.heard_s = snapshot, time.monotonic()
        return is_new


async def run_workers(
    settings: Settings, options: RunOptions, observers: Observers, count: int | None, address: str | None
) -> dict[str, Any]:
    """Run *count* workers (None: as many as the cluster has places) on the cluster at *address* (None: one on this machine).

    Return the statistics of a run, with the sums of all workers, and: *workers*, one object for each; *problems*, sentences
    for the operator; *exit_code*, the highest one of the workers.

    Raises:
        ClusterUnavailableError: There is no cluster, or it does not accept this machine.
        DirectoryLockedError: Another command uses the state directory on this machine.
        StoreError: MongoDB is not reachable from here.
    """
    files = BatchFiles(settings.batch_files_dir)  # for the progress of all workers
    files.acquire()
    store = DocumentStore(settings, subset=options.subset)
    try:
        await store.check()
        shows_logs = logging.getLogger().isEnabledFor(logging.INFO)
        run = ClusterRun(observers, has_shares=bool(options.only or options.limit))
        with open_cluster(address, count, shows_logs=shows_logs), stop_on_signals(run.stop, lambda: True):
            await run.execute(_jobs(settings, options, count or places()))
        stats = run.statistics(settings)
        if stats["exit_code"] in (ExitCode.DONE, ExitCode.INCOMPLETE) and options.only in (None, "new"):
            with suppress(StoreError):
                queued = stats["in_retry_queue"] + stats["in_quarantine"]
                left_out = count_left_out(store, queued=queued, skipped_now=stats["skipped"])
                stats["not_selected"] = asdict(await count_in_time(left_out, logger.info))
        return stats
    finally:
        await store.close()
        files.release()


def _jobs(settings: Settings, options: RunOptions, count: int) -> list[Job]:
    if not count:
        raise ConfigurationError(
            "No node of the Ray cluster has a processor or a model_server for workers; start one, for example with "
            "ray start --address HOST:6379 --resources '{\"model_server\": 1}' (docs/scaling.md)."
        )
    places = {name: getattr(settings, name) for name in ("taxonomy_file", "prompt_examples_file")}
    files = {name: path.absolute() for name, path in places.items() if path is not None}
    settings = settings.model_copy(update=files)
    jobs = [Job(settings, options, directory_of(settings), code_of(settings))] * count
    if options.limit is None:
        return jobs
    shares = [options.limit // count + (number < options.limit % count) for number in range(count)]
    return [
        replace(job, options=replace(options, limit=share)) for job, share in zip(jobs, shares, strict=True) if share
    ]


class ClusterRun:
    """Starts the workers, gathers their progress, passes a stop on, and moves workers away from nodes that are removed.

    *has_shares* means that the total of a worker is its own share of the documents; else it is that of all.
    """

    def __init__(self, observers: Observers, *, has_shares: bool) -> None:
        self.stop = asyncio.Event()
        self._observers = observers
        self._has_shares = has_shares
        self._job_id = f"ray_{datetime.now(UTC):%Y%m%d_%H%M%S}_{secrets.token_hex(3)}"
        self._views: list[View] = []
        self._stopped = self._has_ended = False
        self._tasks: set[asyncio.Task[Any]] = set()
        self._waiting_s = time.monotonic() + WAITING_EVERY_S

    async def execute(self, jobs: Sequence[Job]) -> None:
        """Run each of *jobs* in a worker until all have ended, or those that remain have no node and nothing to do."""
        try:
            for number, (job, remote) in enumerate(zip(jobs, start_workers(len(jobs)), strict=True), 1):
                self._views.append(View(number, remote, self._background(remote.run(job))))
            self._tell(f"Ray starts {counted(len(jobs), 'worker')} ...")
            while not self._is_done():
                waits = [view.run for view in self._running()]
                stopping = [] if self._stopped else [asyncio.ensure_future(self.stop.wait())]
                await asyncio.wait([*waits, *stopping], timeout=POLL_S, return_when=asyncio.FIRST_COMPLETED)
                for task in stopping:
                    task.cancel()
                self._look()
                self._report("running")
            self._has_ended = True
            self._report("interrupted" if self.stop.is_set() else "completed")
        finally:
            await self._end_tasks()
            if not self._has_ended:
                self._report("failed")

    async def _end_tasks(self) -> None:
        """End all calls, because one that is made after the end of Ray would start a cluster."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _running(self) -> list[View]:
        return [view for view in self._views if view.ended is None]

    def _is_done(self) -> bool:
        """A worker that ended by itself has found nothing more to do, so one without a node is not waited for."""
        running = self._running()
        nothing_left = self._stopped or any(
            view.ended is not None and view.ended.error is None and not view.ended.interrupted for view in self._views
        )
        return not running or (nothing_left and all(view.is_silent for view in running))

    def _look(self) -> None:
        for view in self._running():
            if view.run.done():
                self._end(view)
        if self.stop.is_set() and not self._stopped:
            self._stopped = True
            for view in self._running():
                self._background(_unless_lost(view.remote.stop()))
        draining = draining_nodes()
        for view in self._running():
            self._hear(view)
            last = view.last
            if last is not None and last.node in draining and last.start != view.moved and not self._stopped:
                self._tell(
                    f"The node of worker {view.number} is being removed: it finishes its calls and goes to another node."
                )
                view.moving, view.moved = self._background(view.remote.move()), last.start
        if time.monotonic() > self._waiting_s and self._running():
            self._waiting_s = time.monotonic() + WAITING_EVERY_S
            self._tell_waiting()

    def _tell_waiting(self) -> None:
        silent = [str(view.number) for view in self._running() if view.is_silent]
        if silent:
            self._tell(f"Ray has no node for worker {', '.join(silent)} now; it starts as soon as one is free.")
        answering = [view.last for view in self._running() if view.last is not None and not view.is_silent]
        if answering and not any(one.in_flight for one in answering):
            self._tell(
                "No call is in flight: a worker that died may hold the rest, for LEASE_S at most, or the model loads."
            )

    def _end(self, view: View) -> None:
        try:
            view.ended = view.run.result()
            self._note(view, view.ended.snapshot)
        except WorkerLostError as exc:
            view.ended = Ended(view.last or Snapshot("", "", ""), error=str(exc), exit_code=ExitCode.INCOMPLETE)
        if view.ended.exit_code == ExitCode.FAILURE_THRESHOLD:
            self.stop.set()

    def _hear(self, view: View) -> None:
        """Take the answers of *view*, and ask it again."""
        if view.moving is not None and view.moving.done():
            with suppress(WorkerLostError):
                self._note(view, view.moving.result())
            view.moving = None
        if view.asked is None or view.asked.done():
            with suppress(WorkerLostError):
                if view.asked is not None and view.asked.result().start != view.moved:  # that would be older
                    self._note(view, view.asked.result())
            view.asked = self._background(view.remote.progress())

    def _note(self, view: View, snapshot: Snapshot) -> None:
        if view.note(snapshot):
            again = "" if view.starts == 1 else " (started again by Ray)"
            self._tell(f"Worker {view.number} runs on {snapshot.host}, node {snapshot.node[:8]}{again}.")
            if self._stopped:
                self._background(_unless_lost(view.remote.stop()))

    def _report(self, status: str) -> None:
        now = [view.last for view in self._running() if view.last is not None and not view.is_silent]
        limits = [one.limit for one in now if one.limit is not None]
        stats = self._stats()
        for reporter in self._observers.reporters:
            in_flight = sum(one.in_flight for one in now)
            reporter.update(self._job_id, status, stats, in_flight, sum(limits) if limits else None)

    def _stats(self) -> RunStats:
        found = [view.stats for view in self._views]
        stats = added(found)
        return replace(stats, total=sum(one.total for one in found)) if self._has_shares else stats

    def statistics(self, settings: Settings) -> dict[str, Any]:
        """Return what ``run_workers`` returns, but for *not_selected*."""
        ends = [view.ended for view in self._views if view.ended is not None]
        counts = asdict(self._stats())
        errors = [end.exit_code for end in ends if end.error is not None]
        interrupted = self.stop.is_set() or any(end.interrupted for end in ends)
        code = max(errors, default=0) or (
            ExitCode.INTERRUPTED if interrupted else max((end.exit_code for end in ends), default=0)
        )
        return {
            "job_id": self._job_id,
            "documents_processed": counts.pop("processed"),
            **counts,
            "in_retry_queue": sum(end.in_retry_queue for end in ends),
            "in_quarantine": sum(end.in_quarantine for end in ends),
            "not_selected": None,
            "interrupted": interrupted,
            "held_back_s": max((end.held_back_s for end in ends), default=0.0),
            "review_below": settings.review_below,
            "workers": [_described(view) for view in self._views],
            "problems": _problems(self._views),
            "exit_code": int(code),
        }

    def _background(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _tell(self, sentence: str) -> None:
        logger.info(sentence)
        tell: Callable[[str], None] | None = self._observers.announce
        if tell is not None:
            tell(sentence)


async def _unless_lost(work: Coroutine[Any, Any, None]) -> None:
    with suppress(WorkerLostError):
        await work


def _described(view: View) -> dict[str, Any]:
    last, stats = view.last, view.stats
    return {
        "worker": view.number,
        "host": last.host if last else None,
        "jobs": list(last.jobs) if last else [],
        "starts": view.starts,
        "documents_processed": stats.processed,
        "successful": stats.successful,
        "failed": stats.failed,
        "skipped": stats.skipped,
        "error": view.ended.error if view.ended else None,
    }


def _problems(views: Sequence[View]) -> list[str]:
    """Return a sentence for each error, with the workers that had it, and for workers that never had a node."""
    by_error: dict[str, list[str]] = {}
    for view in views:
        if view.ended is not None and view.ended.error is not None:
            by_error.setdefault(view.ended.error, []).append(str(view.number))
        elif view.ended is None:
            by_error.setdefault("Ray had no node for it; the other workers did its work.", []).append(str(view.number))
    return [f"worker {', '.join(numbers)}: {error}" for error, numbers in by_error.items()]

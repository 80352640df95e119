"""``--engine ray`` without Ray: the workers of a run in the process of the test, behind the seam of ``cluster.ray_cluster``."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, cast

import pytest

from cluster.tally import Ended, Job, Snapshot, added
from cluster.worker import ClusterWorker
from config import load_settings
from error_handler import WorkerLostError
from tests.worker.site import Document, Site, check_exactly_once, check_results, check_statuses, filled, model_of
from tests.worker.site import Ended as Run
from utils.batch_file_manager import BatchFiles
from worker.checkpoint import RunStats
from worker.intake import RunOptions


@dataclass
class Nodes:
    """The cluster of a test. *starts* counts the starts of all workers; each has a node of its own."""

    places: int = 2
    has_room: bool = True  # for a worker that moves
    draining: set[str] = field(default_factory=set)
    workers: list[NearWorker] = field(default_factory=list)
    starts: int = 0
    when_polled: Callable[[], None] = lambda: None

    def start(self, count: int) -> list[NearWorker]:
        self.workers = [NearWorker(self) for _ in range(count)]
        return self.workers

    def drained(self) -> set[str]:
        self.when_polled()
        return self.draining


class NearWorker:
    """A RemoteWorker whose process is that of the test."""

    def __init__(self, nodes: Nodes) -> None:
        self.nodes = nodes
        self.here = self._started()
        self._task: asyncio.Task[Ended] | None = None
        self._job: Job | None = None
        self._is_lost = self._is_waiting = False

    def _started(self) -> ClusterWorker:
        self.nodes.starts += 1
        return ClusterWorker(f"node-{self.nodes.starts}")

    async def run(self, job: Job) -> Ended:
        self._job = job
        while True:
            here = self.here
            self._task = asyncio.create_task(here.run(job))
            await asyncio.wait([self._task])
            if self._is_lost:
                raise WorkerLostError("Ray has lost the worker.")
            if self._is_waiting:
                await asyncio.Event().wait()
            if here is self.here:
                return self._task.result()

    async def progress(self) -> Snapshot:
        if self._is_waiting:
            await asyncio.Event().wait()
        return await self.here.progress()

    async def stop(self) -> None:
        await self.here.stop()

    async def move(self) -> Snapshot:
        last = await self.here.leave()
        self._is_waiting = not self.nodes.has_room
        if not self._is_waiting:
            self.here = self._started()
        assert self._task is not None
        self._task.cancel()
        return last

    def lose(self) -> None:
        """Let the process die for good, as far as that goes within this one: its leases stay."""
        self._is_lost = True
        assert self.here._work is not None
        self.here._work.cancel()


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch) -> Nodes:
    """Return two nodes in place of Ray, which are looked at often."""
    pytest.importorskip("ray", reason="requirements-ray.txt is not installed")
    from cluster import engine

    made = Nodes()

    @contextmanager
    def opened(address: str | None, workers: int | None, *, shows_logs: bool) -> Iterator[None]:
        with nullcontext():
            yield

    monkeypatch.setattr(engine, "open_cluster", opened)
    monkeypatch.setattr(engine, "places", lambda: made.places)
    monkeypatch.setattr(engine, "start_workers", made.start)
    monkeypatch.setattr(engine, "draining_nodes", made.drained)
    monkeypatch.setattr(engine, "POLL_S", 0.05)
    monkeypatch.setattr(engine, "SILENT_AFTER_S", 1.0)
    monkeypatch.setattr("cluster.worker.LOOK_AGAIN_S", 0.05)
    return made


def run(site: Site, *flags: str, **settings: str) -> tuple[Run, dict[str, Any]]:
    """Run ``cli.py --engine ray``; return how it ended and its statistics."""
    output = site.folder / "output.json"
    ended = site.run("--engine", "ray", "--output", str(output), *flags, **settings)
    return ended, json.loads(output.read_text()) if output.exists() else {}


def slowly(site: Site, count: int) -> list[Document]:
    """Store *count* conversations, which take longer than some looks at the nodes."""
    model_of(site).configure(latency_s=0.1)
    return filled(site, count)


def test_workers_share_the_documents_and_the_summary_has_their_sums(site: Site, nodes: Nodes) -> None:
    """Each document is asked once; each worker has a directory of its own."""
    documents = filled(site, 60)
    ended, stats = run(site, BATCH_SIZE="5")
    assert ended.code == 0, ended.err
    shares = [worker["documents_processed"] for worker in stats["workers"]]
    assert len(shares) == 2
    assert all(shares)
    assert (sum(shares), stats["documents_processed"], stats["successful"], stats["total"]) == (60, 60, 60, 60)
    assert sum(stats["labels"]["sentiment"].values()) == 60
    assert "60 documents processed" in ended.out
    assert stats["not_selected"]["done"] == 60
    check_exactly_once(site, documents)
    assert model_of(site).stats()["chat_requests"] == 60
    assert {path.parent.name for path in site.files("**/checkpoint.json")} == {"worker-1", "worker-2"}
    (progress,) = site.files("progress/ray_*.json")
    state = json.loads(progress.read_text())
    assert (state["status"], state["processed"]) == ("completed", 60)


def test_summary_has_the_subset_and_the_urgent_documents(site: Site, nodes: Nodes) -> None:
    """As that of one worker: what failed outside the subset is not told, and what waits there is."""
    filled(site, 9)
    site.source.update_many({"_id": {"$lt": 4}}, {"$set": {"channel": "email"}})
    site.source.update_many({"_id": {"$gte": 6}}, {"$set": {"status": "failed", "status_reason": "timeout"}})
    ended, stats = run(site, "--filter", '{"channel": "email"}')
    assert ended.code == 0, ended.err
    left = stats["not_selected"]
    assert (left["done"], left["filtered"], left["failed"]) == (4, 2, 0)
    assert stats["urgent"] == 0
    assert added([RunStats(urgent=1), RunStats(urgent=2)]).urgent == 3


@pytest.mark.slow
def test_worker_of_a_node_that_is_removed_continues_elsewhere(site: Site, nodes: Nodes) -> None:
    """It finishes its calls first, so no call is repeated, and its counts are kept."""
    documents = slowly(site, 60)

    def drain() -> None:
        if model_of(site).stats()["answered"] > 10:
            nodes.draining = {"node-1"}

    nodes.when_polled = drain
    ended, stats = run(site)
    assert ended.code == 0, ended.err
    assert nodes.starts == 3
    assert "worker 1 is being removed" in ended.err
    assert stats["workers"][0]["starts"] == 2
    check_exactly_once(site, documents)
    assert model_of(site).stats()["chat_requests"] == stats["successful"] == 60


@pytest.mark.slow
def test_documents_of_a_worker_without_a_node_are_free_at_once(site: Site, nodes: Nodes) -> None:
    """The other worker does them all; it does not wait until leases of 300 s expire."""
    documents = slowly(site, 60)
    nodes.has_room = False

    def drain() -> None:
        if model_of(site).stats()["answered"] > 10:
            nodes.draining = {"node-1"}

    nodes.when_polled = drain
    ended, stats = run(site)
    assert ended.code == 0, ended.err
    assert "worker 1: Ray had no node for it; the other workers did its work." in ended.err
    assert site.files("worker-1/pending/*"), "all that it had leased was done: this proves nothing"
    check_results(site, documents)
    check_statuses(site, documents)
    assert model_of(site).stats()["chat_requests"] == stats["successful"] == 60


@pytest.mark.slow
def test_documents_of_a_lost_worker_are_taken_over(site: Site, nodes: Nodes) -> None:
    """The other worker waits until the leases have expired; the command tells that a worker was lost."""
    documents = slowly(site, 60)

    def lose() -> None:
        if model_of(site).stats()["answered"] > 10:
            nodes.workers[0].lose()

    nodes.when_polled = lose
    ended, stats = run(site, LEASE_S="1")
    assert ended.code == 1, ended.err
    assert "worker 1: Ray has lost the worker." in ended.err
    check_results(site, documents)
    check_statuses(site, documents)
    assert stats["workers"][1]["error"] is None


@pytest.mark.slow
def test_stop_ends_all_workers_and_the_next_run_resumes(site: Site, nodes: Nodes) -> None:
    """Calls in flight are finished: no call is repeated."""
    documents = slowly(site, 60)

    def interrupt() -> None:
        if model_of(site).stats()["answered"] > 10:
            running.stop.set()

    from cluster import engine

    running: Any = None
    make = engine.ClusterRun

    def kept(*arguments: Any, **options: Any) -> Any:
        nonlocal running
        running = make(*arguments, **options)
        return running

    nodes.when_polled = interrupt
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "ClusterRun", kept)
        ended, stats = run(site)
    assert ended.code == 130
    assert stats["interrupted"]
    assert "run the same command again" in ended.err
    assert site.results.count_documents({}) < 60
    nodes.when_polled = lambda: None
    assert run(site)[0].code == 0
    check_exactly_once(site, documents)
    assert model_of(site).stats()["chat_requests"] == 60


@pytest.mark.thorough
def test_failures_are_summed_and_give_the_exit_code(site: Site, nodes: Nodes) -> None:
    """The exit code is that of the worker that ended worst."""
    filled(site, 60)
    model_of(site).configure(faults=[{"kind": "status", "status": 400, "body": "no", "when": {"text": "Case 00007"}}])
    ended, stats = run(site)
    assert ended.code == 1, ended.err
    assert (stats["failed"], stats["successful"], stats["in_quarantine"]) == (1, 59, 1)


@pytest.mark.thorough
def test_too_many_failures_of_one_worker_stop_all(site: Site, nodes: Nodes) -> None:
    """The exit code is 4, as for one worker, and not that of an interruption."""
    filled(site, 300)
    model_of(site).configure(faults=[{"kind": "status", "status": 400, "body": "no"}])
    ended, stats = run(site)
    assert ended.code == 4, ended.err
    assert "mostly because of" in ended.err
    assert stats["documents_processed"] < 300


def test_error_of_all_workers_is_printed_once(site: Site, nodes: Nodes) -> None:
    """A missing model ends each worker with the same sentence and exit code 2."""
    filled(site, 10)
    ended, _ = run(site, OLLAMA_MODEL="not-there")
    assert ended.code == 2
    assert ended.err.count("not-there") == 1
    assert "worker 1, 2: " in ended.err


async def test_time_held_back_is_the_sum_of_all_passes() -> None:
    """A worker that waits for the documents of another one makes several."""
    passes = [{"leased_elsewhere": 1, "held_back_s": 2.0}, {"leased_elsewhere": 0, "held_back_s": 3.0}]
    same = {"interrupted": False, "failed": 0, "in_retry_queue": 0, "in_quarantine": 0}

    class Processor:
        stop = asyncio.Event()

        async def run(self, _options: RunOptions) -> dict[str, Any]:
            return same | passes.pop(0)

    Processor.stop.set()  # no wait between the two
    ended = await ClusterWorker("node")._passes_of(
        cast("Any", Processor()), cast("Any", Job(None, RunOptions(), None, ""))
    )
    assert ended.held_back_s == 5.0


@pytest.mark.slow
def test_limit_is_shared_by_the_workers(site: Site, nodes: Nodes) -> None:
    filled(site, 60)
    ended, stats = run(site, "--limit", "7", "--workers", "3")
    assert ended.code == 0, ended.err
    assert stats["successful"] == stats["total"] == site.results.count_documents({}) == 7
    ended, stats = run(site, "--only", "new", "--workers", "2", BATCH_SIZE="5")
    assert (ended.code, stats["total"], stats["successful"]) == (0, 53, 53), ended.err


def test_node_with_another_taxonomy_is_refused(site: Site, nodes: Nodes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Labels of two taxonomies in one run would be noticed much later."""
    filled(site, 10)
    monkeypatch.setattr("cluster.engine.code_of", lambda settings: "another")
    ended, _ = run(site)
    assert ended.code == 2
    assert "install the same files on all nodes" in ended.err
    assert site.results.count_documents({}) == 0


def test_worker_asks_the_model_server_of_its_node(monkeypatch: pytest.MonkeyPatch, nothing_is_set: None) -> None:
    """The node's own OLLAMA_ENDPOINT, unless the command names one."""
    from cluster.worker import on_this_node

    unset, named = load_settings(), load_settings(ollama_endpoint="http://named:11434")
    monkeypatch.setenv("OLLAMA_ENDPOINT", "http://gpu-7:11434")
    assert on_this_node(unset).ollama_endpoint == "http://gpu-7:11434"
    assert on_this_node(named).ollama_endpoint == "http://named:11434"


def test_cluster_without_places_is_an_error(site: Site, nodes: Nodes) -> None:
    nodes.places = 0
    ended, _ = run(site)
    assert ended.code == 2
    assert "model_server" in ended.err


def test_second_command_with_the_directory_is_refused(site: Site, nodes: Nodes) -> None:
    """Their progress files would replace each other."""
    first = BatchFiles(site.directory)
    first.acquire()
    try:
        assert run(site)[0].code == 5
    finally:
        first.release()


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (("--engine", "ray", "--reprocess"), "--only stale"),
        (("--engine", "ray", "--embedded"), "where all nodes reach it"),
        (("--engine", "ray", "--describe"), "afterwards"),
        (("--engine", "ray", "--mode", "continuous"), "cron"),
        (("--engine", "ray", "--student", "0.9"), "STUDENT"),
        (("--engine", "ray", "--reply", "auto"), "--reply auto"),
        (("--workers", "2"), "--workers requires --engine ray"),
        (("--ray-address", "auto"), "--ray-address requires --engine ray"),
    ],
)
def test_flags_that_do_not_go_together_are_refused(site: Site, flags: tuple[str, ...], sentence: str) -> None:
    ended = site.run(*flags)
    assert ended.code == 2
    assert sentence in ended.err


def test_missing_package_names_its_file(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    ended = site.run("--engine", "ray")
    assert ended.code == 2
    assert "requirements-ray.txt" in ended.err


def test_sums_of_counts() -> None:
    """Numbers and nested counts are added; the total is the largest, because each worker counts all pending documents."""
    one = RunStats(total=9, processed=2, leased_elsewhere=7, reasons={"busy": 1}, labels={"intent": {"A": 2}})
    other = RunStats(
        total=7, processed=3, reasons={"busy": 2, "timeout": 1}, labels={"intent": {"B": 1}, "topic": {"C": 1}}
    )
    assert added([one, other]) == RunStats(
        total=9,
        processed=5,
        reasons={"busy": 3, "timeout": 1},
        labels={"intent": {"A": 2, "B": 1}, "topic": {"C": 1}},
    )
    assert added([]) == RunStats()
    assert one.labels == {"intent": {"A": 2}}

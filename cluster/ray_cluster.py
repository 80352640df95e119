"""Ray: connects to a cluster, and places, restarts and calls the workers on it. The only module that imports ``ray``."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import (
    ActorUnschedulableError,
    NodeDiedError,
    OutOfMemoryError,
    RayActorError,
    RayError,
    WorkerCrashedError,
)
from ray.job_config import JobConfig

from cluster.tally import Ended, Job, Snapshot
from cluster.worker import ClusterWorker
from config.loading import changed_environment
from error_handler import ClusterUnavailableError, WorkerLostError

ROOT = Path(__file__).parent.parent
MODEL_SERVER = "model_server"  # the custom resource of nodes with model servers
MAX_RESTARTS = 20  # of a worker; a document that kills it twice is quarantined
LOST = (RayActorError, ActorUnschedulableError, NodeDiedError, OutOfMemoryError, WorkerCrashedError)
LOCAL_OBJECTS_BYTES = 80_000_000  # the least that Ray takes for objects, of which there are none


class PlacedWorker(ClusterWorker):
    """A worker that knows its node."""

    def __init__(self) -> None:
        super().__init__(ray.get_runtime_context().get_node_id())


class RemoteWorker:
    """A worker in another process. Ray starts it again after a crash, on another node if its node is lost, and runs its job again.

    The job is an argument of a call, because Ray shows the environment of its processes in logs and on its dashboard.
    """

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    async def run(self, job: Job) -> Ended:
        """Run *job* to its end.

        Raises:
            WorkerLostError: The worker died more than MAX_RESTARTS times.
        """
        ended: Ended = await _answer(self._actor.run.remote(job))
        return ended

    async def progress(self) -> Snapshot:
        """Return its state; this waits while it has no node.

        Raises:
            WorkerLostError: It died; Ray starts it again.
        """
        snapshot: Snapshot = await _answer(self._actor.progress.options(max_task_retries=0).remote())
        return snapshot

    async def stop(self) -> None:
        """Stop it as the first signal stops a worker.

        Raises:
            WorkerLostError: It died.
        """
        await _answer(self._actor.stop.options(max_task_retries=0).remote())

    async def move(self) -> Snapshot:
        """Stop it, then let Ray start it on another node; return its last state on this node.

        Raises:
            WorkerLostError: It died.
        """
        last: Snapshot = await _answer(self._actor.leave.options(max_task_retries=0).remote())
        ray.kill(self._actor, no_restart=False)
        return last


@contextmanager
def open_cluster(address: str | None, workers: int | None, *, shows_logs: bool) -> Iterator[None]:
    """Connect to the cluster at *address*; None starts one on this machine with room for *workers* (None: 1), and ends it.

    Raises:
        ClusterUnavailableError: There is no cluster at *address*, or this machine may not use it.
    """
    ours: dict[str, Any] = (
        {}
        if address
        else {"num_cpus": workers or 1, "include_dashboard": False, "object_store_memory": LOCAL_OBJECTS_BYTES}
    )
    try:
        # Ray's own statistics would go to a server on the Internet.
        with changed_environment(RAY_USAGE_STATS_ENABLED="0"):
            ray.init(
                address or "local",
                logging_level=logging.ERROR,
                log_to_driver=shows_logs,
                job_config=JobConfig(code_search_path=[str(ROOT)]),
                **ours,
            )
    except (OSError, RuntimeError, ValueError, RayError) as exc:
        raise ClusterUnavailableError(
            f"Ray does not connect to {address or 'a cluster of its own'} ({type(exc).__name__}). Check with ray status that it "
            "runs, and that this machine has its token and the same versions of Ray and Python (docs/scaling.md)."
        ) from exc
    try:
        yield
    finally:
        ray.shutdown()


def places() -> int:
    """Return how many workers the cluster has room for: one for each model server, or else for each node with a processor."""
    resources = _resources()
    servers = sum(int(one.get(MODEL_SERVER, 0)) for one in resources)
    return servers or sum(one.get("CPU", 0) >= 1 for one in resources)


def start_workers(count: int) -> list[RemoteWorker]:
    """Start *count* workers. Each gets a unit of MODEL_SERVER if a node has that resource, or else a processor, spread over the nodes."""
    has_servers = any(MODEL_SERVER in one for one in _resources())
    needs: dict[str, Any] = {"num_cpus": 0, "resources": {MODEL_SERVER: 1}} if has_servers else {"num_cpus": 1}
    actor = ray.remote(max_restarts=MAX_RESTARTS, max_task_retries=MAX_RESTARTS, scheduling_strategy="SPREAD", **needs)(
        PlacedWorker
    )
    return [RemoteWorker(actor.remote()) for _ in range(count)]


def draining_nodes() -> set[str]:
    """Return the ids of the nodes that are about to be removed."""
    # Ray has no public function for it; its own libraries use this one.
    return set(ray._private.state.state.get_draining_nodes())


def _resources() -> list[dict[str, float]]:
    """Return the resources of each node that is alive."""
    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    return [node["Resources"] for node in nodes if node["Alive"]]


async def _answer(reference: Any) -> Any:
    try:
        return await asyncio.wrap_future(reference.future())
    except LOST as exc:
        raise WorkerLostError(
            "Ray has lost the worker; its logs are in the folder logs of the session of Ray on its node."
        ) from exc

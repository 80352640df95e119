"""A Ray cluster of several nodes on this machine, each with processes of its own, for tests."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import ray
from ray.cluster_utils import Cluster

from tests.worker.site import Site, until

SMALL = {"object_store_memory": 80_000_000, "include_dashboard": False}
# Ray's own token of this user would decide otherwise; its statistics go to the Internet.
ENVIRONMENT = {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}


class RayNodes:
    """The nodes; the head runs no worker, and each other one has a model server."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.cluster = Cluster(shutdown_at_exit=False)
        self.cluster.add_node(num_cpus=0, temp_dir=str(folder), **SMALL)
        self.nodes: list[Any] = []

    @property
    def address(self) -> str:
        """The address for ``--ray-address``."""
        return str(self.cluster.address)

    def add(self, count: int = 1) -> None:
        """Add *count* nodes."""
        for _ in range(count):
            self.nodes.append(self.cluster.add_node(num_cpus=1, resources={"model_server": 1}, **SMALL))

    def node_of(self, process: int) -> Any:
        """Return the node that runs *process*."""
        parent = psutil.Process(process).ppid()
        return next(node for node in self.nodes if node.all_processes["raylet"][0].process.pid == parent)

    def close(self) -> None:
        """End all processes of the cluster; those of a killed node may have been left."""
        ray.shutdown()
        self.cluster.shutdown()
        mine = [process for process in psutil.process_iter() if _names(process, str(self.folder))]
        for process in mine:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(mine, timeout=20)


@contextmanager
def ray_nodes(count: int, **environment: str) -> Iterator[RayNodes]:
    """Yield a cluster with *count* nodes beside its head; *environment* is that of its processes."""
    before = dict(os.environ)
    os.environ.update({**ENVIRONMENT, **environment})
    folder = Path(tempfile.mkdtemp(prefix="ray"))  # short: the paths of sockets are limited
    try:
        nodes = RayNodes(folder)
        try:
            nodes.add(count)
            yield nodes
        finally:
            nodes.close()
    finally:
        os.environ.clear()
        os.environ.update(before)
        shutil.rmtree(folder, ignore_errors=True)


def working(site: Site, count: int) -> list[int]:
    """Return the process ids of *count* workers that have processed documents, by their heartbeats."""
    workers = site.database["sentimental_analysis_workers"]
    busy = {"ended_at": None, "counts.processed": {"$gt": 0}}
    until(lambda: workers.count_documents(busy) >= count)
    return [found["pid"] for found in workers.find(busy, sort=[("started_at", 1)])]


def kill(process: int) -> None:
    """Kill *process*."""
    os.kill(process, signal.SIGKILL)


def _names(process: psutil.Process, folder: str) -> bool:
    with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
        return any(folder in argument for argument in process.cmdline())
    return False

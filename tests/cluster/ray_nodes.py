"""A Ray cluster of several nodes on this machine, for tests.

Ray's cluster for tests runs in a process of its own, which takes a line of JSON for each step and prints one: it leaves
open files, signal handlers and processes, and its end is the end of them.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from tests.environment import clean_environment
from tests.worker.site import ROOT, Site, until

SMALL = {"object_store_memory": 80_000_000, "include_dashboard": False}
# A token of this user would decide otherwise; the statistics go to the Internet.
ENVIRONMENT = {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}


class RayNodes:
    """The nodes, numbered from 0: the head, which runs no worker, and others with a model server each."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self.nodes: list[dict[str, Any]] = []
        with (folder / "cluster.err").open("wb") as errors:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.cluster.ray_nodes"],
                cwd=ROOT,
                env=clean_environment() | environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                start_new_session=True,
            )
        self.add({"num_cpus": 0})

    @property
    def address(self) -> str:
        """The address for ``--ray-address``."""
        return str(self.nodes[0]["address"])

    def add(self, arguments: dict[str, Any] | None = None) -> None:
        """Add a node; None means one with a model server."""
        self.nodes.append(self.do("add", arguments or {"num_cpus": 1, "resources": {"model_server": 1}}))

    def do(self, step: str, argument: Any = None) -> Any:
        """Take *step*, a name in STEPS."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps([step, argument]) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def number_of(self, process: int) -> int:
        """Return the number of the node that runs *process*."""
        parent = psutil.Process(process).ppid()
        return next(number for number, node in enumerate(self.nodes) if node["raylet"] == parent)

    def close(self) -> None:
        """End the process with the cluster."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            with suppress(BrokenPipeError):
                stream.close()


@contextmanager
def ray_nodes(count: int, **environment: str) -> Iterator[RayNodes]:
    """Yield a cluster with *count* nodes beside its head; *environment* is added to that of its processes."""
    folder = Path(tempfile.mkdtemp(prefix="ray"))  # short: the paths of sockets are limited
    (folder / "ray").mkdir()
    nodes = RayNodes(folder, {**ENVIRONMENT, "TMPDIR": str(folder), **environment})
    try:
        for _ in range(count):
            nodes.add()
        yield nodes
    finally:
        nodes.close()
        end_processes_of(folder)
        shutil.rmtree(folder, ignore_errors=True)


def processes_of(folder: Path) -> list[psutil.Process]:
    """Return the processes whose arguments name *folder*, and their children: those of Ray."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            if any(str(folder) in argument for argument in process.cmdline()):
                found += [process, *process.children(recursive=True)]
    return found


def end_processes_of(folder: Path) -> None:
    """Kill the processes of Ray in *folder*."""
    found = processes_of(folder)
    for process in found:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(found, timeout=20)
    for child in psutil.Process().children():  # the process of the tests inherits them, see tests/forked_process.py
        with suppress(psutil.NoSuchProcess, ChildProcessError):
            if child.status() == psutil.STATUS_ZOMBIE and re.match("ray|gcs_server", child.name()):
                os.waitpid(child.pid, 0)


def working(site: Site, count: int) -> list[int]:
    """Return the process ids of *count* workers that have processed documents, by their heartbeats."""
    workers = site.database["sentimental_analysis_workers"]
    busy = {"ended_at": None, "counts.processed": {"$gt": 0}}
    until(lambda: workers.count_documents(busy) >= count)
    return [found["pid"] for found in workers.find(busy, sort=[("started_at", 1)])]


def _serve() -> None:
    from ray.cluster_utils import Cluster

    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # Ray prints, too
    cluster = Cluster(shutdown_at_exit=False)
    nodes: list[Any] = []

    def add(arguments: dict[str, Any]) -> dict[str, Any]:
        node = cluster.add_node(**SMALL, **arguments)
        nodes.append(node)
        raylet = node.all_processes["raylet"][0].process.pid
        return {"address": cluster.address, "id": node.node_id, "raylet": raylet}

    steps: dict[str, Any] = {
        "add": add,
        "kill": lambda number: cluster.remove_node(nodes[number], allow_graceful=False),
        "kill_gcs": lambda _: cluster.head_node.kill_gcs_server(check_alive=False),
        "start_gcs": lambda _: cluster.head_node.start_gcs_server(),
    }
    for line in sys.stdin:
        step, argument = json.loads(line)
        print(json.dumps(steps[step](argument)), file=out, flush=True)


if __name__ == "__main__":
    _serve()

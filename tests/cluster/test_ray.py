"""``--engine ray`` on real Ray: nodes and workers are killed, the head is restarted, and each document has one result."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.cluster.ray_nodes import RayNodes, processes_of, ray_nodes, working
from tests.worker.site import Site, check_calls, check_results, check_statuses, filled, model_of, until

# Importing it would take each process that runs tests half a second.
MISSING = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="requirements-ray.txt is not installed")
pytestmark = [MISSING, pytest.mark.timeout(300)]
CONCURRENCY = 6
SECRET = "sk-not-in-any-log"


@pytest.fixture
def three() -> Iterator[RayNodes]:
    """Return a head and three nodes with a model server each."""
    with ray_nodes(3) as nodes:
        yield nodes


def ready(site: Site) -> list[dict[str, object]]:
    """Store documents that take three workers several seconds."""
    site.settings |= {"LEASE_S": "4", "RAY_AUTH_MODE": "disabled"}
    model_of(site).configure(slots=4 * CONCURRENCY, latency_s=0.4)
    return filled(site, 400)


def check_once(site: Site, documents: list[dict[str, object]], *, deaths: int) -> None:
    check_results(site, documents)
    check_statuses(site, documents)
    # Those in flight, and those whose answers only the journal of a dead worker has.
    check_calls(site, documents, repeated=2 * CONCURRENCY * deaths)


@pytest.mark.slow
def test_run_on_a_cluster_of_its_own(site: Site) -> None:
    """Ray is started and ended by the command, and nothing of it remains."""
    documents = filled(site, 40)
    with tempfile.TemporaryDirectory(prefix="ray") as folder:
        with site.start("--engine", "ray", "--workers", "2", TMPDIR=folder, HOME=folder, LLM_API_KEY=SECRET) as running:
            ended = running.ended(120)
        assert ended.code == 0, ended.err
        logs = [path for path in Path(folder).rglob("*") if path.is_file()]
        assert any(path.name.startswith("worker-") for path in logs), "there are no logs: this proves nothing"
        assert [path for path in logs if SECRET.encode() in path.read_bytes()] == []
        assert processes_of(Path(folder)) == []
    check_once(site, documents, deaths=0)
    assert "Worker 2 runs on" in ended.err
    assert "dashboard" not in ended.err


@pytest.mark.thorough
def test_node_is_killed(site: Site, three: RayNodes) -> None:
    """Its worker has no other node; the others take its documents when the leases expire."""
    documents = ready(site)
    output = site.folder / "output.json"
    flags = ("--engine", "ray", "--ray-address", three.address, "--output", str(output))
    with site.start(*flags) as running:
        three.do("kill", three.number_of(working(site, 3)[0]))
        ended = running.ended(120)
    assert ended.code == 0, ended.err
    assert "Ray had no node for it; the other workers did its work." in ended.err
    assert json.loads(output.read_text())["documents_processed"] <= len(documents)
    check_once(site, documents, deaths=1)


@pytest.mark.thorough
def test_worker_goes_to_a_new_node(site: Site, three: RayNodes) -> None:
    """A node is killed while another one joins, as on Kubernetes."""
    documents = ready(site)
    with site.start("--engine", "ray", "--ray-address", three.address) as running:
        three.do("kill", three.number_of(working(site, 3)[0]))
        three.add()
        running.await_text("(started again by Ray)", 90)
        ended = running.ended(120)
    assert ended.code == 0, ended.err
    check_once(site, documents, deaths=1)


@pytest.mark.thorough
def test_actor_is_killed(site: Site, three: RayNodes) -> None:
    """Ray starts it again on its node, where it replays its directory."""
    documents = ready(site)
    with site.start("--engine", "ray", "--ray-address", three.address) as running:
        os.kill(working(site, 3)[0], signal.SIGKILL)
        running.await_text("(started again by Ray)", 90)
        ended = running.ended(120)
    assert ended.code == 0, ended.err
    assert len(site.files("worker-*/worker.json")) == 3
    assert site.files("worker-*/pending/*") == []
    check_results(site, documents)
    check_statuses(site, documents)
    check_calls(site, documents, repeated=CONCURRENCY)


@pytest.mark.thorough
def test_node_is_drained(site: Site, three: RayNodes) -> None:
    """No call is repeated: the worker finishes its calls before it goes to the node that joined."""
    documents = ready(site)
    three.add()
    with site.start("--engine", "ray", "--ray-address", three.address, "--workers", "3") as running:
        victim = three.nodes[three.number_of(working(site, 3)[0])]["id"]
        drain = ["drain-node", "--address", three.address, "--node-id", victim]
        environment = {**os.environ, "RAY_AUTH_MODE": "disabled"}
        reason = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "test"]
        subprocess.run([Path(sys.executable).with_name("ray"), *drain, *reason], check=True, env=environment)
        running.await_text("(started again by Ray)", 90)
        ended = running.ended(120)
    assert ended.code == 0, ended.err
    assert "is being removed" in ended.err
    check_once(site, documents, deaths=0)


@pytest.mark.thorough
def test_stop_ends_all_workers(site: Site, three: RayNodes) -> None:
    """SIGTERM finishes the calls in flight on all nodes; the next command resumes without repeated calls."""
    documents = ready(site)
    flags = ("--engine", "ray", "--ray-address", three.address)
    with site.start(*flags) as running:
        working(site, 3)
        running.send(signal.SIGTERM)
        ended = running.ended(60)
    assert ended.code == 130, ended.err
    assert 0 < site.results.count_documents({}) < len(documents)
    with site.start(*flags) as running:
        assert running.ended(120).code == 0
    check_once(site, documents, deaths=0)


@pytest.mark.thorough
def test_command_is_killed(site: Site, three: RayNodes) -> None:
    """Ray ends the workers of a command that is gone; the same command replays their directories."""
    documents = ready(site)
    flags = ("--engine", "ray", "--ray-address", three.address)
    with site.start(*flags) as running:
        workers = working(site, 3)
        running.send(signal.SIGKILL)
        running.ended()
    until(lambda: not any(psutil.pid_exists(worker) for worker in workers))
    assert site.results.count_documents({}) < len(documents)
    with site.start(*flags) as running:
        assert running.ended(120).code == 0
    check_results(site, documents)
    check_statuses(site, documents)
    check_calls(site, documents, repeated=3 * CONCURRENCY)


@pytest.mark.thorough
def test_head_restarts_with_its_state_on_disk(site: Site) -> None:
    """With RAY_gcs_storage=rocksdb the workers go on while the head is away."""
    with (
        tempfile.TemporaryDirectory(prefix="gcs") as storage,
        ray_nodes(3, RAY_gcs_storage="rocksdb", RAY_gcs_storage_path=storage) as nodes,
    ):
        documents = ready(site)
        with site.start("--engine", "ray", "--ray-address", nodes.address) as running:
            working(site, 3)
            nodes.do("kill_gcs")
            before = site.results.count_documents({})
            until(lambda: site.results.count_documents({}) > before + 30)
            nodes.do("start_gcs")
            ended = running.ended(120)
        assert ended.code == 0, ended.err
        check_once(site, documents, deaths=0)


@pytest.mark.thorough
def test_head_is_lost(site: Site) -> None:
    """Without its state on disk the cluster is lost; the same command on a new one finishes the work."""
    documents = ready(site)
    soon = {"RAY_gcs_rpc_server_reconnect_timeout_s": "5"}
    with ray_nodes(3, **soon) as nodes:
        with site.start("--engine", "ray", "--ray-address", nodes.address, **soon) as running:
            working(site, 3)
            for number in range(4):
                nodes.do("kill", number)
            ended = running.ended(120)
        assert ended.code != 0, ended.err
    assert site.results.count_documents({}) < len(documents)
    with ray_nodes(3) as nodes, site.start("--engine", "ray", "--ray-address", nodes.address) as running:
        assert running.ended(120).code == 0
    check_once(site, documents, deaths=3)

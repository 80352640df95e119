"""``--metrics-port``: the metrics of a running worker over HTTP."""

from __future__ import annotations

import signal
import socket
import urllib.request

from prometheus_client.parser import text_string_to_metric_families

from error_handler import ExitCode
from tests.service.service_process import free_port
from tests.worker.site import Site, WorkerProcess, filled, until


def scraped(port: int) -> dict[str, float]:
    """Return the series by name and label values, the worker's left out."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        families = list(text_string_to_metric_families(answer.read().decode()))
    found = {}
    for family in families:
        for sample in family.samples:
            assert sample.labels.pop("worker") == "batch_files"
            found[" ".join([sample.name, *sample.labels.values()])] = sample.value
    return found


def answers(worker: WorkerProcess, port: int) -> bool:
    """Return whether the metrics are served; fail if the worker has ended."""
    assert worker.process.poll() is None, worker.err_so_far()
    try:
        scraped(port)
    except OSError:
        return False
    return True


def test_metrics_are_served_between_the_passes_of_a_continuous_run(site: Site) -> None:
    """The state of the last pass, equal to metrics.prom, which the port implies."""
    filled(site, 5)
    port = free_port()
    with site.start("--mode", "continuous", "--logs", METRICS_PORT=str(port)) as worker:
        until(lambda: answers(worker, port) and scraped(port).get("triad_run_status completed"))
        found = scraped(port)
        assert found["triad_run_documents successful"] == 5
        assert found["triad_run_started_timestamp_seconds"] <= found["triad_last_success_timestamp_seconds"]
        assert found["triad_last_success_timestamp_seconds"] <= found["triad_last_completed_timestamp_seconds"]
        assert found["triad_run_tokens_total prompt"] > 100
        assert found["triad_run_tokens_total reply"] > 5
        assert found["triad_run_breaker_open"] == 0
        assert found["triad_run_queue_wait_seconds"] >= 0
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
            assert answer.read() == (site.directory / "progress/metrics.prom").read_bytes()
        worker.send(signal.SIGTERM)
        assert worker.ended().code == ExitCode.INTERRUPTED
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", port)) != 0


def test_port_in_use_is_one_sentence_and_exit_code_2(site: Site) -> None:
    """Before anything is changed."""
    filled(site, 1)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        ended = site.run("--metrics-port", str(port))
    assert ended.code == ExitCode.CONFIGURATION
    assert ended.err.count("\n") == 1
    assert f"Cannot serve metrics at 127.0.0.1:{port} (Address already in use)" in ended.err
    assert "--metrics-port" in ended.err
    assert site.results.count_documents({}) == 0
    assert site.files() == []

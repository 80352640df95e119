"""The state of a run as Prometheus series: for ``metrics.prom`` and, with ``--metrics-port``, over HTTP."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from error_handler import ConfigurationError, Reason
from worker.checkpoint import RunStats
from worker.model_use import ModelUse

STATUSES = ("running", "completed", "interrupted", "failed")
OUTCOMES = ("successful", "failed", "skipped", "already_done", "leased_elsewhere")


class RunMetrics:
    """The series of one worker; the label ``worker`` is *worker*. Values of labels are closed lists.

    ``set`` replaces all of them at once, so that a scrape from another thread sees one state.
    """

    def __init__(self, worker: str, model: ModelUse) -> None:
        self._worker = worker
        self._model = model
        self._families: list[Metric] = []
        self.registry = CollectorRegistry()
        self.registry.register(self)

    def collect(self) -> list[Metric]:
        """Return the last state; a collector of prometheus_client."""
        return self._families

    def set(
        self, status: str, stats: RunStats, in_flight: int, limit: int | None, others: Mapping[str, tuple[str, float]]
    ) -> None:
        """Replace the state; see ``Reporter.update``. *others* maps further names to a documentation and a value."""
        reasons = {str(reason): stats.reasons.get(reason, 0) for reason in Reason}
        outcomes = {name: getattr(stats, name) for name in OUTCOMES}
        states = {name: name == status for name in STATUSES}
        self._families = [
            self._gauges("triad_run_documents", "Documents of this run by outcome", "outcome", outcomes),
            self._gauge("triad_run_documents_expected", "Documents that this run has to process", stats.expected),
            self._gauges("triad_run_failures", "Documents of this run without a result, by reason", "reason", reasons),
            self._gauges("triad_run_status", "1 for the current status of the run", "status", states),
            self._gauge("triad_run_calls_in_flight", "Documents that wait for the model", in_flight),
            self._tokens(),
            *(self._gauge(name, documentation, value) for name, (documentation, value) in others.items()),
        ]
        if limit is not None:
            documentation = "Limit of concurrent calls, set by auto or by the lease of the service"
            self._families.append(self._gauge("triad_run_concurrency_limit", documentation, limit))
        if (state := self._model.breaker_state) is not None:
            documentation = "1 while the model server is away and calls wait"
            self._families.append(self._gauge("triad_run_breaker_open", documentation, state == "open"))
        if (wait_s := self._model.queue_wait_s) is not None:
            documentation = "Mean time of the last answers in the queue of the model server"
            self._families.append(self._gauge("triad_run_queue_wait_seconds", documentation, wait_s))
        if servers := self._model.servers:
            self._families += self._of_servers(servers)

    def render(self) -> bytes:
        """Return all series in text format 0.0.4."""
        return generate_latest(self.registry)

    def _tokens(self) -> CounterMetricFamily:
        labels = ["worker", "kind"]
        family = CounterMetricFamily("triad_run_tokens", "Tokens counted by the model server", labels=labels)
        for kind, count in self._model.tokens.items():
            family.add_metric([self._worker, kind], count)
        return family

    def _of_servers(self, servers: list[dict[str, Any]]) -> list[Metric]:
        labels = ["worker", "server"]
        families: dict[str, GaugeMetricFamily | CounterMetricFamily] = {
            "answered": CounterMetricFamily("triad_run_server_answers", "Conversations by model server", labels=labels),
            "in_flight": GaugeMetricFamily("triad_run_server_calls_in_flight", "Calls in flight", labels=labels),
            "limit": GaugeMetricFamily("triad_run_server_concurrency_limit", "Most calls in flight", labels=labels),
            "seconds": GaugeMetricFamily("triad_run_server_seconds", "Mean time of a conversation", labels=labels),
            "is_ready": GaugeMetricFamily(
                "triad_run_server_ready", "1 while the model server takes calls", labels=labels
            ),
        }
        for state in servers:
            values = {**state, "seconds": state["seconds"] or 0.0}
            for name, family in families.items():
                family.add_metric([self._worker, state["server"]], values[name])
        return list(families.values())

    def _gauge(self, name: str, documentation: str, value: float) -> GaugeMetricFamily:
        family = GaugeMetricFamily(name, documentation, labels=["worker"])
        family.add_metric([self._worker], value)
        return family

    def _gauges(self, name: str, documentation: str, label: str, values: Mapping[str, float]) -> GaugeMetricFamily:
        family = GaugeMetricFamily(name, documentation, labels=["worker", label])
        for value, number in values.items():
            family.add_metric([self._worker, value], number)
        return family


@contextmanager
def serve_metrics(registry: CollectorRegistry, address: str, port: int) -> Iterator[None]:
    """Answer ``GET /metrics`` at *address* and *port* from a thread until the end of the block.

    Raises:
        ConfigurationError: The address cannot be used, for example because another program uses the port.
    """
    try:
        server, thread = start_http_server(port, address, registry)
    except OSError as exc:
        raise ConfigurationError(
            f"Cannot serve metrics at {address}:{port} ({exc.strerror}). Choose another --metrics-port (METRICS_PORT) "
            "or METRICS_ADDRESS, or stop the program that uses the port; each worker needs a port of its own."
        ) from exc
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()

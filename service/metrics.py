"""Prometheus metrics of the service. Labels are closed lists; they never contain text from a request."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4

from error_handler import Reason

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0)


class ServiceMetrics:
    """The metrics of one service; docs/service.md lists them."""

    def __init__(self) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]  # they would double the number of series
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        counter = partial(Counter, registry=self._registry)
        seconds = partial(Histogram, buckets=SECONDS, registry=self._registry)
        self.requests = counter("triad_http_requests", "Requests answered", ("route", "status"))
        self.latency = seconds(
            "triad_http_request_duration_seconds", "From the request head to the end of the answer", ("route",)
        )
        self.in_flight = Gauge("triad_http_requests_in_flight", "Requests in progress", registry=self._registry)
        self.model_time = seconds("triad_model_duration_seconds", "Time with the model, repairs included")
        self.queue_time = seconds("triad_queue_duration_seconds", "Wait for a slot at the model")
        self.search_time = seconds("triad_search_duration_seconds", "Embedding and searching for /similar")
        self.tokens = counter("triad_tokens", "Tokens counted by the model server", ("kind",))
        self.rejections = counter("triad_rejections", "Requests rejected or failed", ("reason",))
        self.model_failures = counter(
            "triad_model_failures", "Classifications that failed after a call to the model", ("reason",)
        )
        self.job_conversations = counter("triad_job_conversations", "Conversations of jobs that are done", ("outcome",))
        self.webhooks = counter("triad_webhooks", "Webhooks that are done", ("outcome",))
        for outcome in ("succeeded", "failed"):
            self.job_conversations.labels(outcome)
        for outcome in ("delivered", "failed"):
            self.webhooks.labels(outcome)
        for reason in Reason:
            self.model_failures.labels(str(reason))
        for kind in ("prompt", "reply"):
            self.tokens.labels(kind)

    def watch(self, name: str, documentation: str, read: Callable[[], float]) -> None:
        """Add a gauge that calls *read* at each scrape."""
        Gauge(name, documentation, registry=self._registry).set_function(read)

    def watch_servers(self, states: Callable[[], list[dict[str, Any]]]) -> None:
        """Add gauges of each of several model servers; *states* is called at each scrape."""

        def read(place: int, name: str) -> float:
            return float(states()[place][name])

        gauge = partial(Gauge, labelnames=("server",), registry=self._registry)
        calls = gauge("triad_server_calls_in_flight", "Model calls in flight")
        ready = gauge("triad_server_ready", "1 while the model server takes calls")
        for place, server in enumerate(states()):
            calls.labels(server["server"]).set_function(partial(read, place, "in_flight"))
            ready.labels(server["server"]).set_function(partial(read, place, "is_ready"))

    def render(self) -> bytes:
        """Return all metrics in text format 0.0.4."""
        return generate_latest(self._registry)

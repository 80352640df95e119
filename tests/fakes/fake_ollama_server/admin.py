"""The routes under ``/__fake__/``: knobs, statistics, records, and waiting for a gauge."""

import asyncio
import ctypes
import os
import signal
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import orjson

from .records import Totals
from .replies import JSON_TYPE
from .wire import Exchange

if TYPE_CHECKING:
    from .server import FakeServer

_PR_SET_PDEATHSIG = 1


class Admin:
    """Answers the class ``FakeOllama`` in the test process."""

    def __init__(self, server: "FakeServer") -> None:
        self._server = server
        self.waiting: dict[Exchange, Callable[[], bool]] = {}
        self._timers: dict[Exchange, asyncio.TimerHandle] = {}
        self._routes: dict[str, Callable[[Exchange], None]] = {
            "/__fake__/configure": self._configure,
            "/__fake__/stats": self._stats,
            "/__fake__/requests": self._requests,
            "/__fake__/reset": self._reset,
            "/__fake__/wait": self._wait,
            "/__fake__/die_with_parent": self._die_with_parent,
        }

    def handle(self, exchange: Exchange) -> None:
        """Answer one admin request; 400 with the reason for a mistake in it."""
        route = self._routes.get(exchange.path)
        if route is None:
            self._send(exchange, 404, {"error": f"no such admin route: {exchange.path}"})
            return
        try:
            route(exchange)
        except (ValueError, TypeError, KeyError, AttributeError) as exc:
            self._send(exchange, 400, {"error": f"{type(exc).__name__}: {exc}"})

    def gauges(self) -> dict[str, Any]:
        """Numbers that change while requests run; `wait` looks at these."""
        server, scheduler, totals = self._server, self._server.scheduler, self._server.totals
        return {
            "in_flight": totals.in_flight,
            "running": scheduler.running,
            "queued": scheduler.queued,
            "pending": len(scheduler.pending),
            "loading": int(scheduler.loading),
            "loaded_models": len(scheduler.loaded),
            "connections": len(server.connections),
            "chat_requests": totals.chat_requests,
            "load_requests": totals.load_requests,
            "embed_requests": totals.embed_requests,
            "answered": totals.answered,
            "failed": totals.failed,
            "client_disconnects": totals.client_disconnects,
            "loads": scheduler.loads,
            "reloads": scheduler.reloads,
            "load_aborts": scheduler.load_aborts,
            "unloads": scheduler.unloads,
            "rejected": scheduler.rejected,
        }

    def check_waiting(self) -> None:
        """Answer those whose condition now holds."""
        for exchange, holds in list(self.waiting.items()):
            if holds():
                self._end_wait(exchange, reached=True)

    def _send(self, exchange: Exchange, status: int, body: object) -> None:
        exchange.send(status, orjson.dumps(body, option=orjson.OPT_NON_STR_KEYS), JSON_TYPE)

    def _configure(self, exchange: Exchange) -> None:
        server = self._server
        server.configure(server.knobs.updated(orjson.loads(exchange.body)))
        self._send(exchange, 200, {"ok": True})

    def _reset(self, exchange: Exchange) -> None:
        """Back to the knobs of the start, nothing loaded, all counters at zero but for what is in flight."""
        server = self._server
        in_flight = server.totals.in_flight
        server.totals = Totals()
        server.totals.in_flight = server.totals.max_in_flight = in_flight
        server.bytes_in = 0
        server.configure(server.started_knobs)
        for name in list(server.scheduler.loaded):
            server.scheduler.expire(name)
        server.scheduler.reset_counters()
        self._send(exchange, 200, {"ok": True})

    def _stats(self, exchange: Exchange) -> None:
        server, scheduler, totals = self._server, self._server.scheduler, self._server.totals
        stats = self.gauges() | {
            "embed_inputs": totals.embed_inputs,
            "cloud_requests": totals.cloud_requests,
            "max_in_flight": totals.max_in_flight,
            "max_running": scheduler.max_running,
            "max_queued": scheduler.max_queued,
            "bytes_in": server.bytes_in,
            "simulated_s_sum": totals.simulated_s_sum,
            "simulated_s_max": totals.simulated_s_max,
            "busy_slot_s": scheduler.busy_ns / 1e9,
            "statuses": totals.statuses,
            "faults_served": server.plan.served,
            "internal_errors": server.internal_errors,
            "cpu_s": time.process_time(),
            "pid": os.getpid(),
        }
        if "brief" not in exchange.target:
            stats["calls_by_sha"] = {digest.hex(): calls for digest, calls in totals.calls_by_digest.items()}
        self._send(exchange, 200, stats)

    def _die_with_parent(self, exchange: Exchange) -> None:
        """Have the kernel kill this process with its parent: a stopped process cannot notice by itself."""
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        self._send(exchange, 200, {"ok": True})

    def _requests(self, exchange: Exchange) -> None:
        self._send(exchange, 200, [record.as_dict() for record in self._server.totals.records])

    def _wait(self, exchange: Exchange) -> None:
        """``{"gauge", "at_least"? | "equals"?, "timeout_s"}``: answered when it holds, or when time is up."""
        wanted = orjson.loads(exchange.body)
        gauge = wanted["gauge"]
        if gauge not in self.gauges():
            raise ValueError(f"unknown gauge {gauge!r}; use one of {', '.join(self.gauges())}")

        def holds() -> bool:
            value = self.gauges()[gauge]
            return bool(value == wanted["equals"] if "equals" in wanted else value >= wanted["at_least"])

        self.waiting[exchange] = holds
        self._timers[exchange] = self._server.loop.call_later(wanted["timeout_s"], self._end_wait, exchange)
        self.check_waiting()

    def _end_wait(self, exchange: Exchange, *, reached: bool = False) -> None:
        del self.waiting[exchange]
        self._timers.pop(exchange).cancel()
        self._send(exchange, 200, {"reached": reached, "gauges": self.gauges()})

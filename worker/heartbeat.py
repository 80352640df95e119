"""The heartbeat of a worker: publishes its state in MongoDB in the background, and obeys the orders of the dashboard."""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import socket
from typing import Any

from config import Settings
from domain.conversation import PROCESSOR_VERSION
from error_handler import ConfigurationError, StoreError, StoreForbiddenError
from storage.heartbeats import BEAT_S, Order, beat, collection_name, end, forget, heartbeats, tidy
from worker.checkpoint import RunStats
from worker.model_use import ModelUse
from worker.progress import Rate

logger = logging.getLogger(__name__)

COUNTS = ("processed", "expected", "successful", "failed", "skipped", "already_done", "leased_elsewhere", "copied")


class Heartbeat:
    """A Reporter that writes its state each BEAT_S from ``start`` to ``close``; a failure never touches the run.

    *stop* is set by the order to stop. ``go`` is cleared while the worker is paused: it takes no new documents then.
    """

    def __init__(
        self,
        database: Any,
        settings: Settings,
        worker: str,
        stop: asyncio.Event,
        model: ModelUse,
    ) -> None:
        results = settings.results_collection
        self._mode = settings.mode
        self.id = secrets.token_hex(8)
        self.go = asyncio.Event()
        self.go.set()
        self._collection = heartbeats(database, results)
        self._name = collection_name(results)
        self._worker = worker
        self._stop = stop
        self._most_concurrent = settings.most_in_flight
        self._rate = Rate()
        self._status = "running"
        self._run: dict[str, Any] = {}
        self._model = model
        self._obeyed: Order | None = None
        self._task: asyncio.Task[None] | None = None
        self._is_told = False

    def update(self, job_id: str, status: str, stats: RunStats, in_flight: int, limit: int | None = None) -> None:
        """Keep the state of the run for the next write; a pass without documents does not replace one with documents."""
        self._rate.add(stats.processed)
        left = self._rate.time_left(stats)
        self._status = status
        if self._run and not stats.processed and self._run["job_id"] != job_id:
            return
        self._run = {
            "job_id": job_id,
            "counts": {name: getattr(stats, name) for name in COUNTS},
            "reasons": {str(reason): count for reason, count in stats.reasons.items()},
            "rate": round(self._rate.per_second, 2),
            "eta_s": None if left is None else round(left.total_seconds()),
            "in_flight": in_flight,
            "limit": limit or self._most_concurrent,
        }

    def start(self) -> None:
        """Begin to write, in a task."""
        self._task = asyncio.create_task(self._beat_regularly(), name="heartbeat")

    async def close(self) -> None:
        """Write the end. The document of a worker that found no work is removed: it would only fill the list of runs."""
        if self._task is None or self._task.done():  # it has no right to write
            return
        self._task.cancel()
        await asyncio.wait([self._task])
        try:
            if self._status == "completed" and not self._run["counts"]["processed"]:
                await forget(self._collection, self.id)
            else:
                status = "interrupted" if self._status == "running" else self._status
                await end(self._collection, self.id, {**self._state(), "status": status})
        except (StoreError, ConfigurationError) as exc:
            self._warn(exc)

    async def _beat_regularly(self) -> None:
        is_tidy = False
        while True:
            try:
                self._obey(await beat(self._collection, self.id, self._state()))
                if not is_tidy:
                    await tidy(self._collection, self.id, self._worker)
                is_tidy, self._is_told = True, False
            except (StoreError, ConfigurationError) as exc:
                self._warn(exc)
                if isinstance(exc, StoreForbiddenError):  # it stays so
                    return
            await asyncio.sleep(BEAT_S)

    def _obey(self, order: Order | None) -> None:
        if order is None or order == self._obeyed:
            return
        self._obeyed = order
        logger.warning("order of the dashboard: %s, by %s", order.action, order.by)
        if order.action == "stop":
            self._stop.set()
        elif order.action == "pause":
            self.go.clear()
        else:
            self.go.set()

    def _state(self) -> dict[str, Any]:
        status = self._status
        if self._stop.is_set():
            status = "stopping"
        elif not self.go.is_set():
            status = "paused"
        elif status != "running":
            status = "waiting"  # for the next pass
        return {
            "worker": self._worker,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "version": PROCESSOR_VERSION,
            "status": status,
            "mode": self._mode,
            "breaker": self._model.breaker_state,
            "queue_wait_s": self._model.queue_wait_s,
            "tokens": dict(self._model.tokens),
            "servers": self._model.servers,
            **self._run,
        }

    def _warn(self, exc: Exception) -> None:
        if not self._is_told:
            logger.warning(
                "no heartbeat for the dashboard: %s (right on %s: docs/operations.md; switch: WORKER_HEARTBEAT)",
                exc,
                self._name,
            )
        self._is_told = True

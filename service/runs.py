"""The state of all workers as the page shows it, and the orders that it gives them."""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import dataclass
from typing import Any

from error_handler import ConfigurationError, StoreError
from storage.heartbeats import LOST_AFTER_S, Action, Order, give_order, heartbeats, read_all

logger = logging.getLogger(__name__)

FRESH_S = 1.0  # all open pages share one read of MongoDB in this time
CARDS, ROWS = 20, 20  # the most workers and ended runs on the page
AWAY = "MongoDB does not answer or refuses the operation; see the log of the service."


@dataclass(frozen=True, slots=True)
class RunsView:
    """What the tab shows: *active* workers (lost ones included), *ended* runs, and how many of each are not shown.

    *problem* is a sentence if MongoDB could not be read; the rest is then that of the last time.
    """

    active: list[dict[str, Any]]
    ended: list[dict[str, Any]]
    more_active: int = 0
    problem: str = ""


class Runs:
    """Reads the heartbeats of the workers that write *results_collection*; only if somebody asks, at most each FRESH_S."""

    def __init__(self, database: Any, results_collection: str) -> None:
        self._heartbeats = heartbeats(database, results_collection)
        self._view = RunsView([], [])
        self._read_at = float("-inf")
        self._lock = asyncio.Lock()

    async def view(self) -> RunsView:
        """Return the present state; it is never an error."""
        async with self._lock:
            if time.monotonic() - self._read_at < FRESH_S:
                return self._view
            try:
                self._view = view_of(await read_all(self._heartbeats))
            except (StoreError, ConfigurationError) as exc:
                if not self._view.problem:
                    logger.warning("dashboard: %s", exc)
                self._view = RunsView(self._view.active, self._view.ended, self._view.more_active, AWAY)
            self._read_at = time.monotonic()
            return self._view

    async def order(self, heartbeat_id: str, action: Action, caller: str) -> bool:
        """Give an order to a worker; return whether there is one that can obey.

        Raises:
            StoreError: MongoDB does not store it.
        """
        is_given = await give_order(self._heartbeats, heartbeat_id, Order(action, caller))
        self._read_at = float("-inf")  # the next page shows it
        if is_given:
            logger.info("dashboard: %s ordered worker %s to %s", caller, heartbeat_id, action)
        return is_given


def view_of(found: list[dict[str, Any]]) -> RunsView:
    """Return the view of the documents *found*."""
    active = [_shown(one) for one in found if one.get("ended_at") is None]
    ended = [_shown(one) for one in found if one.get("ended_at") is not None]
    return RunsView(active[:CARDS], ended[:ROWS], max(0, len(active) - CARDS))


def _shown(document: dict[str, Any]) -> dict[str, Any]:
    """Return *document* with its order, and the state that a person should see."""
    silent_s = document.get("silent_s") or 0.0
    state = document.get("status", "running")
    if document.get("ended_at") is None and silent_s > LOST_AFTER_S:
        state = "lost"
    orders = document.get("orders") or []
    order = orders[-1] if orders else None
    expected = {"host": "", "worker": "", "version": "", "ran_s": None, "eta_s": None, "queue_wait_s": None}
    return {**expected, **document, "state": state, "silent_s": silent_s, "order": order}


def duration(seconds: float | None) -> str:
    """Return *seconds* for people: ``45 s``, ``12 min``, ``3 h 5 min``, ``2 d 4 h``; a dash for None."""
    if seconds is None:
        return "–"
    if seconds < 60:
        return f"{max(0, seconds):.0f} s"
    minutes = int(seconds // 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours < 24 else f"{hours // 24} d {hours % 24} h"


def age(seconds: float) -> str:
    """Return how long ago something was."""
    return f"{duration(seconds)} ago"

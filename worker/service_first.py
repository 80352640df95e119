"""The worker's side of the service's lease: fewer model calls while the service has requests on the same server."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

from error_handler import ConfigurationError, StoreError
from storage.service_lease import LEASE_S, lease_renewal

logger = logging.getLogger(__name__)

POLL_S = 0.25
LOG_EVERY_S = 60.0
_UNREAD = object()


class ServiceFirst:
    """Whether the service holds a lease on the model server, and how many calls the worker may have in flight meanwhile.

    ``watch`` reads the lease in the background. While MongoDB does not answer, no renewal is seen, so the lease ends.
    """

    def __init__(
        self, database: Any, servers: Sequence[str], floor: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """*servers* have the ``server_name`` of each model server; *floor*, from 1, is the limit while one lease is held."""
        self._database = database
        self._servers = servers
        self._floor = floor
        self._clock = clock
        self._seen: Any = _UNREAD  # the last renewal; the first one that is read may be old
        self._held_until = -math.inf
        self._held_since: float | None = None
        self._logged_at = -math.inf
        self._held_s = 0.0
        self._is_told = False

    @property
    def limit(self) -> int | None:
        """The calls that may be in flight now; None while the lease is not held."""
        return None if self._held_since is None else self._floor

    @property
    def held_s(self) -> float:
        """The seconds for which the lease has been held."""
        return self._held_s + (0.0 if self._held_since is None else self._clock() - self._held_since)

    async def watch(self, on_change: Callable[[int | None], None]) -> None:
        """Read the lease each POLL_S for ever; call *on_change* with each new ``limit``."""
        while True:
            before = self.limit
            try:
                self.note(await lease_renewal(self._database, *self._servers))
            except (StoreError, ConfigurationError) as exc:
                self.note(self._seen)
                if not self._is_told:
                    logger.warning(
                        "the run goes on without the lease of the service (SERVICE_LEASE=false ends this): %s", exc
                    )
                self._is_told = True
            if self.limit != before:
                on_change(self.limit)
            await asyncio.sleep(POLL_S)

    def note(self, renewal: Any) -> None:
        """Compare *renewal*, the value that was read now, with the last one."""
        now = self._clock()
        if self._seen is not _UNREAD and renewal != self._seen:
            self._held_until = now + LEASE_S
        self._seen = renewal
        is_held, was_held = now < self._held_until, self._held_since is not None
        if is_held and not was_held:
            self._held_since = now
            self._log(now)
        elif was_held and not is_held:
            self._held_s, self._held_since = self.held_s, None

    def _log(self, now: float) -> None:
        if now - self._logged_at >= LOG_EVERY_S:
            self._logged_at = now
            logger.info("the service has requests: at most %d model calls in flight until it has none", self._floor)

"""Who may ask what: host names, API keys, rates, and whether the service is still open."""

from __future__ import annotations

import math
import re
from typing import Any

from config.service_settings import Exposure, ServiceSettings
from error_handler import RequestError
from utils.api_keys import Headers, KeyRing, presented_key
from utils.rate_limit import RateLimiter
from utils.service_errors import NOT_FOUND, STOPPING, TOO_MANY, UNAUTHENTICATED, WRONG_HOST

CLASSIFY, SIMILAR, HEALTH, READY, METRICS, DOCS, OPENAPI = (
    "/classify",
    "/similar",
    "/health",
    "/ready",
    "/metrics",
    "/docs",
    "/openapi.json",
)
ASKED = (CLASSIFY, SIMILAR)  # what people ask for; the other routes are for operators
ANONYMOUS = "anonymous"
WRONG_KEYS_PER_MINUTE = 60  # of one address; guessing 16 characters this way has no end
STOPPING_RETRY_AFTER_S = 5

_THIS_MACHINE = re.compile(rb"(localhost|127(\.\d{1,3}){3}|\[::1\])(:\d{1,5})?", re.IGNORECASE)


def route_of(path: str) -> str:
    """Return the route that *path* belongs to: one of a closed list, fit for metrics and logs."""
    if path.startswith("/docs/"):
        return DOCS
    return path if path in (*ASKED, HEALTH, READY, METRICS, DOCS, OPENAPI) else "other"


class ServiceGate:
    """Decides about a request by its head alone."""

    def __init__(self, settings: ServiceSettings) -> None:
        self._keys = KeyRing(settings.named_keys)
        self._is_local_only = not self._keys and not settings.allow_unauthenticated
        self._exposure: dict[str, Exposure] = {
            CLASSIFY: "key",
            SIMILAR: "key",
            DOCS: settings.expose_docs,
            OPENAPI: settings.expose_docs,
            METRICS: settings.expose_metrics,
        }
        self._rates = RateLimiter(settings.rate_limit_per_minute)
        self._wrong_keys = RateLimiter(WRONG_KEYS_PER_MINUTE)
        self.stopping = False

    def admit(self, route: str, headers: Headers, client: Any) -> str:
        """Return the caller's name: that of the key, else ANONYMOUS.

        Args:
            route: From ``route_of``.
            headers: Names in lower case.
            client: (address, port), or None where the server does not know.

        Raises:
            RequestError: WRONG_HOST, NOT_FOUND, UNAUTHENTICATED, TOO_MANY or STOPPING.
        """
        if self._is_local_only and not _THIS_MACHINE.fullmatch(headers.get(b"host", b"localhost")):
            raise RequestError(WRONG_HOST)  # a page in a browser here that calls itself by another name
        exposure = self._exposure.get(route, "public")
        if exposure == "off":
            raise RequestError(NOT_FOUND)
        address = str(client[0]) if client else ""
        caller = ANONYMOUS
        if self._keys and exposure == "key":
            caller = self._require_key(headers, address)
        if route in ASKED:
            self._require_pace(self._rates, caller if self._keys else address)
            if self.stopping:
                raise RequestError(STOPPING, retry_after_s=STOPPING_RETRY_AFTER_S)
        return caller

    def _require_key(self, headers: Headers, address: str) -> str:
        caller = self._keys.caller(headers)
        if caller is None:
            if presented_key(headers):
                self._require_pace(self._wrong_keys, address)
            raise RequestError(UNAUTHENTICATED)
        return caller

    def _require_pace(self, limiter: RateLimiter, caller: str) -> None:
        wait_s = limiter.take(caller)
        if wait_s:
            raise RequestError(TOO_MANY, retry_after_s=max(1, math.ceil(wait_s)))

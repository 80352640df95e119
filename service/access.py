"""Access control by the head of a request: host names, API keys, rate limits, shutdown."""

from __future__ import annotations

import base64
import binascii
import contextlib
import hashlib
import hmac
import math
import re
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from config.service_settings import Exposure, ServiceSettings
from error_handler import RequestError
from service.errors import NOT_FOUND, STOPPING, TOO_MANY, UNAUTHENTICATED, WRONG_HOST, unavailable

CLASSIFY, SIMILAR, HEALTH, READY = "/classify", "/similar", "/health", "/ready"
BATCH, JOBS, LABELS = "/classify/batch", "/jobs", "/labels"
METRICS, DOCS, OPENAPI = "/metrics", "/docs", "/openapi.json"
REVIEW, REVIEW_DECISIONS, REVIEW_SKIP = "/review", "/review/decisions", "/review/skip"
DASHBOARD = "/dashboard"
DASHBOARD_EVENTS = f"{DASHBOARD}/events"  # a stream: its duration says nothing about the page
ASKED = (CLASSIFY, BATCH, JOBS, SIMILAR)  # for callers, within their rate limit
OF_MANY = (BATCH, JOBS)  # conversations in one body
WITH_BODY = (*ASKED, REVIEW_DECISIONS, REVIEW_SKIP)  # if the method is POST
ANONYMOUS = "anonymous"
WRONG_KEYS_PER_MINUTE = 60  # per address; a right key always passes, so the length of keys is what keeps guesses out

_THIS_MACHINE = re.compile(rb"(localhost|127(\.\d{1,3}){3}|\[::1\])(:\d{1,5})?", re.IGNORECASE)


def route_of(path: str) -> str:
    """Return the route of *path*, or ``other``: a closed list, safe for metrics and logs."""
    if not path.isprintable():  # Starlette's patterns end in $, which also matches before a line end: /metrics%0A
        return "other"
    if path == DASHBOARD_EVENTS:
        return path
    for page in (DOCS, JOBS, REVIEW, DASHBOARD):
        if path.startswith(f"{page}/"):
            return page
    return path if path in (*ASKED, LABELS, HEALTH, READY, METRICS, DOCS, OPENAPI, REVIEW, DASHBOARD) else "other"


class ServiceGate:
    """Admits or rejects a request by its head."""

    def __init__(self, settings: ServiceSettings) -> None:
        self._keys = KeyRing(settings.named_keys)
        self._is_local_only = not self._keys and not settings.allow_unauthenticated
        self._exposure: dict[str, Exposure] = {
            **dict.fromkeys((HEALTH, READY), "public"),
            **dict.fromkeys((CLASSIFY, BATCH, LABELS), "key"),
            JOBS: settings.expose_jobs,
            SIMILAR: "key",
            DOCS: settings.expose_docs,
            OPENAPI: settings.expose_docs,
            METRICS: settings.expose_metrics,
            REVIEW: settings.expose_review,
            DASHBOARD: settings.expose_dashboard,
            DASHBOARD_EVENTS: settings.expose_dashboard,
        }
        self._rates = RateLimiter(settings.rate_limit_per_minute)
        self._wrong_keys = RateLimiter(WRONG_KEYS_PER_MINUTE)
        self.stopping = False

    def admit(self, route: str, headers: Headers, client: Any) -> str:
        """Return the name of the caller's key, or ANONYMOUS.

        Args:
            route: From ``route_of``.
            headers: Names in lower case.
            client: (address, port), or None if the server does not know.

        Raises:
            RequestError: WRONG_HOST, NOT_FOUND, UNAUTHENTICATED, TOO_MANY or STOPPING.
        """
        if self._is_local_only and not _THIS_MACHINE.fullmatch(headers.get(b"host", b"localhost")):
            raise RequestError(WRONG_HOST)  # DNS rebinding: a web page reaches this machine under its own host name
        exposure = self._exposure.get(route, "off")
        if exposure == "off":
            raise RequestError(NOT_FOUND)
        address = str(client[0]) if client else ""
        caller = ANONYMOUS
        if self._keys and exposure == "key":
            known = self._keys.caller(headers)
            if known is None:
                if presented_key(headers):
                    self._wrong_keys.require(address)
                raise RequestError(UNAUTHENTICATED)
            caller = known
        if route in ASKED:
            self._rates.require(self._rated(caller, client))
            if self.stopping:
                raise unavailable(STOPPING)
        return caller

    def charge(self, caller: str, client: Any, requests: int) -> None:
        """Count *requests* more of *caller* at *client*; see ``admit``. They are not refused, but those that follow are."""
        self._rates.charge(self._rated(caller, client), requests)

    def _rated(self, caller: str, client: Any) -> str:
        """Return whose rate counts: that of the key, or of the address if there are no keys."""
        return caller if self._keys else str(client[0]) if client else ""


Headers = Mapping[bytes, bytes]


class KeyRing:
    """The valid API keys, as (name, key) pairs; empty if no key is needed."""

    def __init__(self, named_keys: Iterable[tuple[str, str]]) -> None:
        self._digests = [(name, hashlib.sha256(key.encode()).digest()) for name, key in named_keys]

    def __bool__(self) -> bool:
        return bool(self._digests)

    def caller(self, headers: Headers) -> str | None:
        """Return the name of the key in *headers* (names in lower case), or None if it is invalid.

        Compares with every key, so that the time does not depend on which one matches.
        """
        presented = hashlib.sha256(presented_key(headers)).digest()
        found = None
        for name, digest in self._digests:
            if hmac.compare_digest(presented, digest):
                found = name
        return found


def presented_key(headers: Headers) -> bytes:
    """Return the key in ``X-API-Key`` or ``Authorization`` (Bearer, or the password of Basic); empty without one.

    Basic is for browsers and scrapers, which cannot send other headers.
    """
    if b"x-api-key" in headers:
        return headers[b"x-api-key"]
    scheme, _, credentials = headers.get(b"authorization", b"").partition(b" ")
    if scheme.lower() == b"bearer":
        return credentials.strip()
    if scheme.lower() == b"basic":
        with contextlib.suppress(binascii.Error):
            return base64.b64decode(credentials.strip(), validate=True).partition(b":")[2]
    return b""


MAX_CALLERS = 10_000


class RateLimiter:
    """Token bucket for each caller: *per_minute* tokens, refilled within a minute; 0 means no limit.

    Remembers MAX_CALLERS callers and forgets the least recent one, which can only give it tokens back.
    *clock* returns seconds.
    """

    def __init__(self, per_minute: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._capacity = float(per_minute)
        self._per_s = per_minute / 60
        self._clock = clock
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()  # caller -> tokens, at

    def take(self, caller: str) -> float:
        """Take a token of *caller* and return 0.0; without one, return the seconds until the next."""
        if not self._capacity:
            return 0.0
        now = self._clock()
        tokens, at = self._buckets.pop(caller, (self._capacity, now))
        tokens = min(self._capacity, tokens + (now - at) * self._per_s)
        allowed = tokens >= 1.0
        self._buckets[caller] = (tokens - 1.0 if allowed else tokens, now)
        if len(self._buckets) > MAX_CALLERS:
            self._buckets.popitem(last=False)
        return 0.0 if allowed else (1.0 - tokens) / self._per_s

    def charge(self, caller: str, tokens: int) -> None:
        """Take *tokens* of *caller*, also those that it does not have yet."""
        if self._capacity:
            held, at = self._buckets.pop(caller, (self._capacity, self._clock()))
            self._buckets[caller] = (held - tokens, at)

    def require(self, caller: str) -> None:
        """Take a token of *caller*.

        Raises:
            RequestError: TOO_MANY, if there is none.
        """
        wait_s = self.take(caller)
        if wait_s:
            raise RequestError(TOO_MANY, retry_after_s=math.ceil(wait_s))

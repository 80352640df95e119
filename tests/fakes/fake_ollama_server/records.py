"""The records of the fake: totals, and one record per inference request."""

import time
from collections import Counter, deque
from typing import Any

from .labels import text_digest
from .payloads import Call

_MAX_TRACKED_TEXTS = 1_000_000


_CALL_FIELDS = (
    "model",
    "message_count",
    "options",
    "format_sent",
    "stream",
    "think",
    "truncate",
    "shift",
    "keep_alive_s",
)


class RequestRecord:
    """One inference request, without its text; digests are spelled only when asked for."""

    __slots__ = ("digests", "end_s", "fault", "index", "outcome", "path", "request_id", "shape", "start_s")

    def __init__(self, index: int, path: str, request_id: str) -> None:
        self.index = index
        self.path = path
        self.request_id = request_id
        self.start_s = time.monotonic()
        self.end_s: float | None = None
        self.outcome = "open"
        self.fault: str | None = None
        self.digests: tuple[bytes, ...] = ()
        self.shape: list[Any] = []

    def seen(self, call: Call) -> None:
        """Keep the shape of *call*, and digests of the selected, the last and the longest user message."""
        last = call.digest if call.last_text is call.text else text_digest(call.last_text)
        longest = call.digest if call.longest_text is call.text else text_digest(call.longest_text)
        self.digests = (call.digest, last, longest)
        self.shape = [getattr(call, name) for name in _CALL_FIELDS]

    def as_dict(self) -> dict[str, Any]:
        """The public form; times are seconds of CLOCK_MONOTONIC, which all processes share."""
        public: dict[str, Any] = {
            "index": self.index,
            "path": self.path,
            "request_id": self.request_id,
            "start_s": self.start_s,
            "end_s": self.end_s,
            "outcome": self.outcome,
            "fault": self.fault,
        }
        names = ("user_sha256", "last_sha256", "longest_sha256")
        public |= {name: digest.hex() for name, digest in zip(names, self.digests, strict=False)}
        return public | dict(zip(_CALL_FIELDS, self.shape, strict=False))


class Totals:
    """Counters of the inference requests."""

    def __init__(self) -> None:
        self.chat_requests = 0
        self.load_requests = 0
        self.embed_requests = 0
        self.embed_inputs = 0
        self.cloud_requests = 0
        self.answered = 0
        self.failed = 0
        self.client_disconnects = 0
        self.in_flight = 0
        self.max_in_flight = 0
        self.simulated_s_sum = 0.0
        self.simulated_s_max = 0.0
        self.statuses: Counter[int] = Counter()
        self.indexes: Counter[str] = Counter()
        self.calls_by_digest: dict[bytes, int] = {}
        self.records: deque[RequestRecord] = deque()

    def count_text(self, digest: bytes) -> None:
        """Count one call for the text with *digest*."""
        calls = self.calls_by_digest
        if digest in calls:
            calls[digest] += 1
        elif len(calls) < _MAX_TRACKED_TEXTS:
            calls[digest] = 1

    def add_simulated(self, seconds: float) -> None:
        """Count the planned duration of one completed answer."""
        self.simulated_s_sum += seconds
        self.simulated_s_max = max(self.simulated_s_max, seconds)

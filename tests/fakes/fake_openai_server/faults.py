"""Which fault strikes which request, batch or line. What the kinds do is in `wire`, `batches` and `results`."""

from collections import Counter
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

from tests.fakes.fake_ollama_server.labels import probability_hit

# Answered on arrival, before anything is done: status, type and code of the error body, message.
STATUS_KINDS: dict[str, tuple[int, str, str | None, str]] = {
    "rate_limit_429": (
        429,
        "requests",
        "rate_limit_exceeded",
        "Rate limit reached for requests. Please try again later. Visit"
        " https://platform.openai.com/account/rate-limits to learn more.",
    ),
    "insufficient_quota_429": (
        429,
        "insufficient_quota",
        "insufficient_quota",
        "You exceeded your current quota, please check your plan and billing details.",
    ),
    "server_error_500": (
        500,
        "server_error",
        None,
        "The server had an error while processing your request. Sorry about that!",
    ),
    "overloaded_503": (503, "server_error", None, "The engine is currently overloaded, please try again later"),
    "unauthorized_401": (401, "invalid_request_error", "invalid_api_key", "Incorrect API key provided: sk-fa*****."),
    "forbidden_403": (
        403,
        "request_forbidden",
        "unsupported_country_region_territory",
        "Country, region, or territory not supported",
    ),
    "not_found_404": (404, "invalid_request_error", None, "No such object, or it is not visible yet"),
    "conflict_409": (409, "invalid_request_error", "conflict", "The resource was changed by another request."),
    "bad_request_400": (400, "invalid_request_error", "invalid_value", "Invalid request."),
}
ARRIVAL_KINDS = frozenset({"close", "reset", "hang", "garbage", "status", "bad_gateway_502", *STATUS_KINDS})
ANSWER_KINDS = frozenset({"answer_lost", "truncated", "cut", "reset_after", "slow", "not_json"})
EMBED_KINDS = frozenset(
    {"embed_short", "embed_extra", "embed_dims", "embed_nan", "embed_zero", "embed_unordered", "embed_same_index"}
)
REQUEST_KINDS = ARRIVAL_KINDS | ANSWER_KINDS | EMBED_KINDS | {"delay"}
BATCH_KINDS = frozenset(
    {
        "fail",
        "token_limit_exceeded",
        "expire",
        "cancel",
        "status_value",
        "hold",
        "late_output",
        "no_output_file",
        "no_error_file",
        "empty_id",
        "empty_error_file",
        "counts",
        "vanish",
        "output_gone",
        "bom",
        "half_last_line",
        "blank_lines",
        "junk_line",
        "unknown_ids",
        "timing",
    }
)
LINE_KINDS = frozenset(
    {
        "line_status",
        "line_error",
        "missing",
        "duplicate",
        "null_custom_id",
        "null_body",
        "null_both",
        "junk",
        "content",
        "refusal",
        "length",
        "content_filter",
        "no_choices",
        "no_usage",
    }
)
KINDS = REQUEST_KINDS | BATCH_KINDS | LINE_KINDS
_WHEN_KEYS = frozenset(
    {"route", "indexes", "from", "to", "probability", "seed", "text", "batches", "custom_ids", "metadata", "by"}
)


class Fault:
    """One entry of the knob ``faults``."""

    __slots__ = ("key", "kind", "params", "times", "when")

    def __init__(self, entry: Mapping[str, Any], key: str) -> None:
        """Check *entry*; *key* names its count in the store.

        Raises:
            ValueError: The kind or a condition is unknown.
        """
        params = dict(entry)
        self.key = key
        self.kind: str = params.pop("kind", "")
        self.when: dict[str, Any] = dict(params.pop("when", {}))
        self.times: float = params.pop("times", float("inf"))
        self.params = params
        if self.kind not in KINDS:
            raise ValueError(f"unknown fault kind {self.kind!r}; use one of {', '.join(sorted(KINDS))}")
        if unknown := set(self.when) - _WHEN_KEYS:
            raise ValueError(f"unknown condition {sorted(unknown)}; use one of {', '.join(sorted(_WHEN_KEYS))}")

    def strikes_request(self, route: str, index: int, texts: Iterable[str]) -> bool:
        """Return whether it strikes the request number *index* (from 0) to *route*."""
        wanted = self.when.get("route", "embeddings.create" if self.kind in EMBED_KINDS else "*")
        patterns = [wanted] if isinstance(wanted, str) else wanted
        if not any(fnmatchcase(route, pattern) for pattern in patterns):
            return False
        return self._strikes(index, str(index), texts)

    def strikes_batch(self, number: int, metadata: Mapping[str, str]) -> bool:
        """Return whether it strikes the batch that was created as number *number*, from 0."""
        return self._of_batch(number, metadata) and self._strikes(number, str(number), ())

    def strikes_line(self, number: int, metadata: Mapping[str, str], line_no: int, custom_id: str, text: str) -> bool:
        """Return whether it strikes line *line_no* (from 1) of the batch *number*."""
        if not self._of_batch(number, metadata):
            return False
        if "custom_ids" in self.when and custom_id not in self.when["custom_ids"]:
            return False
        return self._strikes(line_no, custom_id, (text,))

    def _of_batch(self, number: int, metadata: Mapping[str, str]) -> bool:
        wanted = self.when.get("metadata", {})
        return number in self.when.get("batches", (number,)) and all(
            metadata.get(name) == value for name, value in wanted.items()
        )

    def _strikes(self, index: int, key: str, texts: Iterable[str]) -> bool:
        when = self.when
        if index not in when.get("indexes", (index,)):
            return False
        if not when.get("from", 0) <= index <= when.get("to", index):
            return False
        if "text" in when and not any(when["text"] in text for text in texts):
            return False
        return "probability" not in when or probability_hit(when.get("seed", 0), key, when["probability"])


class FaultPlan:
    """The faults in force, in their order; *used* counts strikes by the fault's key and outlives restarts."""

    def __init__(self, entries: Iterable[Mapping[str, Any]], used: Counter[str]) -> None:
        self.faults = [Fault(entry, f"fault:{place}") for place, entry in enumerate(entries)]
        self._used = used
        self.has_line_faults = any(fault.kind in LINE_KINDS for fault in self.faults)

    def for_request(self, route: str, index: int, texts: Iterable[str]) -> tuple[Fault | None, float]:
        """The first fault that strikes, and the seconds of all ``delay`` faults that do."""
        chosen: Fault | None = None
        delay_s = 0.0
        for fault in self.faults:
            if fault.kind not in REQUEST_KINDS or (chosen is not None and fault.kind != "delay"):
                continue
            if not self._left(fault) or not fault.strikes_request(route, index, texts):
                continue
            self._use(fault)
            if fault.kind == "delay":
                delay_s += float(fault.params.get("delay_s", 1.0))
            else:
                chosen = fault
        return chosen, delay_s

    def for_batch(self, number: int, metadata: Mapping[str, str]) -> list[dict[str, Any]]:
        """All batch faults that strike, as ``{"kind", ...parameters}``."""
        struck = []
        for fault in self.faults:
            if fault.kind in BATCH_KINDS and self._left(fault) and fault.strikes_batch(number, metadata):
                self._use(fault)
                struck.append({"kind": fault.kind, **fault.params})
        return struck

    def for_line(
        self, number: int, metadata: Mapping[str, str], line_no: int, custom_id: str, text: str
    ) -> Fault | None:
        """The first line fault that strikes."""
        for fault in self.faults:
            if (
                fault.kind in LINE_KINDS
                and self._left(fault)
                and fault.strikes_line(number, metadata, line_no, custom_id, text)
            ):
                self._use(fault)
                return fault
        return None

    def _left(self, fault: Fault) -> bool:
        return self._used[fault.key] < fault.times

    def _use(self, fault: Fault) -> None:
        self._used[fault.key] += 1
        self._used[f"faults:{fault.kind}"] += 1

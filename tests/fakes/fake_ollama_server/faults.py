"""Which fault strikes which request. What the kinds do is in `reply_faults`, `responses` and `wire`."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .labels import probability_hit

# Answered with this status and error text when the request arrives; None means the text needs the request.
STATUS_KINDS: dict[str, tuple[int, str | None]] = {
    "busy_503": (503, "server busy, please try again.  maximum pending requests exceeded"),
    "runner_stopped_500": (
        500,
        "model runner has unexpectedly stopped, this may be due to resource limitations or an internal error,"
        " check ollama server logs for details",
    ),
    "runner_eof_500": (500, "an error was encountered while running the model: unexpected EOF"),
    "load_failed_500": (500, "llama-server process has terminated: exit status 1: error loading model"),
    "token_repeat_500": (500, "prediction aborted, token repeat limit reached"),
    "model_not_found_404": (404, None),
    "overflow_400": (400, None),
    "canceled_499": (499, "request canceled"),
    "embed_nan_400": (400, "embedding contains NaN or Inf values"),
}
STATUS_TEXTS: dict[int, str] = {
    400: "invalid character 'x' looking for beginning of value",
    401: "unauthorized",
    403: "forbidden",
    404: "model 'unknown' not found",
    429: "too many requests",
    499: "request canceled",
    500: STATUS_KINDS["runner_stopped_500"][1] or "",
    502: "upstream error",
    503: STATUS_KINDS["busy_503"][1] or "",
    504: "upstream timed out",
}
ARRIVAL_KINDS = frozenset(
    {"close", "reset", "hang", "garbage", "status", "html_200", "html_502", "runner_crash", *STATUS_KINDS}
)
WIRE_KINDS = frozenset({"reset_after", "slow_headers", "slow_body", "truncated_body", "half_json"})
STREAM_KINDS = frozenset({"stream_truncate", "stream_no_final", "stream_error_line"})
REPLY_KINDS = frozenset(
    {
        "done_false",
        "missing_done",
        "empty_content",
        "thinking_only",
        "length",
        "done_reason_load",
        "invalid_json",
        "prose",
        "code_fence",
        "wrong_label",
        "missing_field",
        "extra_field",
        "duplicate_keys",
        "nan",
        "number_label",
        "huge",
        "deep_json",
        "lone_surrogate",
        "nul",
        "bom",
        "control_chars",
        "raw_control_chars",
        "padded_json",
        "unconstrained",
        "half_window",
        "no_counters",
        "message_null",
        "clock_jump",
        "unload",
    }
)
EMBED_KINDS = frozenset({"embed_short", "embed_dims"})
KINDS = ARRIVAL_KINDS | WIRE_KINDS | STREAM_KINDS | REPLY_KINDS | EMBED_KINDS | {"latency"}

GENERATION_PATHS = frozenset({"/api/chat", "/api/generate", "/v1/chat/completions"})
_WHEN_KEYS = frozenset({"indexes", "from", "to", "probability", "seed", "by", "text", "path"})


class Fault:
    """One entry of the knob ``faults``."""

    __slots__ = ("indexes", "kind", "params", "remaining", "seed", "served", "when")

    def __init__(self, entry: Mapping[str, Any]) -> None:
        """Check *entry*; ``{"kind", "when"?: {...}, "times"?: int, ...parameters of the kind}``.

        Raises:
            ValueError: The kind or a condition is unknown.
        """
        params = dict(entry)
        self.kind: str = params.pop("kind", "")
        self.when: dict[str, Any] = dict(params.pop("when", {}))
        self.remaining: float = params.pop("times", float("inf"))
        self.params = params
        self.served = 0
        if self.kind not in KINDS:
            raise ValueError(f"unknown fault kind {self.kind!r}; use one of {', '.join(sorted(KINDS))}")
        if unknown := set(self.when) - _WHEN_KEYS:
            raise ValueError(f"unknown condition {sorted(unknown)}; use one of {', '.join(sorted(_WHEN_KEYS))}")
        self.indexes = frozenset(self.when["indexes"]) if "indexes" in self.when else None
        self.seed: int = self.when.get("seed", 0)

    @property
    def at_arrival(self) -> bool:
        """True if it strikes before the request is scheduled, so that it holds no slot."""
        if self.kind == "runner_crash":
            return False
        if self.kind == "hang":
            return not self.params.get("hold_slot", True)
        return self.kind in ARRIVAL_KINDS and self.params.get("stage", "arrival") == "arrival"

    def strikes(self, path: str, index: int, texts: Sequence[str], digest: bytes) -> bool:
        """Return whether every condition of ``when`` holds; without one, always (on the generation paths)."""
        when = self.when
        if self.remaining <= 0 or not self._covers(path):
            return False
        if self.indexes is not None and index not in self.indexes:
            return False
        if not when.get("from", 0) <= index <= when.get("to", index):
            return False
        if "text" in when and not any(when["text"] in text for text in texts):
            return False
        if "probability" not in when:
            return True
        return probability_hit(self.seed, digest if when.get("by") == "text" else index, when["probability"])

    def _covers(self, path: str) -> bool:
        wanted = self.when.get("path")
        if wanted is not None:
            return bool(wanted == path)
        return path == "/api/embed" if self.kind in EMBED_KINDS else path in GENERATION_PATHS


class FaultPlan:
    """The faults in force, in their order."""

    def __init__(self, entries: Iterable[Mapping[str, Any]]) -> None:
        self.faults = [Fault(entry) for entry in entries]
        self.served: Counter[str] = Counter()

    def pick(self, path: str, index: int, texts: Sequence[str], digest: bytes) -> tuple[Fault | None, list[Fault]]:
        """The first fault that strikes, and all ``latency`` faults that do; each of these is used up by one.

        Args:
            path: Request path, without the query.
            index: Sequence number of the request among those to its group of paths, from 0.
            texts: What ``when.text`` is looked for in.
            digest: Of the selected text, for ``when: {"by": "text"}``.
        """
        chosen: Fault | None = None
        slower: list[Fault] = []
        for fault in self.faults:
            if chosen is not None and fault.kind != "latency":
                continue
            if not fault.strikes(path, index, texts, digest):
                continue
            if fault.kind == "latency":
                slower.append(fault)
            else:
                chosen = fault
            self._use_up(fault)
        return chosen, slower

    def _use_up(self, fault: Fault) -> None:
        fault.remaining -= 1
        fault.served += 1
        self.served[fault.kind] += 1

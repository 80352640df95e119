"""Durations as Go reads them, in seconds."""

import functools
import json
import re

FOREVER_S = float(2**63) / 1e9

_PART = re.compile(r"([0-9]+\.?[0-9]*|\.[0-9]+)([^0-9.]*)")
_UNITS_S = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "μs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}


@functools.lru_cache(maxsize=64)
def parse_duration(value: str) -> float:
    """Seconds of *value*, such as ``1h30m``; a negative one counts as `FOREVER_S`, as in Ollama.

    Raises:
        ValueError: With the words of Go's time.ParseDuration.
    """
    text = value[1:] if value[:1] in ("-", "+") else value
    if text == "0":
        return 0.0
    quoted = json.dumps(value)
    seconds, at = 0.0, 0
    while at < len(text) or not text:
        part = _PART.match(text, at)
        if part is None:
            raise ValueError(f"time: invalid duration {quoted}")
        number, unit = part.groups()
        if not unit:
            raise ValueError(f"time: missing unit in duration {quoted}")
        if unit not in _UNITS_S:
            raise ValueError(f"time: unknown unit {json.dumps(unit)} in duration {quoted}")
        seconds += float(number) * _UNITS_S[unit]
        at = part.end()
    return FOREVER_S if value[0] == "-" else seconds

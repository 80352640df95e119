"""Wrong answers of /v1/embeddings."""

import struct
from base64 import b64decode, b64encode
from typing import Any

import orjson

from .faults import Fault

_NAN = "fake-nan"


def spoil_embeddings(fault: Fault, answer: dict[str, Any]) -> bytes:
    """The body as *fault* changes it; ``item`` says whose vector, from 0, -1 for the last."""
    data = answer["data"]
    place = int(fault.params.get("item", -1))
    if fault.kind == "embed_short":
        del data[place]
    elif fault.kind == "embed_extra":
        data.append(dict(data[-1]) | {"index": len(data)})
    elif fault.kind == "embed_unordered":
        data.reverse()
    elif fault.kind == "embed_same_index":
        for item in data:
            item["index"] = 0
    else:
        _spoil_vector(fault, data[place])
    return orjson.dumps(answer).replace(b'"fake-nan"', b"NaN")


def _spoil_vector(fault: Fault, item: dict[str, Any]) -> None:
    vector, packed = item["embedding"], isinstance(item["embedding"], str)
    numbers = list(struct.unpack(f"<{len(b64decode(vector)) // 4}f", b64decode(vector))) if packed else list(vector)
    if fault.kind == "embed_dims":
        numbers = numbers[:-1]
    elif fault.kind == "embed_zero":
        numbers = [0.0] * len(numbers)
    elif fault.kind == "embed_nan":
        numbers[0] = float("nan") if packed else _NAN
    item["embedding"] = b64encode(struct.pack(f"<{len(numbers)}f", *numbers)).decode() if packed else numbers

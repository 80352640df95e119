"""Read JSON that means one thing only, and can be written again as it came."""

from __future__ import annotations

import json
from typing import Any

import orjson

from error_handler import RequestError
from utils.service_errors import INVALID_JSON


def read_json_object(body: bytes) -> dict[str, Any]:
    """Return the object in *body*, which is UTF-8 without a byte order mark.

    Refused although common parsers take it: a key named twice, NaN and Infinity, lone surrogates,
    numbers that do not fit, nesting deeper than the interpreter can follow (about 900).

    Raises:
        RequestError: INVALID_JSON. The message says what is wrong and quotes nothing.
    """
    try:
        value = _DECODER.decode(body.decode())
    except UnicodeDecodeError as exc:
        raise RequestError(INVALID_JSON, "The body is not UTF-8; send UTF-8 JSON.") from exc
    except RecursionError as exc:
        raise RequestError(INVALID_JSON, "The body is nested too deeply; send one flat conversation.") from exc
    except ValueError as exc:  # JSONDecodeError, and integers of thousands of digits
        raise RequestError(INVALID_JSON) from exc
    if not isinstance(value, dict):
        raise RequestError(INVALID_JSON)
    # Python reads a lone surrogate, and nothing that follows can write it.
    if (b"\\ud" in body or b"\\uD" in body) and not _is_writable(value):
        raise RequestError(INVALID_JSON, "The body holds half of a surrogate pair; send whole characters.")
    return value


def _is_writable(value: dict[str, Any]) -> bool:
    try:
        orjson.dumps(value)
    except orjson.JSONEncodeError:
        return False
    return True


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise RequestError(INVALID_JSON, "The body names a key twice; name each key once.")
    return fields


def _no_constant(_name: str) -> Any:
    raise RequestError(INVALID_JSON, "The body holds NaN or Infinity, which JSON does not have.")


_DECODER = json.JSONDecoder(object_pairs_hook=_distinct, parse_constant=_no_constant)

"""MongoDB Extended JSON, and keys for ids of any type: the owner of ``bson.json_util``.

Written with orjson, because each document of a run passes through here; orjson hands on what plain
JSON has no type for. Types survive the round trip: int64 stays int64, dates keep milliseconds.
"""

from __future__ import annotations

import json
import math
from datetime import UTC, datetime, timedelta
from typing import Any

import bson
import orjson
from bson import json_util
from bson.codec_options import DatetimeConversion
from bson.errors import BSONError

_CANONICAL = json_util.JSONOptions(
    json_mode=json_util.JSONMode.CANONICAL, tz_aware=True, datetime_conversion=DatetimeConversion.DATETIME_AUTO
)
_BSON_OPTIONS: bson.CodecOptions[dict[str, Any]] = bson.CodecOptions(
    tz_aware=True, datetime_conversion=DatetimeConversion.DATETIME_AUTO
)
_EPOCH, _MILLISECOND = datetime(1970, 1, 1, tzinfo=UTC), timedelta(milliseconds=1)
_OBJECT_ID_KEY = b"\x13\0\0\0\x07\0"  # of BSON: 19 bytes in all, an ObjectId, a name of no characters
_ORJSON_OPTIONS = orjson.OPT_PASSTHROUGH_SUBCLASS | orjson.OPT_PASSTHROUGH_DATETIME | orjson.OPT_NON_STR_KEYS


def dumps(value: Any) -> bytes:
    """Return *value* as one line of Extended JSON, UTF-8.

    Raises:
        ValueError: It holds what MongoDB cannot hold either (a lone surrogate, a foreign type).
    """
    try:
        data = orjson.dumps(value, default=_default, option=_ORJSON_OPTIONS)
        if b"null" in data:  # what orjson makes of NaN and the infinities, too
            data = orjson.dumps(_typed_doubles(value), default=_default, option=_ORJSON_OPTIONS)
        return data
    except (orjson.JSONEncodeError, TypeError) as exc:
        raise ValueError("not representable as Extended JSON") from exc


def canonical(value: Any) -> str:
    """Return *value* as canonical Extended JSON: equal texts mean the same type and value, and ``loads`` gives it back.

    Raises:
        ValueError: MongoDB cannot hold it.
    """
    try:
        return json_util.dumps(value, json_options=_CANONICAL)
    except (TypeError, ArithmeticError, BSONError) as exc:
        raise ValueError("not representable as Extended JSON") from exc


def plain(value: Any) -> Any:
    """Return *value* without BSON types, for templates: ids and binary data as texts, dates in ISO 8601, decimals as texts."""
    if value is None or isinstance(value, str | bool):
        return value
    if isinstance(value, int | float):  # bson.Int64 is an int
        return int(value) if isinstance(value, int) else value
    if isinstance(value, dict):
        return {str(name): plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return (
        value.isoformat() if isinstance(value, datetime) else id_text(value) if isinstance(value, bytes) else str(value)
    )


def loads(data: bytes | str) -> Any:
    """Return the value of *data*; dates are aware, in UTC.

    Raises:
        ValueError: *data* is not JSON, or misuses a ``$`` key.
    """
    try:
        return json_util.loads(data, json_options=_CANONICAL)
    except (TypeError, LookupError, ArithmeticError, BSONError, RecursionError) as exc:
        raise ValueError("not Extended JSON") from exc


def pretty(value: Any) -> str:
    """Return *value* as Extended JSON for people: indented, each character that is not ASCII as it is.

    Raises:
        ValueError: See ``dumps``.
    """
    return json.dumps(json.loads(dumps(value)), indent=2, ensure_ascii=False)


def id_key(document_id: Any) -> bytes:
    """Return a hashable key of an ``_id`` of any BSON type; equal keys mean the same type and value.

    Raises:
        ValueError: MongoDB cannot hold such an id.
    """
    if type(document_id) is bson.ObjectId:  # most are, and each is asked for several times
        return _OBJECT_ID_KEY + document_id.binary + b"\0"
    try:
        return bson.encode({"": document_id})
    except (BSONError, OverflowError) as exc:
        raise ValueError("not an id") from exc


def bson_encode(value: dict[str, Any]) -> bytes:
    """Return *value* as BSON: unlike JSON it takes no key for a type, and no text for anything else.

    Raises:
        ValueError: MongoDB cannot hold it.
    """
    try:
        return bson.encode(value)
    except (BSONError, OverflowError, RecursionError, TypeError) as exc:
        raise ValueError("not representable as BSON") from exc


def bson_decode(data: bytes) -> dict[str, Any]:
    """Return the value of *data*, which ``bson_encode`` made; dates are aware, in UTC."""
    return bson.decode(data, _BSON_OPTIONS)


def id_text(document_id: Any) -> str:
    """Return *document_id* as people and logs read it: plain for ObjectIds, texts and numbers."""
    is_plain = isinstance(document_id, str | int | float | bson.ObjectId)
    text = str(document_id) if is_plain else dumps(document_id).decode()
    return "".join(character if character.isprintable() else "?" for character in text[:120])


def _typed_doubles(value: Any) -> Any:
    """Return *value* with the doubles that JSON has no number for as Extended JSON."""
    if isinstance(value, float) and not math.isfinite(value):
        return json_util.default(value, _CANONICAL)
    if isinstance(value, dict):
        return {name: _typed_doubles(item) for name, item in value.items()}
    return [_typed_doubles(item) for item in value] if isinstance(value, list) else value


def _default(value: Any) -> Any:
    # The first two are in every document, and json_util takes its time to find them out.
    if type(value) is bson.ObjectId:
        return {"$oid": str(value)}
    if type(value) is datetime:
        aware = value if value.tzinfo else value.replace(tzinfo=UTC)
        return {"$date": {"$numberLong": str((aware - _EPOCH) // _MILLISECOND)}}
    if isinstance(value, dict):  # SON and other mappings that are subclasses
        return dict(value)
    return json_util.default(value, _CANONICAL)

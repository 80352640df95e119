"""MongoDB Extended JSON, BSON, and keys for ids of any type.

orjson writes the JSON, because every document of a run passes through here; json_util encodes the types that plain JSON
does not have. Types survive the round trip: int64 stays int64, dates keep milliseconds. A key of a document that begins with
``$`` is written with one more, because ``{"$date": "yesterday"}`` would be read as a date. A value that MongoDB cannot store
(a lone surrogate, an unknown type), or a text that is not Extended JSON, is a ValueError.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
from binascii import hexlify
from datetime import UTC, datetime, timedelta
from typing import Any

import bson
import orjson
from bson import json_util
from bson.codec_options import DatetimeConversion
from bson.errors import BSONError

Document = dict[str, Any]  # of MongoDB
SMALL_BYTES = 20_000

_CANONICAL = json_util.JSONOptions(
    json_mode=json_util.JSONMode.CANONICAL, tz_aware=True, datetime_conversion=DatetimeConversion.DATETIME_AUTO
)
_BSON_OPTIONS: bson.CodecOptions[dict[str, Any]] = bson.CodecOptions(
    tz_aware=True, datetime_conversion=DatetimeConversion.DATETIME_AUTO
)
_EPOCH, _MILLISECOND = datetime(1970, 1, 1, tzinfo=UTC), timedelta(milliseconds=1)
_MARK = b"\0"  # JSON escapes it, so no text has it
_DOLLAR_KEY = re.compile(rb'[{,]"\$(?:[^"\\]|\\.)*":')  # a quotation mark inside a text is escaped, so this is a key
_ORJSON_OPTIONS = orjson.OPT_PASSTHROUGH_SUBCLASS | orjson.OPT_PASSTHROUGH_DATETIME | orjson.OPT_NON_STR_KEYS


def dumps(value: Any) -> bytes:
    """Return *value* as one line of Extended JSON, UTF-8."""
    return _marked(value).replace(_MARK, b"$")


def written(value: Any) -> orjson.Fragment:
    """Return *value* in a form that ``dumps`` copies, for a value that is written several times."""
    return orjson.Fragment(_marked(value))


def _marked(value: Any) -> bytes:
    """Return *value* as Extended JSON, with _MARK in place of the ``$`` of types: a document may have keys with ``$``."""
    try:
        data = orjson.dumps(value, default=_default, option=_ORJSON_OPTIONS)
        if b"$" in data and (b'{"$' in data or b',"$' in data) and _DOLLAR_KEY.search(data):
            data = orjson.dumps(value := _escaped(value), default=_default, option=_ORJSON_OPTIONS)
        if b"null" in data:  # orjson also writes NaN and the infinities as null
            data = orjson.dumps(_typed_doubles(value), default=_default, option=_ORJSON_OPTIONS)
        return data
    except (orjson.JSONEncodeError, TypeError) as exc:
        raise ValueError("not representable as Extended JSON") from exc


def canonical(value: Any) -> str:
    """Return *value* as canonical Extended JSON: equal texts mean equal types and values, and ``loads`` reverses it."""
    try:
        return json_util.dumps(_escaped(value), json_options=_CANONICAL)
    except (TypeError, ArithmeticError, BSONError) as exc:
        raise ValueError("not representable as Extended JSON") from exc


def plain(value: Any) -> Any:
    """Return *value* without BSON types, for templates: ids, binary data and decimals as texts, dates in ISO 8601."""
    if value is None or isinstance(value, str | bool | float):
        return value
    if isinstance(value, int):  # or bson.Int64
        return int(value)
    if isinstance(value, dict):
        return {str(name): plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, datetime):
        return value.isoformat()
    return id_text(value) if isinstance(value, bytes) else str(value)


def drop_attachments(document: Document) -> int:
    """Return the bytes of *document* in BSON. If it is large, first remove binary values from its turns: they have no text."""
    if (size := len(bson_encode(document))) <= SMALL_BYTES:
        return size
    for turns in document.values():
        for turn in turns if isinstance(turns, list) else ():
            if isinstance(turn, dict):
                for name in [name for name, value in turn.items() if isinstance(value, bytes)]:
                    del turn[name]
    return len(bson_encode(document))


def loads(data: bytes | str) -> Any:
    """Return the value of *data*; dates are aware, in UTC."""
    try:
        return json.loads(data, object_pairs_hook=_from_pairs)
    except (TypeError, LookupError, ArithmeticError, BSONError, RecursionError) as exc:
        raise ValueError("not Extended JSON") from exc


def rows(data: bytes) -> list[bytes]:
    """Return the items of the damaged list *data*, each as JSON if possible; its lines if the whole is no JSON."""
    with contextlib.suppress(ValueError, RecursionError):
        content = json.loads(data)
        return [json.dumps(row).encode() for row in content] if isinstance(content, list) else []
    return [line.removesuffix(b",") for line in data.splitlines()]


def pretty(value: Any) -> str:
    """Return *value* as indented Extended JSON for people; characters outside ASCII are not escaped."""
    return json.dumps(json.loads(dumps(value)), indent=2, ensure_ascii=False)


def id_key(document_id: Any) -> bytes:
    """Return a hashable key for an ``_id`` of any BSON type; equal keys mean the same type and value."""
    if type(document_id) is bson.ObjectId:  # nearly all, several times for each document
        return b"\x13\0\0\0\x07\0%b\0" % document_id.binary
    return bson_encode({"": document_id})


def bson_encode(value: dict[str, Any]) -> bytes:
    """Return *value* as BSON, in which no key can be mistaken for a type, as ``$`` keys can in Extended JSON."""
    try:
        return bson.encode(value)
    except (BSONError, OverflowError, RecursionError, TypeError) as exc:
        raise ValueError("not representable as BSON") from exc


def bson_decode(data: bytes) -> dict[str, Any]:
    """Return the value of BSON *data*; dates are aware, in UTC."""
    return bson.decode(data, _BSON_OPTIONS)


def is_doubtful(document_id: Any) -> bool:
    """Return whether *document_id* may not be UTF-8 in MongoDB: the driver reads what is not as U+FFFD."""
    return "\ufffd" in (document_id if isinstance(document_id, str) else str(document_id))


def id_text(document_id: Any) -> str:
    """Return *document_id* for people and logs: its ``whole_id_text``, of at most 120 printable characters."""
    return "".join(character if character.isprintable() else "?" for character in whole_id_text(document_id)[:120])


def whole_id_text(document_id: Any) -> str:
    """Return *document_id* as a text: plain for ObjectIds, texts and numbers, else Extended JSON."""
    is_plain = isinstance(document_id, str | int | float | bson.ObjectId)
    return str(document_id) if is_plain else dumps(document_id).decode()


def _escaped(value: Any) -> Any:
    """Return *value* with one more ``$`` before each key that begins with one."""
    if isinstance(value, dict):
        return {f"${name}" if _is_dollar(name) else name: _escaped(item) for name, item in value.items()}
    if isinstance(value, bson.Code) and value.scope:
        return bson.Code(str(value), _escaped(dict(value.scope)))
    if isinstance(value, bson.DBRef):
        more = {name: item for name, item in value.as_doc().items() if name not in ("$ref", "$id", "$db")}
        return bson.DBRef(value.collection, value.id, value.database, _escaped(more))
    return [_escaped(item) for item in value] if isinstance(value, list | tuple) else value


def _is_dollar(name: Any) -> bool:
    return isinstance(name, str) and name.startswith("$")


def _from_pairs(pairs: list[tuple[str, Any]]) -> Any:
    """Return the value of the JSON object *pairs*: one of a BSON type, or a document."""
    names = {name for name, _ in pairs}
    found = {name.removeprefix("$") if name.startswith("$$") else name: item for name, item in pairs}
    if {"$ref", "$id"} <= names:  # json_util refuses further fields such as "collection"
        return bson.DBRef(found.pop("$ref"), found.pop("$id"), found.pop("$db", None), found)
    if any(name.startswith("$$") for name in names):
        return found
    return json_util.object_pairs_hook(pairs, _CANONICAL)


def _typed_doubles(value: Any) -> Any:
    """Return *value* with NaN and infinities as Extended JSON."""
    if isinstance(value, float) and not math.isfinite(value):
        return json_util.default(value, _CANONICAL)
    if isinstance(value, dict):
        return {name: _typed_doubles(item) for name, item in value.items()}
    return [_typed_doubles(item) for item in value] if isinstance(value, list) else value


def _default(value: Any) -> Any:
    """Return *value*, which orjson does not know, as Extended JSON; see ``_marked``."""
    if type(value) is bson.ObjectId:  # these two are in each document, and json_util takes 20 µs for a date
        return orjson.Fragment(b'{"\0oid":"%b"}' % hexlify(value.binary))
    if type(value) is datetime:
        aware = value if value.tzinfo else value.replace(tzinfo=UTC)
        return orjson.Fragment(b'{"\0date":{"\0numberLong":"%d"}}' % ((aware - _EPOCH) // _MILLISECOND))
    if isinstance(value, dict):  # SON and other mappings that are subclasses
        return dict(value)
    fields = json_util.default(value, _CANONICAL)
    if isinstance(value, bson.Code | bson.DBRef):  # they may hold keys of a document
        return fields
    return orjson.Fragment(orjson.dumps(fields).replace(b'{"$', b'{"' + _MARK))

"""Every BSON type survives the way through a file with its type; keys of ids tell types apart."""

from __future__ import annotations

import json
import math
import uuid
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import bson
import pytest
from bson.datetime_ms import DatetimeMS
from hypothesis import given
from hypothesis import strategies as st

from storage.extended_json import dumps, id_key, id_text, loads

TYPES = {
    "string": "naïve 📦\n\x00",
    "empty-string": "",
    "int32": 7,
    "int32-least": -(2**31),
    "int64": bson.Int64(7),
    "int64-great": bson.Int64(2**63 - 1),
    "double": 1.5,
    "double-whole": 1.0,
    "double-tiny": 5e-324,
    "double-infinite": math.inf,
    "double-negative-infinite": -math.inf,
    "true": True,
    "null": None,
    "object-id": bson.ObjectId("65f0a1b2c3d4e5f6a7b8c9d0"),
    "date": datetime(2024, 5, 1, 10, 30, 0, 123000, tzinfo=UTC),
    "date-before-1970": datetime(1899, 12, 31, 23, 59, 59, 999000, tzinfo=UTC),
    "date-beyond-9999": DatetimeMS(2**60),
    "decimal": bson.Decimal128("1.10"),
    "binary": b"\x00\xff",
    "binary-user": bson.Binary(b"x", 128),
    "uuid": bson.Binary.from_uuid(uuid.UUID(int=5)),
    "uuid-legacy": bson.Binary(uuid.UUID(int=5).bytes, 3),
    "regex": bson.Regex("^a", "i"),
    "code": bson.Code("f()"),
    "code-with-scope": bson.Code("f()", {"a": bson.Int64(1)}),
    "timestamp": bson.Timestamp(1, 2),
    "least": bson.MinKey(),
    "greatest": bson.MaxKey(),
    "reference": bson.DBRef("c", bson.ObjectId("65f0a1b2c3d4e5f6a7b8c9d0")),
    "reference-with-fields": bson.DBRef("c", 1, None, {"collection": "d", "id": 2, "$date": "x"}),
    "list": [1, [bson.Int64(2), None], {}],
    "document": {"b": 1, "a": {"c": [math.inf]}, "": 2, "with.dot": 3},
}


@pytest.mark.parametrize("value", TYPES.values(), ids=list(TYPES))
def test_round_trip(value: Any) -> None:
    """In a field, in a list, in a nested document: the same type and value, so the same BSON."""
    whole = {"_id": value, "list": [value, value], "nested": {"deep": [{"value": value}]}}
    read = loads(dumps(whole))
    assert type(read["_id"]) is type(value)
    assert bson.encode(read) == bson.encode(whole)
    assert id_key(read["_id"]) == id_key(value)


def test_not_a_number() -> None:
    """NaN is no null; nothing compares with it, so its bytes are compared."""
    assert bson.encode(loads(dumps({"a": math.nan, "b": None}))) == bson.encode({"a": math.nan, "b": None})


bson_values: st.SearchStrategy[Any] = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**31), 2**31 - 1)
    | st.integers(-(2**63), 2**63 - 1).map(bson.Int64)
    | st.floats(allow_nan=False)
    | st.text()
    | st.binary()
    | st.binary(min_size=12, max_size=12).map(bson.ObjectId)
    | st.datetimes(datetime(1, 1, 2), datetime(9999, 12, 30)).map(lambda at: at.replace(tzinfo=UTC)),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.text(st.characters(exclude_characters="\x00$", exclude_categories=["Cs"]), max_size=8), inner, max_size=4
        )
    ),
    max_leaves=20,
)


@given(bson_values)
def test_any_document_round_trips(value: Any) -> None:
    """To the byte, as BSON; in one line, as JSON."""
    data = dumps({"value": value})
    assert b"\n" not in data
    json.loads(data)
    assert bson.encode(loads(data)) == bson.encode({"value": value})


def test_dates_are_aware_in_utc() -> None:
    """Whatever zone they had; microseconds beyond MongoDB's milliseconds are cut."""
    written = datetime(2024, 5, 1, 12, 0, 0, 123456, tzinfo=timezone(timedelta(hours=2)))
    read = loads(dumps(written))
    assert read == datetime(2024, 5, 1, 10, 0, 0, 123000, tzinfo=UTC)
    assert read.utcoffset() == timedelta()


def test_other_mappings_become_documents() -> None:
    """SON is what some drivers read documents as."""
    assert dumps(bson.SON([("b", 1), ("a", math.inf)])) == b'{"b":1,"a":{"$numberDouble":"Infinity"}}'


@pytest.mark.parametrize("value", ["\ud83d", {"a": "\ud83d"}, {"\ud83d": 1}, 2**80, object(), {1, 2}, b"x".decode])
def test_values_that_mongodb_cannot_store_are_refused(value: Any) -> None:
    """One kind of error for all of it."""
    with pytest.raises(ValueError, match="Extended JSON"):
        dumps({"value": value})


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"nonsense",
        b"\xff",
        b'{"$oid": "x"}',
        b'{"$date": "yesterday"}',
        b'{"$numberLong": []}',
        b"[" * 100_000,
    ],
)
def test_invalid_extended_json_is_refused(data: bytes) -> None:
    """A corrupt file is a ValueError, whatever is wrong with it."""
    with pytest.raises(ValueError):  # noqa: PT011 - its message differs with what is wrong
        loads(data)


IDS = [
    1,
    bson.Int64(1),
    1.0,
    True,
    "1",
    b"1",
    None,
    bson.Decimal128("1"),
    datetime(1970, 1, 1, tzinfo=UTC),
    bson.Timestamp(0, 1),
    bson.ObjectId("000000000000000000000001"),
    {"a": 1},
    {"a": bson.Int64(1)},
    {"a": 1, "b": 2},
    {"b": 2, "a": 1},
    "",
    math.nan,
    bson.MinKey(),
]


def test_id_keys_are_exact_in_type_and_order() -> None:
    """Two keys are equal only for the same type and value; each is hashable."""
    assert len({id_key(value) for value in IDS}) == len(IDS)
    assert [id_key(value) for value in IDS] == [id_key(value) for value in IDS]
    assert [id_key(value) for value in IDS] == [bson.encode({"": value}) for value in IDS]


@pytest.mark.parametrize("value", [2**80, "\ud83d", object(), {1: 2}, {"a\x00": 1}])
def test_invalid_id_is_refused(value: Any) -> None:
    """A file that was edited by hand must not end the worker."""
    with pytest.raises(ValueError):  # noqa: PT011 - some of the messages are the driver's
        id_key(value)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (bson.ObjectId("65f0a1b2c3d4e5f6a7b8c9d0"), "65f0a1b2c3d4e5f6a7b8c9d0"),
        ("doc0", "doc0"),
        (7, "7"),
        (None, "null"),
        ({"a": bson.Int64(1)}, '{"a":{"$numberLong":"1"}}'),
        ("a\n\x1b[31m\u202e", "a??[31m?"),
        ("x" * 500, "x" * 120),
    ],
)
def test_id_text(value: Any, text: str) -> None:
    """Short, on one line, and harmless for a terminal."""
    assert id_text(value) == text

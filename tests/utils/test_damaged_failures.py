"""A damaged entry of a retry or quarantine file takes no neighbour with it; documents with ``$`` keys are not damage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import bson
import pytest

from error_handler import Reason
from storage import extended_json
from utils.batch_file_manager import BatchFiles, FailureKind
from utils.failed_documents import FailedDocument
from worker.quarantine import list_failed, requeue

DOLLARS: list[Any] = [
    {"$date": "yesterday"},
    {"$oid": "65f0a1b2c3d4e5f6a7b8c9d0"},
    {"$numberLong": "5"},
    {"$binary": {"base64": "", "subType": "00"}},
    {"$$date": 1, "$ref": "x"},
    {"$": 1, "plain": bson.Int64(2)},
    bson.Code("f()", {"$date": "yesterday"}),
    bson.DBRef("c", 1, more={"$oid": "x"}),
    ['"$date":1', '{"$oid":"'],
]


def failure(number: int, value: Any = None) -> FailedDocument:
    return FailedDocument(number, "llm_failed", {"_id": number, "value": value}, 0, Reason.NOT_JSON, "no JSON")


@pytest.mark.parametrize("value", DOLLARS, ids=repr)
def test_keys_that_look_like_types_survive(tmp_path: Path, value: Any) -> None:
    """B22: in both kinds of files, and in the text of an id."""
    files = BatchFiles(tmp_path)
    files.save_failed("retry", 1, [failure(1, value)])
    ((_, [entry]),) = files.failure_files("retry")
    assert bson.encode(entry.conversation_data or {}) == bson.encode({"_id": 1, "value": value})
    files.save_pending([{"_id": 1, "value": value}])
    (batch,) = files.load_pending()
    assert bson.encode(batch.documents[0]) == bson.encode({"_id": 1, "value": value})
    assert extended_json.id_key(extended_json.loads(extended_json.canonical(value))) == extended_json.id_key(value)


def not_extended_json(data: bytes) -> bytes:
    return data.replace(b'"b"', b'{"$date":"yesterday"}')


def not_an_entry(data: bytes) -> bytes:
    return data.replace(b"llm_failed", b"llm_failed", 1).replace(b'"conversation_id":2', b'"somebody":2')


def not_json(data: bytes) -> bytes:
    return data.replace(b'"b"', b'"b\x00')


def cut(data: bytes) -> bytes:
    return data[: data.index(b'"c"')]


@pytest.mark.parametrize("kind", ["retry", "quarantine"])
@pytest.mark.parametrize(
    ("damage", "left"), [(not_extended_json, {1, 3}), (not_an_entry, {1, 3}), (not_json, {1, 3}), (cut, {1, 2})]
)
def test_neighbours_survive(tmp_path: Path, kind: FailureKind, damage: Any, left: set[int]) -> None:
    """The readable entries stay, the file as it was is kept beside them, and the retry queue is known to have lost some."""
    files = BatchFiles(tmp_path)
    files.save_failed(kind, 1, [failure(1, "a"), failure(2, "b"), failure(3, "c")])
    ((path, _),) = files.failure_files(kind)
    path.write_bytes(damaged := damage(path.read_bytes()))
    listed = list_failed(tmp_path, kind)
    assert {entry.conversation_id for entry in listed.entries} == left
    assert listed.unreadable == [path.name]
    assert files.failed_keys(kind) == {extended_json.id_key(number) for number in left}
    assert path.with_name(path.name + ".corrupt").read_bytes() == damaged
    assert files.lost_failures is (kind == "retry")
    assert list_failed(tmp_path, kind).unreadable == []


def test_neighbours_in_a_replayed_file_survive(tmp_path: Path) -> None:
    """``quarantine`` moved it to pending/; its documents are failed in MongoDB, so nothing else would find them."""
    files = BatchFiles(tmp_path)
    files.save_failed("quarantine", 1, [failure(1, "a"), failure(2, "b")])
    assert requeue(files) == 2
    (path,) = (tmp_path / "pending").glob("*.json")
    path.write_bytes(not_extended_json(path.read_bytes()))
    (batch,) = files.load_pending()
    assert [document["_id"] for document in batch.documents] == [1]
    assert files.lost_failures

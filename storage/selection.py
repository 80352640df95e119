"""Which source documents a run selects: one rule, as a query, as an aggregation expression and in Python.

Conversations have a ``status``. Single queries have none but ``processed`` and ``status_reason``. A status that this
product does not know belongs to another program: such a document is foreign and is never selected.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args

State = Literal["pending", "processing", "processed", "failed", "skipped", "foreign"]
Selection = Literal["pending", "sweep", "failed", "processed", "skipped", "known", "foreign", "all"]

STATES: tuple[State, ...] = get_args(State)
STATUSES = STATES[:-1]
# The field in place of those of a document that is not valid BSON. It is never written to MongoDB.
UNREADABLE = "$unreadable"

_OPEN, _DONE = {"status": None, "processed": {"$ne": True}}, {"status": None, "processed": True}
_WITHOUT_STATUS: dict[str, dict[str, Any]] = {
    "pending": {**_OPEN, "status_reason": None},
    "failed": {**_OPEN, "status_reason": {"$ne": None}},
    "processed": {**_DONE, "status_reason": None},
    "skipped": {**_DONE, "status_reason": {"$ne": None}},
}
_HAS_REASON, _IS_DONE = {"$gt": ["$status_reason", None]}, {"$eq": ["$processed", True]}


def switch(default: str, *cases: tuple[dict[str, Any], Any]) -> dict[str, Any]:
    """Return the aggregation expression for the value of the first case that holds."""
    return {"$switch": {"branches": [{"case": case, "then": then} for case, then in cases], "default": default}}


# A status of another program may be binary data that the driver cannot read.
STATUS_EXPRESSION = {"$cond": [{"$eq": [{"$type": "$status"}, "binData"]}, "binary data", "$status"]}
# The status itself if there is one, also that of another program.
STATE_EXPRESSION = switch(
    "pending",
    ({"$gt": ["$status", None]}, STATUS_EXPRESSION),
    ({"$and": [_IS_DONE, _HAS_REASON]}, "skipped"),
    (_IS_DONE, "processed"),
    (_HAS_REASON, "failed"),
)


def selection_filter(selection: Selection) -> dict[str, Any]:
    """Return the query for the documents of *selection*; a missing status counts as pending.

    ``sweep`` adds documents with the status processing: their worker died, unless a lease says otherwise. ``known`` is
    all but ``foreign``.
    """
    if selection == "all":
        return {}
    if selection in ("known", "foreign"):
        return {"status": {"$in" if selection == "known" else "$nin": [None, *STATUSES]}}
    statuses = ["pending", "processing"] if selection == "sweep" else [selection]
    without = _WITHOUT_STATUS["pending" if selection == "sweep" else selection]
    return {"$or": [{"status": {"$in": statuses}}, without]}


QUERIES: dict[Selection, dict[str, Any]] = {name: selection_filter(name) for name in get_args(Selection)}


def state_of(document: Mapping[str, Any]) -> State:
    """Return the state of *document*."""
    status = document.get("status")
    if isinstance(status, list):  # a query matches a list that contains its value
        status = next((known for known in (None, *STATUSES) if known in status), status)
    if status is None:
        ended = document.get("processed") is True
        has_reason = document.get("status_reason") is not None
        return ("skipped" if has_reason else "processed") if ended else ("failed" if has_reason else "pending")
    return next((known for known in STATUSES if known == status), "foreign")

"""Which source documents a run selects: one rule, as a query, as an aggregation expression and in Python.

Conversations have a ``status``. Single queries have none but ``processed`` and ``status_reason``. A status that this
product does not know belongs to another program: such a document is foreign and is never selected. STATUS_FIELD moves the
state of this product to fields of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args

from config.settings import DEFAULT_STATUS_FIELD

State = Literal["pending", "processing", "processed", "failed", "skipped", "foreign"]
Selection = Literal["pending", "sweep", "failed", "processed", "skipped", "known", "foreign", "all"]

STATES: tuple[State, ...] = get_args(State)
STATUSES = STATES[:-1]
# The field in place of those of a document that is not valid BSON. It is never written to MongoDB.
UNREADABLE = "$unreadable"


def switch(default: str, *cases: tuple[dict[str, Any], Any]) -> dict[str, Any]:
    """Return the aggregation expression for the value of the first case that holds."""
    return {"$switch": {"branches": [{"case": case, "then": then} for case, then in cases], "default": default}}


class StateFields:
    """The fields of a source document that hold its state, and what they say; *status* is the name of the first one.

    The queries are limited to *subset*, a query; those in ``whole`` are not.

    By default, a conversation has ``status``, ``status_reason`` and ``last_processed_at``, and a single query has
    ``processed``, ``status_reason`` and ``processing_attempts``. With another name, the state of each document is in
    fields of that name, and those of other programs are neither read nor changed.
    """

    def __init__(self, status: str = DEFAULT_STATUS_FIELD, subset: Mapping[str, Any] | None = None) -> None:
        self.status = status
        self.is_default = status == DEFAULT_STATUS_FIELD
        self.reason = f"{status}_reason"
        self.processed_at = "last_processed_at" if self.is_default else f"{status}_processed_at"
        queries = ("processed", "processing_attempts") if self.is_default else ()
        self.names = (status, self.reason, *queries)  # what a run reads of the state
        self.indexed = (status, "conversation_number", self.processed_at)
        selections: tuple[Selection, ...] = get_args(Selection)
        self.whole: dict[Selection, dict[str, Any]] = {name: self._query(name) for name in selections}
        self.subset = dict(subset or {})
        self.queries: dict[Selection, dict[str, Any]] = {
            name: {"$and": [part for part in (query, self.subset) if part]} if self.subset else query
            for name, query in self.whole.items()
        }

    @property
    def status_expression(self) -> dict[str, Any]:
        """The aggregation expression for the status, also that of another program, which may be unreadable binary data."""
        path = f"${self.status}"
        return {"$cond": [{"$eq": [{"$type": path}, "binData"]}, "binary data", path]}

    @property
    def state_expression(self) -> dict[str, Any]:
        """The aggregation expression for the state; for a foreign document, its status."""
        given = ({"$gt": [f"${self.status}", None]}, self.status_expression)
        if not self.is_default:
            return switch("pending", given)
        has_reason, is_done = {"$gt": [f"${self.reason}", None]}, {"$eq": ["$processed", True]}
        return switch(
            "pending",
            given,
            ({"$and": [is_done, has_reason]}, "skipped"),
            (is_done, "processed"),
            (has_reason, "failed"),
        )

    def _query(self, selection: Selection) -> dict[str, Any]:
        """Return the query for the documents of *selection*; a missing status counts as pending.

        ``sweep`` adds documents with the status processing: their worker died, unless a lease says otherwise. ``known``
        is all but ``foreign``.
        """
        if selection == "all":
            return {}
        if selection in ("known", "foreign"):
            return {self.status: {"$in" if selection == "known" else "$nin": [None, *STATUSES]}}
        statuses: list[str | None] = ["pending", "processing"] if selection == "sweep" else [selection]
        if not self.is_default:
            return {self.status: {"$in": [None, *statuses] if "pending" in statuses else statuses}}
        return {"$or": [{self.status: {"$in": statuses}}, self._without_status(selection)]}

    def _without_status(self, selection: Selection) -> dict[str, Any]:
        """Return the query for documents of *selection* that are single queries, or have no status yet."""
        is_done = selection in ("processed", "skipped")
        has_reason = selection in ("failed", "skipped")
        return {
            self.status: None,
            "processed": True if is_done else {"$ne": True},
            self.reason: {"$ne": None} if has_reason else None,
        }

    def state_of(self, document: Mapping[str, Any]) -> State:
        """Return the state of *document*."""
        status = document.get(self.status)
        if isinstance(status, list):  # a query matches a list that contains its value
            status = next((known for known in (None, *STATUSES) if known in status), status)
        if status is None and not self.is_default:
            return "pending"
        if status is None:
            ended = document.get("processed") is True
            has_reason = document.get(self.reason) is not None
            return ("skipped" if has_reason else "processed") if ended else ("failed" if has_reason else "pending")
        return next((known for known in STATUSES if known == status), "foreign")

"""The queries that select source documents. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from utils.store_protocol import Document, Selection


def selection_filter(selection: Selection) -> Document:
    """Return the query for the documents of *selection*, a missing status counting as pending.

    ``sweep`` adds documents that say processing: their worker died, unless a lease says otherwise.
    Single queries have no status; theirs are ``processed`` and ``status_reason``.
    """
    undone = {"status": None, "processed": {"$ne": True}}
    if selection == "all":
        return {}
    if selection == "failed":
        return {"$or": [{"status": "failed"}, {**undone, "status_reason": {"$ne": None}}]}
    statuses = ["pending", "processing"] if selection == "sweep" else ["pending"]
    return {"$or": [{"status": {"$in": statuses}}, {**undone, "status_reason": None}]}


def range_filter(after: Sequence[Any], bound: Sequence[Any]) -> Document:
    """Return the query for ids after *after* up to *bound*, across BSON types.

    Each holds one id, or none where that side is open; ids may be null, so None cannot say so.
    """
    limits = [{"$gt": ["$_id", {"$literal": value}]} for value in after]
    limits += [{"$lte": ["$_id", {"$literal": value}]} for value in bound]
    return {"$expr": {"$and": limits}} if limits else {}

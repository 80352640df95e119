"""Which results are counted: a ``Slice``, and the stages of MongoDB's aggregation that read times, channels and labels. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal

from storage.extended_json import Document

Period = Literal["day", "week"]

# Years that MongoDB and Python can format, in any time zone. A date outside of them counts as missing.
EARLIEST, LATEST = datetime(1, 1, 3, tzinfo=UTC), datetime(9999, 12, 28, tzinfo=UTC)
FORMATS: dict[Period, str] = {"day": "%Y-%m-%d", "week": "%G-W%V"}  # an ISO week begins on Monday
NO_CHANNEL = ""

LAST, CREATED = "conversation.last_message_at", "created_at"
CHANNEL, MODEL = "conversation.channel", "processing_metadata.model_used"
DIGEST, PROMPT = "processing_metadata.model_digest", "processing_metadata.plan"
BINS = 20  # of confidence


@dataclass(frozen=True, slots=True)
class Slice:
    """A filter of results; the default takes all. It is hashable, so that counts can be cached by it.

    *since* (inclusive) and *until* (exclusive) are aware; a result without a readable time is in no such range.
    *channel* is None for all and NO_CHANNEL for results without one. *labels* are pairs of a field and a label, corrections
    applied. *confidence* is the range, both ends included, of the lowest confidence in a result, 0 to 1; a result without
    confidence is in no range.
    """

    since: datetime | None = None
    until: datetime | None = None
    channel: str | None = None
    labels: tuple[tuple[str, str], ...] = ()
    confidence: tuple[float, float] | None = None
    model: str | None = None

    def match(self, fields: Sequence[str]) -> Document:
        """Return the query for these results; *fields* are those of the taxonomy."""
        parts: list[Document] = []
        if self.since is not None or self.until is not None:
            wanted = {"$gte": self.since or EARLIEST, "$lt": self.until or LATEST}
            # Two parts for results without a last message: MongoDB can look up each in an index, but not both in one $not.
            others = ({LAST: {"$not": limit}, CREATED: wanted} for limit in ({"$gte": EARLIEST}, {"$lt": LATEST}))
            parts.append({"$or": [{LAST: wanted}, *others]})
        parts += self.facts(CHANNEL, MODEL)
        parts += [{f"classification.{field}": {"$eq": label}} for field, label in self.labels]
        if self.confidence is not None:
            lowest = lowest_confidence(fields)
            limits = [{"$gte": [lowest, self.confidence[0]]}, {"$lte": [lowest, self.confidence[1]]}]
            parts.append({"$expr": {"$and": limits}})
        return {"$and": parts} if parts else {}

    def facts(self, channel: str, model: str) -> list[Document]:
        """Return the parts of the query on channel and model, which are at these paths."""
        parts: list[Document] = []
        if self.channel is not None:
            without = {"$expr": {"$or": [{"$ne": [{"$type": f"${channel}"}, "string"]}, {"$eq": [f"${channel}", ""]}]}}
            parts.append(without if self.channel == NO_CHANNEL else {channel: {"$eq": self.channel}})
        if self.model is not None:
            parts.append({model: {"$eq": self.model}})
        return parts


def _if_time(path: str, otherwise: Any) -> Document:
    # Comparisons go by type first, so only dates are between two dates.
    return {"$cond": [{"$and": [{"$gte": [path, EARLIEST]}, {"$lt": [path, LATEST]}]}, path, otherwise]}


# The time of the conversation: of its last message, else of the result; null if neither is a date.
TIME = _if_time(f"${LAST}", _if_time(f"${CREATED}", None))


def period_of(by: Period, time_zone: str) -> Document:
    """Return the expression for the day or ISO week of a result in *time_zone*, such as 2026-11-30 or 2026-W49."""
    return {"$dateToString": {"date": TIME, "format": FORMATS[by], "timezone": time_zone}}


def lowest_confidence(fields: Sequence[str]) -> Document:
    """Return the expression for the lowest confidence in a result, null if it has none."""
    return {"$min": [f"$processing_metadata.confidence.{field}" for field in fields]}


def is_share(expression: Any) -> Document:
    """Return the expression that is true if *expression* is a number from 0 to 1."""
    return {"$and": [{"$gte": [expression, 0]}, {"$lte": [expression, 1]}]}


def confidence_place(fields: Sequence[str]) -> Document:
    """Return the expression for the range of the lowest confidence, from 0 to BINS - 1; null if there is none."""
    lowest = lowest_confidence(fields)
    return {"$cond": [is_share(lowest), {"$min": [BINS - 1, {"$floor": {"$multiply": [BINS, lowest]}}]}, None]}


def confidence_figures(fields: Sequence[str]) -> dict[str, tuple[str, Any]]:
    """Return, for each field, the sum of its confidences and their number: an operator and its expression by name."""
    figures: dict[str, tuple[str, Any]] = {}
    for number, name in enumerate(fields):
        path = f"$processing_metadata.confidence.{name}"
        figures[f"sum_{number}"] = ("$sum", {"$cond": [is_share(path), path, 0]})
        figures[f"n_{number}"] = ("$sum", {"$cond": [is_share(path), 1, 0]})
    return figures


def corrected_results(results: str, fields: Sequence[str], *, with_gold: bool = False) -> list[Document]:
    """Return the stages that make, of corrections, the corrected *results*, each twice.

    Once as the model labelled it, with ``sign`` -1, and once with the latest correction of each field, with ``sign`` 1. So
    sums of signs, added to counts of all results, give counts of the corrected labels. *with_gold* makes each only once, as
    the model labelled it, with the corrections by field as ``gold``.
    """
    stored = "$result.classification"
    of_model = {"$cond": [{"$eq": [{"$type": stored}, "object"]}, stored, {}]}  # $mergeObjects refuses other types
    labels = {"$mergeObjects": [of_model, {"$arrayToObject": "$labels"}]}
    chosen = {"$cond": [{"$eq": ["$sign", 1]}, labels, stored]}
    newest = {"field": "$field", "id": "$source_conversation_id"}
    both: list[Document] = [
        {"$set": {"sign": [-1, 1]}},
        {"$unwind": "$sign"},
        {"$replaceRoot": {"newRoot": {"$mergeObjects": ["$result", {"sign": "$sign", "classification": chosen}]}}},
    ]
    gold = {"$mergeObjects": ["$result", {"gold": {"$arrayToObject": "$labels"}}]}
    return [
        {"$match": {"field": {"$in": list(fields)}}},
        {"$sort": {"at": 1}},
        {"$group": {"_id": newest, "to": {"$last": "$to"}}},
        {"$group": {"_id": "$_id.id", "labels": {"$push": {"k": "$_id.field", "v": "$to"}}}},
        {"$lookup": {"from": results, "localField": "_id", "foreignField": "source_conversation_id", "as": "result"}},
        {"$unwind": "$result"},
        *([{"$replaceRoot": {"newRoot": gold}}] if with_gold else both),
    ]

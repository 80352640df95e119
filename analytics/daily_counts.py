"""The counts of each day, kept in ``<results>_counts``, so that figures over many results read no result.

A document has the counts of one day in one time zone. It also has a stamp: how many results the day had, and the sum of
their times. ``refresh`` compares the stamps with the results, of which it reads only an index, and counts the days that
differ again. So nothing has to be counted when a result is written, replaced or deleted, and counts cannot drift.
Corrections are not part of the counts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime, timedelta, tzinfo
from itertools import combinations
from typing import Any
from zoneinfo import ZoneInfo

from analytics.slices import (
    CHANNEL,
    CREATED,
    DIGEST,
    EARLIEST,
    LAST,
    LATEST,
    MODEL,
    PROMPT,
    TIME,
    Period,
    Slice,
    confidence_figures,
    confidence_place,
    period_of,
)
from error_handler import StoreForbiddenError, StoreRejectedError
from mongo_client import call_repeatedly
from storage.aggregation import aggregated
from storage.extended_json import Document
from storage.mongo_indexes import TIMES_INDEX
from utils.retry_utils import RetryPolicy

LAYOUT = 1  # of the documents; documents of another layout are not read
WINDOW = timedelta(days=7)  # counted in one pass, which has a time limit: a week, or fewer days with WINDOW_RESULTS
WINDOW_RESULTS = 100_000
MARGIN = timedelta(hours=3)  # MongoDB and Python may know different rules of a time zone
MAX_DAYS = 4000  # with results
CONFIDENCE, MODELS = "confidence", "models"
Figures = Mapping[str, tuple[str, Any]]  # by name: an operator ($sum, $min, $max) and its expression
Stamps = dict[str | None, Document]  # by day; None for the results without a readable time


def _milliseconds(path: str) -> Document:
    # Since 2020, so that the sum fits into 64 bits for more results than a collection has.
    number = {"$convert": {"input": path, "to": "long", "onError": 0, "onNull": 0}}
    return {"$subtract": [number, 1_577_836_800_000]}


# A result that is labelled again has another time of labelling. ``--only facts`` adds the time of the last message.
_TIMES = {"$add": [_milliseconds("$processing_metadata.processed_at"), _milliseconds(f"${LAST}")]}


@dataclass(frozen=True, slots=True)
class Kept:
    """The part of the counts that answers a question: the cells of one *kind*, grouped by *key*, with paths in ``$cell``."""

    kind: str
    key: Any

    def of(self, cell: Document) -> Document:
        """Return the key that *cell* counts for; fields that are missing in one are missing in the other."""
        places = {name: path.removeprefix("$").removeprefix("cell.") for name, path in self.key.items()}
        return {name: cell[place] for name, place in places.items() if place in cell}


def of_field(place: int, by: Period) -> Kept:
    """Return the labels of the field at *place* of the taxonomy, by period and channel."""
    return Kept(f"f{place}", {"period": f"${by}", "channel": "$cell.channel", "labels": "$cell.key"})


def of_pair(first: int, second: int) -> Kept:
    """Return the labels of two fields together."""
    if first == second:
        return Kept(f"f{first}", {"first": "$cell.key", "second": "$cell.key"})
    low, high = sorted((first, second))
    one, other = ("key", "other") if first < second else ("other", "key")
    # The order of the names is that of direct counts: MongoDB and BSON tell documents of another order apart.
    return Kept(f"f{low}f{high}", {"first": f"$cell.{one}", "second": f"$cell.{other}"})


OF_CONFIDENCE = Kept(CONFIDENCE, "$cell.key")
OF_MODELS = Kept(MODELS, {"model": "$cell.model", "digest": "$cell.key", "prompt": "$cell.other"})


class DailyCounts:
    """The counts of the collection *results* of *database* with the *fields* of a taxonomy, by days of *time_zone*."""

    def __init__(
        self, database: Any, results: str, fields: Sequence[str], time_zone: str, limit_s: float, policy: RetryPolicy
    ) -> None:
        self.name = f"{results}_counts"
        self._results, self._counts = database[results], database[self.name]
        self._fields = tuple(fields)
        self._day, self._week = period_of("day", time_zone), period_of("week", time_zone)
        self._zone: tzinfo = UTC if time_zone == "UTC" else ZoneInfo(time_zone)
        self._prefix = f"{LAYOUT} {time_zone} {','.join(fields)} "
        self._limit_s, self._policy = limit_s, policy

    async def refresh(self, tell: Callable[[int, int], None]) -> None:
        """Count the days again whose results have changed; *tell* gets how many of how many days are done.

        Raises:
            StoreForbiddenError: The user may not write the collection.
            StoreRejectedError: There are too many days, or a day has too many combinations for one document.
            StoreError: MongoDB fails.
        """
        now = await self._stamps()
        if len(now) > MAX_DAYS:
            raise StoreRejectedError(f"the results are of more than {MAX_DAYS} days")
        kept = {
            one.get("day"): one["stamp"]
            for one in await self._read(self._counts, [{"$match": self._ids()}, {"$project": {"day": 1, "stamp": 1}}])
        }
        if gone := [self._id(day) for day in kept.keys() - now.keys()]:
            await call_repeatedly(
                "remove counts", lambda: self._counts.delete_many({"_id": {"$in": gone}}), self._policy
            )
        stale = {day: stamp["n"] for day, stamp in now.items() if kept.get(day) != stamp}
        done = 0
        for days in _windows(stale):
            tell(done, len(stale))
            await self._read(
                self._results, [*self._counted(days), {"$merge": {"into": self.name, "whenMatched": "replace"}}]
            )
            done += len(days)

    def stages(self, view: Slice, kept: Kept, figures: Figures) -> tuple[list[Document], list[Slice]] | None:
        """Return the stages that read *figures* from the counts, and the parts of days in *view*, to be counted themselves.

        None if the counts cannot answer: *view* filters by label or confidence, or has no whole day.
        """
        if not answers(view):
            return None
        first, end, edges = self._whole_days(view)
        if first is not None and end is not None and first >= end:
            return None
        cells = f"$cells.{kept.kind}"
        return [
            {"$match": self._ids(first, end)},
            {"$project": {"day": 1, "week": 1, "cell": cells}},
            {"$unwind": "$cell"},
            {"$match": {"$and": [{}, *view.facts("cell.channel", "cell.model")]}},
            {"$group": {"_id": kept.key, **{name: {do: f"$cell.{name}"} for name, (do, _) in figures.items()}}},
        ], edges

    async def _stamps(self) -> Stamps:
        """Return the stamp of each day as the results are now."""
        group = {"$group": {"_id": self._day, "n": {"$sum": 1}, "times": {"$sum": _TIMES}}}
        try:
            found = await self._read(self._results, [group], hint=TIMES_INDEX)
        except StoreRejectedError:  # no worker of this version has made the index yet
            found = await self._read(self._results, [group])
        return {one["_id"]: {"n": one["n"], "times": one["times"]} for one in found}

    def _counted(self, days: Sequence[str | None]) -> list[Document]:
        """Return the stages that make the documents of *days*, which are one window."""
        figures = confidence_figures(self._fields)
        times = {"first": ("$min", "$parts.at"), "last": ("$max", "$parts.at")}
        sums = {name: ("$sum", f"$parts.{name}") for name in ("times", *figures)}
        names = ("day", "channel", "model")
        cell = {name: f"$_id.{name}" for name in ("channel", "model", "key", "other")} | {"n": "$n"}
        kind = "$_id.kind"
        more = {
            "$switch": {
                "branches": [
                    {"case": {"$eq": [kind, CONFIDENCE]}, "then": {name: f"${name}" for name in figures}},
                    {"case": {"$eq": [kind, MODELS]}, "then": {name: f"${name}" for name in times}},
                ],
                "default": {},
            }
        }
        return [
            {"$match": self._in_window(days)},
            {
                "$project": {
                    "_id": 0,
                    "day": self._day,
                    "channel": f"${CHANNEL}",
                    "model": f"${MODEL}",
                    "parts": self._parts(figures),
                }
            },
            {"$match": {"day": {"$in": list(days)}}},
            {"$unwind": "$parts"},
            {
                "$group": {
                    "_id": {
                        **{name: f"${name}" for name in names},
                        **{name: f"$parts.{name}" for name in ("kind", "key", "other")},
                    },
                    "n": {"$sum": 1},
                    **{name: {do: one} for name, (do, one) in {**sums, **times}.items()},
                }
            },
            {
                "$group": {
                    "_id": {"day": "$_id.day", "kind": kind},
                    "n": {"$sum": "$n"},
                    "times": {"$sum": "$times"},
                    "cells": {"$push": {"$mergeObjects": [cell, more]}},
                }
            },
            {
                "$group": {
                    "_id": "$_id.day",
                    "n": {"$max": "$n"},  # the same for each kind
                    "times": {"$sum": "$times"},  # only models have it
                    "cells": {"$push": {"k": kind, "v": "$cells"}},
                }
            },
            self._document(),
        ]

    def _document(self) -> Document:
        day = {"$dateFromString": {"dateString": "$_id", "onNull": None}}
        return {
            "$project": {
                "_id": {"$concat": [self._prefix, {"$ifNull": ["$_id", ""]}]},
                "day": "$_id",
                "week": {"$dateToString": {"date": day, "format": "%G-W%V"}},
                "stamp": {"n": "$n", "times": "$times"},
                "cells": {"$arrayToObject": "$cells"},
            }
        }

    def corrected(self, corrections: Sequence[Document], view: Slice) -> list[Document]:
        """Return the stages that count what *corrections* change in *view*: ``_id`` is a cell, ``n`` below 0 takes away.

        *corrections* are the stages of ``corrected_results``.
        """
        names = {"channel": f"${CHANNEL}", "day": self._day, "week": self._week, "parts": self._label_parts()}
        key = {name: f"${name}" for name in ("channel", "day", "week")}
        key |= {name: f"$parts.{name}" for name in ("kind", "key", "other")}
        return [
            *corrections,
            {"$match": view.match(self._fields)},
            {"$project": {"_id": 0, "sign": 1, **names}},
            {"$unwind": "$parts"},
            {"$group": {"_id": key, "n": {"$sum": "$sign"}}},
            {"$match": {"n": {"$ne": 0}}},
        ]

    async def since_newest(self, view: Slice, count: int) -> Slice:
        """Return the last days of *view* that had *count* results or more when they were counted; *view* if none had.

        Also *view* if the user may not read the counts.
        """
        sums = self.stages(view, Kept(MODELS, "$day"), {"n": ("$sum", 1)})
        if sums is None:
            return view
        try:
            days = await self._read(self._counts, sums[0])
        except StoreForbiddenError:  # the counts only save time
            return view
        for one in sorted(days, key=lambda one: one["_id"] or "", reverse=True):
            count -= one["n"]
            if count <= 0 and one["_id"]:
                start = _start(date.fromisoformat(one["_id"]), self._zone)
                return replace(view, since=max(start, view.since or start))
        return view

    def _label_parts(self) -> list[Document]:
        paths = [f"$classification.{name}" for name in self._fields]
        pairs = combinations(range(len(paths)), 2)
        return [
            *({"kind": f"f{place}", "key": path} for place, path in enumerate(paths)),
            *({"kind": f"f{one}f{two}", "key": paths[one], "other": paths[two]} for one, two in pairs),
        ]

    def _parts(self, figures: Figures) -> list[Document]:
        """Return what one result counts for: one element for each cell."""
        return [
            *self._label_parts(),
            {
                "kind": CONFIDENCE,
                "key": confidence_place(self._fields),
                **{name: expression for name, (_, expression) in figures.items()},
            },
            {"kind": MODELS, "key": f"${DIGEST}", "other": f"${PROMPT}", "at": TIME, "times": _TIMES},
        ]

    def _in_window(self, days: Sequence[str | None]) -> Document:
        """Return a query for the results of *days*, and perhaps for some more."""
        if days[0] is None:
            readable = {"$gte": EARLIEST, "$lt": LATEST}
            return {LAST: {"$not": readable}, CREATED: {"$not": readable}}
        first, last = (date.fromisoformat(day) for day in (days[0], days[-1] or days[0]))
        start, end = _start(first, self._zone) - MARGIN, _start(last + timedelta(days=1), self._zone) + MARGIN
        return Slice(max(start, EARLIEST), min(end, LATEST)).match(self._fields)

    def _whole_days(self, view: Slice) -> tuple[date | None, date | None, list[Slice]]:
        """Return the first whole day in *view*, the day after the last one, and the rest of *view*."""
        first = end = None
        edges = []
        if view.since is not None:
            first = _local_day(view.since, self._zone)
            if (start := _start(first, self._zone)) != view.since:
                first += timedelta(days=1)
                edges.append(replace(view, until=_start(first, self._zone)))
        if view.until is not None:
            end = _local_day(view.until, self._zone)
            if (start := _start(end, self._zone)) != view.until:
                edges.append(replace(view, since=start))
        return first, end, edges

    def _ids(self, first: date | None = None, end: date | None = None) -> Document:
        """Return the query for the documents of days from *first* to before *end*; of all days without both."""
        if first is None and end is None:
            return {"_id": {"$gte": self._prefix, "$lt": f"{self._prefix}:"}}  # the colon comes after all digits
        low, high = (first.isoformat() if first else "0"), (end.isoformat() if end else ":")
        return {"_id": {"$gte": self._prefix + low, "$lt": self._prefix + high}}

    def _id(self, day: str | None) -> str:
        return self._prefix + (day or "")

    async def _read(self, collection: Any, stages: list[Document], hint: str | None = None) -> list[Document]:
        return await call_repeatedly(
            f"count in {collection.name}",
            lambda: aggregated(collection, stages, self._limit_s, hint),
            self._policy,
        )


def answers(view: Slice) -> bool:
    """Return whether the counts can answer *view*: a filter by label or confidence needs the results."""
    return not view.labels and view.confidence is None


def _windows(days: Mapping[str | None, int]) -> list[list[str | None]]:
    """Return *days*, with their numbers of results, in windows in order of time; the results without a time are one."""
    found: list[list[str | None]] = []
    start, count = date.min, 0
    for day in sorted(days, key=lambda one: one or ""):
        count += days[day]
        is_near = day is not None and found and found[-1][0] is not None and date.fromisoformat(day) < start + WINDOW
        if is_near and count <= WINDOW_RESULTS:
            found[-1].append(day)
        else:
            found.append([day])
            start, count = date.fromisoformat(day) if day else date.min, days[day]
    return found


def _start(day: date, zone: tzinfo) -> datetime:
    """Return when *day* begins in *zone*, in UTC. If its midnight is skipped, that is the moment of the change."""
    return datetime(day.year, day.month, day.day, tzinfo=zone).astimezone(UTC)


def _local_day(at: datetime, zone: tzinfo) -> date:
    return at.astimezone(UTC).astimezone(zone).date()

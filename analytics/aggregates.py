"""Counts of the labels in a results collection, corrections applied. MongoDB computes them; no result is read one by one.

After ``refresh``, the counts of days answer what they can; the rest is a pass over the results of a ``Slice``. docs/report.md
has the time of each.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal

from analytics.daily_counts import OF_CONFIDENCE, OF_MODELS, DailyCounts, Figures, Kept, answers, of_field, of_pair
from analytics.figures import Confidences, Counts, Example, FieldCounts, Labels, ModelUse
from analytics.slices import (
    BINS,
    CHANNEL,
    DIGEST,
    EARLIEST,
    MODEL,
    PROMPT,
    TIME,
    Period,
    Slice,
    confidence_figures,
    confidence_place,
    corrected_results,
    is_share,
    lowest_confidence,
    period_of,
)
from config import Settings, Taxonomy
from domain.text import one_line
from error_handler import Reason, StoreForbiddenError, StoreRejectedError
from mongo_client import DocumentStore, call_repeatedly
from storage.aggregation import aggregated
from storage.extended_json import Document, id_key
from storage.selection import Selection
from utils.retry_utils import RetryPolicy

LIMIT_S = 600.0  # for one pass
MAX_GROUPS = 20_000  # that one pass returns, the largest first; real taxonomies have some hundreds
MAX_CHARACTERS = 200  # of a label, channel or model
ELLIPSIS = "…"

Order = Literal["confidence", "newest"]
ALL = Slice()


LEFT: tuple[Selection, ...] = ("failed", "skipped")  # the states of documents without labels


@dataclass(frozen=True, slots=True)
class Question:
    """One thing to count: *key* and *more* are expressions over a result; *kept* names the same in the counts of days."""

    key: Any
    kept: Kept
    more: Figures = field(default_factory=dict)


class LabelAnalytics:
    """Counts the results of *store* with the fields of *taxonomy*.

    Every method raises StoreError if MongoDB fails. *time_zone* is an Olson name, in which days and weeks begin.
    """

    def __init__(
        self,
        store: DocumentStore,
        settings: Settings,
        taxonomy: Taxonomy,
        time_zone: str = "UTC",
        limit_s: float = LIMIT_S,
    ) -> None:
        self.taxonomy, self.time_zone = taxonomy, time_zone
        self.fields = taxonomy.field_names
        self._limit_s = limit_s
        options = store.database.codec_options.with_options(tz_aware=True)
        self._database = store.database.client.get_database(store.database.name, codec_options=options)
        self._results_name = settings.results_collection
        self._corrections_name = f"{settings.results_collection}_corrections"
        self._source_name, self._states = settings.source_collection, store.states
        self._policy = RetryPolicy(settings.mongodb_max_retries, settings.mongodb_backoff_s)
        self._days = DailyCounts(
            self._database, settings.results_collection, self.fields, time_zone, limit_s, self._policy
        )
        self._has_counts = False
        self._corrected_cells: dict[Slice, list[Document]] = {}  # until the next refresh
        self._one = asyncio.Lock()

    async def refresh(self, view: Slice, tell: Callable[[int, int], None]) -> str:
        """Bring the counts of days up to date, which then answer; *tell* gets how many of how many days are done.

        Return a sentence if *view* is counted from the results all the same, which takes longer; empty if not.
        """
        self._has_counts = False
        self._corrected_cells.clear()
        if not answers(view):
            return "A view of one label or of a range of confidence is counted from the results, which takes longer."
        try:
            await self._days.refresh(tell)
        except StoreForbiddenError:
            return f"The figures are counted from the results, which takes longer: no right to read and write {self._days.name}."
        except StoreRejectedError as exc:
            return f"The figures are counted from the results, which takes longer: {exc}."
        self._has_counts = True
        return ""

    async def field_counts(
        self, name: str, by: Period = "week", view: Slice = ALL, *, is_corrected: bool = True
    ) -> FieldCounts:
        """Return the labels of the field *name* in *view*, by period and by channel; those of the model, unless *is_corrected*."""
        key = {"period": period_of(by, self.time_zone), "channel": f"${CHANNEL}", "labels": f"$classification.{name}"}
        question = Question(key, of_field(self.fields.index(name), by))
        groups = await self._grouped(view, question, is_corrected=is_corrected)
        found = FieldCounts(name, is_cut=len(groups) == MAX_GROUPS)
        for group in groups:
            key, n = group["_id"], group["n"]
            labels = labels_of(key.get("labels"))
            if labels is None:
                continue
            found.total.add(labels, n)
            if period := key.get("period"):
                found.periods.setdefault(period, Counts()).add(labels, n)
            found.channels.setdefault(text_of(key.get("channel")), Counts()).add(labels, n)
        found.periods = dict(sorted(found.periods.items()))
        found.channels = dict(sorted(found.channels.items(), key=lambda item: (-item[1].n, item[0])))
        return found

    async def crossed(
        self, first: str, second: str, view: Slice = ALL
    ) -> tuple[Counter[tuple[str, str]], Counter[str]]:
        """Return how many results of *view* have each label of the field *first* with each of *second*, and with any."""
        key = {"first": f"$classification.{first}", "second": f"$classification.{second}"}
        question = Question(key, of_pair(self.fields.index(first), self.fields.index(second)))
        counts, totals = Counter[tuple[str, str]](), Counter[str]()
        for group in await self._grouped(view, question):
            others = labels_of(group["_id"].get("second"))
            if others is None:
                continue
            for one in labels_of(group["_id"].get("first")) or ():
                totals[one] += group["n"]
                for other in others:
                    counts[one, other] += group["n"]
        return counts, totals

    async def confidences(self, view: Slice = ALL) -> Confidences:
        """Return the confidence of the model in the results of *view*."""
        sums, bins, without, totals = confidence_figures(self.fields), [0] * BINS, 0, Counter[str]()
        question = Question(confidence_place(self.fields), OF_CONFIDENCE, sums)
        for group in await self._grouped(view, question, is_corrected=bool(view.labels)):
            if group["_id"] is None:
                without += group["n"]
            else:
                bins[int(group["_id"])] += group["n"]
            totals.update({name: group[name] for name in sums})
        means = {
            name: totals[f"sum_{number}"] / totals[f"n_{number}"]
            for number, name in enumerate(self.fields)
            if totals[f"n_{number}"] > 0
        }
        return Confidences(tuple(bins), means, without)

    async def models(self, view: Slice = ALL) -> list[ModelUse]:
        """Return which models labelled the results of *view*, with which prompts; the most frequent first."""
        key = {"model": f"${MODEL}", "digest": f"${DIGEST}", "prompt": f"${PROMPT}"}
        question = Question(key, OF_MODELS, {"first": ("$min", TIME), "last": ("$max", TIME)})
        return [
            ModelUse(
                model=text_of(one["_id"].get("model")),
                digest=text_of(one["_id"].get("digest")),
                prompt=text_of(one["_id"].get("prompt")),
                n=one["n"],
                first=time_of(one["first"]),
                last=time_of(one["last"]),
            )
            for one in await self._grouped(view, question, is_corrected=bool(view.labels))
        ]

    async def failures(self) -> dict[str, Counter[str]]:
        """Return the reasons of the source documents that are ``failed`` and ``skipped`` now, whatever their time."""
        path = f"${self._states.reason}"
        reason = {"$cond": [{"$eq": [{"$type": path}, "string"]}, path, ""]}
        group = {"$group": {"_id": {"$arrayElemAt": [{"$split": [reason, ":"]}, 0]}, "n": {"$sum": 1}}}
        found: dict[str, Counter[str]] = {}
        for state in LEFT:
            counts = found[state] = Counter[str]()
            for one in await self._read(self._source_name, [{"$match": self._states.queries[state]}, group, *LARGEST]):
                counts[one["_id"] if one["_id"] in _REASONS else "other"] += one["n"]
        return found

    async def gold_pairs(self, name: str, view: Slice = ALL) -> Counter[tuple[Labels, Labels]]:
        """Return how often the field *name* has each pair of a gold label and a label of the model in the control sample.

        It is a random sample of the results of *view* only if *view* has no labels.
        """
        stages: list[Document] = [
            {"$match": {"field": name, "sampling_probability": {"$ne": None}}},
            *corrected_results(self._results_name, [name], with_gold=True),
            {"$match": view.match(self.fields)},
            {"$group": {"_id": {"gold": f"$gold.{name}", "model": f"$classification.{name}"}, "n": {"$sum": 1}}},
            *LARGEST,
        ]
        pairs: Counter[tuple[Labels, Labels]] = Counter()
        for one in await self._read(self._corrections_name, stages):
            gold, model = labels_of(one["_id"].get("gold")), labels_of(one["_id"].get("model"))
            if gold is not None and model is not None:
                pairs[gold, model] += one["n"]
        return pairs

    async def corrected(self, view: Slice = ALL) -> int:
        """Return how many results of *view* have a decision of a person."""
        stages = [*self._corrections(), {"$match": {"$and": [{"sign": 1}, view.match(self.fields)]}}, {"$count": "n"}]
        return sum(one["n"] for one in await self._read(self._corrections_name, stages))

    async def examples(self, view: Slice = ALL, order: Order = "confidence", limit: int = 20) -> list[Example]:
        """Return up to *limit* results of *view*: those with the lowest confidence, not corrected; or the newest."""
        lowest = lowest_confidence(self.fields)
        sort = {"confidence": 1} if order == "confidence" else {"at": -1}
        shown = {"source_conversation_id": 1, "conversation_number": 1, "classification": 1, MODEL: 1}
        project = {"$project": {**shown, "at": TIME, "confidence": {"$cond": [is_share(lowest), lowest, None]}}}
        known: Document = {"confidence": {"$ne": None}} if order == "confidence" else {}
        decisions = {
            "from": self._corrections_name,
            "localField": "source_conversation_id",
            "foreignField": "source_conversation_id",
            "as": "decisions",
        }
        decided: list[Document] = [{"$group": {"_id": "$source_conversation_id"}}, {"$count": "n"}]
        most = limit + sum(one["n"] for one in await self._read(self._corrections_name, decided))
        stages: list[Document] = [
            project,
            {"$match": known},
            {"$sort": sort},
            {"$limit": most},
            {"$lookup": decisions},
            {"$match": {"decisions.field": {"$nin": list(self.fields)}}},
            {"$limit": limit},
        ]
        of_model: list[Document] = []
        parts = [await self._days.since_newest(view, most), view] if order == "newest" else [view]
        for part in dict.fromkeys(parts):
            if len(of_model) < limit:  # fewer only if results were deleted after they were counted
                match = {"$match": part.match(self.fields)}
                of_model = await self._read(self._results_name, [match, *stages])
        found = [self._example(one, "model") for one in of_model]
        if order == "newest":
            human = [*self._corrections(), {"$match": {"$and": [{"sign": 1}, view.match(self.fields)]}}, project]
            corrected = await self._read(self._corrections_name, [*human, {"$sort": sort}, {"$limit": limit}])
            found += [self._example(one, "human") for one in corrected]
            found.sort(key=lambda one: one.at or EARLIEST, reverse=True)
        return found[:limit]

    def _example(self, result: Document, source: Literal["model", "human"]) -> Example:
        stored = result.get("classification")
        stored = stored if isinstance(stored, dict) else {}
        labels = {name: labels_of(stored.get(name)) for name in self.fields}
        number, metadata = result.get("conversation_number"), result.get("processing_metadata")
        return Example(
            result.get("source_conversation_id"),
            "" if number is None else text_of(str(number)),
            {name: found for name, found in labels.items() if found is not None},
            result.get("confidence"),
            text_of(metadata.get("model_used") if isinstance(metadata, dict) else None),
            time_of(result.get("at")),
            source,
        )

    def _corrections(self) -> list[Document]:
        return corrected_results(self._results_name, self.fields)

    async def _grouped(self, view: Slice, question: Question, *, is_corrected: bool = True) -> list[Document]:
        """Return ``{_id, n}`` and the further figures for each key of *question* in *view*, the largest first."""
        figures = {"n": ("$sum", 1), **question.more}
        reads = self._reads(view, question, figures)
        if is_corrected and self._has_counts and answers(view) and not question.more:
            return with_changes(await self._united(reads, figures), await self._changes(view), question.kept)
        if is_corrected and await self._has_corrections():
            signed = {
                name: {do: {"$multiply": ["$sign", one]} if do == "$sum" else one}
                for name, (do, one) in figures.items()
            }
            match = {"$match": view.match(self.fields)}
            reads.append(
                (self._corrections_name, [*self._corrections(), match, {"$group": {"_id": question.key, **signed}}])
            )
        return await self._united(reads, figures)

    async def _united(self, reads: Sequence[tuple[str, list[Document]]], figures: Figures) -> list[Document]:
        (first, stages), *others = reads
        if others:
            stages = [*stages, *({"$unionWith": {"coll": name, "pipeline": part}} for name, part in others)]
            totals = {name: {do: f"${name}"} for name, (do, _) in figures.items()}
            stages += [{"$group": {"_id": "$_id", **totals}}, {"$match": {"n": {"$gt": 0}}}]
        return await self._read(first, [*stages, *LARGEST])

    async def _changes(self, view: Slice) -> list[Document]:
        """Return what corrections change in the counts of *view*: read once for all questions."""
        async with self._one:
            if view not in self._corrected_cells:
                stages = self._days.corrected(self._corrections(), view)
                self._corrected_cells[view] = await self._read(self._corrections_name, stages)
            return self._corrected_cells[view]

    def _reads(self, view: Slice, question: Question, figures: Figures) -> list[tuple[str, list[Document]]]:
        """Return what to read for *figures* as the model labelled the results: names of collections with stages."""

        def of_results(part: Slice) -> tuple[str, list[Document]]:
            group = {"_id": question.key, **{name: {do: one} for name, (do, one) in figures.items()}}
            return self._results_name, [{"$match": part.match(self.fields)}, {"$group": group}]

        kept = self._days.stages(view, question.kept, figures) if self._has_counts else None
        if kept is None:
            return [of_results(view)]
        stages, edges = kept
        return [(self._days.name, stages), *map(of_results, edges)]

    async def _has_corrections(self) -> bool:
        return bool(await self._read(self._corrections_name, [{"$limit": 1}, {"$project": {"_id": 1}}]))

    async def _read(self, name: str, stages: list[Document]) -> list[Document]:
        collection = self._database[name]
        return await call_repeatedly(
            f"count in {name}", lambda: aggregated(collection, stages, self._limit_s), self._policy
        )


LARGEST: tuple[Document, ...] = ({"$sort": {"n": -1}}, {"$limit": MAX_GROUPS})
_REASONS = frozenset(Reason)


def with_changes(groups: Sequence[Document], changes: Sequence[Document], kept: Kept) -> list[Document]:
    """Return *groups* with the counts of the cells *changes* added, as *kept* groups them."""
    found = {id_key(one["_id"]): one for one in groups}
    for change in changes:
        if change["_id"]["kind"] == kept.kind:
            key = kept.of(change["_id"])
            found.setdefault(id_key(key), {"_id": key, "n": 0})["n"] += change["n"]
    return [one for one in found.values() if one["n"] > 0]


def labels_of(value: Any) -> Labels | None:
    """Return the labels in *value*, a text or a list of texts, each as ``text_of`` returns it; None if it is neither."""
    if isinstance(value, str):
        return (text_of(value),)
    if isinstance(value, list) and all(isinstance(label, str) for label in value):
        return tuple(sorted({text_of(label) for label in value}))
    return None


def text_of(value: Any) -> str:
    """Return *value*; empty if it is no text.

    A long or unprintable one becomes one short line that ends with an ellipsis, because a filter with it finds nothing.
    """
    if not isinstance(value, str):
        return ""
    if len(value) <= MAX_CHARACTERS and value.isprintable():
        return value
    return one_line(value, MAX_CHARACTERS - 1).removesuffix(ELLIPSIS) + ELLIPSIS


def time_of(value: Any) -> datetime | None:
    """Return *value* if it is a date, aware."""
    return value if isinstance(value, datetime) else None

"""The review queue: which conversation a reviewer gets next, and what follows from a decision.

A queue works on a pool, a random sample of the results. Most turns take the conversation of the pool that is most worth a
look. A fixed share of the turns, the control sample, takes the next one in random order instead. Whether the control
sample draws a conversation must not depend on whether it was reviewed for another reason: one that was decided already is
recorded as drawn, and the draw goes on. So the control sample is a uniform sample of all results.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

from aggregator import aggregate_conversation
from config import Settings, Taxonomy
from config.review_settings import ReviewSettings
from domain.conversation import Classification, Conversation
from embedded.choice import open_classifier
from error_handler import ConfigurationError, ReviewConflictError, ReviewLabelError, SkippedDocumentError
from mongo_client import DocumentStore
from review.corrections import CorrectionStore
from review.labels import Correction, Label, Source, fingerprint_of
from review.leases import ReviewLeases
from review.ranking import StudentOpinion, is_control_turn, is_double, label_shares, worth_of_a_look
from review.student_opinion import AskStudent, open_student_opinion
from storage.extended_json import Document, id_key

POOL = 200  # results; the embedded classifier labels each of their conversations
_PAGE = 50  # documents in memory at once
SERVED_PER_POOL = 50  # in a large collection, the last ones of a pool are worth less than the first ones of another
_RESULT_FIELDS = (
    *("source_conversation_id", "conversation_number", "classification"),
    *("processing_metadata.confidence", "processing_metadata.fingerprint"),
)

SecondOpinion = Callable[[Conversation], Classification]


@dataclass(frozen=True, slots=True)
class Options:
    """Shares of 0 to 1: of *control* turns, and of conversations that two reviewers decide (*double*)."""

    control: float
    double: float
    lease_s: float

    @classmethod
    def of(cls, settings: ReviewSettings) -> Options:
        """Return the options in *settings*."""
        return cls(settings.control_share, settings.double_share, settings.lease_s)


@dataclass(frozen=True, slots=True)
class ReviewItem:
    """A conversation to review: its *labels* are those of the model, by field."""

    source_id: Any
    conversation: Conversation
    labels: dict[str, Label]


@dataclass(slots=True)
class _Candidate:
    """*seen* is what the lease records; *decided_by* is the one reviewer who has decided already, if any."""

    source_id: Any
    seen: Document
    worth: float = 0.0
    decided_by: str | None = None


@dataclass(slots=True)
class _Pool:
    """Candidates in the order in which they are served; *left* is the number to serve before the next pool."""

    second: list[_Candidate] = field(default_factory=list)
    by_worth: list[_Candidate] = field(default_factory=list)
    at_random: list[_Candidate] = field(default_factory=list)
    left: int = 0


class ReviewQueue:
    """Gives conversations to reviewers and stores their decisions. Every method raises StoreError if MongoDB fails."""

    def __init__(self, store: DocumentStore, settings: Settings, taxonomy: Taxonomy, options: Options) -> None:
        self.corrections = CorrectionStore(store, settings)
        self.taxonomy = taxonomy
        self._leases = ReviewLeases(store, settings, options.lease_s)
        self._store = store
        self._results = store.database[settings.results_collection]
        self._options = options
        self._second_opinion: SecondOpinion | None = None  # see open
        self._ask_student: AskStudent | None = None
        self._directory = settings.batch_files_dir
        self._pool = _Pool()
        self._served = random.randrange(1_000_000)  # so that short sessions have control turns as well
        self._skipped: dict[str, set[bytes]] = {}
        self._filling = asyncio.Lock()
        self._is_open = False

    async def open(self) -> None:
        """Connect, create the indexes of the corrections, and load the student, or without one the embedded classifier."""
        async with self._filling:
            if not self._is_open:
                await self._store.check()
                self._ask_student = await asyncio.to_thread(open_student_opinion, self._directory, self.taxonomy)
                if self._ask_student is None:
                    self._second_opinion = await asyncio.to_thread(_second_opinion, self.taxonomy)
                await self.corrections.ensure_indexes()
                self._is_open = True

    async def next(self, reviewer: str) -> ReviewItem | None:
        """Lease a conversation to *reviewer* and return it: the one held already, or the next; None if none is left."""
        await self.open()
        async with self._filling:  # two windows of one reviewer could ask at once
            held = await self._leases.held_by(reviewer)
            if held is not None and (item := await self._item(held["_id"], held["labels"])):
                return item
            if self._pool.left > 0 and (item := await self._served_to(reviewer)):
                return item
            await self._fill()
            return await self._served_to(reviewer)

    async def decide(self, reviewer: str, source_id: Any, labels: Mapping[str, Label], note: str = "") -> None:
        """Store the decision of *reviewer*: *labels* by field; a label that is the model's own is accepted.

        Raises:
            ReviewConflictError: The reviewer does not hold the conversation.
            ReviewLabelError: A field or a label is not in the taxonomy.
        """
        await self.open()
        lease = await self._leases.renew(source_id, reviewer)
        if lease is None:
            raise ReviewConflictError("You do not hold this conversation any more; get the next one.")
        seen: dict[str, Label] = lease["labels"]
        for name, label in labels.items():
            if label != seen.get(name):
                self._require_known(name, label, seen.get(name))
        base = Correction(
            source_conversation_id=source_id,
            conversation_number=lease.get("conversation_number"),
            field="",
            label_from=None,
            label_to="",
            reviewer=reviewer,
            at=datetime.now(UTC),
            source=lease["source"],
            sampling_probability=lease.get("sampling_probability"),
            result_fingerprint=lease.get("result_fingerprint"),
            note=note,
        )
        decisions = [replace(base, field=name, label_from=seen.get(name), label_to=labels[name]) for name in labels]
        await self.corrections.record(decisions)
        await self._leases.release(source_id, reviewer)

    async def skip(self, reviewer: str, source_id: Any) -> None:
        """Give the conversation back; *reviewer* does not get it again from this queue."""
        self._skipped.setdefault(reviewer, set()).add(id_key(source_id))
        await self._leases.release(source_id, reviewer)

    async def undo(self, reviewer: str) -> ReviewItem | None:
        """Remove the last decision of *reviewer* and lease its conversation again; None if there is none."""
        await self.open()
        removed = await self.corrections.undo(reviewer)
        if not removed:
            return None
        first = removed[0]
        labels = {one.field: one.label_from for one in removed if one.label_from is not None}
        seen = _seen(labels, first.conversation_number, first.result_fingerprint, first.source)
        if first.sampling_probability is not None:
            seen["sampling_probability"] = first.sampling_probability
        if not await self._leases.take(first.source_conversation_id, reviewer, seen):
            return await self.next(reviewer)
        return await self._item(first.source_conversation_id, labels)

    async def _served_to(self, reviewer: str) -> ReviewItem | None:
        for candidate in self._turn(reviewer):
            if item := await self._take(candidate, reviewer):
                self._served += 1
                self._pool.left -= 1
                return item
        return None

    async def _take(self, candidate: _Candidate, reviewer: str) -> ReviewItem | None:
        """Lease *candidate* unless somebody else has it, or it is decided already."""
        if not await self._leases.take(candidate.source_id, reviewer, candidate.seen):
            if probability := candidate.seen.get("sampling_probability"):
                await self._leases.add_to_control_sample(candidate.source_id, probability)
            return None
        # After the lease: who decided before has ended theirs.
        if await self._is_open_for(reviewer, candidate):
            item = await self._item(candidate.source_id, candidate.seen["labels"])
            if item is not None:
                return item
        await self._leases.release(candidate.source_id, reviewer)
        return None

    async def _is_open_for(self, reviewer: str, candidate: _Candidate) -> bool:
        key = id_key(candidate.source_id)
        decided = (await self.corrections.of([candidate.source_id])).get(key, [])
        reviewers = {one.reviewer for one in decided}
        if probability := candidate.seen.get("sampling_probability") if decided else None:
            await self.corrections.add_to_control_sample([candidate.source_id], probability)
        needed = 2 if is_double(key, self._options.double) else 1
        return reviewer not in reviewers and len(reviewers) < needed

    def _turn(self, reviewer: str) -> Iterator[_Candidate]:
        """Yield the candidates of one turn, the first choice first. Those of the pool are yielded once."""
        pool, skipped = self._pool, self._skipped.get(reviewer, set())
        is_control = is_control_turn(self._served, self._options.control)
        for queue in (*([pool.at_random] if is_control else []), pool.second, pool.by_worth):
            passed = []
            while queue:
                candidate = queue.pop(0)
                if candidate.decided_by == reviewer or id_key(candidate.source_id) in skipped:
                    passed.append(candidate)  # for another reviewer
                    continue
                queue[:0] = passed
                passed = []
                yield candidate
            queue[:0] = passed

    async def _item(self, source_id: Any, labels: dict[str, Label]) -> ReviewItem | None:
        """Return the conversation with its *labels*; None if it is gone or has no text."""
        for document in await self._store.read_documents("all", [source_id]):
            try:
                return ReviewItem(source_id, aggregate_conversation(document), labels)
            except SkippedDocumentError:
                break
        return None

    def _require_known(self, name: str, label: Label, seen: Label | None) -> None:
        if name not in self.taxonomy.field_names:
            raise ReviewLabelError("labels: a field is not in the taxonomy; use those of the conversation.")
        labels = label if isinstance(label, list) else [label]
        is_multiple = self.taxonomy.field(name).is_multiple if seen is None else isinstance(seen, list)
        if isinstance(label, list) is not is_multiple:
            raise ReviewLabelError(f"labels: {name} needs {'a list' if is_multiple else 'one label'}.")
        known = {*self.taxonomy.names(name), *(seen if isinstance(seen, list) else ())}
        if not set(labels) <= known or len(set(labels)) != len(labels):
            raise ReviewLabelError(f"labels: {name} has a label that is not in the taxonomy, or one twice.")

    async def _fill(self) -> None:
        """Draw a new pool."""
        call = self.corrections.call
        total = max(1, await call("count the results", self._results.estimated_document_count))
        drawn = await self._read_results([{"$sample": {"size": POOL}}])
        ids = {id_key(one["source_conversation_id"]) for one in drawn}
        decided = await self.corrections.of(one["source_conversation_id"] for one in drawn)
        if total > POOL and len(decided) > len(drawn) // 2:  # most of a large collection is reviewed
            more = await self._read_results(self._undecided())
            drawn += [one for one in more if id_key(one["source_conversation_id"]) not in ids]
        candidates = await self._judged(drawn)
        at_random = [one for one in candidates if id_key(one.source_id) in ids]
        random.shuffle(at_random)
        self._pool = _Pool(
            second=await self._second_candidates(),
            by_worth=sorted(candidates, key=lambda one: -one.worth),
            at_random=[_drawn(one, 1 / total) for one in at_random],
            left=SERVED_PER_POOL,
        )

    def _undecided(self) -> list[Document]:
        """Return the stages for results without a decision. They are no random draw: the control sample omits them."""
        key = "source_conversation_id"
        lookup = {"from": self.corrections.name, "localField": key, "foreignField": key, "as": "decisions"}
        return [{"$lookup": lookup}, {"$match": {"decisions": []}}, {"$limit": POOL}]

    async def _read_results(self, stages: list[Document]) -> list[Document]:
        """Return the results that *stages* make, each conversation once, with the _RESULT_FIELDS."""
        stages = [*stages, {"$project": dict.fromkeys(_RESULT_FIELDS, 1)}]

        async def read() -> list[Document]:
            return [one async for one in await self._results.aggregate(stages)]

        found = await self.corrections.call("read results", read)
        usable = [
            one for one in found if isinstance(one.get("classification"), dict) and "source_conversation_id" in one
        ]
        return list({id_key(one["source_conversation_id"]): one for one in usable}.values())

    async def _judged(self, results: list[Document]) -> list[_Candidate]:
        """Return the candidates of *results* whose conversations are there, with their worth."""
        fields = self.taxonomy.field_names
        shares = label_shares(results, fields)
        sizes = {name: len(self.taxonomy.names(name)) for name in fields}
        by_key = {id_key(one["source_conversation_id"]): one for one in results}
        candidates = []
        for start in range(0, len(results), _PAGE):
            ids = [one["source_conversation_id"] for one in results[start : start + _PAGE]]
            documents = await self._store.read_documents("all", ids)
            labelled = await asyncio.to_thread(self._opinions, documents)
            for document, (second, student) in zip(documents, labelled, strict=True):
                result = by_key[id_key(document["_id"])]
                worth = worth_of_a_look(result, shares, sizes, second, student)
                candidates.append(_Candidate(document["_id"], self._seen(result, worth.source), worth.value))
        return candidates

    def _opinions(self, documents: list[Document]) -> list[tuple[dict[str, Any] | None, StudentOpinion | None]]:
        """Return the labels of the embedded classifier, or the opinion of the student, on each of *documents* with text."""
        opinions: list[tuple[dict[str, Any] | None, StudentOpinion | None]] = []
        for document in documents:
            second = student = None
            with contextlib.suppress(SkippedDocumentError):
                conversation = aggregate_conversation(document)
                if self._ask_student is not None:
                    student = self._ask_student(conversation)
                elif self._second_opinion is not None:
                    second = self._second_opinion(conversation).as_dict()
            opinions.append((second, student))
        return opinions

    async def _second_candidates(self) -> list[_Candidate]:
        """Return the conversations that one reviewer has decided and another one should."""
        once = await self.corrections.decided_once()
        ids = [source_id for source_id, _ in once if is_double(id_key(source_id), self._options.double)][:POOL]
        first = {key: found[0] for key, found in (await self.corrections.of(ids)).items()}
        query = {"source_conversation_id": {"$in": ids}}
        candidates = []
        for result in await self._read_results([{"$match": query}]) if ids else ():
            source_id = result["source_conversation_id"]
            if decision := first.get(id_key(source_id)):
                candidate = _Candidate(source_id, self._seen(result, decision.source), decided_by=decision.reviewer)
                candidates.append(_drawn(candidate, decision.sampling_probability, decision.source))
        return candidates

    def _seen(self, result: Document, source: Source) -> Document:
        given = result["classification"]
        labels = {name: given[name] for name in self.taxonomy.field_names if isinstance(given.get(name), str | list)}
        return _seen(labels, result.get("conversation_number"), fingerprint_of(result), source)


def _seen(labels: dict[str, Label], number: str | None, fingerprint: str | None, source: Source) -> Document:
    return {"labels": labels, "conversation_number": number, "result_fingerprint": fingerprint, "source": source}


def _drawn(candidate: _Candidate, probability: float | None, source: Source = "random") -> _Candidate:
    """Return *candidate* as one of the control sample, unless *probability* is None."""
    if probability is None:
        return candidate
    return replace(candidate, seen={**candidate.seen, "source": source, "sampling_probability": probability})


def _second_opinion(taxonomy: Taxonomy) -> SecondOpinion | None:
    """Return the built-in classifier; None if it cannot use *taxonomy*."""
    try:
        classifier = open_classifier(taxonomy)
    except ConfigurationError:
        return None
    return lambda conversation: classifier.answer(conversation).classification

"""Reads what a student learns from: results with their conversations and corrections, and the vectors of the conversations."""

from __future__ import annotations

import asyncio
import os
import time
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from aggregator import aggregate_conversation
from config import Settings, Taxonomy
from domain.conversation import Conversation, is_student
from embedded.minilm import Encoder
from error_handler import SkippedDocumentError
from evaluation.sources import Collections
from mongo_client import DocumentStore
from review.corrections import CorrectionStore
from review.labels import read_labels
from review.ranking import confidence_of
from storage.extended_json import Document, id_key
from student.features import Numbers, features_of
from student.training import Example
from student.vector_cache import VectorCache
from utils.retry_utils import RetryPolicy
from worker.staleness import Plan

PAGE = 500
CHUNK = 16  # conversations of one thread at a time; 32 short ones take a tenth longer
THREADS = 4
LINE_EVERY_S = 5.0
FIELDS = (
    *("source_conversation_id", "classification"),
    *(
        f"processing_metadata.{name}"
        for name in ("confidence", "model_used", "model_digest", "fingerprint", "input_sha256")
    ),
)
OTHER, BY_STUDENT, GONE, TWICE, UNKNOWN = (
    "of another model, prompt or taxonomy",
    "by a student",
    "without their conversation, or it has changed",
    "of an identical conversation",
    "with labels that are not in the taxonomy",
)


@dataclass(slots=True)
class Lessons:
    """Distinct conversations with the labels of one model, and their features in the same order.

    *left_out* counts the other results by reason, *models* the results by ``model_used``; *embedded* conversations had no
    vector yet, which took *embedding_s*.
    """

    examples: list[Example] = field(default_factory=list)
    rows: list[Numbers] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)
    models: Counter[str] = field(default_factory=Counter)
    embedded: int = 0
    embedding_s: float = 0.0

    @property
    def features(self) -> Numbers:
        """The features, a row for each example."""
        return np.stack(self.rows) if self.rows else np.empty((0, 0), np.float32)


class LessonReader:
    """Reads the newest results of *plan*; *tell* gets a line each LINE_EVERY_S."""

    def __init__(
        self, store: DocumentStore, settings: Settings, taxonomy: Taxonomy, plan: Plan, tell: Callable[[str], None]
    ) -> None:
        self._store = store
        self._corrections = CorrectionStore(store, settings)
        self._collections = Collections(store, RetryPolicy(settings.mongodb_max_retries, settings.mongodb_backoff_s))
        self._name = settings.results_collection
        self._taxonomy, self._plan, self._tell = taxonomy, plan, tell

    async def read(self, limit: int, encoder: Encoder, cache: VectorCache) -> Lessons:
        """Return the lessons in the *limit* newest results; vectors that *cache* lacks are computed and stored."""
        found, seen, read = Lessons(), set[str](), 0
        total = min(limit, await self._store.count_results())
        after: Document = {}
        shown_s = time.monotonic()
        with ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1)) as threads:
            while read < limit:
                options: dict[str, Any] = {
                    "sort": [("_id", -1)],
                    "limit": min(PAGE, limit - read),
                    "hint": [("_id", 1)],
                }
                page = await self._collections.find(self._name, after, FIELDS, **options)
                if not page:
                    break
                after = {"$expr": {"$lt": ["$_id", {"$literal": page[-1]["_id"]}]}}
                read += len(page)
                await self._add(found, seen, page, _Embedding(encoder, cache, threads))
                if time.monotonic() - shown_s >= LINE_EVERY_S:
                    shown_s = time.monotonic()
                    self._tell(
                        f"student: {read:,} of {max(total, read):,} results read, {found.embedded:,} conversations embedded"
                    )
        return found

    async def _add(self, found: Lessons, seen: set[str], page: list[Document], embedding: _Embedding) -> None:
        candidates = [result for result in page if self._is_candidate(result, found)]
        ids = [result["source_conversation_id"] for result in candidates]
        documents = await self._store.read_documents("all", ids)
        conversations = await asyncio.to_thread(_conversations, documents)
        corrections = await self._corrections.of(ids)
        new: list[tuple[Example, Conversation]] = []
        for result in candidates:
            key = id_key(result["source_conversation_id"])
            conversation = conversations.get(key)
            metadata = result["processing_metadata"]
            if conversation is None or conversation.transcript_sha256 != metadata.get("input_sha256"):
                found.left_out[GONE] += 1
            elif not self._plan.made(metadata, conversation.transcript_sha256):
                found.left_out[OTHER] += 1
            elif conversation.transcript_sha256 in seen:
                found.left_out[TWICE] += 1
            else:
                read = read_labels(result, corrections.get(key, []))
                corrected = {name: read.labels[name] for name in read.human_fields}
                if not self._are_known(result["classification"]) or not self._are_known(read.labels):
                    found.left_out[UNKNOWN] += 1
                    continue
                seen.add(conversation.transcript_sha256)
                found.models[str(metadata.get("model_used"))] += 1
                new.append((_example(result, conversation, corrected), conversation))
        start_s = time.monotonic()
        vectors = await embedding.of([conversation for _, conversation in new])
        found.embedding_s += time.monotonic() - start_s
        found.embedded += embedding.computed
        found.examples += [example for example, _ in new]
        found.rows += [vectors[example.input_sha256] for example, _ in new]

    def _is_candidate(self, result: Document, found: Lessons) -> bool:
        metadata = result.get("processing_metadata")
        is_ours = "source_conversation_id" in result and isinstance(result.get("classification"), Mapping)
        if not is_ours or not isinstance(metadata, Mapping):
            found.left_out[OTHER] += 1
        elif is_student(metadata.get("model_used")):
            found.left_out[BY_STUDENT] += 1
        else:
            return True
        return False

    def _are_known(self, labels: Mapping[str, Any]) -> bool:
        """Return whether *labels* has a label, or a list of them, of the taxonomy for each field."""
        for one in self._taxonomy.fields:
            label = labels.get(one.name)
            given = label if isinstance(label, list) else [label]
            if isinstance(label, list) is not one.is_multiple or not all(each in one.names for each in given):
                return False
        return True


class _Embedding:
    """Looks vectors up, and computes those that are missing in several threads, each with one thread of BLAS."""

    def __init__(self, encoder: Encoder, cache: VectorCache, threads: ThreadPoolExecutor) -> None:
        self._encoder, self._cache, self._threads = encoder, cache, threads
        self.computed = 0

    async def of(self, conversations: list[Conversation]) -> dict[str, Numbers]:
        """Return the features of *conversations* by their hash."""
        known = await asyncio.to_thread(self._cache.find, [one.transcript_sha256 for one in conversations])
        missing = [one for one in conversations if one.transcript_sha256 not in known]
        missing.sort(key=lambda one: len(one.transcript))
        chunks = [missing[start : start + CHUNK] for start in range(0, len(missing), CHUNK)]
        loop = asyncio.get_running_loop()
        tasks = [loop.run_in_executor(self._threads, features_of, self._encoder, chunk) for chunk in chunks]
        made = dict(zip((one.transcript_sha256 for one in missing), _rows(await asyncio.gather(*tasks)), strict=True))
        if made:
            await asyncio.to_thread(self._cache.add, made)
        self.computed = len(made)
        return known | made


def _rows(blocks: list[Numbers]) -> list[Numbers]:
    return [row for block in blocks for row in block]


def _conversations(documents: list[Document]) -> dict[bytes, Conversation]:
    """Return the conversations of *documents* by ``id_key``, without those that have no text."""
    found = {}
    for document in documents:
        try:
            found[id_key(document["_id"])] = aggregate_conversation(document)
        except SkippedDocumentError:
            continue
    return found


def _example(result: Document, conversation: Conversation, corrected: Mapping[str, Any]) -> Example:
    return Example(conversation.transcript_sha256, result["classification"], confidence_of(result), corrected)

"""Searches in the embedding index for /similar, and the bodies of their requests and responses.

The index is opened at the first search and used in one thread.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field, field_validator

from config import Taxonomy
from config.index_settings import load_index_settings
from config.openai_settings import load_openai_settings
from config.service_settings import ServiceSettings
from database_docs.items import Kind
from domain.text import prompt_text
from error_handler import (
    ConfigurationError,
    MixedIndexError,
    ProviderBusyError,
    ProviderRejectedError,
    ProviderUnavailableError,
    RequestError,
    TriadError,
    UnusableVectorsError,
)
from service import errors
from service.admission import AdmissionQueue, Deadlines
from service.contract import EXAMPLE_LABELS, VISIBLE, Labels
from service.metrics import ServiceMetrics

if TYPE_CHECKING:  # it needs numpy and chromadb, which may be missing
    from embedding_index.search_entries import Hit
    from embedding_index.vector_search import IndexReader

logger = logging.getLogger(__name__)

EMBEDDING_TIMEOUT_S = 20.0  # of one call; a caller is waiting
CLOSE_WAIT_S = 2.0  # for a search that still runs
REOPEN_AFTER_S = 5.0  # after a failure to open the index; until then every search gets the same error
DEFAULT_HITS, MAX_HITS = 5, 50
# In a body and in a URL. One character may take twelve bytes of a URL, and a URL has at most 64 KiB.
MAX_SEARCH_CHARACTERS, MAX_QUERY_CHARACTERS = 10_000, 2000

OpenIndex = Callable[[ServiceSettings], "IndexReader"]

EXAMPLE_SEARCH: dict[str, Any] = {"text": "My parcel has not come, and nobody answers.", "limit": 5}
EXAMPLE_HITS: dict[str, Any] = {
    "model": "all-MiniLM-L6-v2",
    "hits": [
        {
            "source_id": '{"$oid": "65f1c0ffee65f1c0ffee65f1"}',
            "conversation_number": "123",
            "similarity": 0.7421,
            "classification": EXAMPLE_LABELS,
            "classified_at": "2026-11-21T10:02:00+00:00",
            "classified_by": "llama3.2",
        }
    ],
}


class SimilarRequest(BaseModel):
    """The text to search for."""

    model_config = ConfigDict(extra="forbid", strict=True, json_schema_extra={"examples": [EXAMPLE_SEARCH]})

    text: str = Field(
        min_length=1,
        description="what a customer wrote, in any words",
        examples=[EXAMPLE_SEARCH["text"]],
        json_schema_extra={"pattern": VISIBLE},
    )
    limit: int = Field(DEFAULT_HITS, ge=1, le=MAX_HITS, description="maximum number of conversations in the answer")

    @field_validator("limit", mode="before")
    @classmethod
    def _whole_number(cls, value: object) -> object:
        """Accept 4.0, which is an integer in JSON Schema."""
        return int(value) if isinstance(value, float) and value.is_integer() else value


class SimilarQuery(SimilarRequest):
    """The same as the parameters of a URL, which are strings."""

    model_config = ConfigDict(strict=False)


class SimilarConversation(BaseModel):
    """A past conversation and its labels."""

    source_id: str = Field(description="its `_id` in MongoDB as Extended JSON, which keeps the type")
    conversation_number: str | None = Field(description="the help desk's own number; null if it has none")
    similarity: float = Field(ge=-1, le=1, description="cosine similarity of the two texts; 1 means identical")
    classification: Labels
    classified_at: str | None = Field(description="when, ISO 8601; null if unknown")
    classified_by: str | None = Field(description="the model that gave the labels; null if unknown")


class SimilarResponse(BaseModel):
    """Past conversations, the most similar one first."""

    model_config = ConfigDict(json_schema_extra={"examples": [EXAMPLE_HITS]})

    model: str = Field(description="the embedding model; similarities of different models cannot be compared")
    hits: list[SimilarConversation]


def searched_text(text: str, max_characters: int) -> str:
    """Return *text* as the index has it: without invisible characters.

    Raises:
        RequestError: INVALID if it is longer than *max_characters*, or nothing of it is visible.
    """
    if len(text) > max_characters:
        raise RequestError(errors.INVALID, f"text: at most {max_characters} characters are allowed; send less text.")
    visible = prompt_text(text)
    if not visible:
        raise RequestError(errors.INVALID, "text: needs at least one visible character.")
    return visible


def open_index(service_settings: ServiceSettings) -> IndexReader:
    """Open the index of the current EMBEDDING_* and INDEX_DIR settings for reading.

    Raises:
        ModuleNotFoundError: requirements-index.txt is not installed.
        RequestError: INDEX_EMPTY.
        IndexingError, ConfigurationError: The index cannot be opened.
    """
    # Late: the service starts and classifies without the optional packages that this module needs.
    from embedding_index.vector_search import IndexReader, is_index  # noqa: PLC0415

    settings = load_index_settings()
    timeout_s = min(settings.timeout_s, service_settings.request_timeout_s, EMBEDDING_TIMEOUT_S)
    if not is_index(settings.index_dir):
        raise RequestError(errors.INDEX_EMPTY)
    return IndexReader(settings.model_copy(update={"timeout_s": timeout_s}))


class SimilarConversations:
    """The embedding index with a slot for one search at a time, a queue and deadlines.

    A local embedding model uses all cores: concurrent searches would slow each other down, and ``/classify`` too.
    """

    def __init__(
        self,
        service_settings: ServiceSettings,
        metrics: ServiceMetrics,
        deadlines: Deadlines,
        open_search: OpenIndex,
        taxonomy: Taxonomy,
    ) -> None:
        """Prepare without opening the index."""
        self._taxonomy = taxonomy
        self._settings = service_settings
        self._metrics = metrics
        self._deadlines = deadlines
        self._open = open_search
        self._thread = ThreadPoolExecutor(1, "similar")
        self._index: IndexReader | None = None  # used by the thread only, like the next two
        self._problem = RequestError(errors.INDEX_UNUSABLE)
        self._closed_until = 0.0
        self.slots = AdmissionQueue(1, service_settings.queue_size)
        metrics.watch("triad_search_queue_length", "Searches waiting for a slot", lambda: self.slots.waiting)

    async def find(self, text: str, limit: int, deadline: float) -> tuple[SimilarResponse, float, float]:
        """Return the *limit* conversations most similar to *text*, and the seconds of the wait and of the search.

        Args:
            text: With visible characters.
            limit: At least 1.
            deadline: On the clock of the running loop.

        Raises:
            RequestError: Listed in docs/service.md.
        """
        return await self._deadlines.until(deadline, self._find_in_turn(text, limit))

    async def _find_in_turn(self, text: str, limit: int) -> tuple[SimilarResponse, float, float]:
        asked_at = time.monotonic()
        await self.slots.acquire()
        started_at = time.monotonic()
        try:
            # A caller that leaves frees the slot at once; the thread finishes the search before it starts the next.
            response = await asyncio.get_running_loop().run_in_executor(self._thread, self._find, text, limit)
        finally:
            search_s = time.monotonic() - started_at
            self.slots.release(search_s)
        self._metrics.search_time.observe(search_s)
        return response, started_at - asked_at, search_s

    async def close(self) -> None:
        """Close the index after the running search, and wait for that at most CLOSE_WAIT_S."""
        closing = asyncio.get_running_loop().run_in_executor(self._thread, self._drop)
        self._thread.shutdown(wait=False)
        await asyncio.wait([closing], timeout=CLOSE_WAIT_S)

    def _find(self, text: str, limit: int) -> SimilarResponse:
        if self._index is None and time.monotonic() < self._closed_until:
            raise RequestError(self._problem.kind, retry_after_s=self._problem.retry_after_s)
        try:
            if self._index is None:
                self._index = self._open_allowed()
            hits = self._index.search(text, [Kind.CONVERSATION], limit)
        except (TriadError, ModuleNotFoundError) as exc:
            problem = request_error(exc)
            logger.warning("search failed: %s: %s", problem.kind.name, exc)
            # .env may be corrected meanwhile, so the next attempt reopens the index with its settings.
            if self._index is None or isinstance(exc, MixedIndexError | ConfigurationError):
                self._drop()
                if problem.kind is not errors.INDEX_EMPTY:  # that is quick to check at the next search
                    self._problem, self._closed_until = problem, time.monotonic() + REOPEN_AFTER_S
            raise problem from exc
        if not hits:
            raise RequestError(errors.INDEX_EMPTY)
        return SimilarResponse(
            model=self._index.provider.identity.model, hits=[_shown(hit, self._taxonomy) for hit in hits]
        )

    def _open_allowed(self) -> IndexReader:
        index = self._open(self._settings)
        if index.provider.is_external and not load_openai_settings().allow_external:
            index.close()
            raise RequestError(errors.TEXT_STAYS)
        return index

    def _drop(self) -> None:
        if self._index is not None:
            self._index.close()
            self._index = None


def _shown(hit: Hit, taxonomy: Taxonomy) -> SimilarConversation:
    """Return *hit* with all fields of *taxonomy*, empty where its conversation was labelled without them."""
    labels: dict[str, str | list[str]] = {}
    for field in taxonomy.fields:
        found = hit.metadata.get(field.name)
        found = found if isinstance(found, list) else [str(found)] if found else []
        labels[field.name] = found if field.is_multiple else ", ".join(found)
    facts = {name: str(value) for name, value in hit.metadata.items() if value is not None}
    if taxonomy.has_categorization:
        labels["categorization"] = facts.get("categorization", "")
    return SimilarConversation(
        source_id=hit.name,
        conversation_number=facts.get("conversation_number"),
        similarity=round(max(-1.0, min(1.0, hit.similarity)), 4),
        classification=Labels(**labels),
        classified_at=facts.get("classified_at"),
        classified_by=facts.get("classified_by"),
    )


def request_error(exc: TriadError | ModuleNotFoundError) -> RequestError:
    """Return the error that the caller gets for *exc*."""
    if isinstance(exc, RequestError):
        return RequestError(exc.kind)
    if isinstance(exc, ModuleNotFoundError):
        return RequestError(errors.INDEX_NOT_INSTALLED)
    if isinstance(exc, ProviderUnavailableError):
        wait_s = exc.wait_s if isinstance(exc, ProviderBusyError) else None
        return RequestError(
            errors.EMBEDDING_AWAY, retry_after_s=max(1, round(wait_s or errors.UNAVAILABLE_RETRY_AFTER_S))
        )
    if isinstance(exc, ProviderRejectedError):
        return RequestError(errors.INVALID, "text: the embedding model rejects it; send less or different text.")
    return RequestError(errors.UNUSABLE_ANSWER if isinstance(exc, UnusableVectorsError) else errors.INDEX_UNUSABLE)

"""Searches in the embedding index for /similar. The index is opened at the first search and used in one thread."""

from __future__ import annotations

import asyncio
import importlib
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

from config.index_settings import load_index_settings
from config.openai_settings import load_openai_settings
from config.service_settings import ServiceSettings
from database_docs.items import Kind
from error_handler import (
    ConfigurationError,
    ErrorKind,
    IndexingError,
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
from service.metrics import ServiceMetrics
from service.similar_contract import SimilarResponse, similar_response

if TYPE_CHECKING:  # it needs numpy and chromadb, which may be missing
    from embedding_index.index_reader import IndexReader

logger = logging.getLogger(__name__)

EMBEDDING_TIMEOUT_S = 20.0  # of one call; a caller is waiting
CLOSE_WAIT_S = 2.0  # for a search that still runs
REOPEN_AFTER_S = 5.0  # after a failure to open the index; until then every search gets the same error

OpenIndex = Callable[[ServiceSettings], "IndexReader"]


@dataclass(frozen=True, slots=True)
class Found:
    """The response to one search, and how long it took."""

    response: SimilarResponse
    queue_s: float
    search_s: float


def open_index(service_settings: ServiceSettings) -> IndexReader:
    """Open the index of the current EMBEDDING_* and INDEX_DIR settings for reading.

    Raises:
        ModuleNotFoundError: requirements-index.txt is not installed.
        RequestError: INDEX_EMPTY.
        IndexingError, ConfigurationError: The index cannot be opened.
    """
    settings = load_index_settings()
    timeout_s = min(settings.timeout_s, service_settings.request_timeout_s, EMBEDDING_TIMEOUT_S)
    # Late imports: the service starts and classifies without the optional packages that these modules need.
    reader = importlib.import_module("embedding_index.index_reader")
    if not reader.is_index(settings.index_dir):
        raise RequestError(errors.INDEX_EMPTY)
    index: IndexReader = reader.IndexReader(settings.model_copy(update={"timeout_s": timeout_s}))
    return index


class SimilarConversations:
    """The embedding index with a slot for one search at a time, a queue and deadlines.

    A local embedding model uses all cores: concurrent searches would slow each other down, and ``/classify`` too.
    """

    def __init__(
        self,
        service_settings: ServiceSettings,
        metrics: ServiceMetrics,
        deadlines: Deadlines,
        open_search: OpenIndex = open_index,
    ) -> None:
        """Prepare without opening the index."""
        self._settings = service_settings
        self._metrics = metrics
        self._deadlines = deadlines
        self._open = open_search
        self._thread = ThreadPoolExecutor(1, "similar")
        self._index: IndexReader | None = None  # used by the thread only, like _problem
        self._problem: tuple[RequestError, float] | None = None
        self.slots = AdmissionQueue(1, service_settings.queue_size)
        metrics.watch("triad_search_queue_length", "Searches waiting for a slot", lambda: self.slots.waiting)

    def require_room(self) -> None:
        """Raise the RequestError that ``find`` would raise at once, before the body is read."""
        self.slots.require_room()

    async def find(self, text: str, limit: int, deadline: float) -> Found:
        """Return the *limit* conversations most similar to *text* before *deadline* (of the running loop's clock).

        Raises:
            RequestError: Listed in docs/service.md.
        """
        asked_at = time.monotonic()
        async with self._deadlines.until(deadline), self.slots.slot():
            started_at = time.monotonic()
            loop = asyncio.get_running_loop()
            # A caller that leaves frees the slot at once; the thread finishes the search before it starts the next.
            response = await loop.run_in_executor(self._thread, self._find, text, limit)
            ended_at = time.monotonic()
        self._metrics.search_time.observe(ended_at - started_at)
        return Found(response, started_at - asked_at, ended_at - started_at)

    async def close(self) -> None:
        """Close the index after the running search, and wait for that at most CLOSE_WAIT_S."""
        closing = asyncio.get_running_loop().run_in_executor(self._thread, self._drop)
        self._thread.shutdown(wait=False)
        await asyncio.wait([closing], timeout=CLOSE_WAIT_S)

    def _find(self, text: str, limit: int) -> SimilarResponse:
        index = self._open_once()
        try:
            hits = index.search(text, [Kind.CONVERSATION], limit)
        except (IndexingError, ConfigurationError) as exc:
            problem = request_error(exc)
            logger.warning("search failed: %s: %s", problem.kind.name, exc)
            if isinstance(
                exc, MixedIndexError | ConfigurationError
            ):  # .env may have been corrected; reopen with its settings
                self._drop()
                self._problem = problem, time.monotonic() + REOPEN_AFTER_S
            raise problem from exc
        if not hits:
            raise RequestError(errors.INDEX_EMPTY)
        return similar_response(index.provider.identity.model, hits)

    def _open_once(self) -> IndexReader:
        if self._index is not None:
            return self._index
        if self._problem is not None and time.monotonic() < self._problem[1]:
            raise RequestError(self._problem[0].kind, retry_after_s=self._problem[0].retry_after_s)
        try:
            self._index = self._open_if_allowed()
        except RequestError as exc:
            logger.warning("cannot open the index: %s: %s", exc.kind.name, exc.__cause__ or exc)
            if exc.kind is not errors.INDEX_EMPTY:  # the next search checks again
                self._problem = exc, time.monotonic() + REOPEN_AFTER_S
            raise
        self._problem = None
        return self._index

    def _open_if_allowed(self) -> IndexReader:
        try:
            index = self._open(self._settings)
            is_allowed = not index.provider.is_external or load_openai_settings().allow_external
        except ModuleNotFoundError as exc:
            raise RequestError(errors.INDEX_NOT_INSTALLED) from exc
        except (IndexingError, ConfigurationError) as exc:
            raise request_error(exc) from exc
        if not is_allowed:
            index.close()
            raise RequestError(errors.TEXT_STAYS)
        return index

    def _drop(self) -> None:
        if self._index is not None:
            self._index.close()
            self._index = None


def request_error(exc: TriadError) -> RequestError:
    """Return the error that the caller gets for *exc*."""
    if isinstance(exc, ProviderUnavailableError):
        wait_s = exc.wait_s if isinstance(exc, ProviderBusyError) else None
        return RequestError(
            errors.EMBEDDING_AWAY, retry_after_s=max(1, round(wait_s or errors.UNAVAILABLE_RETRY_AFTER_S))
        )
    if isinstance(exc, ProviderRejectedError):
        return RequestError(errors.INVALID, "text: the embedding model rejects it; send less or different text.")
    kind: ErrorKind = errors.UNUSABLE_ANSWER if isinstance(exc, UnusableVectorsError) else errors.INDEX_UNUSABLE
    return RequestError(kind)

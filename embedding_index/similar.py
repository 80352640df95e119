"""Past conversations like a text, for GET /similar: the index is opened at the first request, and asked in one thread."""

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
from embedding_index.items import Kind
from embedding_index.similar_contract import SimilarRequest, SimilarResponse, similar_response
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

if TYPE_CHECKING:  # it needs numpy and chromadb, which may be missing
    from embedding_index.index_reader import IndexReader

logger = logging.getLogger(__name__)

EMBEDDING_TIMEOUT_S = 20.0  # of one call, with a person waiting
CLOSE_WAIT_S = 2.0  # a copy of the index is removed meanwhile
LOOK_AGAIN_S = 5.0  # after the index could not be opened; meanwhile all are told the same

OpenIndex = Callable[[ServiceSettings], "IndexReader"]


@dataclass(frozen=True, slots=True)
class Found:
    """The answer to one search, and how long it took."""

    response: SimilarResponse
    queue_s: float
    search_s: float


def open_index(service_settings: ServiceSettings) -> IndexReader:
    """Return the index that EMBEDDING_* and INDEX_DIR name now, for reading.

    Raises:
        ModuleNotFoundError: requirements-index.txt is not installed.
        RequestError: INDEX_EMPTY.
        IndexingError, ConfigurationError: It cannot be opened.
    """
    settings = load_index_settings()
    timeout_s = min(settings.timeout_s, service_settings.request_timeout_s, EMBEDDING_TIMEOUT_S)
    # By name, and now: the service starts, and classifies, without the packages that these modules need.
    reader = importlib.import_module("embedding_index.index_reader")
    if not reader.is_index(settings.index_dir):
        raise RequestError(errors.INDEX_EMPTY)
    index: IndexReader = reader.IndexReader(settings.model_copy(update={"timeout_s": timeout_s}))
    return index


class SimilarConversations:
    """The index as the service asks it: one text at a time, a short queue before it, within deadlines.

    Embedding inside this process takes all cores for a moment: a second search at once would only slow both, and
    ``/classify`` with them.
    """

    def __init__(
        self,
        service_settings: ServiceSettings,
        metrics: ServiceMetrics,
        deadlines: Deadlines,
        open_search: OpenIndex = open_index,
    ) -> None:
        """Prepare; nothing is opened before the first request."""
        self._settings = service_settings
        self._metrics = metrics
        self._deadlines = deadlines
        self._open = open_search
        self._thread = ThreadPoolExecutor(1, "similar")
        self._index: IndexReader | None = None  # touched by the thread alone, like the next one
        self._problem: tuple[RequestError, float] | None = None
        self.places = AdmissionQueue(1, service_settings.queue_size)
        metrics.watch("triad_search_queue_length", "Searches that wait for their turn", lambda: self.places.waiting)

    def require_room(self) -> None:
        """Raise the RequestError that ``find`` would raise at once, for a caller that is not read yet."""
        self.places.require_room()

    async def find(self, wanted: SimilarRequest, deadline: float) -> Found:
        """Return the conversations most like ``wanted.text`` before *deadline* (of the running loop's clock).

        Raises:
            RequestError: See docs/service.md.
        """
        asked_at = time.monotonic()
        async with self._deadlines.until(deadline), self.places.place():
            begun_at = time.monotonic()
            loop = asyncio.get_running_loop()
            # Whoever leaves gives the place back at once; the thread ends what it has begun before it takes the next.
            response = await loop.run_in_executor(self._thread, self._find, wanted)
            ended_at = time.monotonic()
        self._metrics.search_time.observe(ended_at - begun_at)
        return Found(response, begun_at - asked_at, ended_at - begun_at)

    async def close(self) -> None:
        """Close the index behind the search that runs, which is waited for CLOSE_WAIT_S at most."""
        closing = asyncio.get_running_loop().run_in_executor(self._thread, self._drop)
        self._thread.shutdown(wait=False)
        await asyncio.wait([closing], timeout=CLOSE_WAIT_S)

    def _find(self, wanted: SimilarRequest) -> SimilarResponse:
        index = self._opened()
        try:
            hits = index.search(wanted.text, [Kind.CONVERSATION], wanted.limit)
        except (IndexingError, ConfigurationError) as exc:
            problem = request_error(exc)
            logger.warning("no search: %s: %s", problem.kind.name, exc)
            if isinstance(exc, MixedIndexError | ConfigurationError):  # .env may say another model, or key, by now
                self._drop()
                self._problem = problem, time.monotonic() + LOOK_AGAIN_S
            raise problem from exc
        if not hits:
            raise RequestError(errors.INDEX_EMPTY)
        return similar_response(index.provider.identity.model, hits)

    def _opened(self) -> IndexReader:
        if self._index is not None:
            return self._index
        if self._problem is not None and time.monotonic() < self._problem[1]:
            raise RequestError(self._problem[0].kind, retry_after_s=self._problem[0].retry_after_s)
        try:
            self._index = self._open_within_house()
        except RequestError as exc:
            logger.warning("no index of conversations: %s: %s", exc.kind.name, exc.__cause__ or exc)
            if exc.kind is not errors.INDEX_EMPTY:  # which is seen at once
                self._problem = exc, time.monotonic() + LOOK_AGAIN_S
            raise
        self._problem = None
        return self._index

    def _open_within_house(self) -> IndexReader:
        try:
            index = self._open(self._settings)
            is_allowed = not index.provider.leaves_house or load_openai_settings().allow_external
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
    """Return what a caller is told about *exc*."""
    if isinstance(exc, ProviderUnavailableError):
        wait_s = exc.wait_s if isinstance(exc, ProviderBusyError) else None
        return RequestError(
            errors.EMBEDDING_AWAY, retry_after_s=max(1, round(wait_s or errors.UNAVAILABLE_RETRY_AFTER_S))
        )
    if isinstance(exc, ProviderRejectedError):
        return RequestError(errors.INVALID, "text: the embedding model does not take it; send other or less text.")
    kind: ErrorKind = errors.UNUSABLE_ANSWER if isinstance(exc, UnusableVectorsError) else errors.INDEX_UNUSABLE
    return RequestError(kind)

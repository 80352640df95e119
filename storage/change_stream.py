"""The change stream of the source: which documents are new, pending again, or have another text."""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import dataclass
from typing import Any

from error_handler import StoreError, StoreForbiddenError, StoreRejectedError
from storage.extended_json import Document
from storage.mongo_errors import translated
from storage.selection import StateFields

logger = logging.getLogger(__name__)

WAIT_MS = 500  # how long the server holds a request for changes
REOPEN_S = 1.0  # between two attempts to open the stream
BATCH = 1000  # changes in one response
NO_CHANGE_STREAMS = 40573  # a standalone server
# Of resume tokens that will never be usable again, beside any refusal that is not transient.
LOST_TOKEN_CODES = frozenset({222, 260, 280, 286, 40585, 40615})
FOLLOW = "follow the changes"
_TEXT = r"^(tweets|messages|text)(\.|$)"


@dataclass(frozen=True, slots=True)
class Change:
    """A changed document; *is_new*: inserted, or pending again. *has_grown*: its text changed."""

    document_id: Any
    is_new: bool
    has_grown: bool


@dataclass(frozen=True, slots=True)
class Position:
    """A place in the stream: the *change* there, if any, and the *token* to resume after it.

    *is_lost* says that changes before it may be missing, because the server no longer knew the token.
    """

    token: Document | None
    change: Change | None = None
    is_lost: bool = False


class ChangeWatch:
    """Follows the changes of *collection* from *token*, or from now if it is None.

    *is_supported* is False as soon as the server has refused change streams: it is standalone, or a right is missing.
    """

    def __init__(self, collection: Any, states: StateFields, token: Document | None = None) -> None:
        self._collection = collection
        self._stages = stages(states)
        self.token = token
        self.is_supported = True
        self._is_told = False
        self._is_lost = False

    async def locate(self) -> None:
        """Set ``token`` to now if there is none, so that nothing is missed before ``run``.

        Raises:
            StoreError: MongoDB does not answer.
        """
        if self.token is not None:
            return
        try:
            with translated("open the change stream"):
                async with await self._open() as stream:
                    self.token = stream.resume_token
        except StoreError as exc:
            if not self._is_refused(exc):
                raise

    async def run(self, positions: asyncio.Queue[Position]) -> None:
        """Put each change into *positions*, and at least each WAIT_MS the place without one, until cancelled.

        A failure is a warning, and the stream is opened again, at most each REOPEN_S. It returns if the server has no change
        streams.
        """
        while self.is_supported:
            opened_s = time.monotonic()
            try:
                with translated(FOLLOW):
                    await self._follow(positions)
                self._lose("the collection was dropped or renamed")
            except StoreError as exc:
                if self.token is not None and _is_final(exc) and not self._is_refused(exc):
                    self._lose("the server cannot resume after it")
                elif not self._is_refused(exc) and not self._is_told:
                    logger.warning("the change stream is interrupted and will be resumed: %s", exc)
                    self._is_told = True
            await asyncio.sleep(max(0.0, opened_s + REOPEN_S - time.monotonic()))

    async def _follow(self, positions: asyncio.Queue[Position]) -> None:
        async with await self._open() as stream:
            if self._is_lost:  # told when the stream is open again, so that nothing is missed between the two
                await positions.put(Position(stream.resume_token, is_lost=True))
                self._is_lost = False
            while stream.alive:
                self.token = stream.resume_token or self.token
                with translated(FOLLOW):  # each time: the driver may swallow the cancellation that ends this loop
                    found = await stream.try_next()
                if self._is_told:
                    logger.info("the change stream is resumed")
                    self._is_told = False
                if found is None or found["operationType"] != "invalidate":
                    await positions.put(Position(stream.resume_token, _change(found)))

    def _lose(self, why: str) -> None:
        logger.warning("the resume token is dropped: %s; all documents are compared with their results", why)
        self.token, self._is_lost = None, True

    def _is_refused(self, exc: StoreError) -> bool:
        if getattr(exc.__cause__, "code", None) == NO_CHANGE_STREAMS:
            logger.info(
                "MongoDB is a standalone server, which has no change streams: new documents are found by polling"
            )
        elif isinstance(exc, StoreForbiddenError):
            logger.warning("no change stream, so new documents are found by polling: %s", exc)
        else:
            return False
        self.is_supported = False
        return True

    async def _open(self) -> Any:
        return await self._collection.watch(
            self._stages, resume_after=self.token, max_await_time_ms=WAIT_MS, batch_size=BATCH
        )


def stages(states: StateFields) -> list[Document]:
    """Return the stages that keep, of each change, its id and what it means for a worker; no text leaves the server."""
    updated = {"$objectToArray": {"$ifNull": ["$updateDescription.updatedFields", {}]}}
    removed = {"$ifNull": ["$updateDescription.removedFields", []]}
    truncated = {"$ifNull": ["$updateDescription.truncatedArrays.field", []]}
    names = {"$concatArrays": [{"$map": {"input": updated, "in": "$$this.k"}}, removed, truncated]}
    is_text = {"$regexMatch": {"input": "$$this", "regex": _TEXT}}
    reset = [{"k": states.status, "v": "pending"}, *([{"k": "processed", "v": False}] if states.is_default else [])]
    is_pending = [{"$in": [{"$literal": one}, updated]} for one in reset]
    is_replaced = {"$eq": ["$operationType", "replace"]}
    return [
        {"$match": {"operationType": {"$in": ["insert", "update", "replace", "invalidate"]}}},
        {
            "$project": {
                "operationType": 1,
                "documentKey": 1,
                "is_new": {
                    "$or": [
                        {"$eq": ["$operationType", "insert"]},
                        is_replaced,
                        *is_pending,
                        {"$in": [{"$literal": states.status}, removed]},
                    ]
                },
                "has_grown": {"$or": [is_replaced, {"$anyElementTrue": [{"$map": {"input": names, "in": is_text}}]}]},
            }
        },
        {"$match": {"$or": [{"operationType": "invalidate"}, {"is_new": True}, {"has_grown": True}]}},
    ]


def _change(found: Document | None) -> Change | None:
    if found is None:
        return None
    return Change(found["documentKey"]["_id"], found["is_new"], found["has_grown"])


def _is_final(exc: StoreError) -> bool:
    """Return whether the server will never take the token again."""
    return isinstance(exc, StoreRejectedError) or getattr(exc.__cause__, "code", None) in LOST_TOKEN_CODES

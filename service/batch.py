"""POST /classify/batch: many conversations in one request, each with a result or an error of its own."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, FailFast, Field

from config.service_settings import ServiceSettings
from error_handler import RequestError
from service import errors
from service.contract import (
    EXAMPLE_LABELS,
    EXAMPLE_REQUEST,
    ClassificationRequest,
    ErrorDetail,
    Labels,
    conversation_of,
)
from service.metrics import ServiceMetrics
from service.model import ModelService, Verdict

MAX_CONVERSATIONS = 100
MAX_ID_CHARACTERS = 200
DONE, PENDING = 200, 202  # statuses of one conversation, beside those of errors

_EXAMPLE_RESULTS: list[Any] = [
    {
        "id": "ticket-1",
        "conversation_number": "123",
        "status": DONE,
        "classification": EXAMPLE_LABELS,
        "model": "llama3.2",
    },
    {
        "id": "ticket-2",
        "conversation_number": "124",
        "status": errors.INVALID.status,
        "error": RequestError(errors.INVALID).body["error"],
    },
]
EXAMPLE_ITEMS: list[Any] = [
    {"id": "ticket-1", **EXAMPLE_REQUEST},
    {"id": "ticket-2", "conversation_number": "124", "messages": [{"sender": "agent", "text": "Are you still there?"}]},
]


class BatchItem(ClassificationRequest):
    """One conversation of many."""

    id: str | None = Field(
        None, min_length=1, max_length=MAX_ID_CHARACTERS, description="the caller's own id, which the result repeats"
    )


# FailFast, as in ClassificationRequest.
Conversations = Annotated[list[BatchItem], FailFast()]


class BatchRequest(BaseModel):
    """Up to 100 conversations."""

    model_config = ConfigDict(
        extra="forbid", strict=True, json_schema_extra={"examples": [{"conversations": EXAMPLE_ITEMS}]}
    )

    conversations: Conversations = Field(min_length=1, max_length=MAX_CONVERSATIONS, description="each id at most once")


class ItemResult(BaseModel):
    """What became of one conversation. The fields that do not apply are left out."""

    id: str | None = Field(None, description="as sent")
    conversation_number: str = Field(description="as sent")
    status: int = Field(
        description="200: labelled; 202: not done yet (jobs only); otherwise the status of the error, as of POST /classify"
    )
    classification: Labels | None = Field(None, description="with status 200")
    model: str | None = Field(None, description="the model that gave the labels")
    input_complete: bool | None = Field(
        None, description="false if the conversation was too long and the model saw only a part of it"
    )
    error: ErrorDetail | None = Field(None, description="if there are no labels")
    retry_after_s: int | None = Field(None, description="seconds to wait before this conversation is sent again")


class BatchResponse(BaseModel):
    """A result for each conversation, in the order of the request."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"succeeded": 1, "failed": 1, "results": _EXAMPLE_RESULTS}]}
    )

    succeeded: int = Field(description="conversations with labels")
    failed: int = Field(description="conversations with an error")
    results: list[ItemResult]


def require_distinct_ids(items: Sequence[BatchItem]) -> None:
    """Raise RequestError (DUPLICATE_ID) if two of *items* have the same id."""
    ids = [item.id for item in items if item.id is not None]
    if len(set(ids)) != len(ids):
        raise RequestError(errors.DUPLICATE_ID)


async def classify_batch(
    items: Sequence[BatchItem], model: ModelService, settings: ServiceSettings, metrics: ServiceMetrics, deadline: float
) -> BatchResponse:
    """Return a result for each of *items*; those that are not done at *deadline* (of the loop's clock) have an error.

    The batch has as many places in the queue as there are slots, so that other callers find room. It waits while the
    queue is full: it was admitted as a whole.
    """
    results: list[ItemResult | None] = [None] * len(items)
    waiting = iter(enumerate(items))

    async def work() -> None:
        for place, item in waiting:
            try:
                verdict = await model.classify(conversation_of(item, settings), deadline, patiently=True)
                results[place] = labelled(item, verdict)
            except RequestError as problem:
                metrics.rejections.labels(problem.kind.name).inc()
                results[place] = failed(item, problem)

    async with asyncio.TaskGroup() as group:
        for _ in range(min(len(items), model.slots.size)):
            group.create_task(work())
    done = [result for result in results if result is not None]
    succeeded = sum(result.status == DONE for result in done)
    return BatchResponse(succeeded=succeeded, failed=len(done) - succeeded, results=done)


def labelled(item: BatchItem, verdict: Verdict) -> ItemResult:
    """Return the result of *item* with the labels of *verdict*."""
    return ItemResult(
        id=item.id,
        conversation_number=item.conversation_number,
        status=DONE,
        classification=Labels(**verdict.labels),
        model=verdict.model,
        input_complete=None if verdict.is_complete else False,
    )


def failed(item: BatchItem, problem: RequestError) -> ItemResult:
    """Return the result of *item* with *problem* as its error."""
    return ItemResult(
        id=item.id,
        conversation_number=item.conversation_number,
        status=problem.kind.status,
        error=ErrorDetail(type=problem.kind.name, message=str(problem)),
        retry_after_s=problem.retry_after_s,
    )

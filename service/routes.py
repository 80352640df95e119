"""The routes of the service: /classify, /similar and those for operators."""

from __future__ import annotations

import re
from typing import Annotated, Literal
from urllib.parse import parse_qsl

from fastapi import APIRouter, Depends, FastAPI, Query, Request, Response
from pydantic import BaseModel, Field
from starlette.staticfiles import StaticFiles

from error_handler import RequestError
from service import errors, openapi
from service.access import BATCH, CLASSIFY, DOCS, HEALTH, METRICS, OPENAPI, READY, SIMILAR
from service.admission import cancel_on_disconnect
from service.batch import BatchRequest, BatchResponse, classify_batch, require_distinct_ids
from service.contract import ClassificationRequest, ClassificationResponse, Labels, conversation_of
from service.idempotency import KEY_PARAMETER, REPLAYED, fingerprint, idempotency_key
from service.metrics import CONTENT_TYPE
from service.model import ModelService, Verdict
from service.openapi import KEY_REQUIRED, REQUEST_ID_PARAMETER, documented_errors
from service.similar import (
    MAX_QUERY_CHARACTERS,
    MAX_SEARCH_CHARACTERS,
    SimilarQuery,
    SimilarRequest,
    SimilarResponse,
    searched_text,
)
from service.startup import Service

_HEADER_SAFE = re.compile(r"[^!-~]")
_CLASSIFY_ERRORS = (errors.BAD_HEADER, errors.TOO_LONG, errors.KEY_REUSED, errors.MODEL_AWAY)
_ANSWER_HEADERS = {
    "X-Model": {"schema": {"type": "string"}, "description": "the model that gave the labels"},
    "X-Input-Complete": {
        "schema": {"const": "false"},
        "description": "present if the conversation was too long and the model saw only a part of it",
    },
    **REPLAYED,
}
_classify_responses = documented_errors(*errors.COMMON_ERRORS, *errors.BODY_ERRORS, *_CLASSIFY_ERRORS)
_classify_responses[200]["headers"] = {**_classify_responses[200]["headers"], **_ANSWER_HEADERS}


class Health(BaseModel):
    """The process is alive."""

    status: Literal["ok"] = "ok"


class Readiness(BaseModel):
    """The model server answers and has the model."""

    status: Literal["ready"] = "ready"
    model: str = Field(description="the model that gives the labels", examples=["llama3.2"])


similarity = APIRouter(tags=["similar conversations"])
operations = APIRouter(tags=["operations"])
documentation = APIRouter(include_in_schema=False)


async def classify(conversation: ClassificationRequest, request: Request) -> Response:
    """Return the conversation as it was sent, and its labels."""
    service: Service = request.state.service
    key = idempotency_key(request)
    parsed = conversation_of(conversation, service.settings)

    async def ask() -> Verdict:
        return await service.model.classify(parsed, request.state.deadline)

    if key is None:
        verdict, replayed = await cancel_on_disconnect(ask(), request.receive), False
    else:
        shared = service.answers.answer((request.state.caller, key), fingerprint(conversation), ask)
        verdict, replayed = await cancel_on_disconnect(shared, request.receive)
    times = f"waited {verdict.queue_s * 1000:.0f} ms, model {verdict.model_s * 1000:.0f} ms"
    request.state.note = ", replayed" if replayed else f", {times}"
    headers = {"X-Model": _HEADER_SAFE.sub("", verdict.model)}
    if not verdict.is_complete:
        headers["X-Input-Complete"] = "false"
    if replayed:
        headers["Idempotency-Replayed"] = "true"
    answer = ClassificationResponse(
        conversation_number=conversation.conversation_number,
        messages=conversation.messages,
        classification=Labels(**verdict.labels),
    )
    # A Response, because FastAPI would validate the model a second time.
    return Response(answer.model_dump_json(exclude_unset=True), headers=headers, media_type="application/json")


async def batch(wanted: BatchRequest, request: Request) -> Response:
    """Return a result for each conversation: labels, or the error that POST /classify would answer.

    The status is 200 also if conversations failed. The deadline is that of one request.
    """
    service: Service = request.state.service
    require_distinct_ids(wanted.conversations)
    service.gate.charge(request.state.caller, request.client, len(wanted.conversations) - 1)
    work = classify_batch(
        wanted.conversations, service.model, service.settings, service.metrics, request.state.deadline
    )
    answer = await cancel_on_disconnect(work, request.receive)
    request.state.note = f", {answer.succeeded} of {len(answer.results)} conversations labelled"
    return Response(answer.model_dump_json(exclude_none=True), media_type="application/json")


def add_classification(app: FastAPI) -> None:
    """Add POST /classify and its batch to *app* itself: the path of an included router is matched twice."""
    app.post(
        CLASSIFY,
        tags=["classification"],
        operation_id="classify",
        summary="Classify one conversation",
        response_model=ClassificationResponse,
        responses=_classify_responses,
        openapi_extra={**KEY_REQUIRED, "parameters": [KEY_PARAMETER, REQUEST_ID_PARAMETER]},
    )(classify)
    app.post(
        BATCH,
        tags=["classification"],
        operation_id="classifyBatch",
        summary="Classify up to 100 conversations",
        response_model=BatchResponse,
        response_model_exclude_none=True,
        responses=documented_errors(*errors.BATCH_ERRORS),
        openapi_extra={**KEY_REQUIRED, "parameters": [REQUEST_ID_PARAMETER]},
    )(batch)


async def require_plain_query(request: Request) -> None:
    """FastAPI replaces what is not UTF-8, and takes the last of two values."""
    try:
        pairs = parse_qsl(
            request.scope["query_string"].decode(), keep_blank_values=True, errors="strict", max_num_fields=10
        )
    except ValueError as exc:  # UnicodeDecodeError is one
        raise RequestError(errors.INVALID, "The query is not percent-encoded UTF-8; encode the text.") from exc
    if len(dict(pairs)) != len(pairs):
        raise RequestError(errors.INVALID, "The query names a parameter twice; name each once.")


@similarity.get(
    SIMILAR,
    operation_id="similarByUrl",
    summary="Find past conversations similar to a text",
    openapi_extra=KEY_REQUIRED,
    responses=documented_errors(*errors.COMMON_ERRORS, *errors.SIMILAR_ERRORS),
    dependencies=[Depends(require_plain_query)],
)
async def similar_by_url(query: Annotated[SimilarQuery, Query()], request: Request) -> SimilarResponse:
    """Prefer POST /similar: proxies log URLs, and the text in them."""
    limit = min(MAX_QUERY_CHARACTERS, request.state.service.settings.max_text_characters)
    if len(query.text) > limit:
        raise RequestError(
            errors.INVALID, f"text: at most {limit} characters fit in a URL; send less, or use POST /similar."
        )
    return await similar(query, request)


@similarity.post(
    SIMILAR,
    operation_id="similar",
    summary="Find past conversations similar to a text",
    openapi_extra=KEY_REQUIRED,
    responses=documented_errors(*errors.COMMON_ERRORS, *errors.SIMILAR_ERRORS, *errors.BODY_ERRORS),
)
async def similar(wanted: SimilarRequest, request: Request) -> SimilarResponse:
    """Return past conversations, the most similar one first."""
    service: Service = request.state.service
    text = searched_text(wanted.text, min(MAX_SEARCH_CHARACTERS, service.settings.max_text_characters))
    search = service.similar.find(text, wanted.limit, request.state.deadline)
    response, queue_s, search_s = await cancel_on_disconnect(search, request.receive)
    request.state.note = f", waited {queue_s * 1000:.0f} ms, search {search_s * 1000:.0f} ms"
    return response


@operations.head(HEALTH, include_in_schema=False)
@operations.get(HEALTH, responses=documented_errors(errors.WRONG_HOST, errors.INTERNAL))
async def health() -> Health:
    """Liveness check without dependencies."""
    return Health()


@operations.head(READY, include_in_schema=False)
@operations.get(
    READY,
    responses=documented_errors(errors.WRONG_HOST, errors.MODEL_AWAY, errors.MODEL_MISSING, errors.INTERNAL),
)
async def ready(request: Request) -> Readiness:
    """Readiness check: the model server answers and has the model."""
    model: ModelService = request.state.service.model
    problem = await model.check()
    if problem is not None:
        raise errors.unavailable(problem)
    return Readiness(model=model.model)


_metrics_responses = documented_errors(errors.UNAUTHENTICATED, errors.TOO_MANY, errors.WRONG_HOST, errors.INTERNAL)
_metrics_responses[200]["content"] = {"text/plain": {"schema": {"type": "string"}}}


@operations.get(METRICS, response_class=Response, responses=_metrics_responses, openapi_extra=KEY_REQUIRED)
async def metrics(request: Request) -> Response:
    """Return the metrics in Prometheus text format."""
    return Response(request.state.service.metrics.render(), headers={"Content-Type": CONTENT_TYPE})


@documentation.get(OPENAPI)
async def openapi_json(request: Request) -> Response:
    """Return the OpenAPI document."""
    return Response(request.state.openapi, media_type="application/json")


@documentation.get(DOCS)
async def docs() -> Response:
    """Return the page with Swagger UI."""
    headers = {"Content-Security-Policy": openapi.CONTENT_SECURITY_POLICY}
    return Response(openapi.DOCS_PAGE, media_type="text/html", headers=headers)


@documentation.get(f"{DOCS}/start.js")
async def docs_start() -> Response:
    """Return the script that starts Swagger UI."""
    return Response(openapi.START_SCRIPT, media_type="text/javascript")


# Swagger UI comes from an installed package: customer networks may not reach a CDN.
documentation.mount(f"{DOCS}/assets", StaticFiles(packages=[("fastapi_offline", "static")]))

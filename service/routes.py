"""The routes of the service, without /similar: POST /classify and those for operators."""

from __future__ import annotations

import hashlib
import re
from typing import Annotated, Literal

import orjson
from fastapi import APIRouter, Header, Request, Response
from pydantic import BaseModel, Field
from pydantic.json_schema import SkipJsonSchema
from starlette.staticfiles import StaticFiles

from error_handler import RequestError
from service import docs_page, errors
from service.access import CLASSIFY, DOCS, HEALTH, METRICS, OPENAPI, READY
from service.admission import cancel_on_disconnect
from service.contract import ClassificationRequest, ClassificationResponse, Labels, conversation_of
from service.error_responses import documented_errors
from service.metrics import CONTENT_TYPE
from service.model import Verdict
from service.openapi import KEY_REQUIRED, REQUEST_ID_PARAMETER
from service.startup import RunningService

_HEADER_SAFE = re.compile(r"[^!-~]")
_IDEMPOTENCY_KEY = r"^[!-~]([ -~]*[!-~])?$"
_MAX_KEY_CHARACTERS = 255

IdempotencyKey = Annotated[
    str | SkipJsonSchema[None],
    Header(
        alias="Idempotency-Key",
        description="the same key with the same body asks the model once and gets the same answer",
        json_schema_extra={"minLength": 1, "maxLength": _MAX_KEY_CHARACTERS, "pattern": _IDEMPOTENCY_KEY},
    ),
]
_CLASSIFY_ERRORS = (
    errors.INVALID_JSON,
    errors.BAD_HEADER,
    errors.UNAUTHENTICATED,
    errors.BODY_TOO_SLOW,
    errors.TOO_LARGE,
    errors.NOT_JSON,
    errors.WRONG_HOST,
    errors.INVALID,
    errors.TOO_LONG,
    errors.KEY_REUSED,
    errors.TOO_MANY,
    errors.INTERNAL,
    errors.UNUSABLE_ANSWER,
    errors.MODEL_AWAY,
    errors.QUEUE_FULL,
    errors.STOPPING,
    errors.TOO_SLOW,
)
_ANSWER_HEADERS = {
    "X-Model": {"schema": {"type": "string"}, "description": "the model that gave the labels"},
    "X-Input-Complete": {
        "schema": {"const": "false"},
        "description": "present if the conversation was too long and the model saw only a part of it",
    },
    "Idempotency-Replayed": {
        "schema": {"const": "true"},
        "description": "present if the answer is that of an earlier request with this Idempotency-Key",
    },
}
_classify_responses = documented_errors(*_CLASSIFY_ERRORS)
_classify_responses[200]["headers"] = {**_classify_responses[200]["headers"], **_ANSWER_HEADERS}


class Health(BaseModel):
    """The process is alive."""

    status: Literal["ok"] = "ok"


class Readiness(BaseModel):
    """The model server answers and has the model."""

    status: Literal["ready"] = "ready"
    model: str = Field(description="the model that gives the labels", examples=["llama3.2"])


classification = APIRouter(tags=["classification"])
operations = APIRouter(tags=["operations"])
documentation = APIRouter(include_in_schema=False)


@classification.post(
    CLASSIFY,
    operation_id="classify",
    summary="Classify one conversation",
    response_model=ClassificationResponse,
    response_model_exclude_unset=True,
    responses=_classify_responses,
    openapi_extra={**KEY_REQUIRED, "parameters": [REQUEST_ID_PARAMETER]},
)
async def classify(
    conversation: ClassificationRequest,
    service: RunningService,
    request: Request,
    response: Response,
    idempotency_key: IdempotencyKey = None,
) -> ClassificationResponse:
    """Return the conversation as it was sent, and its labels."""
    _require_valid_key(idempotency_key)
    parsed = conversation_of(conversation, service.settings)
    deadline = service.deadline(request)

    async def ask() -> Verdict:
        return await service.model.classify(parsed, deadline)

    if idempotency_key is None:
        verdict, replayed = await cancel_on_disconnect(ask(), request.receive), False
    else:
        sent = orjson.dumps(conversation.model_dump(exclude_unset=True), option=orjson.OPT_SORT_KEYS)
        fingerprint = hashlib.sha256(sent).digest()
        answer = service.answers.answer((request.state.caller, idempotency_key), fingerprint, ask)
        verdict, replayed = await cancel_on_disconnect(answer, request.receive)
    request.state.note = _note(verdict, replayed)
    response.headers["X-Model"] = _HEADER_SAFE.sub("", verdict.model)
    if not verdict.is_complete:
        response.headers["X-Input-Complete"] = "false"
    if replayed:
        response.headers["Idempotency-Replayed"] = "true"
    return ClassificationResponse(
        conversation_number=conversation.conversation_number,
        messages=conversation.messages,
        classification=Labels(**verdict.labels),
    )


def _require_valid_key(key: str | None) -> None:
    if key is not None and not (len(key) <= _MAX_KEY_CHARACTERS and re.fullmatch(_IDEMPOTENCY_KEY, key)):
        raise RequestError(errors.BAD_HEADER)


def _note(verdict: Verdict, replayed: bool) -> str:
    if replayed:
        return ", replayed"
    return f", waited {verdict.queue_s * 1000:.0f} ms, model {verdict.model_s * 1000:.0f} ms"


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
async def ready(service: RunningService) -> Readiness:
    """Readiness check: the model server answers and has the model."""
    problem = await service.model.check()
    if problem is not None:
        raise RequestError(problem, retry_after_s=errors.UNAVAILABLE_RETRY_AFTER_S)
    return Readiness(model=service.model.model)


_metrics_responses = documented_errors(errors.UNAUTHENTICATED, errors.TOO_MANY, errors.WRONG_HOST, errors.INTERNAL)
_metrics_responses[200]["content"] = {"text/plain": {"schema": {"type": "string"}}}


@operations.get(METRICS, response_class=Response, responses=_metrics_responses, openapi_extra=KEY_REQUIRED)
async def metrics(service: RunningService) -> Response:
    """Return the metrics in Prometheus text format."""
    return Response(service.metrics.render(), headers={"Content-Type": CONTENT_TYPE})


@documentation.get(OPENAPI)
async def openapi(request: Request) -> Response:
    """Return the OpenAPI document."""
    return Response(request.state.openapi, media_type="application/json")


@documentation.get(DOCS)
async def docs() -> Response:
    """Return the page with Swagger UI."""
    headers = {"Content-Security-Policy": docs_page.CONTENT_SECURITY_POLICY}
    return Response(docs_page.PAGE, media_type="text/html", headers=headers)


@documentation.get(f"{DOCS}/start.js")
async def docs_start() -> Response:
    """Return the script that starts Swagger UI."""
    return Response(docs_page.START_SCRIPT, media_type="text/javascript")


documentation.mount(docs_page.ASSETS_PATH, StaticFiles(directory=docs_page.assets_folder()))

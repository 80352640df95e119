"""The routes of the service, without /similar: POST /classify and those for operators."""

from __future__ import annotations

import hashlib
import re
from typing import Literal

import orjson
from fastapi import APIRouter, FastAPI, Request, Response
from pydantic import BaseModel, Field
from starlette.staticfiles import StaticFiles

from error_handler import RequestError
from service import docs_page, errors
from service.access import CLASSIFY, DOCS, HEALTH, METRICS, OPENAPI, READY
from service.admission import cancel_on_disconnect
from service.contract import ClassificationRequest, ClassificationResponse, Labels, conversation_of
from service.error_responses import documented_errors
from service.metrics import CONTENT_TYPE
from service.model import ModelService, Verdict
from service.openapi import KEY_REQUIRED, REQUEST_ID_PARAMETER
from service.startup import Service

_HEADER_SAFE = re.compile(r"[^!-~]")
_KEY_PATTERN, _MAX_KEY_CHARACTERS = r"^[!-~]([ -~]*[!-~])?$", 255
# The route reads it from the headers, because a parameter of FastAPI takes much longer.
_IDEMPOTENCY_KEY = {
    "name": "Idempotency-Key",
    "in": "header",
    "required": False,
    "schema": {"type": "string", "minLength": 1, "maxLength": _MAX_KEY_CHARACTERS, "pattern": _KEY_PATTERN},
    "description": "the same key with the same body asks the model once and gets the same answer",
}
_CLASSIFY_ERRORS = (errors.BAD_HEADER, errors.TOO_LONG, errors.KEY_REUSED, errors.MODEL_AWAY)
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
_classify_responses = documented_errors(*errors.COMMON_ERRORS, *errors.BODY_ERRORS, *_CLASSIFY_ERRORS)
_classify_responses[200]["headers"] = {**_classify_responses[200]["headers"], **_ANSWER_HEADERS}


class Health(BaseModel):
    """The process is alive."""

    status: Literal["ok"] = "ok"


class Readiness(BaseModel):
    """The model server answers and has the model."""

    status: Literal["ready"] = "ready"
    model: str = Field(description="the model that gives the labels", examples=["llama3.2"])


operations = APIRouter(tags=["operations"])
documentation = APIRouter(include_in_schema=False)


async def classify(conversation: ClassificationRequest, request: Request) -> Response:
    """Return the conversation as it was sent, and its labels."""
    service: Service = request.state.service
    key = request.headers.get("idempotency-key")
    if key is not None and not (len(key) <= _MAX_KEY_CHARACTERS and re.fullmatch(_KEY_PATTERN, key)):
        raise RequestError(errors.BAD_HEADER)
    parsed = conversation_of(conversation, service.settings)

    async def ask() -> Verdict:
        return await service.model.classify(parsed, request.state.deadline)

    if key is None:
        verdict, replayed = await cancel_on_disconnect(ask(), request.receive), False
    else:
        sent = orjson.dumps(conversation.model_dump(exclude_unset=True), option=orjson.OPT_SORT_KEYS)
        shared = service.answers.answer((request.state.caller, key), hashlib.sha256(sent).digest(), ask)
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


def add_classification(app: FastAPI) -> None:
    """Add POST /classify to *app* itself: the path of an included router is matched twice."""
    app.post(
        CLASSIFY,
        tags=["classification"],
        operation_id="classify",
        summary="Classify one conversation",
        response_model=ClassificationResponse,
        responses=_classify_responses,
        openapi_extra={**KEY_REQUIRED, "parameters": [_IDEMPOTENCY_KEY, REQUEST_ID_PARAMETER]},
    )(classify)


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

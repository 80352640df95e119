"""The routes of jobs. ServiceGate checks the key before; API_EXPOSE_JOBS=off answers 404."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Path, Query, Request, Response

from domain.text import counted
from service import errors
from service.access import JOBS
from service.idempotency import KEY_PARAMETER, REPLAYED, idempotency_key
from service.jobs import JobPage, JobRequest, JobService, JobState, PageQuery
from service.openapi import KEY_REQUIRED, documented_errors
from service.routes import require_plain_query

JobId = Annotated[str, Path(pattern="^[0-9a-f]{32}$", description="the id of POST /jobs")]

_READ_ERRORS = documented_errors(*errors.JOB_ERRORS, errors.JOB_NOT_FOUND)
_POST_ERRORS = documented_errors(
    *(*errors.JOB_ERRORS, *errors.BODY_ERRORS, errors.BAD_HEADER, errors.DUPLICATE_ID),
    *(errors.KEY_REUSED, errors.QUEUE_FULL, errors.TOO_MANY_JOBS),
)
_headers = _POST_ERRORS.pop(200)["headers"]
_LOCATION = {"Location": {"schema": {"type": "string"}, "description": "the path of the job"}}
_POST_ERRORS[202] = {"description": "the job is stored", "headers": {**_headers, **_LOCATION, **REPLAYED}}
_REMOVE_ERRORS = {status: answer for status, answer in _READ_ERRORS.items() if status != 200}
_REMOVE_ERRORS[204] = {"description": "the job is removed", "headers": _headers}

jobs = APIRouter(tags=["jobs"])


@jobs.post(
    JOBS,
    status_code=202,
    operation_id="createJob",
    summary="Have conversations labelled in the background",
    response_model=JobState,
    response_model_exclude_none=True,
    responses=_POST_ERRORS,
    openapi_extra={**KEY_REQUIRED, "parameters": [KEY_PARAMETER]},
)
async def create(wanted: JobRequest, request: Request) -> Response:
    """Store the conversations durably. They are labelled when no request waits for the model."""
    service, key = _service(request), idempotency_key(request)
    state, replayed = await service.create(wanted, request.state.caller, key, request.state.deadline)
    request.state.note = f", job {state.job}, {counted(state.total, 'conversation')}" + (
        ", replayed" if replayed else ""
    )
    headers = {"Location": f"{JOBS}/{state.job}", **({"Idempotency-Replayed": "true"} if replayed else {})}
    return Response(state.model_dump_json(exclude_none=True), 202, headers, "application/json")


@jobs.get(
    f"{JOBS}/{{job}}",
    operation_id="readJob",
    summary="Read a job and a page of its results",
    response_model=JobPage,
    response_model_exclude_none=True,
    responses=_READ_ERRORS,
    openapi_extra=KEY_REQUIRED,
    dependencies=[Depends(require_plain_query)],
)
async def read(job: JobId, query: Annotated[PageQuery, Query()], request: Request) -> Response:
    """Return the state of the job, and results in the order of the request. Those with status 202 are not done yet."""
    page = await _service(request).read(job, request.state.caller, query, request.state.deadline)
    request.state.note = f", job {job}"
    return Response(page.model_dump_json(exclude_none=True), media_type="application/json")


@jobs.delete(
    f"{JOBS}/{{job}}",
    status_code=204,
    operation_id="removeJob",
    summary="Stop a job, and remove it with its results",
    responses=_REMOVE_ERRORS,
    openapi_extra=KEY_REQUIRED,
)
async def remove(job: JobId, request: Request) -> Response:
    """Remove the job, its conversations and its results. Calls that are running end, and their labels are dropped."""
    await _service(request).remove(job, request.state.caller, request.state.deadline)
    request.state.note = f", job {job} removed"
    return Response(status_code=204)


def _service(request: Request) -> JobService:
    service: JobService | None = request.state.service.jobs
    if service is None:  # MONGODB_URI cannot be used; the start has logged why
        raise errors.unavailable(errors.STORE_AWAY)
    return service

"""The routes of the review page. ServiceGate checks the key before; API_EXPOSE_REVIEW=off answers 404."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Depends, Request, Response

from error_handler import RequestError
from service import errors
from service.access import DASHBOARD, REVIEW, REVIEW_DECISIONS, REVIEW_SKIP
from service.openapi import KEY_REQUIRED, documented_errors
from service.pages import page_headers, require_own_page
from service.review import ReviewDecision, ReviewSaved, ReviewService, ReviewSkip, ReviewState, ReviewUndone

_PAGE_HEADERS = page_headers()

# POST and DELETE could not come from a page of another site in any case, because JSON and DELETE need a preflight request.
review = APIRouter(tags=["review"], dependencies=[Depends(require_own_page)])
review_page = APIRouter(include_in_schema=False)  # has no conversation; a page of another site may link to it
_GET_ERRORS: dict[int | str, dict[str, Any]] = documented_errors(*errors.REVIEW_ERRORS)
_POST_ERRORS = documented_errors(
    *errors.REVIEW_ERRORS, *errors.BODY_ERRORS, errors.NOT_HELD, errors.INVALID, errors.QUEUE_FULL
)


@review.get(f"{REVIEW}/next", operation_id="reviewNext", responses=_GET_ERRORS, openapi_extra=KEY_REQUIRED)
async def next_conversation(request: Request) -> ReviewState:
    """Return the conversation that the caller holds, or lease the next one: the most doubtful first."""
    return await _service(request).next(request.state.caller, request.state.deadline)


@review.post(REVIEW_DECISIONS, operation_id="reviewDecide", responses=_POST_ERRORS, openapi_extra=KEY_REQUIRED)
async def decide(decision: ReviewDecision, request: Request) -> ReviewSaved:
    """Store the labels that the caller finds right; the result of the model is not changed."""
    await _service(request).decide(request.state.caller, decision, request.state.deadline)
    return ReviewSaved()


@review.post(REVIEW_SKIP, operation_id="reviewSkip", responses=_POST_ERRORS, openapi_extra=KEY_REQUIRED)
async def skip(skipped: ReviewSkip, request: Request) -> ReviewSaved:
    """Give a conversation back undecided; the caller does not get it again until the service restarts."""
    await _service(request).skip(request.state.caller, skipped, request.state.deadline)
    return ReviewSaved()


@review.delete(f"{REVIEW_DECISIONS}/last", operation_id="reviewUndo", responses=_GET_ERRORS, openapi_extra=KEY_REQUIRED)
async def undo(request: Request) -> ReviewUndone:
    """Remove the caller's last decision, and lease its conversation again."""
    return await _service(request).undo(request.state.caller, request.state.deadline)


@review_page.get(REVIEW)
async def page(request: Request) -> Response:
    """Return the page, or the way to its tab if there is a dashboard. Links are relative: a proxy may add a prefix."""
    if request.state.service.dashboard is not None:
        return Response(status_code=303, headers={"Location": f"{DASHBOARD.lstrip('/')}{REVIEW}", **_PAGE_HEADERS})
    return Response(_service(request).page.html, media_type="text/html", headers=_PAGE_HEADERS)


@review_page.get(f"{REVIEW}/page.js")
async def script(request: Request) -> Response:
    """Return the script of the page."""
    return Response(_service(request).page.script, media_type="text/javascript", headers=_PAGE_HEADERS)


@review_page.get(f"{REVIEW}/page.css")
async def style(request: Request) -> Response:
    """Return the style sheet of the page."""
    return Response(_service(request).page.style, media_type="text/css", headers=_PAGE_HEADERS)


def _service(request: Request) -> ReviewService:
    service: ReviewService | None = request.state.service.review
    if service is None:  # the gate has answered 404 already
        raise RequestError(errors.NOT_FOUND)
    return service

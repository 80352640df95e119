"""The tab *Review* of the page ``/dashboard``: the page ``/review`` inside the frame. Its routes are those of /review."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from service.access import DASHBOARD, REVIEW
from service.dashboard_routes import page_response
from service.review import ReviewService

dashboard_review = APIRouter(include_in_schema=False)


@dashboard_review.get(f"{DASHBOARD}{REVIEW}")
async def review_tab(request: Request) -> Response:
    """Return the page with the queue; a hint if API_EXPOSE_REVIEW is ``off``."""
    service: ReviewService | None = request.state.service.review
    return page_response(request, "review", problem="", content=None if service is None else service.page.tab)

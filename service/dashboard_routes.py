"""The files of the page ``/dashboard``, and what the routes of its tabs have in common.

ServiceGate checks the key before; API_EXPOSE_DASHBOARD=off answers 404. The routes are not in the OpenAPI document: they
answer people, and their HTML may change. A POST has no body: what it changes is in its path and query.
"""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request, Response

from error_handler import RequestError
from service import errors
from service.access import DASHBOARD
from service.dashboard import Dashboard
from service.pages import page_headers

PAGE_HEADERS = page_headers(form_action="'self'")
# A form sends the Origin of its page only if the policy allows a referrer.

dashboard = APIRouter(prefix=DASHBOARD, include_in_schema=False)


@dashboard.get("/dashboard.css")
async def style(request: Request) -> Response:
    """Return the style sheet."""
    content = dashboard_of(request).files["dashboard.css"]
    return Response(content, media_type="text/css", headers=PAGE_HEADERS)


@dashboard.get("/dashboard.js")
async def script(request: Request) -> Response:
    """Return the script."""
    content = dashboard_of(request).files["dashboard.js"]
    return Response(content, media_type="text/javascript", headers=PAGE_HEADERS)


def dashboard_of(request: Request) -> Dashboard:
    """Return the parts of the page."""
    found: Dashboard | None = request.state.service.dashboard
    if found is None:  # the gate has answered 404 already
        raise RequestError(errors.NOT_FOUND)
    return found


def page_response(request: Request, tab: str, status: int = 200, **values: Any) -> Response:
    """Return the page with *tab* open; *values* are for its template ``<tab>.html``.

    ``problem`` among the *values* is a sentence that the page shows as an alert.
    """
    html = dashboard_of(request).render(tab, request.url.path, tab=tab, caller=request.state.caller, **values)
    return Response(html, status, media_type="text/html", headers=PAGE_HEADERS)


def back_to(request: Request, path: str = "") -> Response:
    """Return the answer to a POST: a redirect to the tab at *path* after ``/dashboard``. It is relative."""
    up = "../" * (request.url.path.count("/") - 1)
    return Response(status_code=303, headers={"Location": f"{up}{DASHBOARD.lstrip('/')}{path}", **PAGE_HEADERS})
